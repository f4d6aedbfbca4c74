--- An assistant's turn, read from its text while it is generated: reasoning, content, tool calls.
---
---   local reader = turn.reader { tools = tools, reasoning = true }
---   for piece in ... do for _, part in ipairs(reader:feed(piece)) do ... end end
---   for _, part in ipairs(reader:finish()) do ... end
---
--- The parts, merged, are the same however the text is cut. Parts:
---   { kind = "reasoning", text = }   { kind = "content", text = }
---   { kind = "call", index = 0.., id =, name =, arguments = object, text = what the model wrote }
---   { kind = "unfinished", text = }  a call that the text ends in
--- and with stream_arguments, before each call, as it grows:
---   { kind = "call_start", index =, id =, name = }
---   { kind = "call_arguments", index =, text = }   pieces of one JSON object
---
--- Calls are read in Qwen3.5's XML form and in the Hermes form (a JSON object), whichever stands
--- behind <tool_call>. Nothing that a model writes is an error; what is no call stays text.

local json = require "moonlet.json"
local literal = require "moonlet.literal"
local options = require "moonlet.options"
local call = require "moonlet.turn.call"
local tag = require "moonlet.turn.tag"
local trim = require "moonlet.trim"

local turn = {}

-- Texts are read in pieces, as the front of what is left is cut off at every tag. They grow with
-- what is held back, which is copied for each.
local PIECE <const>, SHARE <const> = 1024, 64
-- Objects behind <tool_call> that are no calls; behind so many, further ones stay text. The next
-- call is looked for inside of each.
local MAX_BROKEN <const> = 16

---@class moonlet.turn.Reader
---@field n_broken integer objects behind <tool_call> that were no calls, and are text
---@field new_id fun(): string
local Reader = {}
Reader.__index = Reader

local function new_id()
  return ("call_%08x%08x%08x"):format(math.random(0, 0xFFFFFFFF), math.random(0, 0xFFFFFFFF),
    math.random(0, 0xFFFFFFFF))
end

-- Parameter schemas by tool name; the function may lie bare or as OpenAI wraps it.
local function schemas_of(tools)
  local schemas = {}
  for _, tool in ipairs(tools) do
    local f = type(tool) == "table" and type(tool["function"]) == "table" and tool["function"]
      or tool
    if type(f) == "table" and type(f.name) == "string" then
      schemas[f.name] = type(f.parameters) == "table" and f.parameters ~= json.null
        and f.parameters or {}
    end
  end
  return schemas
end

local KNOWN = { tools = "table", reasoning = "boolean", calls = "boolean", parallel = "boolean",
  stream_arguments = "boolean", new_id = "function" }

---@class moonlet.turn.options
---@field tools table?      array of tools; types arguments and knows calls without <tool_call>
---@field reasoning boolean?  the text begins inside a think block, as the prompt has opened it
---@field calls boolean?    false leaves tool calls in the content (tool_choice "none")
---@field parallel boolean?  false drops every call but the first
---@field stream_arguments boolean?  hand out calls as they grow
---@field new_id (fun(): string)?

---@param given moonlet.turn.options?
---@return moonlet.turn.Reader
function turn.reader(given)
  local o = options.check(given, KNOWN)
  return setmetatable({
    schemas = schemas_of(o.tools or {}),
    calls = o.calls ~= false,
    parallel = o.parallel ~= false,
    stream_arguments = o.stream_arguments or false,
    new_id = o.new_id or new_id,
    state = o.reasoning and "reasoning" or "content",
    buffer = "",
    held = "",           -- white space whose fate what follows decides
    trim = o.reasoning,  -- drop white space until text comes
    started = false,     -- content has begun
    n_calls = 0,
    n_broken = 0,        -- objects that were no calls
    parts = {},
  }, Reader)
end

-- ---- handing out -------------------------------------------------------------------------------

