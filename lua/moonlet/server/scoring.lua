--- What the model makes of texts that are given: log-probabilities of their own tokens, and what
--- the last layer puts out, averaged.
---
--- Texts are read in pieces between the engine's batches, one text at a time, so that generations
--- go on beside it.

local refusal = require "moonlet.server.refusal"

local scoring = {}

-- Tokens; others wait for their next one as long as a piece takes.
local PIECE <const>, PIECE_OF_STEPS <const> = 64, 8
local MAX_WAITING <const> = 64 -- texts

---@class moonlet.server.Scoring
local Scoring = {}
Scoring.__index = Scoring

---@param server moonlet.Server
---@param session_options table of Model:session
---@return moonlet.server.Scoring
function scoring.new(server, session_options)
  return setmetatable({ server = server, session_options = session_options,
    free = server.loop:signal(), is_busy = false, n_waiting = 0 }, Scoring)
end

local function floats(tensor, format)
  local bytes, list = tensor:bytes(), {}
  for i = 1, #bytes // 4 do list[i] = string.unpack(format, bytes, 4 * i - 3) end
  tensor:close()
  return list
end

local function each_piece(engine, session, ids, is_over, read, size)
  for first = 1, #ids, size do
    if is_over() then return end
    local piece = table.move(ids, first, math.min(first + size - 1, #ids), 1, {})
    refusal.check(engine:between(read, session, piece, first))
  end
end

-- Runs read(session, piece, first) over all pieces of ids; stops early when is_over() says so. The
-- session is closed between batches, too: closing one ends a batch that is being evaluated.
local function in_pieces(self, ids, is_over, read, size)
  local engine, model = self.server.engine, self.server.model
  local options = { ctx = #ids, kv = self.session_options.kv }
  local session = refusal.check(engine:between(function() return model:session(options) end))
  local ok, problem = pcall(each_piece, engine, session, ids, is_over, read, size)
  engine:between(session.close, session)
  if not ok then error(problem, 0) end
end

-- One text at a time: each has a session of its own.
local function exclusively(self, fn, ...)
  if self.server.engine.is_scripted then
    refusal.raise(400, "scripted answers have no weights to look into")
  end
  if self.n_waiting == MAX_WAITING then
    refusal.raise_busy("too many texts wait to be read; try again")
  end
  self.n_waiting = self.n_waiting + 1
  while self.is_busy do self.free:wait() end
  self.is_busy, self.n_waiting = true, self.n_waiting - 1
  local results = table.pack(xpcall(fn, function(problem)
    return refusal.is(problem) and problem or debug.traceback(tostring(problem), 2)
  end, self, ...))
  self.is_busy = false
  self.free:notify()
  if not results[1] then error(results[2], 0) end
  return table.unpack(results, 2, results.n)
end

-- ---- log-probabilities -------------------------------------------------------------------------

-- The tokens that should follow each of a piece; none behind the last one of all.
local function targets_of(ids, first, n)
  local targets = {}
  for i = 1, n do targets[i] = ids[first + i] or -1 end
  return targets
end

local READERS <const> = {}

-- Only the tokens themselves.
READERS[0] = function(model, ids, entries) -- luacheck: no unused args
  return function(session, piece, first)
    local nll, message, code = session:score(piece, targets_of(ids, first, #piece))
    if not nll then return nil, message, code end
    for i, x in ipairs(floats(nll, "<f")) do
      local at = first + i
      if ids[at] then entries[at] = { id = ids[at], logprob = -x, top = {} } end
    end
    return true
  end
end

-- And the best token of each place.
READERS[1] = function(model, ids, entries)
  return function(session, piece, first)
    local targets, n = targets_of(ids, first, #piece), #piece
    if targets[n] < 0 then n = n - 1 end
    local final, message, code = session:final(piece, targets)
    if not final then return nil, message, code end
    local wanted = table.move(targets, 1, n, 1, {})
    if n == 0 then return true end
    local own, best
    own, message, code = model:compare(final, model, final, wanted)
    if not own then return nil, message, code end
    local top = floats(own.top, "<i4")
    best, message, code = model:compare(final, model, final, top)
    if not best then return nil, message, code end
    local nll, best_nll = floats(own.nll, "<f"), floats(best.nll, "<f")
    for i = 1, n do
      entries[first + i] = { id = wanted[i], logprob = -nll[i],
        top = { { id = top[i], logprob = -best_nll[i] } } }
    end
    return true
  end
end

-- And several: a step for each token.
local function read_steps(ids, entries, n_top)
  return function(session, piece, first)
    for i, id in ipairs(piece) do
      local ok, message, code = session:step(id)
      if not ok then return nil, message, code end
      local target = ids[first + i]
      if target then
        local logits = session:logits()
        local logprob = logits:logprob(target)
        local log_sum, top = logits:get(target) - logprob, {}
        local best, values = logits:topk(n_top)
        for k, other in ipairs(best) do top[k] = { id = other, logprob = values[k] - log_sum } end
        entries[first + i] = { id = target, logprob = logprob, top = top }
      end
    end
    return true
  end
end

local function read_logprobs(self, ids, n_top, is_over)
  local entries = {}
  local make = READERS[n_top]
  if make then
    in_pieces(self, ids, is_over, make(self.server.model, ids, entries), PIECE)
  else
    in_pieces(self, ids, is_over, read_steps(ids, entries, n_top), PIECE_OF_STEPS)
  end
  return entries
end

---Log-probabilities of a text's tokens by those before them.
---@param ids integer[]
---@param n_top integer how many of the best tokens to list
---@param is_over fun(): boolean whether nobody wants them any more
---@return table<integer, moonlet.Token> entries from the second token on
function Scoring:logprobs(ids, n_top, is_over)
  return exclusively(self, read_logprobs, ids, n_top, is_over)
end

-- ---- embeddings --------------------------------------------------------------------------------

local function read_mean(self, ids, is_over)
  local sums = {}
  in_pieces(self, ids, is_over, function(session, piece)
    local targets = {}
    for i = 1, #piece do targets[i] = 0 end
    local final, message, code = session:final(piece, targets)
    if not final then return nil, message, code end
    local values = floats(final, "<f")
    local hidden = #values // #piece
    for i = 1, hidden do
      local sum = sums[i] or 0.0
      for at = i, #values, hidden do sum = sum + values[at] end
      sums[i] = sum
    end
    return true
  end, PIECE)
  for i, sum in ipairs(sums) do sums[i] = sum / #ids end
  return sums
end

---What the last norm puts out, averaged over a text's tokens.
---@param ids integer[]
---@param is_over fun(): boolean
---@return number[]
function Scoring:mean(ids, is_over)
  return exclusively(self, read_mean, ids, is_over)
end

return scoring
