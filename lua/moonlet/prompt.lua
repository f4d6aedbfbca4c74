--- Prompts of a conversation that goes on: from messages to ids, so that what was evaluated before
--- is evaluated once.
---
---   local prompts = prompt.new(model)
---   local p = assert(prompts:make(messages, { tools = tools }))      -- p.ids, p.text, p.keep_at
---   ... generate `ids` with text `text` from p.ids ...
---   prompts:remember(p, ids, text)
---
--- Two things stand between a rendered conversation and the tokens that were there before. Clients
--- send an assistant's turn back as parsed, and the template spells it its own way; so turns are
--- remembered as they were sampled, and where the template's text of a turn means the same, the
--- sampled tokens take its place. And control strings in what people and clients write are text:
--- they are kept apart through the template and tokenized as plain text.

local chat = require "moonlet.chat"
local json = require "moonlet.json"
local new_ids = require "moonlet.tokenizer".new_ids
local trim = require "moonlet.trim"
local turn = require "moonlet.turn"

local prompt = {}

-- Of turns that are remembered, each by two keys.
local MAX_KEYS <const>, MAX_TURN_BYTES <const> = 1024, 64 << 20
local MAX_CALL_IDS <const> = 16 -- of one of them, as dialogues side by side may say the same
local ID_BYTES <const> = 16 -- of a Lua table
local MAX_BEHIND <const> = 256 -- bytes that a template puts behind what the last message says

---@class moonlet.Prompts
local Prompts = {}
Prompts.__index = Prompts

---@class moonlet.Prompt
---@field n integer  how many tokens it has
---@field ids integer[]?  these, unless there are more than was asked for
---@field list moonlet.Ids  all of them
---@field text string
---@field keep_at integer[]  numbers of tokens, rising, where other prompts may differ: after them
---  messages begin, or first thoughts, which templates drop later
---@field reasoning boolean  the generation prompt has opened a think block
---@field tail string  of the generation prompt, behind the line that names the role
---@field tail_ids integer[]
---@field tools table?
---@field said string? what the last message says, which goes on

-- ---- control strings ---------------------------------------------------------------------------

local known_strings = setmetatable({}, { __mode = "k" }) -- by tokenizer: looking takes a while

