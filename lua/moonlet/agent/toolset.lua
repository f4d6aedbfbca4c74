--- The tools of an agent: own ones, checked before anything runs, and built-in ones.

local failure = require "moonlet.agent.failure"
local json = require "moonlet.json"
local options = require "moonlet.options"
local tools = require "moonlet.tools"
local validate = require "moonlet.validate"

local toolset = {}

local MAX_NAME <const> = 128
local FIELDS <const> = { description = "string", run = "function", ask = "boolean",
  parallel = "boolean", parameters = "table" }

-- What templates, the reading of calls and the check of arguments rely on.
local TEXTS <const> = { type = "array", items = { type = "string" } }
local NO_TEXTS <const> = { type = "object", additionalProperties = false } -- {} of plain Lua
local SCHEMA <const> = { type = "object", properties = {
  type = { enum = { "object" } },
  properties = { type = "object", additionalProperties = { type = { "object", "boolean" } } },
  required = { anyOf = { TEXTS, NO_TEXTS } },
} }

local function check_name(name, place)
  if type(name) ~= "string" then
    options.misuse(("%s: name: a text expected, got %s"):format(place, type(name)))
  end
  if not name:find("^[%w_.:/-]+$") or #name > MAX_NAME then
    options.misuse(("%s: name: %d letters, digits and _ . : / - at most expected, got %q"):format(
      place, MAX_NAME, name))
  end
end

local function check_parameters(parameters, place)
  local encoded, text = pcall(json.encode, parameters)
  if not encoded then
    text = tostring(text)
    options.misuse(("%s: parameters: a JSON schema expected: %s"):format(place,
      text:match("cannot encode.*") or text))
  end
  local ok, message = validate.check(json.decode(text), SCHEMA, "parameters")
  if not ok then options.misuse(("%s: no JSON schema: %s"):format(place, message)) end
end

local function check_own(tool, i)
  local place = ("tool %d"):format(i)
  if type(tool) ~= "table" then
    options.misuse(place .. ": a name, or a table with name and run expected")
  end
  check_name(tool.name, place)
  place = ("tool '%s'"):format(tool.name)
  for field, kind in pairs(FIELDS) do
    local value = tool[field]
    if type(value) ~= kind and (value ~= nil or field == "run") then
      options.misuse(("%s: %s: %s expected, got %s"):format(place, field, kind, type(value)))
    end
  end
  local seconds = tool.seconds
  if seconds and not (type(seconds) == "number" and seconds > 0) then
    options.misuse(place .. ": seconds: a number above 0, or false, expected")
  end
  if tool.parameters then check_parameters(tool.parameters, place) end
  return tool
end

---@param given (string|moonlet.Tool)[]?
---@param dir string? of built-in tools
---@return { by_name: table<string, moonlet.Tool>, names: string[], declared: table? } set in the
---  order given; `declared` is what templates are told of them
function toolset.open(given, dir)
  local set, declared = { by_name = {}, names = {} }, json.array {}
  for i, one in ipairs(given or {}) do
    local tool = type(one) == "string" and failure.check(tools.list({ one }, dir))[1]
      or check_own(one, i)
    if set.by_name[tool.name] then
      options.misuse(("tool %d: there are two of the name '%s'"):format(i, tool.name))
    end
    set.by_name[tool.name], set.names[i] = tool, tool.name
    declared[i] = json.object({ type = "function", ["function"] = json.object({ name = tool.name,
      description = tool.description, parameters = tool.parameters },
      { "name", "description", "parameters" }) }, { "type", "function" })
  end
  set.declared = #declared > 0 and declared or nil
  return set
end

return toolset
