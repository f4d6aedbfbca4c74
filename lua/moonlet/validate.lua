--- Whether a value is what a JSON schema asks for.
---
--- The keywords that say something about types, members and bounds; "pattern", "format" and what
--- else is not known are not checked, as the standard has it for unknown keywords.

local json = require "moonlet.json"
local schema = require "moonlet.schema"

local validate = {}

local MAX_DEPTH <const> = 50

local function shown(value)
  local text = json.encode(value)
  return #text <= 60 and text or text:sub(1, 57):gsub("[\xC0-\xFF][\x80-\xBF]*$", "") .. "..."
end

local function fits_type(kind, name)
  return kind == name or name == "number" and kind == "integer"
end

-- Each check: value, keyword's value, schema, context -> nothing, or what is wrong at which place.
local checks, ORDER = {}, {}
local check

local function keyword(name, fn)
  ORDER[#ORDER + 1] = name
  checks[name] = fn
end

keyword("type", function(value, wanted)
  local kind = schema.type_of(value)
  local list = type(wanted) == "table" and wanted or { wanted }
  for _, name in ipairs(list) do
    if fits_type(kind, name) then return end
    if name == "integer" and kind == "number" and math.tointeger(value) then return end
  end
  return ("%s expected, got %s"):format(table.concat(list, " or "), shown(value))
end)

keyword("enum", function(value, wanted)
  local names = {}
  for i, one in ipairs(wanted) do
    names[i] = json.encode(one, { sort_keys = true })
    if names[i] == json.encode(value, { sort_keys = true }) then return end
  end
  return ("one of %s expected, got %s"):format(table.concat(names, ", "), shown(value))
end)

keyword("const", function(value, wanted)
  return checks.enum(value, { wanted })
end)

local function bound(name, of, fails, text)
  keyword(name, function(value, limit)
    local n = of(value)
    if type(n) == "number" and type(limit) == "number" and fails(n, limit) then
      return text:format(limit)
    end
  end)
end

local function number_of(value) return type(value) == "number" and value end
local function length_of(value) return type(value) == "string" and (utf8.len(value) or #value) end
local function count_of(value) return json.is_array(value) and #value end
local function below(n, limit) return n < limit end
local function above(n, limit) return n > limit end

bound("minimum", number_of, below, "at least %s expected")
bound("maximum", number_of, above, "at most %s expected")
bound("exclusiveMinimum", number_of, function(n, m) return n <= m end, "more than %s expected")
bound("exclusiveMaximum", number_of, function(n, m) return n >= m end, "less than %s expected")
bound("minLength", length_of, below, "a text of at least %d characters expected")
bound("maxLength", length_of, above, "a text of at most %d characters expected")
bound("minItems", count_of, below, "at least %d items expected")
bound("maxItems", count_of, above, "at most %d items expected")

keyword("required", function(value, names)
  if not json.is_object(value) then return end
  for _, name in ipairs(names) do
    if value[name] == nil then return "is missing", "." .. name end
  end
end)

keyword("properties", function(value, properties, _, context)
  if not json.is_object(value) then return end
  for _, name in ipairs(json.keys(value)) do
    local wrong, place
    if properties[name] ~= nil then wrong, place = check(value[name], properties[name], context) end
    if wrong then return wrong, "." .. name .. place end
  end
end)

keyword("additionalProperties", function(value, wanted, node, context)
  if not json.is_object(value) then return end
  for _, name in ipairs(json.keys(value)) do
    if not (type(node.properties) == "table" and node.properties[name] ~= nil) then
      if wanted == false then return "is not expected", "." .. name end
      local wrong, place = check(value[name], wanted, context)
      if wrong then return wrong, "." .. name .. place end
    end
  end
end)

keyword("items", function(value, wanted, _, context)
  if not json.is_array(value) then return end
  for i, item in ipairs(value) do
    local wrong, place = check(item, wanted, context)
    if wrong then return wrong, ("[%d]%s"):format(i - 1, place) end
  end
end)

keyword("allOf", function(value, branches, _, context)
  for _, branch in ipairs(branches) do
    local wrong, place = check(value, branch, context)
    if wrong then return wrong, place end
  end
end)

-- When no branch fits, the first one's complaint stands: the others mostly say "or null".
keyword("anyOf", function(value, branches, _, context)
  local first, place
  for _, branch in ipairs(branches) do
    local wrong, at = check(value, branch, context)
    if not wrong then return end
    first, place = first or wrong, place or at
  end
  return first, place
end)

keyword("oneOf", function(value, branches, _, context)
  local n = 0
  for _, branch in ipairs(branches) do
    if not check(value, branch, context) then n = n + 1 end
  end
  if n == 0 then return checks.anyOf(value, branches, nil, context) end
  if n > 1 then return "fits several of the forms that exclude each other" end
end)

keyword("not", function(value, branch, _, context)
  if not check(value, branch, context) then return "is what is ruled out" end
end)

local LISTS <const> = { enum = true, required = true, allOf = true, anyOf = true, oneOf = true }

-- What is wrong and where below; nothing when the value fits. A schema that is itself damaged asks
-- for nothing there: tools of others are not ours to refuse.
function check(value, node, context)
  if node == false then return "nothing is allowed here", "" end
  if type(node) ~= "table" or context.depth > MAX_DEPTH then return nil end
  node = schema.resolve(node, context.root)
  context.depth = context.depth + 1
  local wrong, place
  for _, name in ipairs(ORDER) do
    local wanted = node[name]
    if wanted ~= nil and not (LISTS[name] and type(wanted) ~= "table")
      and not (name == "properties" and type(wanted) ~= "table") then
      wrong, place = checks[name](value, wanted, node, context)
      if wrong then break end
    end
  end
  context.depth = context.depth - 1
  return wrong, place or ""
end

---@param value any as moonlet.json has values
---@param node table|boolean a schema
---@param name string of the value, for messages: "arguments"
---@return boolean? ok
---@return string? message "arguments.path: string expected, got 3"
---@return string? code "format"
function validate.check(value, node, name)
  local wrong, place = check(value, node, { root = node, depth = 0 })
  if not wrong then return true end
  return nil, ("%s%s: %s"):format(name, place, wrong), "format"
end

return validate
