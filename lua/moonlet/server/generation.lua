--- What every dialect shares: answers to neutral requests, as parts in the order they come.
---
---   local run = generation.begin(exchange, { wanted })   -- refuses what cannot be served
---   run:each(function(choice, part) ... end)             -- in a coroutine, until all have ended
---
--- Parts are those of moonlet.turn (reasoning, content, call, call_start, call_arguments,
--- unfinished) and, last of each choice, { kind = "end", reason =, stop_reason =, message = }.

local hooks = require "moonlet.server.hooks"
local packed = require "moonlet.server.packed"
local refusal = require "moonlet.server.refusal"
local sampling = require "moonlet.server.sampling"
local stops = require "moonlet.stops"
local sys = require "moonlet.sys"
local turn = require "moonlet.turn"

local generation = {}

local BUSY_WAIT <const> = 0.05 -- seconds, of further choices when the queue is full
local THINK_END <const> = "\n</think>\n\n"

---@class moonlet.server.Wanted
---@field prompt moonlet.Prompt or moonlet.server.Text
---@field reading moonlet.turn.options? without them all text is content
---@field sampling moonlet.server.Sampling
---@field n integer choices; 0: the prompt is only counted
---@field max_tokens integer? as many as there is room for
---@field logprobs integer? alternatives to list; nil: none are wanted
---@field thinking_budget integer? tokens of reasoning
---@field policy table? that the request has named
---@field hide_reasoning boolean? its tokens are not listed
---@field is_whole boolean? what is listed is kept until the answer is written

---@class moonlet.server.Choice
---@field index integer from 0, over all wanted
---@field wanted moonlet.server.Wanted
---@field ids integer[] sampled so far
---@field n_reasoning integer of them
---@field n_calls integer complete ones
---@field entries string[] packed tokens whose log-probabilities nobody has taken yet
---@field n_listed integer bytes of these
---@field held moonlet.server.Message? what a hook is going to see before the client
local Choice = {}
Choice.__index = Choice

---Tokens since the last time, for logprobs.
---@return string[] of moonlet.server.packed
function Choice:take_entries()
  local entries = self.entries
  if not self.wanted.is_whole then self.run.exchange:let_go(self.n_listed) end
  self.entries, self.n_listed = {}, 0
  return entries
end

