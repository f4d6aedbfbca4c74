--- Generation: sample, show, evaluate, until something says stop.
--
--   local gen = session:generate{ temperature = 0.7, stop = { "\n\n" }, max_tokens = 200 }
--   for tok in gen do io.write(tok.text) end
--   print(gen.finish_reason)
--
-- A token is handed out before it is evaluated, so that its text is seen one decode step earlier.
-- When the loop has run to its end the session holds every token that was handed out; after a
-- break the last one is still `gen.pending`.
local options = require "moonlet.options"
local sampler = require "moonlet.sampler"
local stop_strings = require "moonlet.stops"

local generate = {}

-- ---- options --------------------------------------------------------------------------------

---@class moonlet.GenerateOptions
---@field sampler? moonlet.Policy instead of temperature, top_k, ... (see moonlet.sampler)
---@field seed? integer with a sampler: starts it over
---@field stop? string|string[] text that ends the generation and is not shown
---@field stop_ids? integer[] instead of the model's own
---@field max_tokens? integer without it: until the context is full
---@field skip_special? boolean control tokens have no text (default true)
---@field top_logprobs? integer how many alternatives to list in tok.top

local KNOWN <const> = {
  sampler = "table", stop_ids = "table", max_tokens = "integer", skip_special = "boolean",
  top_logprobs = "integer", stop = "any",
}
-- Their values are checked by the sampler.
for _, name in ipairs(sampler.option_names) do KNOWN[name] = "any" end

-- Those for the sampler.
local function sampling_options(given)
  for _, name in ipairs { "max_tokens", "top_logprobs" } do
    if given[name] and given[name] < 0 then
      options.misuse(("option '%s': 0 or more expected, got %d"):format(name, given[name]))
    end
  end
  if given.sampler and type(given.sampler.sample) ~= "function" then
    options.misuse("option 'sampler': what moonlet.sampler makes expected")
  end
  local sampling = {}
  for _, name in ipairs(sampler.option_names) do
    sampling[name] = given[name]
    if given.sampler and name ~= "seed" and given[name] ~= nil then
      options.misuse(("option '%s': belongs into the sampler"):format(name))
    end
  end
  return sampling
end

local function stop_texts(stop)
  local stops = type(stop) == "string" and { stop } or stop or {}
  if type(stops) ~= "table" then
    options.misuse("option 'stop': text or list of texts expected, got " .. type(stop))
  end
  for _, text in ipairs(stops) do
    if type(text) ~= "string" or text == "" or not utf8.len(text) then
      options.misuse("option 'stop': texts in UTF-8 expected, none of them empty")
    end
  end
  return stops
end

-- The checkpoint's recommendation, overruled by what was asked for.
local function make_policy(session, given, sampling)
  if given.sampler then
    if given.seed then given.sampler:reset(given.seed) end
    return given.sampler
  end
  local defaults, message, code = sampler.from_generation_config(session.model.generation_config)
  if not defaults then return nil, message, code end
  for name, value in pairs(sampling) do defaults[name] = value end
  return sampler.from_options(defaults)
end

-- id -> what ended the generation. A control token named as a stop string has no text to look
-- for when control tokens are skipped.
local function make_stop_ids(session, given, stops)
  local ids = {}
  for _, id in ipairs(given or session.model.stop_ids or {}) do
    if math.type(id) ~= "integer" then
      options.misuse("option 'stop_ids': token ids expected, got " .. type(id))
    end
    ids[id] = true
  end
  local tokenizer = session.model.tokenizer
  for _, text in ipairs(stops) do
    local id = tokenizer:id(text)
    if id and tokenizer:is_special(id) then ids[id] = text end
  end
  return ids
end

-- ---- the loop -------------------------------------------------------------------------------

---@class moonlet.Generation
---@field finish_reason? "stop"|"length"|"context"|"cancelled"|"error" nil while it runs
---@field ids integer[] tokens handed out so far; a stop token is not one of them
---@field stop? string the stop string that was met
---@field stop_id? integer the stop token that was sampled
---@field pending? integer handed out, not yet evaluated
---@field policy moonlet.Policy
local Generation = {}
Generation.__index = Generation

---@class moonlet.Token
---@field id? integer nil when this is only text that had been held back
---@field text string whole characters, "" while more is needed to tell
---@field logprob? number by the model, before any stage of the sampler
---@field top? {id: integer, logprob: number}[] with option top_logprobs, best first

-- What stages see: the text is only put together when one asks for it.
local function new_context(self, prompt_ids, n_vocab)
  local ctx = { prompt_ids = prompt_ids, output_ids = self.ids, n_vocab = n_vocab, state = {} }
  return setmetatable(ctx, {
    __index = function(_, key) return key == "text" and table.concat(self.pieces) or nil end,
  })
end

-- The stream keeps the tail of an unfinished character, the filter what may be a stop string.
local function remaining_text(self)
  if not self.stream then return "" end
  local text, stop = self.filter:feed(self.stream:finish())
  self.stop = self.stop or stop
  return text .. self.filter:flush()
end

local function finish(self, reason)
  self.finish_reason = reason
  local text = not self.ended and remaining_text(self) or ""
  if self.stream then self.stream:close() end
  if text ~= "" then return { text = text } end
end

local function fail(self, message, code)
  finish(self, "error")
  return nil, message, code
end