-- Text of the current kind; white space at its end waits for what follows.
local function emit(self, text)
  if self.trim then text = text:gsub("^%s+", "") end
  if text == "" then return end
  self.trim = false
  local body, space = trim.split(text)
  if body == "" then
    self.held = self.held .. space
    return
  end
  if self.state == "content" then self.started = true end
  self.parts[#self.parts + 1] = { kind = self.state, text = self.held .. body }
  self.held = space
end

local function enter(self, state)
  self.held, self.trim, self.state = "", true, state
end

-- The front of the buffer, up to `behind`, is the current call's.
local function consume(self, behind)
  self.raw[#self.raw + 1] = self.buffer:sub(1, behind - 1)
  self.buffer = self.buffer:sub(behind)
end

local function add_call(self, name, arguments)
  local index, dropped = self.n_calls, not self.parallel and self.n_calls > 0
  if not dropped then
    self.parts[#self.parts + 1] = { kind = "call", index = index, id = self.id or self.new_id(),
      name = name, arguments = arguments, text = trim.right(table.concat(self.raw)) }
    self.n_calls = index + 1
  end
  self.id = nil
end

-- With stream_arguments: the members that are complete and not yet shown. One that comes again is
-- shown again, as what was sent stays: whoever reads JSON takes the last one, too.
local function show_progress(self, complete)
  local c = self.call
  if not self.stream_arguments or not self.parallel and self.n_calls > 0 then return end
  local function add(text)
    self.parts[#self.parts + 1] = { kind = "call_arguments", index = self.n_calls, text = text }
  end
  if not self.id then
    self.id, self.shown = self.new_id(), 0
    self.parts[#self.parts + 1] = { kind = "call_start", index = self.n_calls, id = self.id,
      name = c.name }
    add("{")
  end
  for i = self.shown + 1, #c.given do
    add((i == 1 and "" or ", ") .. json.encode(c.given[i][1]) .. ": " .. json.encode(c.given[i][2]))
  end
  self.shown = #c.given
  if complete then add("}") end
end

-- ---- states ------------------------------------------------------------------------------------

-- Each state reads from the buffer and returns true if another state should go on with the rest.
local states = {}

-- Everything up to `stop` (or what is certain to be text) goes out.
local function take(self, stop)
  emit(self, self.buffer:sub(1, stop - 1))
  self.buffer = self.buffer:sub(stop)
end

-- Whether a call stands behind <tool_call>, which ends at `behind`: true, false or "more".
local function opens_call(self, behind, final)
  local kind, first = tag.next(self.buffer, behind, final)
  if kind == "more" then return "more" end
  if kind == "function" then return true end
  if final and self.buffer:find("^%s*<function%s*=[^<>]*$", behind) then return true end
  if self.buffer:sub(first, first) ~= "{" or self.n_broken == MAX_BROKEN then return false end
  local rest = self.buffer:match("^%s*()", first + 1)
  if rest > #self.buffer then return not final and "more" or false end
  return self.buffer:find("^[\"']", rest) ~= nil
end

local IN_REASONING = { think = true, ["/think"] = true, tool_call = true }

function states.reasoning(self, final)
  local kind, first, behind = tag.find(self.buffer, 1, IN_REASONING, final)
  if not kind or kind == "more" then return take(self, first) end
  if kind == "tool_call" then
    -- Models forget to close the think block before a call, and also mention the tag in thought.
    local opens = self.calls and opens_call(self, behind, final)
    if opens == "more" then return take(self, first) end
    take(self, opens and first or behind)
    if opens then enter(self, "content") end
    return true
  end
  take(self, first)
  self.buffer = self.buffer:sub(behind - first + 1)
  if kind == "/think" then
    enter(self, "content")
  else
    self.trim = true
  end
  return true
end

local IN_CONTENT = { think = true, ["/think"] = true, tool_call = true, ["function"] = true }

-- A call that begins at `first` of the buffer with the tag ending at `behind`.
local function begin_call(self, first, behind)
  take(self, first)
  enter(self, "opening")
  self.raw = {}
  consume(self, behind - first + 1)
end

function states.content(self, final)
  local kind, first, behind, name = tag.find(self.buffer, 1, IN_CONTENT, final)
  if not kind or kind == "more" then return take(self, first) end
  if kind == "think" then
    if self.started or self.n_calls > 0 or self.buffer:sub(1, first - 1):find("%S") then
      take(self, behind)
    else
      self.buffer = self.buffer:sub(behind)
      enter(self, "reasoning")
    end
    return true
  elseif kind == "/think" then
    take(self, first)
    self.buffer = self.buffer:sub(behind - first + 1)
    return true
  end
  local opens = self.calls
  if opens and kind == "tool_call" then opens = opens_call(self, behind, final) end
  if opens and kind == "function" then opens = self.schemas[name] ~= nil end
  if opens == "more" then return take(self, first) end
  if not opens then
    take(self, behind)
  else
    begin_call(self, first, kind == "tool_call" and behind or first)
  end
  return true
end

-- Behind <tool_call>, which is known to be followed by a call.
function states.opening(self, final)
  local kind, first, behind, name = tag.next(self.buffer, 1, final)
  if kind == "function" then
    consume(self, behind)
    self.call = call.open(name, self.schemas[name], self.flat)
    self.state = "call"
  else
    consume(self, first)
    self.state, self.scan = "object", nil
  end
  return true
end

function states.call(self, final)
  local rest, complete = self.call:read(self.buffer, final)
  if not complete and final and self.call:is_closable() and final ~= "length" then
    rest, complete = "", true
  end
  consume(self, #self.buffer - #rest + 1)
  self.flat = self.call.flat
  show_progress(self, complete)
  if not complete then return false end
  self.call:close()
  self.state = "closing"
  return true
end

-- Behind the call's own text: its closing tags, as far as they are there.
function states.closing(self, final)
  local kind, _, behind = tag.next(self.buffer, 1, final)
  if kind == "more" then return false end
  if kind == "/tool_call" or kind == "/function" then
    consume(self, behind)
    if kind == "/function" then return true end
  end
  add_call(self, self.call.name, self.call.arguments)
  self.call = nil
  enter(self, "content")
  return true
end

-- ---- Hermes: <tool_call>{"name": ..., "arguments": {...}}</tool_call> -------------------------

-- Position behind the object at the beginning of the buffer; remembers how far it has looked.
local function object_end(self)
  local scan = self.scan or { at = 1, depth = 0, quoted = false }
  self.scan = scan
  while true do
    local at = self.buffer:find(scan.quoted and '["\\]' or '["{}]', scan.at)
    if not at then
      scan.at = #self.buffer + 1
      return nil
    end
    local c = self.buffer:sub(at, at)
    if c == "\\" and at == #self.buffer then
      scan.at = at
      return nil
    end
    scan.at = at + (c == "\\" and 2 or 1)
    if c == '"' then scan.quoted = not scan.quoted end
    if c == "{" then scan.depth = scan.depth + 1 end
    if c == "}" then
      scan.depth = scan.depth - 1
      if scan.depth == 0 then return at + 1 end
    end
  end
end

-- The call that an object spells, or nil.
local function read_object(text)
  local ok, value = literal.read(text)
  if not ok or not json.is_object(value) then return nil end
  local name = value.name
  if json.is_object(value["function"]) then -- as OpenAI wraps it
    value = value["function"]
    name = value.name
  end
  local arguments = value.arguments
  if arguments == nil then arguments = value.parameters end
  if type(arguments) == "string" then ok, arguments = literal.read(arguments) end
  if arguments == nil or arguments == json.null then arguments = json.object {} end
  if type(name) ~= "string" or not ok or not json.is_object(arguments) then return nil end
  local given = {}
  for i, key in ipairs(json.keys(arguments)) do given[i] = { key, arguments[key] } end
  return { name = name, arguments = arguments, given = given }
end

function states.object(self, final)
  local behind = object_end(self)
  -- A quote that a model forgot leaves the braces unmatched; the closing tag then has to do.
  if not behind and final then behind = self.buffer:find("</tool_call>", 1, true) end
  if not behind then return false end
  local found = read_object(self.buffer:sub(1, behind - 1))
  if not found then
    self.state, self.n_broken = "content", self.n_broken + 1
    self.buffer, self.raw = table.concat(self.raw) .. self.buffer, {}
    local _, stop = self.buffer:find("<tool_call>", 1, true)
    take(self, (stop or 0) + 1)
    return true
  end
  consume(self, behind)
  self.call = found
  show_progress(self, true)
  self.state = "closing"
  return true
end

-- ---- the reader --------------------------------------------------------------------------------

local function run(self, final)
  while self.buffer ~= "" or final do
    if not states[self.state](self, final) then break end
  end
end

local function take_parts(self)
  local parts = self.parts
  self.parts = {}
  return parts
end

---Takes the next piece of text.
---@param text string whole characters or not, in any cut
---@return table[] parts
function Reader:feed(text)
  local at = 1
  while at <= #text do
    local n = math.max(PIECE, #self.buffer // SHARE)
    self.buffer = self.buffer .. text:sub(at, at + n - 1)
    at = at + n
    run(self, false)
  end
  return take_parts(self)
end

---Whether the text so far ends in reasoning, with nothing held back that might end it.
---@return boolean
function Reader:is_reasoning()
  return self.state == "reasoning" and self.buffer == ""
end

---Whether what was read last belongs to reasoning.
---@return boolean
function Reader:in_reasoning()
  return self.state == "reasoning"
end

---Ends the turn. A call that lacks only closing tags is complete unless the text was cut off.
---@param reason string? "length" when the text was cut off
---@return table[] parts
function Reader:finish(reason)
  run(self, reason == "length" and "length" or "stop")
  local parts = take_parts(self)
  if self.state == "opening" or self.state == "call" or self.state == "object" then
    parts[#parts + 1] = { kind = "unfinished", text = table.concat(self.raw) .. self.buffer }
  elseif self.state == "content" and self.started and self.n_calls == 0 and self.held ~= "" then
    parts[#parts + 1] = { kind = "content", text = self.held }
  end
  self.buffer = ""
  return parts
end

---A whole turn at once.
---@param text string
---@param given moonlet.turn.options?
---@param reason string? as Reader:finish
---@return { reasoning: string?, content: string?, calls: table[], unfinished: string? }
function turn.read(text, given, reason)
  local reader = turn.reader(given)
  local calls, texts = {}, { reasoning = {}, content = {}, unfinished = {} }
  local parts = reader:feed(text)
  local last = reader:finish(reason)
  table.move(last, 1, #last, #parts + 1, parts)
  for _, part in ipairs(parts) do
    local list = texts[part.kind]
    if part.kind == "call" then
      calls[#calls + 1] = part
    elseif list then
      list[#list + 1] = part.text
    end
  end
  local result = { calls = calls }
  for kind, list in pairs(texts) do result[kind] = list[1] and table.concat(list) end
  return result
end

return turn
