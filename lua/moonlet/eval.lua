--- Measuring models: perplexity, and how far a model is from another.
--
-- sequences.lua says what is scored, eval/kld.lua how models are compared.
local options = require "moonlet.options"
local rows = require "moonlet.eval.rows"
local sequences = require "moonlet.sequences"

local eval = {}

local function sum_tensor(tensor)
  local bytes, total = tensor:bytes(), 0
  for at = 1, #bytes, 4 do total = total + string.unpack("<f", bytes, at) end
  return total
end

local function score(model, list, on_progress)
  local nll, tokens, progress = 0, 0, rows.progress(list, on_progress, 1, 1)
  for _, piece in ipairs(rows.passes(model, list)) do
    local layers <close>, message, code = rows.run(model, piece, progress)
    if not layers then return nil, message, code end
    for i, sequence in ipairs(piece) do
      local scored = #rows.targets(sequence)
      nll, tokens = nll + sum_tensor(layers:score(i, sequence.targets)), tokens + scored
      progress(scored)
    end
  end
  return nll, tokens
end

local PERPLEXITY_OPTIONS <const> = { on_progress = "function" }
for key, kind in pairs(sequences.OPTIONS) do PERPLEXITY_OPTIONS[key] = kind end

---@param model moonlet.Model
---@param opts { file?: string, text?: string, chat?: string, window?: integer,
---  windows?: integer[], dialogues?: integer[],
---  on_progress?: fun(done: integer, total: integer) } see sequences.lua
---@return table? result nll (sum, nats), tokens scored, perplexity = exp(nll / tokens), words,
---  word_perplexity = exp(nll / words), notes if there are any
---@return string? message, string? code
function eval.perplexity(model, opts)
  opts = options.check(opts, PERPLEXITY_OPTIONS)
  local list, words, notes = sequences.read(model, opts)
  if not list then return nil, words, notes end
  local nll, tokens, code = score(model, list, opts.on_progress)
  if not nll then return nil, tokens, code end
  if nll ~= nll or nll == math.huge then
    local _, why = model:check_finite()
    return nil, "the model's logits are not finite" .. (why and ": " .. why or ""), "range"
  end
  return {
    nll = nll,
    tokens = tokens,
    perplexity = math.exp(nll / tokens),
    words = words,
    word_perplexity = math.exp(nll / math.max(words, 1)),
    notes = notes,
  }
end

-- Loaded when first used: a script that only scores a text needs none of it.
local parts = { kld = "moonlet.eval.kld", save_logits = "moonlet.eval.kld",
  report = "moonlet.eval.report", sensitivity = "moonlet.eval.sensitivity" }

return setmetatable(eval, {
  __index = function(self, key)
    local part = parts[key] and require(parts[key])[key]
    rawset(self, key, part)
    return part
  end,
})
