--- JSON as Python writes it.
--
-- Prompts are rendered from JSON (tool schemas, tool results), and a model saw them as Python's
-- json.dumps spells them, in the order they were written. So objects here remember the order of
-- their keys and arrays and objects stay apart when empty:
--
--   local t = assert(json.decode('{"b": [], "a": {}}'))
--   t.c = 1.0
--   json.encode(t)  --> {"b": [], "a": {}, "c": 1.0}
--
-- An object is an ordinary table: `t.key` reads, `t.key = nil` removes, a new key goes to the end
-- and `pairs` follows the order (`next` does not). Tables without a mark are taken for arrays when
-- they have an element 1 and for objects with sorted keys otherwise.

local core = require "moonlet.core"
local option_table = require "moonlet.options"
local sys = require "moonlet.sys"

local json = {}

--- JSON null: a value of its own, as a table cannot hold nil. It is true in a condition.
json.null = core.json_null

local DEFAULT_DEPTH = 200 -- of decode; deeper than anything that is meant
local MAX_DEPTH = 1000 -- of both; a table nested deeper is taken for a cycle

-- The keys of an object in order; removed ones stay in it and are passed over. It lies outside the
-- object so that `next` and `#` see members only.
local orders = setmetatable({}, { __mode = "k" })
-- orders[object] -> set of its keys; made when an object first gets a new key.
local known_keys = setmetatable({}, { __mode = "k" })

local array_meta = { __name = "json.array" }
local object_meta = { __name = "json.object" }

local function by_spelling(a, b)
  return tostring(a) < tostring(b)
end

