--- The tags of Qwen3.5 / Qwen3.6 output: recognised in text that may still be growing.
---
--- `<think>` and `<tool_call>` are tokens of the vocabulary, `<function=NAME>` and
--- `<parameter=KEY>` ordinary text, so any of them may arrive cut anywhere. White space within a
--- tag is tolerated, as vLLM's qwen3_coder parser does.

local trim = require "moonlet.trim"

local tag = {}

-- Bytes behind the `<`, longer than any name: what opens nothing must not hold text back for ever.
local MAX_LENGTH <const> = 256

local PLAIN = { think = true, ["/think"] = true, tool_call = true, ["/tool_call"] = true,
  ["/function"] = true, ["/parameter"] = true }
local NAMED = { ["function"] = true, parameter = true }

-- What a tag may begin with, white space removed.
local SPELLINGS = { "think>", "/think>", "tool_call>", "/tool_call>", "/function>", "/parameter>",
  "function=", "parameter=" }

local function is_name(text)
  return text ~= "" and not text:find("[%s%c{}<>\"']")
end

-- "kind = name" taken apart.
local function kind_and_name(text)
  local kind, name = text:match("^%s*(%a+)%s*=%s*(.*)$")
  if kind then return kind, trim.right(name) end
end

-- Whether more text could make a tag of `<` and this.
local function may_grow(rest)
  if #rest > MAX_LENGTH then return false end
  local kind, name = kind_and_name(rest)
  if kind then return NAMED[kind] and (name == "" or is_name(name)) end
  rest = rest:gsub("%s+", "")
  for _, spelling in ipairs(SPELLINGS) do
    if spelling:sub(1, #rest) == rest then return true end
  end
  return false
end

---What the `<` at `at` opens.
---@param text string
---@param at integer position of a "<"
---@param final boolean? nothing will follow the text
---@return string? kind "think", "/think", "tool_call", "/tool_call", "function", "/function",
---  "parameter", "/parameter"; "more" when that depends on what follows; nil for no tag
---@return integer? behind position behind the tag
---@return string? name of a function or parameter
function tag.match(text, at, final)
  local body, behind = text:match("^<([^<>]*)>()", at)
  if body and #body <= MAX_LENGTH then
    local plain = body:gsub("%s+", "")
    if PLAIN[plain] then return plain, behind end
    local kind, name = kind_and_name(body)
    if NAMED[kind] and is_name(name) then return kind, behind, name end
    return nil
  end
  -- A function whose name the next tag cuts short.
  local name, cut = text:match("^<%s*function%s*=%s*([%w_.:/-]+)%s*()<", at)
  if name and cut - at - 1 <= MAX_LENGTH then return "function", cut, name end
  local rest = text:match("^<([^<>]*)$", at)
  if rest and not final and may_grow(rest) then return "more" end
  return nil
end

---The first tag of one of these kinds at or behind `at`.
---@param text string
---@param at integer
---@param kinds table<string, boolean>
---@param final boolean?
---@return string? kind as tag.match; "more" when the text ends in what may become a tag
---@return integer? first position of its "<"; where to go on looking when there is none
---@return integer? behind
---@return string? name
function tag.find(text, at, kinds, final)
  while true do
    local first = text:find("<", at, true)
    if not first then return nil, #text + 1 end
    local kind, behind, name = tag.match(text, first, final)
    if kind == "more" or kinds[kind] then return kind, first, behind, name end
    at = first + 1
  end
end

---The tag that follows white space only.
---@param text string
---@param at integer
---@param final boolean?
---@return string? kind as tag.match, and "end" when a final text ends there
---@return integer first position behind the white space
---@return integer? behind
---@return string? name
function tag.next(text, at, final)
  local first = text:match("^%s*()", at)
  if first > #text then return final and "end" or "more", first end
  if text:byte(first) ~= 0x3C then return nil, first end
  local kind, behind, name = tag.match(text, first, final)
  return kind, first, behind, name
end

return tag
