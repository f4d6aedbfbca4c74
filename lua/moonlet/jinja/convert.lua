--- Turns Lua data into template values. What moonlet.json decodes keeps its order and its types;
--- plain Lua tables are read as moonlet.json would write them.

local json = require("moonlet.json")
local errors = require("moonlet.jinja.errors")
local value = require("moonlet.jinja.value")

local convert = {}

local MAX_DEPTH = 200

local function misuse(path, message)
  errors.raise("ContextError", "the render context: " .. path .. " " .. message)
end

local from_lua

local function from_array(t, path, depth)
  local n = 0
  for key in next, t do
    if math.type(key) ~= "integer" then misuse(path, "mixes list items and named fields") end
    n = n + 1
  end
  if n ~= #t then misuse(path, "is a list with holes") end
  local out = {}
  for i = 1, n do out[i] = from_lua(t[i], path .. "[" .. i .. "]", depth + 1) end
  return value.list(out)
end

local function from_object(t, path, depth)
  local out = value.dict()
  for _, key in ipairs(json.keys(t)) do
    if type(key) ~= "string" then misuse(path, "has a key that is not text") end
    from_lua(key, path, depth)
    value.put(out, key, from_lua(t[key], path .. "." .. key, depth + 1))
  end
  return out
end

function from_lua(x, path, depth)
  local t = type(x)
  if x == json.null then return value.none end
  if t == "string" then
    local ok, at = utf8.len(x)
    if not ok then misuse(path, "is not valid UTF-8 at byte " .. at) end
    return x
  end
  if t == "number" or t == "boolean" then return x end
  if t ~= "table" then misuse(path, "is a " .. t .. ", which a template cannot read") end
  if depth > MAX_DEPTH then misuse(path, "is nested deeper than " .. MAX_DEPTH .. " levels") end
  if json.is_array(x) then return from_array(x, path, depth) end
  return from_object(x, path, depth)
end

--- The variables of a render context: name -> template value.
function convert.context(context)
  if type(context) ~= "table" or json.is_array(context) then
    errors.raise("ContextError", "the render context must be a table of named values")
  end
  local vars = {}
  for name, x in pairs(context) do
    if type(name) ~= "string" then misuse("it", "has a name that is not text") end
    vars[name] = from_lua(x, name, 1)
  end
  return vars
end

return convert
