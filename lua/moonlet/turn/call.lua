--- One tool call in Qwen's XML form, read as its text arrives.
---
---   <tool_call>
---   <function=NAME>
---   <parameter=KEY>
---   VALUE
---   </parameter>
---   </function>
---   </tool_call>
---
--- Values are bare text and may hold these very tags (an agent that edits a parser or its manual
--- writes them), and models leave tags out. So a closing tag counts only where the structure can
--- go on behind it, opening tags on a line of their own are matched with their closing ones inside
--- a value, and when a value has no end under these rules the text is read again without nesting.

local json = require "moonlet.json"
local schema = require "moonlet.schema"
local tag = require "moonlet.turn.tag"

---@class moonlet.turn.Call
---@field name string
---@field arguments table<string, any>?  of a call that was closed, in the order of the text
---@field given { [1]: string, [2]: any }[]  all of them, also several of one name
---@field flat boolean  a value had no end under the rules of nesting, so that they are off; the
---  rest of the text does without them, too, as each try reads all of it
---@field private parameters table  the tool's JSON schema of its parameters, {} when unknown
local Call = {}
Call.__index = Call

local call = {}

---@param name string
---@param parameters table?  JSON schema of the tool's parameters
---@param flat boolean?  read without nesting
function call.open(name, parameters, flat)
  return setmetatable({ name = name, parameters = parameters or {}, given = {}, has = {},
    key = nil, at = 1, inside = {}, flat = flat or false }, Call)
end

local function properties_of(self)
  local p = self.parameters.properties
  return type(p) == "table" and p or nil
end

local function value_schema(self, key)
  local properties = properties_of(self)
  local node = properties and properties[key]
  if node == nil then node = self.parameters.additionalProperties end
  return type(node) == "table" and node or nil
end

-- A key that may begin a parameter although the one before has not ended.
local function is_expected(self, key)
  local properties = properties_of(self)
  if not properties then return true end
  return properties[key] ~= nil and not self.has[key] and key ~= self.key
end

local function on_own_line(text, at)
  repeat
    at = at - 1
    local c = text:byte(at)
  until c ~= 0x20 and c ~= 0x09
  return at < 1 or text:byte(at) == 0x0A
end

-- ---- the end of a value ------------------------------------------------------------------------

-- What may stand behind each closing tag that ends a value.
local BEHIND = {
  ["/parameter"] = { parameter = true, ["/parameter"] = true, ["/function"] = true,
    ["/tool_call"] = true, tool_call = true, ["function"] = true, ["end"] = true },
  ["/function"] = { ["/tool_call"] = true, tool_call = true, ["function"] = true, ["end"] = true },
  ["/tool_call"] = { tool_call = true, ["end"] = true },
}
local OPENS = { parameter = "parameter", ["function"] = "function", tool_call = "tool_call" }
local CLOSES = { ["/parameter"] = "parameter", ["/function"] = "function",
  ["/tool_call"] = "tool_call" }

-- Whether the value ends at this tag: true, false or "more". Counts the tags that stand inside it.
local function ends_value(self, text, kind, first, behind, name, final)
  local closes, opens, inside = CLOSES[kind], OPENS[kind], self.inside
  if closes then
    if (inside[closes] or 0) > 0 then
      inside[closes] = inside[closes] - 1
      return false
    end
    if kind ~= "/parameter" and not on_own_line(text, first) then return false end
    local following = tag.next(text, behind, final)
    if following == "more" then return "more" end
    return BEHIND[kind][following] == true
  end
  if not opens or not on_own_line(text, first) then return false end
  local nested = (inside["function"] or 0) + (inside.tool_call or 0) > 0
  if kind == "parameter" and not nested and is_expected(self, name) then return true end
  if self.flat then return kind ~= "parameter" end
  inside[opens] = (inside[opens] or 0) + 1
  return false
end

-- Position of the tag that ends the value at the beginning of `text`, or nil while there is none.
local function find_value_end(self, text, final)
  while true do
    local first = text:find("<", self.at, true)
    if not first then
      self.at = #text + 1
      return nil
    end
    self.at = first
    local kind, behind, name = tag.match(text, first, final)
    if kind == "more" then return nil end
    local ends = kind and ends_value(self, text, kind, first, behind, name, final)
    if ends == "more" then return nil end
    if ends then return first end
    self.at = first + 1
  end
end

local function bare(value)
  return (value:gsub("^\r?\n", "", 1):gsub("\r?\n$", "", 1))
end

-- ---- steps -------------------------------------------------------------------------------------

-- Each step takes the text that is left and returns what is left after it, or nil when it cannot
-- go on, and then whether the call is complete.

local function step_value(self, text, final)
  local stop = find_value_end(self, text, final)
  if not stop and final and not self.flat then
    self.flat, self.at, self.inside = true, 1, {}
    stop = find_value_end(self, text, final)
  end
  if not stop then return nil end
  local value = schema.coerce(bare(text:sub(1, stop - 1)), value_schema(self, self.key),
    self.parameters)
  self.given[#self.given + 1], self.has[self.key] = { self.key, value }, true
  self.key, self.at, self.inside = nil, 1, {}
  return text:sub(stop)
end

local STRUCTURE = { parameter = true, ["/parameter"] = true, ["/function"] = true,
  ["/tool_call"] = true, tool_call = true, ["function"] = true }

local function step_between(self, text, final)
  local kind, first, behind, name = tag.find(text, self.at, STRUCTURE, final)
  self.at = first
  if kind == nil or kind == "more" then return nil end
  self.at = 1
  if kind == "parameter" then
    self.key = name
    return text:sub(behind)
  elseif kind == "/parameter" then
    return text:sub(behind)
  elseif kind == "/function" then
    return text:sub(behind), true
  end
  return text:sub(first), true -- what closes or opens a call is not this call's
end

---Reads on. Text is taken from the front; what is returned is still to be read.
---@param text string
---@param final boolean? nothing will follow
---@return string rest
---@return boolean complete
function Call:read(text, final)
  while true do
    local step = self.key and step_value or step_between
    local rest, complete = step(self, text, final)
    if not rest then return text, false end
    text = rest
    if complete then return text, true end
  end
end

---Whether nothing but closing tags is missing.
---@return boolean
function Call:is_closable()
  return self.key == nil and #self.given > 0
end

---Makes the arguments of what was given. The last of two with one name counts, in its own place.
function Call:close()
  local values, last = {}, {}
  for i, pair in ipairs(self.given) do values[pair[1]], last[pair[1]] = pair[2], i end
  local keys = {}
  for i, pair in ipairs(self.given) do
    if last[pair[1]] == i then keys[#keys + 1] = pair[1] end
  end
  self.arguments = json.object(values, keys)
end

return call
