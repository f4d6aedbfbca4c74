--- What the model makes of texts that are given: log-probabilities of their own tokens, and what
--- the last layer puts out, averaged. They wait in the engine's queue, and are read in pieces
--- beside its generations.

local refusal = require "moonlet.server.refusal"

local scoring = {}

-- The score of a text, or nil when the client has left.
local function read(exchange, ids, options)
  local server = exchange.server
  if exchange:is_gone() then return nil end
  if server.engine.is_scripted then
    refusal.raise(400, "scripted answers have no weights to look into")
  end
  local score = server.model:scoring(ids, options)
  local ticket = refusal.check(server.engine:score { ids = ids, score = score })
  local gone = exchange.on_gone
  exchange.on_gone = function()
    ticket:cancel()
    if gone then gone() end
  end
  ticket:wait()
  exchange.on_gone = gone
  if exchange:is_gone() then return nil end
  if ticket.finish_reason == "stop" then return score end
  if server.is_closing then refusal.raise(503, "the server is shutting down") end
  return refusal.raise(500, ticket.message or "the reading was ended")
end

-- Bytes of a score: of a token, and of each of its alternatives.
local TOKEN_BYTES <const>, TOP_BYTES <const> = 12, 8

---@class moonlet.server.Scores
---@field n integer tokens
local Scores = {}
Scores.__index = Scores

---@param i integer
---@param n_top integer how many alternatives, which may have been kept for a longer wish
---@return moonlet.Token token with its `rank` among all; the first has no log-probability
function Scores:at(i, n_top)
  if i == 1 then return { id = self.ids[1], top = {} } end
  local logprob, top_ids, top_logprobs, rank = self.score:at(i)
  local top = {}
  for k = 1, math.min(n_top, #top_ids) do
    top[k] = { id = top_ids[k], logprob = top_logprobs[k] }
  end
  return { id = self.ids[i], logprob = logprob, top = top, rank = rank }
end

---Log-probabilities of a text's tokens by those before them.
---@param exchange moonlet.server.Exchange
---@param ids integer[]
---@param n_top integer how many of the best tokens to list
---@return moonlet.server.Scores? scores nil when the client has left
function scoring.logprobs(exchange, ids, n_top)
  exchange:take(#ids * (TOKEN_BYTES + TOP_BYTES * n_top))
  local score = read(exchange, ids, { top = n_top })
  return score and setmetatable({ score = score, ids = ids, n = #ids }, Scores)
end

---What the last norm puts out, averaged over a text's tokens.
---@param exchange moonlet.server.Exchange
---@param ids integer[]
---@return number[]? mean nil when the client has left
function scoring.mean(exchange, ids)
  local score = read(exchange, ids, { mean = true })
  return score and score:mean()
end

return scoring