-- Text of a token: "" while it may still become part of a stop string.
local function show(self, id)
  if not self.stream then return "" end
  local piece, message, code = self.stream:step(id)
  if not piece then return nil, message, code end
  local text, stop = self.filter:feed(piece)
  if stop then
    self.stop, self.ended = stop, "stop"
  elseif #self.ids == self.max_tokens then
    text = text .. remaining_text(self)
    self.ended = self.stop and "stop" or "length"
  end
  self.pieces[#self.pieces + 1] = text
  return text
end

local function alternatives(logits, n, id, logprob)
  if n == 0 then return {} end
  local ids, values = logits:topk(n)
  local log_sum = logits:get(id) - logprob
  local top = {}
  for i, other in ipairs(ids) do
    top[i] = { id = other, logprob = other == id and logprob or values[i] - log_sum }
  end
  return top
end

-- Logits that are not finite come from a weight that is not; say which.
local function explain(self, message, code)
  local model = self.session.model
  if code ~= "range" or not model.check_finite then return message end
  local finite, why = model:check_finite()
  return finite and message or ("%s: %s"):format(message, why)
end

local function sample(self)
  local logits, message, code = self.session:logits()
  if not logits then return fail(self, message, code) end
  local id, logprob
  id, logprob, code = self.policy:sample(logits, self.context)
  if not id then return fail(self, explain(self, logprob, code), code) end
  local stop = self.stop_ids[id]
  if stop then
    self.stop_id = id
    self.stop = stop ~= true and stop or nil
    return finish(self, "stop")
  end
  self.policy:accept(id)
  self.ids[#self.ids + 1] = id
  local tok = { id = id, logprob = logprob }
  if self.top_logprobs then
    tok.top = alternatives(logits, self.top_logprobs, id, logprob)
  end
  tok.text, message, code = show(self, id)
  if not tok.text then return fail(self, message, code) end
  self.pending = id
  return tok
end

---The next token; nil at the end, with message and code when the end is a failure.
---@return moonlet.Token? token, string? message, string? code
function Generation:next()
  if self.finish_reason then return nil end
  local session = self.session
  if self.pending then
    local ok, message, code = session:step(self.pending)
    if not ok and code == "cancelled" then return finish(self, "cancelled") end
    if not ok then return fail(self, message, code) end
    self.pending = nil
  end
  if self.ended then return finish(self, self.ended) end
  if #self.ids == self.max_tokens then return finish(self, "length") end
  if session:n_past() >= session:n_ctx() then return finish(self, "context") end
  return sample(self)
end

-- As an iterator there is nobody to take nil, message, code: like io.lines, it raises.
function Generation:__call()
  local tok, message = self:next()
  if not tok and message then error(message, 2) end
  return tok
end

---Ends it early. The session stays as it is.
function Generation:close()
  if not self.finish_reason then
    self.ended = self.ended or "cancelled"
    finish(self, self.ended)
  end
end

Generation.__close = Generation.close

local function open(session, given)
  given = options.check(given, KNOWN)
  local sampling, stops = sampling_options(given), stop_texts(given.stop)
  local tokenizer = session.model.tokenizer
  if not tokenizer and #stops > 0 then
    options.misuse("option 'stop': the model has no tokenizer")
  end
  if session:n_past() == 0 then options.misuse("the session is empty: give it a prompt first") end
  local policy, message, code = make_policy(session, given, sampling)
  if not policy then return nil, message, code end
  local self = setmetatable({
    session = session, policy = policy, ids = {}, pieces = {}, filter = stop_strings.new(stops),
    stop_ids = make_stop_ids(session, given.stop_ids, stops), max_tokens = given.max_tokens,
    top_logprobs = given.top_logprobs,
  }, Generation)
  if tokenizer then
    self.stream, message, code = tokenizer:stream{ skip_special = given.skip_special ~= false }
    if not self.stream then return nil, message, code end
  end
  self.context = new_context(self, session:ids(), tokenizer and tokenizer:n_vocab())
  return self
end

---For the generic for: the generation, which is also its own closing value.
---@param session moonlet.Session
---@param given? moonlet.GenerateOptions and the names of moonlet.sampler.option_names
---@return moonlet.Generation
function generate.tokens(session, given)
  local self, message = open(session, given)
  if not self then error(message, 2) end
  return self, nil, nil, self
end

---Runs a generation to its end.
---@param session moonlet.Session
---@param given? moonlet.GenerateOptions and on_token, called with each token
---@return {text: string, ids: integer[], logprobs: number[], finish_reason: string, stop?: string,
---  stop_id?: integer}? result, string? message, string? code
function generate.collect(session, given)
  local rest = {}
  for key, value in pairs(given or {}) do rest[key] = value end
  local on_token = rest.on_token
  rest.on_token = nil
  local self <close>, message, code = open(session, rest)
  if not self then return nil, message, code end
  local pieces, logprobs = {}, {}
  local tok
  tok, message, code = self:next()
  while tok do
    pieces[#pieces + 1] = tok.text
    logprobs[#logprobs + 1] = tok.logprob
    if on_token then on_token(tok) end
    tok, message, code = self:next()
  end
  if message then return nil, message, code end
  return {
    text = table.concat(pieces), ids = self.ids, logprobs = logprobs,
    finish_reason = self.finish_reason, stop = self.stop, stop_id = self.stop_id,
  }
end

return generate
