--- A scripted engine: emits given texts as token steps, so that clients can be tried without
--- weights, through everything else that a request meets. Its interface is that of moonlet.engine.
---
--- A script is JSON Lines, one answer per line, taken in turn and from the first again at the end:
---   {"text": "...", "finish_reason": "stop", "delay_ms": 0, "tokens_per_step": 1, "prefill_ms": 0}
--- With finish_reason "error" the answer ends in a failure that "message" describes.

local json = require "moonlet.json"
local options = require "moonlet.options"
local sys = require "moonlet.sys"
local ticket_queue = require "moonlet.ticket"

local replay = {}

---@class moonlet.Replay
local Replay = {}
Replay.__index = Replay

local Ticket = {}
Ticket.__index = Ticket

local MAX_BYTES <const> = 64 << 20 -- of a script

local KNOWN <const> = { text = true, finish_reason = true, message = true, delay_ms = true,
  prefill_ms = true, tokens_per_step = true }
local REASONS <const> = { stop = true, length = true, error = true }

local function check_number(line, name, default, min)
  local value = line[name]
  if value == nil then return default end
  if type(value) ~= "number" or not (value >= min and value < math.huge) then
    return nil, ("%s: a finite number from %d expected"):format(name, min)
  end
  return value
end

local function read_answer(line, place)
  local message
  if not json.is_object(line) or type(line.text) ~= "string" then
    return nil, place .. ': an object with "text" expected', "format"
  end
  for name in pairs(line) do
    if not KNOWN[name] then
      return nil, ("%s: unknown field '%s'"):format(place, tostring(name)), "format"
    end
  end
  local answer = { text = line.text, finish_reason = line.finish_reason or "stop",
    message = type(line.message) == "string" and line.message or nil }
  if not REASONS[answer.finish_reason] then
    return nil, place .. ": finish_reason: stop, length or error expected", "format"
  end
  for name, from in pairs { delay_ms = 0, prefill_ms = 0, tokens_per_step = 1 } do
    answer[name], message = check_number(line, name, from, from)
    if not answer[name] then return nil, ("%s: %s"):format(place, message), "format" end
  end
  return answer
end

local function read_line(text, place)
  local line, message = json.decode(text, { name = place })
  if line == nil then return nil, message, "format" end
  return read_answer(line, place)
end

---@param path string
---@return table[]? answers, string? message, string? code
function replay.read(path)
  local text, message, code = sys.read_file(path, MAX_BYTES)
  if not text then return nil, message, code end
  local answers, n = {}, 0
  for line in text:gmatch("[^\n]*") do
    n = n + 1
    if line:find("%S") then
      answers[#answers + 1], message, code = read_line(line, ("%s:%d"):format(path, n))
      if message then return nil, message, code end
    end
  end
  if #answers == 0 then return nil, path .. ": no answers in it", "format" end
  return answers
end

---A script, from wherever it comes.
---@param given string|table path of a file, or answers: texts, or tables like the lines of a file
---@return table[]? answers, string? message, string? code
function replay.answers(given)
  if type(given) == "string" then return replay.read(given) end
  local answers = {}
  for i, one in ipairs(given) do
    local line = type(one) == "string" and { text = one } or one
    local message, code
    answers[i], message, code = read_answer(line, "answer " .. i)
    if not answers[i] then return nil, message, code end
  end
  if #answers == 0 then return nil, "a script without answers", "format" end
  return answers
end

local OPTIONS <const> = { ctx = "integer", queue = "integer" }
local DEFAULT_CTX <const> = 32768

---@param model moonlet.Model needs a tokenizer only
---@param loop moonlet.Loop
---@param answers table[] as of read()
---@param given { ctx: integer?, queue: integer? }?
---@return moonlet.Replay
function replay.open(model, loop, answers, given)
  local o = options.check(given, OPTIONS)
  return setmetatable({ model = model, loop = loop, answers = answers, at = 0,
    is_scripted = true, n_ctx = o.ctx or DEFAULT_CTX, n_max = o.queue or 64, n = 0,
    idle = loop:signal(),
    stats = { prompt_tokens = 0, cached_tokens = 0, generated_tokens = 0, batches = 0 } }, Replay)
end

---@return integer active, integer waiting
function Replay:load()
  return self.n, 0
end

---@return boolean
function Replay:is_full()
  return self.n >= self.n_max
end

---@return number
function Replay.cache_usage()
  return 0.0
end

local function end_ticket(ticket, reason, message)
  if ticket.finish_reason then return end
  ticket.finish_reason, ticket.message = reason, message
  ticket.changed:notify()
  ticket.ended:notify()
end

local function push(ticket, id, text)
  ticket:push { id = id, text = text, logprob = 0.0,
    top = ticket.top and { { id = id, logprob = 0.0 } } }
end

-- What the answer takes of time, unless nobody waits for it any more.
local function pause(ticket, ms)
  if ms > 0 and not ticket.finish_reason then ticket.ended:wait(ms / 1000) end
end

-- Tokens after which others have their turn where an answer takes no time.
local STRETCH <const> = 32

-- Emits an answer, in a coroutine.
local function play(self, ticket, answer)
  local ids = self.model:encode(answer.text)
  local stream <close> = self.model.tokenizer:stream { skip_special = false }
  local n = math.min(#ids, ticket.max_tokens)
  pause(ticket, answer.prefill_ms)
  local per_step = math.tointeger(answer.tokens_per_step // 1)
  for i = 1, n do
    if ticket.finish_reason then break end
    local text = stream:step(ids[i])
    if i == n then text = text .. stream:finish() end
    push(ticket, ids[i], text)
    self.stats.generated_tokens = self.stats.generated_tokens + 1
    if i % per_step == 0 or i == n then
      ticket.changed:notify()
      pause(ticket, answer.delay_ms)
    end
    if i % STRETCH == 0 then self.loop:sleep(0) end
  end
  end_ticket(ticket, n < #ids and "length" or answer.finish_reason, answer.message)
  self.n = self.n - 1
  if self.n == 0 then self.idle:notify() end
end

---As Engine:submit; of the options only max_tokens and top_logprobs count.
function Replay:submit(given)
  if #given.ids >= self.n_ctx then
    return nil, ("a prompt of %d tokens leaves no room in a context of %d"):format(#given.ids,
      self.n_ctx), "limit"
  end
  if self:is_full() then return nil, "too many requests wait", "busy" end
  self.n = self.n + 1
  self.at = self.at % #self.answers + 1
  local o = given.options or {}
  local ticket = setmetatable({ ids = given.ids, queue = ticket_queue.queue(), reused = 0,
    evaluated = #given.ids, changed = self.loop:signal(), ended = self.loop:signal(),
    max_tokens = o.max_tokens or math.maxinteger,
    top = (o.top_logprobs or 0) > 0 }, Ticket)
  self.stats.prompt_tokens = self.stats.prompt_tokens + #given.ids
  self.loop:spawn(play, self, ticket, self.answers[self.at])
  return ticket
end

Ticket.push, Ticket.next, Ticket.tokens = ticket_queue.push, ticket_queue.next,
  ticket_queue.tokens

function Ticket:cancel()
  end_ticket(self, "cancelled")
end

---@param seconds number?
---@return boolean idle
function Replay:drain(seconds)
  if self.n == 0 then return true end
  return self.idle:wait(seconds)
end

function Replay.close()
end

return replay