-- All strings that the tokenizer has tokens of their own for, the longest first.
local function control_strings(tokenizer)
  local list = known_strings[tokenizer]
  if list then return list end
  list = {}
  for id = 0, tokenizer:n_vocab() - 1 do
    local text = tokenizer:token_bytes(id)
    if text and text:find("^<.*>$") and tokenizer:id(text) == id
      and #tokenizer:encode(text) == 1 and #tokenizer:encode(text, { special = false }) > 1 then
      list[#list + 1] = text
    end
  end
  table.sort(list, function(a, b)
    if #a ~= #b then return #a > #b end
    return a < b
  end)
  known_strings[tokenizer] = list
  return list
end

-- Stand-ins are private characters of plane 16 that the conversation does not use.
local FIRST_PRIVATE <const>, LAST_PRIVATE <const> = 0x100000, 0x10FFFD
local PLANE_16 <const>, BYTES <const> = "\xF4", 4 -- what characters of it begin with, and take

-- Every string in a value, keys among them.
local function each_string(value, visit)
  if type(value) == "string" then return visit(value) end
  if type(value) ~= "table" or value == json.null then return end
  for key, child in pairs(value) do
    each_string(key, visit)
    each_string(child, visit)
  end
end

local function stand_ins(strings, given)
  local used, map, back, at = {}, {}, {}, FIRST_PRIVATE
  each_string(given, function(text)
    local from = text:find(PLANE_16, 1, true)
    while from do
      used[text:sub(from, from + BYTES - 1)] = true
      from = text:find(PLANE_16, from + BYTES, true)
    end
  end)
  for _, text in ipairs(strings) do
    while used[utf8.char(at)] do at = at + 1 end
    if at > LAST_PRIVATE then
      return nil, "messages: more private characters than can be told from others", "format"
    end
    local mark = utf8.char(at)
    map[text], back[mark], at = mark, text, at + 1
  end
  return map, back
end

-- Every string in a value, changed.
local function map_strings(value, change)
  if type(value) == "string" then return change(value) end
  if type(value) ~= "table" or value == json.null then return value end
  if json.is_array(value) then
    local list = json.array {}
    for i, child in ipairs(value) do list[i] = map_strings(child, change) end
    return list
  end
  local object, keys = {}, json.keys(value)
  for i, key in ipairs(keys) do
    local child = map_strings(value[key], change)
    keys[i] = change(key)
    object[keys[i]] = child
  end
  return json.object(object, keys)
end

local function replaced(text, s, by)
  local parts, at = {}, 1
  local first, last = text:find(s, 1, true)
  while first do
    parts[#parts + 1] = text:sub(at, first - 1)
    at = last + 1
    first, last = text:find(s, at, true)
  end
  parts[#parts + 1] = text:sub(at)
  return table.concat(parts, by)
end

-- Stand-ins by string, and which strings have brackets inside, as others are what stands between
-- two brackets.
local function mask_of(strings, map)
  local nested = {}
  for _, s in ipairs(strings) do
    if s:find("^<.*[<>].*>$") then nested[#nested + 1] = s end
  end
  return { map = map, nested = nested }
end

local PIECE <const> = 1 << 16 -- bytes; nothing else goes on while so many are worked on

local function masked(mask, text)
  if not text:find("<", 1, true) then return text end
  for _, s in ipairs(mask.nested) do text = replaced(text, s, mask.map[s]) end
  local parts, at = {}, 1
  while at <= #text do
    local stop = text:find("<", at + PIECE, true) or #text + 1
    parts[#parts + 1] = (text:sub(at, stop - 1):gsub("<[^<>]*>", mask.map))
    at = stop
  end
  return table.concat(parts)
end

-- The text with its stand-ins replaced, and the ranges that they take in it.
local function unmask(back, text)
  local parts, ranges, length, at = {}, new_ids(), 0, 1
  local function add(piece)
    parts[#parts + 1] = piece
    length = length + #piece
  end
  while true do
    local first = text:find(PLANE_16, at, true)
    if not first then break end
    add(text:sub(at, first - 1))
    local mark = text:sub(first, first + BYTES - 1)
    local original = back[mark]
    if original then
      ranges:append(length + 1)
      ranges:append(length + #original)
    end
    add(original or mark)
    at = first + BYTES
  end
  add(text:sub(at))
  return table.concat(parts), ranges
end

-- ---- opening -----------------------------------------------------------------------------------

---@param model moonlet.Model with tokenizer and template
---@param encode? fun(text: string, plain: moonlet.Ids): moonlet.Ids?, string?, string?  instead of
---  the model's
---@param gently? fun(fn: function, ...): any  runs what takes long, instead of calling it
---@return moonlet.Prompts
function prompt.new(model, encode, gently)
  local stops = {}
  for i, id in ipairs(model.stop_ids or {}) do stops[i] = model.tokenizer:token_bytes(id) end
  encode = encode or function(text, plain)
    return model:encode(text, { packed = true, plain = plain })
  end
  gently = gently or function(fn, ...) return fn(...) end
  return setmetatable({ model = model, encode = encode, gently = gently, stops = stops,
    strings = control_strings(model.tokenizer), turns = {}, order = {}, turn_bytes = 0,
    by_call = {} }, Prompts)
end

-- ---- turns -------------------------------------------------------------------------------------

local function trimmed(text) return trim.both(text or "") end

-- What a turn says, however it is spelled.
local function meaning(text, tools)
  local t = turn.read(text, { tools = tools })
  local calls = {}
  for i, call in ipairs(t.calls) do calls[i] = { call.name, call.arguments } end
  return json.encode({ trimmed(t.reasoning), trimmed(t.content), t.unfinished or "",
    json.array(calls) }, { sort_keys = true })
end

---@class moonlet.SampledTurn
---@field ids integer[] of the whole turn, behind the line that names the role
---@field text string of those

local function bytes_of(key, sampled)
  return ID_BYTES * #sampled.ids + #sampled.text + #key
end

local function forget(self, key)
  local sampled = self.turns[key]
  self.turn_bytes = self.turn_bytes - bytes_of(key, sampled)
  self.turns[key] = nil
  for _, id in ipairs(sampled.call_ids or {}) do self.by_call[id] = nil end
end

-- The ids of calls by which the turn, and those before it that say the same, are known.
local function name_calls(self, sampled, earlier, call_id)
  local ids = { call_id }
  table.move(earlier or {}, 1, MAX_CALL_IDS - #ids, #ids + 1, ids)
  sampled.call_ids = ids
  for _, id in ipairs(ids) do self.by_call[id] = sampled end
end

-- Knows a turn by a key, in place of the one that was known by it.
local function keep(self, key, sampled, call_id)
  local earlier = self.turns[key]
  if earlier then forget(self, key) else self.order[#self.order + 1] = key end
  self.turns[key] = sampled
  name_calls(self, sampled, earlier and earlier.call_ids, call_id)
  self.turn_bytes = self.turn_bytes + bytes_of(key, sampled)
  while #self.order > MAX_KEYS or self.turn_bytes > MAX_TURN_BYTES do
    forget(self, table.remove(self.order, 1))
  end
end

---Knows a turn again that remember() has told of, also in another process: by what it says, and by
---that and its place, as the same may be said twice and be sampled in two ways.
---@param sampled moonlet.SampledTurn
---@param tools table? of the prompt that it answered
---@param call_id string? see remember()
---@param place integer? how many tokens came before it
function Prompts:recall(sampled, tools, call_id, place)
  local key = self.gently(meaning, sampled.text, tools)
  if place then keep(self, key .. place, { ids = sampled.ids, text = sampled.text }) end
  keep(self, key, sampled, call_id)
end

---Remembers a turn as it was sampled.
---@param p moonlet.Prompt that it answers
---@param ids integer[] sampled tokens without the one that stopped them
---@param text string of those, control strings included
---@param call_id string? of its first call, if nobody else knows it before it is shown
---@return moonlet.SampledTurn
function Prompts:remember(p, ids, text, call_id)
  local all = table.move(ids, 1, #ids, #p.tail_ids + 1,
    table.move(p.tail_ids, 1, #p.tail_ids, 1, {}))
  local sampled = { ids = all, text = p.tail .. text }
  self:recall(sampled, p.tools, call_id, p.n - #p.tail_ids)
  return sampled
end

-- A client that drops reasoning means the reasoning of earlier questions, of which templates drop
-- it, too: between the calls of one question the model still has it in mind, and without it all
-- that follows would be read again. Who sends back the id of a call has seen that turn.
local function give_back_reasoning(self, list, tools)
  for _, message in ipairs(list) do
    local call = message.tool_calls and message.tool_calls[1]
    local sampled = call and type(call.id) == "string" and self.by_call[call.id]
    if sampled and trimmed(message.reasoning_content) == "" then
      local reasoning = trimmed(turn.read(sampled.text, { tools = tools }).reasoning)
      if reasoning ~= "" then message.reasoning_content = reasoning end
    end
  end
end

-- ---- making ------------------------------------------------------------------------------------

-- What tells where the first of several strings at or behind rising places begins. Each is looked
-- for again only when its last place has been passed.
local function finder(text, strings)
  local places = {}
  return function(at)
    local first = #text + 1
    for _, s in ipairs(strings) do
      if not places[s] or places[s] < at then
        places[s] = text:find(s, at, true) or #text + 1
      end
      first = math.min(first, places[s])
    end
    return first <= #text and first or nil
  end
end

-- Takes text apart: pieces {text =} that begin with the control string `start`, and turns that are
-- remembered {turn =}. `header` begins an assistant's turn.
local function pieces_of(self, text, start, header, tools, back)
  local pieces, at = {}, 1
  local function add_text(last)
    while at <= last do
      local next_start = text:find(start, at + 1, true)
      local stop = next_start and next_start <= last and next_start - 1 or last
      pieces[#pieces + 1] = { text = text:sub(at, stop) }
      at = stop + 1
    end
  end
  local from, find_stop = 1, finder(text, self.stops)
  while next(self.turns) do
    local first, last = text:find(header, from, true)
    local stop = first and find_stop(last + 1)
    if not stop then break end
    local key = meaning(unmask(back, text:sub(last + 1, stop - 1)), tools)
    if self.turns[key] then
      add_text(last)
      pieces[#pieces + 1] = { turn = self.turns[key], key = key }
      at = stop
    end
    from = stop
  end
  add_text(#text)
  return pieces
end

local function assemble(self, pieces, start, back)
  local ids, texts, starts = new_ids(), {}, {}
  for _, piece in ipairs(pieces) do
    local more, text
    if piece.turn then
      local sampled = self.turns[piece.key .. #ids] or piece.turn
      more, text = sampled.ids, sampled.text
    else
      local ranges, message, code
      text, ranges = unmask(back, piece.text)
      more, message, code = self.encode(text, ranges)
      if not more then return nil, message, code end
      if #ids > 0 and piece.text:sub(1, #start) == start then starts[#starts + 1] = #ids end
    end
    ids:append(more)
    texts[#texts + 1] = text
  end
  return ids, table.concat(texts), starts
end

-- The control string that text begins with.
local function leading_control(self, text)
  for _, s in ipairs(self.strings) do
    if text:sub(1, #s) == s then return s end
  end
end

-- The last place of a string at or behind `from`.
local function last_of(text, s, from)
  local first, last
  repeat
    local a, b = text:find(s, first and first + 1 or from or 1, true)
    first, last = a or first, b or last
  until not a
  return first, last
end

-- The messages and the variables as templates take them, with stand-ins for control strings, and
-- what takes these back. None that comes from outside stays, an assistant's neither: what a model
-- has said in tokens of its own is known by its turn, and what frames calls and thoughts the
-- template writes.
local function masked_of(self, list, tools, variables)
  local given = {}
  for name, value in pairs(variables or {}) do given[name] = value end
  given.tools = tools
  local map, back, code = stand_ins(self.strings, { list, given })
  if not map then return nil, back, code end
  local mask, options = mask_of(self.strings, map), {}
  local function change(s) return masked(mask, s) end
  for name, value in pairs(given) do options[name] = map_strings(value, change) end
  return map_strings(list, change), options, back
end

-- A rendered conversation: all of it, then what comes before the assistant's turn, the line that
-- begins this, and what the template itself says in it.
local function render(self, shown, options)
  options.add_generation_prompt = true
  local whole, message, code = self.model:render(shown, options)
  if not whole then return nil, message, code end
  options.add_generation_prompt = false
  local before
  before, message, code = self.model:render(shown, options)
  if not before then return nil, message, code end
  local answer = whole:sub(1, #before) == before and whole:sub(#before + 1) or ""
  local header, tail = answer:match("^(.-\n)(.*)$")
  return whole, before, header or answer, tail or ""
end

-- What the last message says, if it is an assistant's text.
local function last_words(list)
  local last = list[#list]
  local said = last.role == "assistant" and not last.tool_calls and trimmed(last.content) or ""
  if said ~= "" then return said end
  return nil, "messages: the last one has to be an assistant's text to be continued", "format"
end

-- What comes before the last turn of a conversation, and that turn up to the end of what it says.
local function reopen(before, header, said)
  local first, last = last_of(before, header)
  if header == "" or not first then return nil end
  -- To look for a long text everywhere in another would take the product of both.
  local _, stop = last_of(before, said, math.max(last + 1, #before - #said - MAX_BEHIND + 1))
  if not stop then return nil end
  return before:sub(1, first - 1), before:sub(last + 1, stop)
end

-- Whether a rendered conversation says what an assistant has thought.
local function shows_thoughts(text)
  local _, last = text:find("<think>", 1, true)
  while last do
    if not text:find("^%s*</think>", last + 1) then return true end
    _, last = text:find("<think>", last + 1, true)
  end
  return false
end

-- A conversation as it is to be tokenized: pieces as pieces_of() has them, the control string that
-- messages begin with, what the assistant's turn begins with, whether that opens thoughts, and the
-- first ones that are shown, and what takes the stand-ins back.
local function lay_out(self, messages, variables, ending)
  local list, tools, said, message, code
  list, message, code = chat.messages(messages)
  if not list then return nil, message, code end
  tools, message, code = chat.tools(variables and variables.tools)
  if message then return nil, message, code end
  if ending == "continue" then
    said, message, code = last_words(list)
    if not said then return nil, message, code end
  end

  give_back_reasoning(self, list, tools)
  local shown, options, back = masked_of(self, list, tools, variables)
  if not shown then return nil, options, back end
  local whole, before, header, tail = render(self, shown, options)
  if not whole then return nil, before, header end
  if said then
    before, tail = reopen(before, header, trimmed(shown[#shown].content))
    if not before then return nil, "the template does not show the last message", "template" end
    whole = before .. header .. tail
  elseif ending == "none" then
    whole, tail = before, ""
  end
  local start = leading_control(self, header)
  local pieces
  if start then
    pieces = pieces_of(self, before, start, header, tools, back)
    if ending ~= "none" then pieces[#pieces + 1] = { text = header .. tail } end
  else -- a template of another kind: nothing to hold on to
    pieces, tail = { { text = whole } }, ""
  end
  local reasoning = tail:find("<think>", 1, true) ~= nil and not tail:find("</think>", 1, true)
  return { pieces = pieces, start = start, tail = tail, tools = tools, said = said, back = back,
    reasoning = reasoning, thinks_first = reasoning and not shows_thoughts(before) }
end

---@param messages table array of messages as OpenAI's API has them
---@param variables table? of the template: tools, enable_thinking, ...
---@param ending string? "answer": the assistant's turn begins (the default); "continue": the last
---  message, an assistant's text, goes on; "none": the prompt ends where the conversation does
---@param most integer? tokens that `ids` may have; all without it
---@return moonlet.Prompt? prompt
---@return string? message
---@return string? code
function Prompts:make(messages, variables, ending, most)
  local made, message, code = self.gently(lay_out, self, messages, variables, ending)
  if not made then return nil, message, code end
  local ids, text, starts = self.gently(assemble, self, made.pieces, made.start or "\0", made.back)
  if not ids then return nil, text, starts end
  local tail = made.tail
  local tail_text, ranges = self.gently(unmask, made.back, tail)
  local tail_ids
  tail_ids, message, code = self.encode(tail_text, ranges)
  if not tail_ids then return nil, message, code end
  -- When a new question comes, templates drop the thoughts since the one before, and the prompt
  -- parts from this one where the first of them begin: there the state has to be kept, and not also
  -- in front of the line that names the role.
  if made.thinks_first then
    table.remove(starts)
    starts[#starts + 1] = #ids - #tail_ids
  end
  return { n = #ids, ids = #ids <= (most or #ids) and ids:slice() or nil, list = ids, text = text,
    tools = made.tools, tail = tail_text, tail_ids = tail_ids:slice(), said = made.said,
    reasoning = made.reasoning, keep_at = starts }
end

return prompt
