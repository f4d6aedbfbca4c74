--- Positions compared: a model's final rows sequence by sequence, and what comparisons add up to.
local json = require "moonlet.json"
local sequences = require "moonlet.sequences"

local rows = {}

-- ---- statistics ---------------------------------------------------------------------------------

-- Between the values around rank q (n - 1), linearly: what numpy and llama.cpp call a percentile.
local function quantile(sorted, q)
  local rank = q * (#sorted - 1)
  local below = math.floor(rank)
  local low, high = sorted[below + 1], sorted[math.min(below + 2, #sorted)]
  return low + (high - low) * (rank - below)
end

---@param values number[]
---@return table statistics mean, mean_error (standard error of the mean), median, p99, p999, max
function rows.statistics(values)
  local n, sum, squares = #values, 0, 0
  for _, v in ipairs(values) do sum = sum + v end
  local mean = sum / n
  for _, v in ipairs(values) do squares = squares + (v - mean) ^ 2 end
  local sorted = table.move(values, 1, n, 1, {})
  table.sort(sorted)
  return {
    mean = mean,
    mean_error = n > 1 and math.sqrt(squares / (n - 1) / n) or 0,
    median = quantile(sorted, 0.5),
    p99 = quantile(sorted, 0.99),
    p999 = quantile(sorted, 0.999),
    max = sorted[n],
  }
end

-- ---- measuring ----------------------------------------------------------------------------------

local function unpack_into(list, tensor, format)
  local bytes, n = tensor:bytes(), #list
  for at = 1, #bytes, 4 do
    n = n + 1
    list[n] = string.unpack(format, bytes, at)
  end
  tensor:close()
end

---Empty columns, one entry per position.
function rows.new()
  return { kl = {}, nll = {}, reference_nll = {}, top = {}, reference_top = {} }
end

-- Positions by the size of their KLD: a fourth of a decade to a bin, from 1e-10 nats to 100.
local LEAST <const>, BINS_PER_DECADE <const>, BINS <const> = -10, 4, 48

---@return { least: integer, bins_per_decade: integer, counts: integer[] } histogram the first bin
---  begins at 10 to the power of `least`, and holds what is smaller, too
function rows.histogram(values)
  local counts = {}
  for i = 1, BINS do counts[i] = 0 end
  for _, v in ipairs(values) do
    local bin = v > 0 and math.floor((math.log(v, 10) - LEAST) * BINS_PER_DECADE) + 1 or 1
    bin = math.max(1, math.min(BINS, bin))
    counts[bin] = counts[bin] + 1
  end
  return { least = LEAST, bins_per_decade = BINS_PER_DECADE, counts = json.array(counts) }
end

local FORMATS <const> = { kl = "<f", nll = "<f", reference_nll = "<f", top = "<i4",
  reference_top = "<i4" }

---Appends what Model:compare returned.
function rows.add(columns, out)
  for name, format in pairs(FORMATS) do unpack_into(columns[name], out[name], format) end
end

---The targets of a sequence that are scored.
function rows.targets(sequence)
  local targets = {}
  for _, id in ipairs(sequence.targets) do
    if id >= 0 then targets[#targets + 1] = id end
  end
  return targets
end

---Logits that are not finite, explained by the weights if those are not.
function rows.explain(message, code, ...)
  for _, model in ipairs { ... } do
    local _, why = model:check_finite()
    if code == "range" and message:find("not finite", 1, true) and why then
      return ("%s: %s: %s"):format(message, model.dir, why), code
    end
  end
  return message, code
end

-- ---- running ------------------------------------------------------------------------------------

-- A pass holds 4 bytes times the hidden size for every token; longer lists take several, each of
-- which reads the checkpoint once.
local PASS_BYTES <const> = 512 << 20

---The list in pieces that one pass takes, in order.
---@param model moonlet.Model
---@param list moonlet.Sequence[]
---@return moonlet.Sequence[][]
function rows.passes(model, list)
  local most = PASS_BYTES // (4 * model:info().config.hidden_size)
  local pieces, tokens = { {} }, 0
  for _, sequence in ipairs(list) do
    if tokens > 0 and tokens + #sequence.ids > most then
      pieces[#pieces + 1], tokens = {}, 0
    end
    local piece = pieces[#pieces]
    piece[#piece + 1] = sequence
    tokens = tokens + #sequence.ids
  end
  return pieces
end

local function ids_of(piece)
  local ids, tokens = {}, 0
  for i, sequence in ipairs(piece) do
    ids[i] = sequence.ids
    tokens = tokens + #sequence.ids
  end
  return ids, tokens
end

-- A function(done, all) of a pass's steps that tells `progress` how many more tokens are done.
local function counter(tokens, progress)
  local reported = 0
  return function(done, all)
    progress(tokens * done // all - reported)
    reported = tokens * done // all
  end
end

---Runs the sequences of one pass.
---@param progress fun(tokens: integer) hears how many more are done
---@return table? layers see Model:layers
---@return string? message, string? code
function rows.run(model, piece, progress)
  local ids, tokens = ids_of(piece)
  local layers, message, code = model:layers(ids)
  if not layers then return nil, message, code end
  local count = counter(tokens, progress)
  local done, all
  repeat
    done, all, code = layers:step()
    if not done then
      layers:close()
      return nil, all, code
    end
    count(done, all)
  until done == all
  return layers
end

local function finals_of(layers, piece)
  local finals = {}
  for i, sequence in ipairs(piece) do finals[i] = layers:final(i, sequence.targets) end
  return finals
end

-- All sequences through the next layer; false when none was left.
local function next_layer(layers, n, count)
  for _ = 1, n do
    local done, all, code = layers:step()
    if not done then return nil, all, code end
    count(done, all)
    if done == all then return false end
  end
  return true
end

local function same_stream(a, b)
  a, b = a:info().config, b:info().config
  return a.num_hidden_layers == b.num_hidden_layers and a.hidden_size == b.hidden_size
end

---Runs the sequences of one pass through both models, side by side.
---@param depths { error: number, power: number }[] sums of squares of what the residual streams
---  differ by and of the reference's, after each layer and after the last norm; added to, unless
---  the models are of different shapes
---@return table[]? finals the model's
---@return table[]|string theirs, string? code
function rows.both(model, reference, piece, progress, depths)
  local ids, tokens = ids_of(piece)
  local mine <close>, message, code = model:layers(ids)
  if not mine then return nil, message, code end
  local theirs <close>, message2, code2 = reference:layers(ids)
  if not theirs then return nil, message2, code2 end
  local count_mine, count_theirs = counter(tokens, progress), counter(tokens, progress)
  local aligned, depth = same_stream(model, reference), 0
  local more_mine, more_theirs = true, true
  while more_mine or more_theirs do
    depth = depth + 1
    if more_theirs then more_theirs, message, code = next_layer(theirs, #piece, count_theirs) end
    if more_theirs == nil then return nil, message, code end
    if more_mine then more_mine, message, code = next_layer(mine, #piece, count_mine) end
    if more_mine == nil then return nil, message, code end
    if aligned then
      local error, power = mine:difference(theirs)
      local sums = depths[depth] or { error = 0, power = 0 }
      depths[depth] = { error = sums.error + error, power = sums.power + power }
    end
  end
  return finals_of(mine, piece), finals_of(theirs, piece)
end

---A model's final rows of every sequence of one pass.
---@return table[]? finals tensors [k, hidden], for Model:compare
---@return string? message, string? code
function rows.finals(model, piece, progress)
  local layers <close>, message, code = rows.run(model, piece, progress)
  if not layers then return nil, message, code end
  return finals_of(layers, piece)
end

---A function(n) that adds up for on_progress(done, total): tokens of `passes` passes over the list,
---and positions that are scored `times` times.
function rows.progress(list, on_progress, passes, times)
  local done, _, total = 0, sequences.lengths(list)
  total = total * passes
  for _, sequence in ipairs(list) do total = total + #rows.targets(sequence) * times end
  return function(n)
    done = done + n
    if on_progress then on_progress(done, total) end
  end
end

-- ---- sums ---------------------------------------------------------------------------------------

local function sum(values)
  local total = 0
  for _, v in ipairs(values) do total = total + v end
  return total
end

---What columns amount to: statistics of the KLD, top1, tokens, nll and perplexity of both.
function rows.summary(columns)
  local result = rows.statistics(columns.kl)
  local same, n = 0, #columns.kl
  for i = 1, n do same = same + (columns.top[i] == columns.reference_top[i] and 1 or 0) end
  result.top1, result.tokens = same / n, n
  result.nll, result.reference_nll = sum(columns.nll), sum(columns.reference_nll)
  result.perplexity = math.exp(result.nll / n)
  result.reference_perplexity = math.exp(result.reference_nll / n)
  return result
end

return rows
