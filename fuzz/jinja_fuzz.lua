--- Mutates the golden Jinja templates and renders what comes out.
---
---   lua5.4 fuzz/jinja_fuzz.lua [SECONDS [SEED]]    from the root of the source tree, after a build
---
--- Every result must be a text or one clear line with the code "template", within a bound of time
--- and memory; a Lua error that shows through is a finding. Prints the template and exits 1.
--- The seed decides which templates are tried, the seconds how many of them.

package.path = "./lua/?.lua;./lua/?/init.lua;" .. package.path
package.cpath = "./build/?.so;" .. package.cpath

local jinja = require "moonlet.jinja"
local json = require "moonlet.json"

local MAX_SECONDS = 20
local MAX_KILOBYTES = 1024 * 1024

local PIECES = { "{{", "}}", "{%", "%}", "{#", "#}", "-", "+", "{%- ", " -%}", "(", ")", "[", "]",
  "{", "}", "|", "~", "**", "//", "%", "*", "==", "<", " in ", " is ", " not ", " if ", " else ",
  "{% endif %}", "{% endfor %}", "{% for x in y %}", "{% set x = ", "{% macro f(a) %}", "f(f)",
  "{% endmacro %}", "loop", "loop(x)", "range(99999)", "'a' * 99999", "[0] * 99999", "1e308",
  "9223372036854775807", "-1", "|join", "|sort", "|tojson", "|batch(9)", "|map('f')", "|e",
  "|indent(99999)", "|center(99999)", "'%99999d'", "'{:99999}'.format", "\0", "\xff", "é", "\n",
  "'", '"', "\\", "namespace(x=1)", "x.x.x", "_", ".", ",", ":", "=", "recursive", "raw", "endraw" }

local function read_corpus()
  local corpus = {}
  for line in io.lines("spec/golden/jinja/cases.jsonl") do
    local case = assert(json.decode(line))
    corpus[#corpus + 1] = { template = case.template, context = case.context }
  end
  return corpus
end

local function cut(s)
  local i = math.random(0, #s)
  return s:sub(1, i), s:sub(i + 1)
end

local MUTATIONS = {
  function(s)
    local head, tail = cut(s)
    return head .. PIECES[math.random(#PIECES)] .. tail
  end,
  function(s)
    local head, tail = cut(s)
    return head .. tail:sub(math.random(1, 8))
  end,
  function(s)
    local head, tail = cut(s)
    local part = tail:sub(1, math.random(1, 20))
    return head .. part:rep(math.random(2, 5)) .. tail
  end,
  function(s)
    local head, tail = cut(s)
    return head .. string.char(math.random(0, 255)) .. tail:sub(2)
  end,
  function(s, other)
    local head = cut(s)
    local _, tail = cut(other)
    return head .. tail
  end,
  function(s)
    local open, close = table.unpack(({ { "(", ")" }, { "[", "]" }, { "-", "" },
      { "{% if x %}", "{% endif %}" }, { "not ", "" } })[math.random(5)])
    local head, tail = cut(s)
    local n = math.random(1, 300)
    return head .. open:rep(n) .. close:rep(n) .. tail
  end,
}

local function mutate(s, corpus)
  for _ = 1, math.random(1, 4) do
    s = MUTATIONS[math.random(#MUTATIONS)](s, corpus[math.random(#corpus)].template)
  end
  return s
end

--- Why a result is not allowed, or nil.
local function complaint(text, message, code, detail)
  if type(text) == "string" then return nil end
  if text ~= nil or code ~= "template" or type(message) ~= "string" then return "wrong results" end
  if message:find("%.lua:%d+:") or message:find("attempt to ", 1, true) then return message end
  if detail.kind ~= "TemplateError" and message:find("\n", 1, true) then return "several lines" end
end

local function try(template, context)
  local start = os.clock()
  local compiled, message, code, detail = jinja.compile(template)
  local text
  if compiled then text, message, code, detail = compiled:render(context) end
  local why = complaint(compiled and text, message, code, detail)
  local seconds = os.clock() - start
  if seconds > MAX_SECONDS then why = ("took %.1f s"):format(seconds) end
  if collectgarbage("count") > MAX_KILOBYTES then
    collectgarbage()
    if collectgarbage("count") > MAX_KILOBYTES then why = "holds too much memory" end
  end
  return why
end

local seconds, seed = tonumber(arg[1] or 10), tonumber(arg[2] or 1)
math.randomseed(seed)
local corpus, count = read_corpus(), 0
while os.clock() < seconds do
  count = count + 1
  local case = corpus[math.random(#corpus)]
  local template = mutate(case.template, corpus)
  local why = try(template, case.context)
  if why then
    io.stderr:write(("seed %d, round %d: %s\n%s\n"):format(seed, count, why,
      json.encode(template)))
    os.exit(1)
  end
end
print(("%d templates, seed %d: nothing found"):format(count, seed))