local function keep_listed(self, token)
  local entry, bytes = packed.pack(token), packed.bytes(#(token.top or {}))
  self.run.exchange:take(bytes)
  self.entries[#self.entries + 1], self.n_listed = entry, self.n_listed + bytes
end

-- ---- the text of a choice ----------------------------------------------------------------------

local function emit(self, part)
  if part.kind == "call" then
    self.n_calls = self.n_calls + 1
    self.call_id = self.call_id or part.id
  end
  self.run.emit(self, part)
end

local HELD_AS <const> = { reasoning = "reasoning", content = "content", unfinished = "content" }

-- Hands a part out, or keeps it for the hook.
local function give(self, part)
  local held, name = self.held, HELD_AS[part.kind]
  if not held then
    emit(self, part)
  elseif name then
    held[name] = (held[name] or "") .. part.text
  elseif part.kind == "call" then
    held.calls[#held.calls + 1] = { id = part.id, name = part.name, arguments = part.arguments }
  end
end

-- The whole answer, as the hook wants it.
local function give_held(self, reason)
  local held = self.held
  if not held then return end
  held.finish_reason = reason
  local message = self.run.server.hooks:response(held, self.wanted.sampling.request)
  for _, kind in ipairs { "reasoning", "content" } do
    if message[kind] then emit(self, { kind = kind, text = message[kind] }) end
  end
  for i, one in ipairs(message.calls or {}) do
    emit(self, { kind = "call", index = i - 1, id = one.id, name = one.name,
      arguments = one.arguments, text = "" })
  end
end

local function stop_at(self, stop)
  self.stop, self.stopped = stop, true
  self.ticket:cancel()
end

-- Content passes the stop strings; what is no content lets go what they hold back.
local function pass(self, parts)
  for _, part in ipairs(parts) do
    if self.stopped then return end
    if part.kind == "content" then
      local text, stop = self.filter:feed(part.text)
      if stop and self.wanted.sampling.include_stop then text = text .. stop end
      if text ~= "" then give(self, { kind = "content", text = text }) end
      if stop then stop_at(self, stop) end
    else
      local held = self.filter:flush()
      if held ~= "" then give(self, { kind = "content", text = held }) end
      give(self, part)
    end
  end
end

local function read(self, text)
  if self.reader then return self.reader:feed(text) end
  return text ~= "" and { { kind = "content", text = text } } or {}
end

local function take(self, token)
  if token.id then
    if self.run.server.hooks:ends(token, self.wanted.sampling.request) then
      self.ended_by = "on_token"
      return self.ticket:cancel()
    end
    self.ids[#self.ids + 1] = token.id
    local reasoning = self.reader and self.reader:in_reasoning()
    if reasoning then self.n_reasoning = self.n_reasoning + 1 end
    if self.wanted.logprobs and not (reasoning and self.wanted.hide_reasoning) then
      keep_listed(self, token)
    end
    self.run:saw_token(self)
  end
  self.pieces[#self.pieces + 1] = token.text
  pass(self, read(self, token.text))
end

-- ---- the end of a choice -----------------------------------------------------------------------

local REASONS <const> = { stop = "stop", length = "length", context = "length" }

-- Stages of a policy are the operator's, as hooks are: what they raise, and when they leave nothing
-- to draw from, is no failure that a client should try again.
local function failure(self)
  local ticket, wanted = self.ticket, self.wanted
  local message, code = ticket.message or "the generation was ended", ticket.code
  if wanted.policy and #wanted.policy > 0 and (code == "raised" or code == "range") then
    message, code = hooks.explain_policy(self.run.server, wanted.policy_name, message)
  end
  return { kind = "end", reason = "error", code = code, message = message }
end

local function end_part(self)
  local ticket = self.ticket
  local stop = self.ended_by or self.stopped and self.stop
  if stop then return { kind = "end", reason = "stop", stop_reason = stop } end
  local reason = REASONS[ticket.finish_reason]
  if not reason then return failure(self) end
  local asked
  for _, id in ipairs(self.wanted.sampling.stop_ids) do
    if id == ticket.stop_id then asked = id end
  end
  return { kind = "end", reason = reason, stop_reason = asked }
end

-- A turn that clients send back is worth knowing by its tokens. One cut at a stop string is not
-- what was sampled.
local function remember(self)
  local prompts, prompt = self.run.server.prompts, self.wanted.prompt
  if self.reader and not self.stopped and REASONS[self.ticket.finish_reason] then
    prompts:remember(prompt, self.ids, table.concat(self.pieces), self.call_id)
  end
end

local function finish(self)
  if not self.stopped and self.reader then
    pass(self, self.reader:finish(REASONS[self.ticket.finish_reason] or "length"))
  end
  if not self.stopped then
    local held = self.filter:flush()
    if held ~= "" then give(self, { kind = "content", text = held }) end
  end
  remember(self)
  local ended = end_part(self)
  if ended.reason ~= "error" then give_held(self, ended.reason) end
  self.ended = ended
  emit(self, ended)
end

-- ---- runs --------------------------------------------------------------------------------------

---@class moonlet.server.Run
---@field choices moonlet.server.Choice[]
local Run = {}
Run.__index = Run

-- Queues a choice; nil when too many wait.
local function submit(self, choice)
  local wanted, server = choice.wanted, self.server
  local ids, stages = wanted.prompt.ids, {}
  if wanted.thinking_budget and choice.reader then
    stages[1] = sampling.thinking_stage(wanted.thinking_budget, server.model:encode(THINK_END),
      choice.reader)
  end
  local room = server.engine.n_ctx - #ids
  local ticket, message, code = server.engine:submit {
    ids = ids, keep_at = wanted.prompt.keep_at,
    options = sampling.options(wanted.sampling, server.model, { choice = choice.sub,
      max_tokens = math.min(wanted.max_tokens or room, room), logprobs = wanted.logprobs,
      stages = stages, policy = wanted.policy }),
  }
  if not ticket and code ~= "busy" then refusal.check(ticket, message, code) end
  choice.ticket = ticket
  return ticket
end

---Refuses a prompt that is empty or leaves no room for an answer.
---@param server moonlet.Server
---@param prompt moonlet.Prompt|moonlet.server.Text
---@param param string the field that it comes from
function generation.check_room(server, prompt, param)
  local n, n_ctx = prompt.n, server.engine.n_ctx
  if n == 0 then
    refusal.raise(400, param .. ": a text expected that is not empty", { param = param })
  end
  if n < n_ctx then return end
  refusal.raise(400, ("This model's maximum context length is %d tokens. However, your request "
    .. "has %d input tokens."):format(n_ctx, n), { code = "context_length_exceeded" })
end

-- Answers that are written at once keep what they list until then.
local function check_listed(server, wanted_list)
  local bytes, most = 0, server.limits.decoded_bytes
  for _, wanted in ipairs(wanted_list) do
    local room = server.engine.n_ctx - wanted.prompt.n
    if wanted.logprobs and wanted.is_whole then
      bytes = bytes + wanted.n * math.min(wanted.max_tokens or room, room)
        * packed.bytes(wanted.logprobs)
    end
  end
  if bytes > most then
    refusal.raise(400, ("log-probabilities of that many tokens may take %d bytes, more than %d: "
      .. "fewer tokens, choices or alternatives expected, or a stream"):format(bytes, most),
      { param = "max_tokens" })
  end
end

---Queues the first choice of everything wanted; the others follow when its prompt has been read,
---so that they need not read it again.
---@param exchange moonlet.server.Exchange
---@param wanted_list moonlet.server.Wanted[]
---@return moonlet.server.Run
function generation.begin(exchange, wanted_list)
  local server = exchange.server
  local self = setmetatable({ exchange = exchange, server = server, list = wanted_list,
    choices = {}, began = sys.seconds(), changed = server.loop:signal() }, Run)
  for _, wanted in ipairs(wanted_list) do
    generation.check_room(server, wanted.prompt, "prompt")
  end
  check_listed(server, wanted_list)
  for _, wanted in ipairs(wanted_list) do
    for i = 1, wanted.n do
      local choice = setmetatable({ run = self, index = #self.choices, sub = i - 1,
        wanted = wanted, ids = {}, pieces = {}, entries = {}, n_listed = 0,
        n_reasoning = 0, n_calls = 0,
        filter = stops.new(wanted.sampling.stop),
        held = server.hooks.on_response and { calls = {} } or nil,
        reader = wanted.reading and turn.reader(wanted.reading) }, Choice)
      if i == 1 then
        wanted.first = choice
        wanted.policy, wanted.policy_name = hooks.find_policy(server, wanted.sampling.request)
      end
      self.choices[#self.choices + 1] = choice
    end
  end
  for _, wanted in ipairs(wanted_list) do
    if wanted.first and not submit(self, wanted.first) then
      self:cancel()
      refusal.raise_busy("too many requests wait; try again")
    end
  end
  return self
end

---Begins what a request wants; it ends when the client leaves.
---@param exchange moonlet.server.Exchange
---@param list moonlet.server.Wanted[]
---@return moonlet.server.Run
function generation.serve(exchange, list)
  -- Its text may have taken long to tokenize. Nobody reads the answer.
  if exchange:is_gone() then refusal.raise(499, "the client has left") end
  local run = generation.begin(exchange, list)
  exchange:is_read()
  exchange.on_gone = function() run:cancel() end
  return run
end

---@private
function Run:saw_token(choice)
  local now, metrics = sys.seconds(), self.server.metrics
  if choice.last_token then
    metrics:observe("inter_token_latency_seconds", now - choice.last_token)
  else
    metrics:observe("time_to_first_token_seconds", now - self.began)
    self.changed:notify()
  end
  choice.last_token = now
end

-- Waits until a further choice finds its prompt kept and a place in the queue.
local function join(self, choice)
  local first = choice.wanted.first
  while not (first.last_token or first.ended) do
    if self.cancelled then return false end
    self.changed:wait()
  end
  while not self.cancelled and not submit(self, choice) do self.server.loop:sleep(BUSY_WAIT) end
  return not self.cancelled
end

local function run_choice(self, choice)
  if not choice.ticket and not join(self, choice) then
    choice.ended = { kind = "end", reason = "error", message = "cancelled" }
    return
  end
  for token in choice.ticket:tokens() do
    if choice.stopped or choice.ended_by then break end
    take(choice, token)
  end
  finish(choice)
  local reason = choice.ended.reason
  self.server.metrics:ended(self.cancelled and reason == "error" and "abort" or reason,
    sys.seconds() - self.began)
end

local function guarded(self, choice)
  local ok, problem = xpcall(run_choice, function(e)
    return refusal.is(e) and e or debug.traceback(tostring(e), 2)
  end, self, choice)
  if not ok then
    self.problem = self.problem or problem
    self:cancel()
  end
  self.open = self.open - 1
  choice.ended = choice.ended or { kind = "end", reason = "error" }
  self.changed:notify()
end

---Runs until every choice has ended.
---@param emit_part fun(choice: moonlet.server.Choice, part: table)
---@param idle? fun(): number called while nothing happens; answers after how many seconds again
function Run:each(emit_part, idle)
  self.emit = emit_part
  self.open = #self.choices
  for _, choice in ipairs(self.choices) do self.server.loop:spawn(guarded, self, choice) end
  while self.open > 0 do self.changed:wait(idle and idle()) end
  if self.problem then error(self.problem, 0) end
end

-- The failure of a choice, as a refusal unless it is the server's own.
local function raise_failure(ended, is_closing)
  if is_closing then refusal.raise(503, "the server is shutting down") end
  if ended.code == "hook_failed" then refusal.raise(422, ended.message, { code = ended.code }) end
  if ended.code == "raised" then error(ended.message, 0) end
  refusal.raise(500, ended.message)
end

---Runs until every choice has ended, and raises the failure of one.
---@param exchange moonlet.server.Exchange
---@param emit_part fun(choice: moonlet.server.Choice, part: table)
---@param idle? fun(): number see each
---@return boolean is_read false when the client has gone
function Run:answer(exchange, emit_part, idle)
  self:each(emit_part, idle)
  if exchange:is_gone() then return false end
  for _, choice in ipairs(self.choices) do
    if choice.ended.reason == "error" then
      raise_failure(choice.ended, self.server.is_closing)
    end
  end
  return true
end

---Ends everything; what was evaluated stays for the next request that begins alike.
function Run:cancel()
  self.cancelled = true
  for _, choice in ipairs(self.choices) do
    if choice.ticket then choice.ticket:cancel() end
  end
  self.changed:notify()
end

---An id that no other reply has.
---@param prefix string
---@return string
function generation.new_id(prefix)
  return ("%s%016x%08x"):format(prefix, math.random(0), math.random(0, 0xFFFFFFFF))
end

---What a client calls the model; one is served whatever its name.
---@param f moonlet.server.Fields
---@param server moonlet.Server
---@return string
function generation.model_name(f, server)
  return f:string("model") or server.name
end

---@class moonlet.server.Usage
---@field prompt integer
---@field cached integer
---@field completion integer
---@field reasoning integer

---@return moonlet.server.Usage so far
function Run:usage()
  local usage = { prompt = 0, cached = 0, completion = 0, reasoning = 0 }
  for _, wanted in ipairs(self.list) do
    usage.prompt = usage.prompt + wanted.prompt.n
    local ticket = wanted.first and wanted.first.ticket
    usage.cached = usage.cached + (ticket and ticket.reused or 0)
  end
  for _, choice in ipairs(self.choices) do
    usage.completion = usage.completion + #choice.ids
    usage.reasoning = usage.reasoning + choice.n_reasoning
  end
  return usage
end

return generation
