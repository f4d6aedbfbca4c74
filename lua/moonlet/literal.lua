--- Values as models write them when they mean JSON: JSON itself, and Python's spelling of it.
---
---   literal.read("{'path': 'a.c', 'all': True, 'depth': None,}")
---
--- Qwen models answer a schema's arrays and objects with Python literals now and then: single
--- quotes, True, False and None, tuples, a comma before the closing bracket.

local json = require "moonlet.json"

local literal = {}

local MAX_DEPTH <const> = 100

local ESCAPES = { a = "\a", b = "\b", f = "\f", n = "\n", r = "\r", t = "\t", v = "\v",
  ["\\"] = "\\", ["'"] = "'", ['"'] = '"', ["/"] = "/", ["\n"] = "" }
local HEX_DIGITS = { x = 2, u = 4, U = 8 }
local WORDS = { True = true, False = false, None = json.null,
  ["true"] = true, ["false"] = false, null = json.null }
local CLOSING = { ["["] = "]", ["("] = ")" }

-- Each reader takes the text and a position and returns the value and the position behind it; no
-- position when the text is no literal.
local value_at

local function skip_space(text, at)
  return text:match("^%s*()", at)
end

-- The character of an escape at `at`, which is behind the backslash.
local function escape_at(text, at)
  local letter = text:sub(at, at)
  if ESCAPES[letter] then return ESCAPES[letter], at + 1 end
  local digits = HEX_DIGITS[letter]
  if not digits then return "\\" .. letter, at + 1 end -- Python keeps unknown ones
  local hex = text:match("^" .. ("%x"):rep(digits), at + 1)
  if not hex then return nil end
  local code, behind = tonumber(hex, 16), at + 1 + digits
  if code >= 0xD800 and code < 0xDC00 then
    local low = text:match("^\\u(%x%x%x%x)", behind)
    low = low and tonumber(low, 16)
    if not low or low < 0xDC00 or low > 0xDFFF then return nil end
    code, behind = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00), behind + 6
  end
  if code > 0x10FFFF or code >= 0xD800 and code < 0xE000 then return nil end
  return utf8.char(code), behind
end

local function string_at(text, at, quote)
  local parts = {}
  at = at + 1
  while true do
    local stop = text:find("[\\" .. quote .. "]", at)
    if not stop then return nil end
    parts[#parts + 1] = text:sub(at, stop - 1)
    if text:sub(stop, stop) == quote then return table.concat(parts), stop + 1 end
    parts[#parts + 1], at = escape_at(text, stop + 1)
    if not at then return nil end
  end
end

local function number_at(text, at)
  local word, behind = text:match("^([+-]?[%d.][%w.+-]*)()", at)
  if not word or word:find("^[+-]?0[xX]") then return nil end
  local value = tonumber(word)
  if not value or value ~= value or value == math.huge or value == -math.huge then return nil end
  return value, behind
end

local function list_at(text, at, close, depth)
  local list = json.array {}
  at = skip_space(text, at + 1)
  while text:sub(at, at) ~= close do
    local value
    value, at = value_at(text, at, depth)
    if not at then return nil end
    list[#list + 1] = value
    at = skip_space(text, at)
    if text:sub(at, at) == "," then
      at = skip_space(text, at + 1)
    elseif text:sub(at, at) ~= close then
      return nil
    end
  end
  return list, at + 1
end

local function object_at(text, at, depth)
  local object = json.object {}
  at = skip_space(text, at + 1)
  while text:sub(at, at) ~= "}" do
    local key, value
    local quote = text:match("^['\"]", at)
    if not quote then return nil end
    key, at = string_at(text, at, quote)
    at = at and text:match("^%s*:%s*()", at)
    if not at then return nil end
    value, at = value_at(text, at, depth)
    if not at then return nil end
    object[key] = value
    at = skip_space(text, at)
    if text:sub(at, at) == "," then
      at = skip_space(text, at + 1)
    elseif text:sub(at, at) ~= "}" then
      return nil
    end
  end
  return object, at + 1
end

function value_at(text, at, depth)
  if depth > MAX_DEPTH then return nil end
  local first = text:sub(at, at)
  if first == "{" then return object_at(text, at, depth + 1) end
  if CLOSING[first] then return list_at(text, at, CLOSING[first], depth + 1) end
  if first == "'" or first == '"' then return string_at(text, at, first) end
  local word, behind = text:match("^(%a+)()", at)
  if word then
    if WORDS[word] == nil then return nil end
    return WORDS[word], behind
  end
  return number_at(text, at)
end

-- JSON's grammar has numbers that no float holds; what came of them could not be written again.
local function is_finite(value)
  if type(value) == "number" then return value > -math.huge and value < math.huge end
  if type(value) == "table" then
    for _, child in pairs(value) do
      if not is_finite(child) then return false end
    end
  end
  return true
end

---The value that a text spells, in JSON or else as a Python literal. Nothing may stand around it
---but white space.
---@param text string
---@return boolean ok
---@return any value json.null for null and None
function literal.read(text)
  local value, message = json.decode(text)
  if message == nil and value ~= nil then return is_finite(value), value end
  local at
  value, at = value_at(text, skip_space(text, 1), 0)
  if not at or skip_space(text, at) <= #text then return false end
  return true, value
end

return literal
