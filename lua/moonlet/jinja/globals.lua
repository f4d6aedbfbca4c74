--- The functions every template can call by name: those of Jinja's sandbox and those transformers
--- adds for chat templates.

local bind = require("moonlet.jinja.bind")
local errors = require("moonlet.jinja.errors")
local methods = require("moonlet.jinja.methods")
local value = require("moonlet.jinja.value")

--- `globals.names` maps names to values.
local globals = { names = {} }

local raise = errors.raise

--- jinja2/sandbox.py, MAX_RANGE.
local MAX_RANGE = 100000

local function define(name, signature, f)
  globals.names[name] = value.func(name, bind.signature(name, signature, f))
end

define("raise_exception", "message", function(_, message)
  raise("TemplateError", value.str(message))
end)

define("range", "/start /stop? /step?", function(_, start, stop, step)
  start = bind.int(start)
  if stop == nil then
    start, stop = 0, start
  else
    stop = bind.int(stop)
  end
  step = bind.int(step, 1)
  if step == 0 then raise("ValueError", "range() arg 3 must not be zero") end
  local out = value.range(start, stop, step)
  if out.n > MAX_RANGE or out.n < 0 then
    raise("OverflowError", "Range too big. The sandbox blocks ranges larger than MAX_RANGE ("
      .. MAX_RANGE .. ").")
  end
  return out
end)

-- strftime ------------------------------------------------------------------------------------

-- What C99 defines; os.date raises for anything else.
local DATE = "^[aAbBcCdDeFgGhHIjmMnprRStTuUVwWxXyYzZ]$"

local function date_part(flag, kind)
  if kind == "%" then return "%" end
  if kind == "f" then return "000000" end
  if not kind:find(DATE) then return nil end
  local part = os.date("%" .. kind)
  if flag == "-" then return (part:gsub("^[0 ]+(.)", "%1")) end
  return part
end

define("strftime_now", "format", function(_, format)
  return (bind.text(format):gsub("%%([-]?)(.)", date_part))
end)

-- dict and namespace --------------------------------------------------------------------------

--- Python's dict(mapping_or_pairs, **kwargs).
local function new_dict(args, kwargs)
  local out = value.dict()
  if #args > 1 then
    raise("TypeError", "dict expected at most 1 argument, got " .. #args)
  end
  local source = args[1]
  if value.is(source, value.Dict) then
    for i, key in ipairs(source.keys) do value.put(out, key, source.vals[i]) end
  elseif value.is(source, value.Undefined) then -- dict() asks it for its keys
    value.fail_undefined(source)
  elseif source ~= nil then
    for pair in value.iter(source) do
      local items = value.items(pair)
      if #items ~= 2 then
        raise("ValueError", "dictionary update sequence element has length " .. #items
          .. "; 2 is required")
      end
      value.put(out, items[1], items[2])
    end
  end
  for i, key in ipairs(kwargs and kwargs.keys or {}) do value.put(out, key, kwargs.vals[i]) end
  return out
end

local DictClass = value.new_type("TemplateDict")
DictClass.call = function(_, _, args, kwargs) return new_dict(args, kwargs) end
DictClass.attribute = function(_, name)
  if name ~= "fromkeys" then return nil end
  return value.func(name, bind.signature(name, "/iterable /value?", methods.fromkeys))
end
globals.names.dict = setmetatable({}, DictClass)

--- Checks a name that is to be set on a namespace.
function globals.check_namespace_name(name)
  if type(name) == "string" and name:sub(1, 1) == "_" then
    raise("SecurityError", "Chat templates cannot store underscore-prefixed attributes on a"
      .. " namespace, but got " .. value.repr(name) .. ". Please rename the attribute.")
  end
end

define("namespace", "*", function(_, args, kwargs)
  local attrs = new_dict(args, kwargs)
  for _, name in ipairs(attrs.keys) do globals.check_namespace_name(name) end
  return setmetatable({ attrs = attrs }, value.Namespace)
end)

-- cycler, joiner ------------------------------------------------------------------------------

local Cycler = value.new_type("Cycler")
Cycler.attribute = function(self, name)
  if name == "current" then return self.items[self.at] end
  if name == "next" then
    return value.func(name, bind.signature(name, "", function()
      local item = self.items[self.at]
      self.at = self.at % #self.items + 1
      return item
    end))
  elseif name == "reset" then
    return value.func(name, bind.signature(name, "", function()
      self.at = 1
      return value.none
    end))
  end
end

define("cycler", "*", function(_, items)
  if #items == 0 then raise("RuntimeError", "at least one item has to be provided") end
  return setmetatable({ items = items, at = 1 }, Cycler)
end)

local Joiner = value.new_type("Joiner")
Joiner.call = function(self)
  if self.used then return self.separator end
  self.used = true
  return ""
end

define("joiner", "sep?", function(_, separator)
  return setmetatable({ separator = separator == nil and ", " or separator }, Joiner)
end)

define("lipsum", "*", function()
  raise("NotImplementedError", "lipsum is not supported: renderings are reproducible")
end)

return globals