local function sorted_keys(t)
  local keys = {}
  for key in next, t do
    keys[#keys + 1] = key
  end
  table.sort(keys, by_spelling)
  return keys
end

function object_meta.__newindex(t, key, value)
  if value == nil then
    return
  end
  local order = orders[t]
  local known = known_keys[order]
  if not known then
    known = {}
    for _, old in ipairs(order) do
      known[old] = true
    end
    known_keys[order] = known
  end
  if known[key] then -- it was removed and comes again, at the end
    for i, old in ipairs(order) do
      if old == key then
        table.remove(order, i)
        break
      end
    end
  end
  known[key] = true
  order[#order + 1] = key
  rawset(t, key, value)
end

function object_meta.__pairs(t)
  local order, i = orders[t], 0
  return function()
    while i < #order do
      i = i + 1
      local key = order[i]
      local value = rawget(t, key)
      if value ~= nil then
        return key, value
      end
    end
  end, t
end

--- Marks a table as an array, so that it stays one when it is empty.
---@param t? table
---@return table # t
function json.array(t)
  t = t or {}
  assert(not orders[t], "the table is a JSON object")
  return setmetatable(t, array_meta)
end

--- Marks a table as an object.
---@param t? table
---@param keys? string[] order of the keys; keys not in it follow, sorted
---@return table # t
function json.object(t, keys)
  t = t or {}
  if getmetatable(t) == object_meta and not keys then
    return t
  end
  local order, seen = {}, {}
  local function append(list)
    for _, key in ipairs(list) do
      if not seen[key] and rawget(t, key) ~= nil then
        seen[key] = true
        order[#order + 1] = key
      end
    end
  end
  append(keys or {})
  append(sorted_keys(t))
  orders[t] = order
  return setmetatable(t, object_meta)
end

--- True for a decoded or marked array and for an unmarked table with an element 1.
---@param value any
---@return boolean
function json.is_array(value)
  if type(value) ~= "table" then
    return false
  end
  local meta = getmetatable(value)
  return meta == array_meta or meta ~= object_meta and rawget(value, 1) ~= nil
end

--- True for every other table.
---@param value any
---@return boolean
function json.is_object(value)
  return type(value) == "table" and not json.is_array(value)
end

--- The keys of an object in their order; sorted for a table without a mark.
---@param object table
---@return string[]
function json.keys(object)
  if getmetatable(object) ~= object_meta then
    return sorted_keys(object)
  end
  local keys = {}
  for key in pairs(object) do
    keys[#keys + 1] = key
  end
  return keys
end

--- How Python spells a float: repr for finite numbers ("1.0", "1e-05"), else NaN, Infinity and
--- -Infinity as json.dumps does.
---@param x number
---@return string
function json.float_repr(x)
  if x ~= x then
    return "NaN"
  elseif x == math.huge or x == -math.huge then
    return x > 0 and "Infinity" or "-Infinity"
  end
  return core.json_float(x)
end

--- A string as encode() spells it.
---@param text string
---@return string
function json.quote(text)
  return core.json_quote(text, false)
end

local DEFAULT_NAME <const> = "JSON"
local DECODE_OPTIONS <const> = { name = "string", max_depth = "integer",
  max_values = "integer", finite = "boolean" }

--- Parses JSON text (RFC 8259, UTF-8, nothing behind the value).
--
-- Integers stay integers and 1.0 stays a float; an integer that needs more than 64 bits becomes a
-- float, and a number beyond all floats is infinite. Of equal keys the last counts, at the place of
-- the first. Half a surrogate pair, which no UTF-8 string can hold, becomes U+FFFD.
---@param text string
---@param options? { name?: string, max_depth?: integer, max_values?: integer, finite?: boolean }
--- name begins error messages ("JSON"); max_depth: levels of arrays and objects (200, at most
--- 1000); max_values: of all of them together (no bound), where arrays, objects and members of
--- these count as four; finite: refuse numbers beyond all floats
---@return any value json.null for null
---@return string? message with the byte offset, counted from 0
---@return string? code "format" or "limit"
function json.decode(text, options)
  local document <close>, message, code = json.parse(text, options)
  if not document then return nil, message, code end
  return json.value(document, options)
end

--- The first half of decode(), for those who have something else to do before the second.
---@param text string
---@param options? table of decode()
---@return userdata? document to be closed
---@return string? message
---@return string? code
function json.parse(text, options)
  options = option_table.check(options, DECODE_OPTIONS)
  return core.json_parse(text, options.name or DEFAULT_NAME, options.max_depth or DEFAULT_DEPTH,
    options.max_values or math.maxinteger)
end

--- The second half: its values.
---@param document userdata
---@param options? table those of parse()
---@return any value
---@return string? message
---@return string? code
function json.value(document, options)
  options = option_table.check(options, DECODE_OPTIONS)
  local value = core.json_value(document, array_meta, object_meta, orders, options.finite or false)
  if value ~= nil then return value end
  return nil, (options.name or DEFAULT_NAME)
    .. ": a number beyond what double precision holds", "format"
end

--- Parses a file.
---@param path string
---@return any value
---@return string? message
---@return string? code
function json.read(path)
  local text, message, code = sys.read_own_file(path)
  if not text then
    return nil, message, code
  end
  return json.decode(text, { name = path })
end

--- Parses a file that holds an object.
---@param path string
---@return table? object
---@return string? message
---@return string? code
function json.read_object(path)
  local object, message, code = json.read(path)
  if object == nil then
    return nil, message, code
  elseif not json.is_object(object) then
    return nil, path .. ": an object is expected", "format"
  end
  return object
end

local encode_value

-- What stands in front of item i, and behind the last one.
local function gaps(style, depth)
  local indent = style.indent and "\n" .. style.indent:rep(depth) or ""
  return indent, style.item .. indent, style.indent and "\n" .. style.indent:rep(depth - 1) or ""
end

local function encode_array(out, t, style, depth)
  local n = #t
  for key in next, t do
    if math.type(key) ~= "integer" or key < 1 or key > n then
      error(("cannot encode an array with key '%s'"):format(tostring(key)), 0)
    end
  end
  if n == 0 then
    out[#out + 1] = "[]"
    return
  end
  local first, between, last = gaps(style, depth)
  for i = 1, n do
    if t[i] == nil then
      error(("cannot encode an array without element %d"):format(i), 0)
    end
    out[#out + 1] = i == 1 and "[" .. first or between
    encode_value(out, t[i], style, depth)
  end
  out[#out + 1] = last .. "]"
end

local function encode_object(out, t, style, depth)
  local keys = style.sort_keys and sorted_keys(t) or json.keys(t)
  if #keys == 0 then
    out[#out + 1] = "{}"
    return
  end
  local first, between, last = gaps(style, depth)
  for i, key in ipairs(keys) do
    if type(key) ~= "string" then
      error(("cannot encode an object with key '%s'"):format(tostring(key)), 0)
    end
    out[#out + 1] = i == 1 and "{" .. first or between
    out[#out + 1] = core.json_quote(key, style.ensure_ascii)
    out[#out + 1] = style.colon
    encode_value(out, t[key], style, depth)
  end
  out[#out + 1] = last .. "}"
end

local function encode_number(x, style)
  if math.type(x) == "integer" then
    return ("%d"):format(x)
  elseif not style.allow_nan and (x ~= x or x == math.huge or x == -math.huge) then
    error("cannot encode " .. json.float_repr(x), 0)
  end
  return json.float_repr(x)
end

function encode_value(out, value, style, depth)
  local kind = type(value)
  if kind == "string" then
    out[#out + 1] = core.json_quote(value, style.ensure_ascii)
  elseif kind == "number" then
    out[#out + 1] = encode_number(value, style)
  elseif kind == "boolean" then
    out[#out + 1] = tostring(value)
  elseif value == nil or value == json.null then
    out[#out + 1] = "null"
  elseif kind ~= "table" then
    error("cannot encode a " .. kind, 0)
  elseif depth == MAX_DEPTH then
    error(("cannot encode more than %d levels (a cycle?)"):format(MAX_DEPTH), 0)
  elseif json.is_array(value) then
    encode_array(out, value, style, depth + 1)
  else
    encode_object(out, value, style, depth + 1)
  end
end

local ENCODE_OPTIONS <const> = { indent = "any", separators = "table", sort_keys = "boolean",
  ensure_ascii = "boolean", allow_nan = "boolean" }

---@class json.encode_options
---@field indent? integer|string spaces (or the text) per level; one member per line
---@field separators? string[] { between items, behind keys }; default { ", ", ": " }, and
--- { ",", ": " } with indent
---@field sort_keys? boolean
---@field ensure_ascii? boolean escape everything outside ASCII
---@field allow_nan? boolean spell NaN, Infinity and -Infinity, which are not JSON

--- Spells a value byte for byte as Python's json.dumps(value, ensure_ascii=False, ...) does.
--
-- nil is null. Bytes that are not UTF-8 become U+FFFD, so the text is always valid. What JSON
-- cannot hold (functions, arrays with holes, keys that are no strings, NaN without allow_nan,
-- cycles) is a mistake of the program and raises.
---@param value any
---@param options? json.encode_options
---@return string
function json.encode(value, options)
  options = option_table.check(options, ENCODE_OPTIONS)
  local indent = options.indent
  if math.type(indent) == "integer" then
    indent = (" "):rep(indent)
  end
  local separators = options.separators or { indent and "," or ", ", ": " }
  local out = {}
  local ok, message = pcall(encode_value, out, value, {
    indent = indent,
    item = separators[1],
    colon = separators[2],
    sort_keys = options.sort_keys or false,
    ensure_ascii = options.ensure_ascii or false,
    allow_nan = options.allow_nan or false,
  }, 0)
  if not ok then
    option_table.misuse(message)
  end
  return table.concat(out)
end

return json
