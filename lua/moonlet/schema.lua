--- What a JSON schema says about the type of a value that arrives as text.
---
--- Qwen's tool calls carry every parameter as bare text; which of them are numbers, booleans or
--- objects only the tool's schema tells. The rules are those of vLLM's qwen3_coder parser
--- (coerce_to_schema_type): the types a schema admits are tried in one fixed order, the first that
--- the text can be read as wins, and what fits nothing stays the text it was. A parameter that is
--- only ever a string is verbatim.

local json = require "moonlet.json"
local literal = require "moonlet.literal"
local trim = require "moonlet.trim"

local schema = {}

local MAX_DEPTH <const> = 20

---The schema that a local "$ref" points to, or the schema itself.
---@param node table
---@param root table
---@return table
function schema.resolve(node, root)
  for _ = 1, MAX_DEPTH do
    local ref = type(node) == "table" and node["$ref"]
    if type(ref) ~= "string" or ref:sub(1, 2) ~= "#/" then break end
    local target = root
    for step in ref:sub(3):gmatch("[^/]+") do
      step = step:gsub("~1", "/"):gsub("~0", "~")
      target = type(target) == "table" and target[step] or nil
    end
    node = target
  end
  return type(node) == "table" and node or {}
end

---The schema's name for the type of a value.
---@return string
function schema.type_of(value)
  if value == json.null then return "null" end
  if json.is_array(value) then return "array" end
  local kind = type(value)
  if kind == "table" then return "object" end
  if kind == "number" then return math.type(value) == "integer" and "integer" or "number" end
  return kind
end

local function add_types(node, root, set, seen)
  node = schema.resolve(node, root)
  if seen[node] then return end
  seen[node] = true
  local declared = node.type
  if type(declared) == "string" then declared = { declared } end
  for _, name in ipairs(type(declared) == "table" and declared or {}) do set[name] = true end
  for _, value in ipairs(type(node.enum) == "table" and node.enum or {}) do
    set[schema.type_of(value)] = true
  end
  if node.const ~= nil then set[schema.type_of(node.const)] = true end
  for _, key in ipairs { "anyOf", "oneOf", "allOf" } do
    for _, branch in ipairs(type(node[key]) == "table" and node[key] or {}) do
      add_types(branch, root, set, seen)
    end
  end
end

---The types a schema admits, as a set of names; empty when it does not say.
---@param node table a schema
---@param root table? the schema that "$ref" is relative to
---@return table<string, boolean>
function schema.types(node, root)
  local set = {}
  add_types(node, root or node, set, {})
  return set
end

-- ---- text to value -----------------------------------------------------------------------------

-- Each reader returns whether it could, and the value.
local readers = {}

readers["null"] = function(text)
  text = trim.both(text):lower()
  return text == "null" or text == "none", json.null
end

function readers.integer(text)
  text = trim.both(text)
  local value = text:find("^[+-]?%d") and tonumber(text)
  local whole = value and math.tointeger(value)
  if whole and not text:find("[xX]") then return true, whole end
  return false
end

function readers.number(text)
  text = trim.both(text)
  local value = text:find("^[+-]?[%d.]") and not text:find("[xX]") and tonumber(text)
  if not value or value ~= value or value == math.huge or value == -math.huge then return false end
  return true, math.tointeger(value) or value
end

local BOOLEANS = { ["true"] = true, ["1"] = true, ["false"] = false, ["0"] = false }

function readers.boolean(text)
  local value = BOOLEANS[trim.both(text):lower()]
  return value ~= nil, value
end

-- A JSON string that holds the JSON meant is read twice.
local function structure(text, kind)
  local ok, value = literal.read(text)
  if ok and type(value) == "string" then ok, value = literal.read(value) end
  return ok and schema.type_of(value) == kind, value
end

function readers.array(text) return structure(text, "array") end

function readers.object(text) return structure(text, "object") end

function readers.string(text) return true, text end

-- "string" comes last as anything is one.
local ORDER = { "null", "integer", "number", "boolean", "object", "array", "string" }

-- What a coercion knows of schemas it has met: { root =, met = schema -> { node =, types = } }. An
-- array's schema is met at each of its members.
local function look_up(known, given)
  local entry = known.met[given]
  if not entry then
    entry = { node = schema.resolve(given, known.root), types = schema.types(given, known.root) }
    known.met[given] = entry
  end
  return entry
end

local coerce

-- The members of a value that was read as a whole: a string where the schema has no string.
local function coerce_members(value, node, known, depth)
  if depth > MAX_DEPTH then return value end
  node = look_up(known, node).node
  local function member(child, child_node)
    if type(child) == "string" and type(child_node) == "table" then
      return coerce(child, child_node, known, depth + 1)
    end
    if type(child) == "table" and child ~= json.null and type(child_node) == "table" then
      return coerce_members(child, child_node, known, depth + 1)
    end
    return child
  end
  if json.is_array(value) then
    for i, child in ipairs(value) do value[i] = member(child, node.items) end
  else
    local properties = type(node.properties) == "table" and node.properties or {}
    for _, key in ipairs(json.keys(value)) do
      value[key] = member(value[key], properties[key])
    end
  end
  return value
end

function coerce(text, node, known, depth)
  local types = look_up(known, node).types
  if next(types) == nil then return text end
  for _, name in ipairs(ORDER) do
    if types[name] then
      local ok, value = readers[name](text)
      if ok and (name == "array" or name == "object") then
        value = coerce_members(value, node, known, depth)
      end
      if ok then return value end
    end
  end
  local ok, value = literal.read(text)
  if ok then return value end
  return text
end

---The value that a text stands for under a schema. Never fails: what fits no type the schema
---admits is read as JSON if it is some, and else stays text.
---@param text string
---@param node table? a schema; nil leaves the text alone
---@param root table? the schema that "$ref" is relative to
---@return any value as moonlet.json has them: json.null, marked arrays and objects
function schema.coerce(text, node, root)
  if type(node) ~= "table" then return text end
  return coerce(text, node, { root = root or node, met = {} }, 0)
end

return schema
