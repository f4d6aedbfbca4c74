--- Jinja templates as chat templates use them: Jinja2 3.1 in the environment that transformers
--- builds (immutable sandbox, trim_blocks, lstrip_blocks, no autoescape, break and continue,
--- generation blocks, a plain JSON `tojson`, raise_exception, strftime_now).
---
---   local template = assert(jinja.compile("Hello {{ name }}!"))
---   print(template:render({ name = "you" }))
---
--- Not supported, and refused by name: integers beyond 64 bits, \N{...} escapes, the filters
--- `random` and `urlize`, `lipsum`, and loading other templates.

local access = require("moonlet.jinja.access")
local constant = require("moonlet.jinja.constant")
local convert = require("moonlet.jinja.convert")
local errors = require("moonlet.jinja.errors")
local exec = require("moonlet.jinja.exec")
local filters = require("moonlet.jinja.filters")
local globals = require("moonlet.jinja.globals")
local operators = require("moonlet.jinja.operators")
local options = require("moonlet.options")
local parser = require("moonlet.jinja.parser")
local scope = require("moonlet.jinja.scope")
local tests = require("moonlet.jinja.tests")
local value = require("moonlet.jinja.value")

local jinja = {}

--- How deep macros and recursive loops may call each other, and how many steps one rendering may
--- take: a round of a loop, a call, an item looked at, 32 bytes gone through. A prompt of a
--- thousand messages takes some ten thousand; the limit takes some ten seconds.
local MAX_CALLS = 200
local MAX_STEPS = 20 * 1000 * 1000

-- The render in progress ----------------------------------------------------------------------

local Runtime = { access = access, filters = filters, tests = tests }
Runtime.__index = Runtime

function Runtime:emit(s)
  local out = self.out
  out.bytes = out.bytes + #s
  if out.bytes > value.MAX_BYTES then value.check_bytes(out.bytes) end
  out[#out + 1] = s
end

function Runtime:charge(n)
  self.steps = self.steps + n
  if self.steps > self.max_steps then
    errors.raise("RuntimeError", ("template takes too long: the limit is %d steps"):format(
      self.max_steps))
  end
end

--- Calls f one level deeper.
function Runtime:nested(f)
  self.calls = self.calls + 1
  if self.calls > MAX_CALLS then
    errors.raise("RecursionError", "macros are nested deeper than " .. MAX_CALLS .. " calls")
  end
  local result = f()
  self.calls = self.calls - 1
  return result
end

--- Calls any callable value.
function Runtime:call(callee, args, kwargs)
  self:charge(1)
  local mt = type(callee) == "table" and callee ~= value.none and getmetatable(callee)
  if mt == value.Function then return callee.call(self, args, kwargs) end
  if mt == value.Undefined then value.fail_undefined(callee) end
  if mt and mt.call then return mt.call(callee, self, args, kwargs) end
  errors.raise("TypeError", "'" .. value.typename(callee) .. "' object is not callable")
end

function Runtime:binary(op, a, b)
  local result = operators.binary(op, a, b)
  if type(result) ~= "number" then self:charge(value.cost(result)) end
  return result
end

function Runtime:contains(container, item)
  return operators.contains(container, item, function(n) self:charge(n) end)
end

-- Errors --------------------------------------------------------------------------------------

--- White space that holds line ends becomes one blank.
local function one_line(message)
  return (message:gsub("%s+", function(run) return run:find("[\r\n]") and " " or nil end))
end

--- What a failed pcall of the renderer means, as the results of compile and render.
local function failure(name, e, line)
  if not errors.is_failure(e) then
    local message = tostring(e)
    if message:find("stack overflow", 1, true) then message = "nested too deeply" end
    e = { kind = "RuntimeError", message = message }
  end
  line = e.line or line
  local message = e.message
  -- The text of raise_exception is the template's own word to the user and stays as it is.
  if e.kind ~= "TemplateError" then
    message = ("%s:%d: %s"):format(name, line, one_line(message))
  end
  return nil, message, "template", { kind = e.kind, message = e.message, line = line }
end

-- Templates -----------------------------------------------------------------------------------

---@class moonlet.jinja.Template
local Template = {}
Template.__index = Template

--- Renders the template. `context` holds its variables: a plain table or an object of moonlet.json;
--- json.null is None, an absent field is undefined.
---@param context? table
---@return string|nil text
---@return string|nil message one line; the bare message of raise_exception
---@return string|nil code "template"
---@return table|nil detail {kind = Python exception name, message, line}
function Template:render(context)
  if context ~= nil and type(context) ~= "table" then
    options.misuse("render: a table of variables expected, got " .. type(context))
  end
  local rt = setmetatable({ out = { bytes = 0 }, line = 1, calls = 0, steps = 0,
    max_steps = self.max_steps, autoescape = false }, Runtime)
  local ok, e = pcall(function()
    local vars = convert.context(context or {})
    exec.template(rt, self.tree, { vars = vars, parent = { vars = globals.names } })
  end)
  if not ok then return failure(self.name, e, rt.line) end
  return table.concat(rt.out)
end

--- Compiles a template.
---@param source string UTF-8
---@param given? {name?: string, max_steps?: integer} name: what messages begin with ("template");
--- max_steps: how long a rendering may take (20,000,000)
---@return moonlet.jinja.Template|nil template
---@return string|nil message
---@return string|nil code "template"
---@return table|nil detail
function jinja.compile(source, given)
  if type(source) ~= "string" then options.misuse("jinja.compile: source must be a string") end
  given = options.check(given, { name = "string", max_steps = "integer" })
  local name = given.name or "template"
  local valid, at = utf8.len(source)
  if not valid then
    return failure(name, errors.new("UnicodeDecodeError", "not valid UTF-8 at byte " .. at), 1)
  end
  local ok, result = pcall(function()
    local tree = parser.parse(source)
    scope.analyse(tree, filters, tests)
    constant.mark(tree)
    return tree
  end)
  if not ok then return failure(name, result, 1) end
  return setmetatable({ tree = result, name = name,
    max_steps = given.max_steps or MAX_STEPS }, Template)
end

return jinja
