--- How far a model's predictions are from a reference's: KL(reference || model) in nats at every
-- scored position, over the whole vocabulary.
local options = require "moonlet.options"
local reference_file = require "moonlet.reference"
local sequences = require "moonlet.eval.sequences"

local kld = {}

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
function kld.statistics(values)
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

local function new_rows()
  return { kl = {}, nll = {}, reference_nll = {}, top = {}, reference_top = {} }
end

local FORMATS <const> = { kl = "<f", nll = "<f", reference_nll = "<f", top = "<i4",
  reference_top = "<i4" }

local function add_rows(rows, out)
  for name, format in pairs(FORMATS) do unpack_into(rows[name], out[name], format) end
end

local function scored_targets(sequence)
  local targets = {}
  for _, id in ipairs(sequence.targets) do
    if id >= 0 then targets[#targets + 1] = id end
  end
  return targets
end

-- A model's final rows of one sequence.
local function final_of(session, sequence)
  session:reset()
  return session:final(sequence.ids, sequence.targets)
end

-- Logits that are not finite, explained by the weights if those are not.
local function explain(message, code, ...)
  for _, model in ipairs { ... } do
    local _, why = model:check_finite()
    if code == "range" and message:find("not finite", 1, true) and why then
      return ("%s: %s: %s"):format(message, model.dir, why), code
    end
  end
  return message, code
end

local function open_session(model, list)
  return model:session { ctx = (sequences.lengths(list)) }
end

-- Every sequence through both; `reference` a model.
local function against_model(model, reference, list, progress)
  local mine <close>, message, code = open_session(model, list)
  if not mine then return nil, message, code end
  local theirs <close>, message2, code2 = open_session(reference, list)
  if not theirs then return nil, message2, code2 end
  local rows = new_rows()
  for _, sequence in ipairs(list) do
    local p, q, out
    p, message, code = final_of(theirs, sequence)
    if not p then return nil, message, code end
    q, message, code = final_of(mine, sequence)
    if not q then return nil, message, code end
    out, message, code = model:compare(q, reference, p, scored_targets(sequence))
    if not out then return nil, explain(message, code, reference, model) end
    add_rows(rows, out)
    p:close()
    q:close()
    progress(sequence)
  end
  return rows
end

-- Every sequence through the model; `file` knows what the reference said.
local function against_file(model, file, list, progress)
  local session <close>, message, code = open_session(model, list)
  if not session then return nil, message, code end
  local rows, at = new_rows(), 1
  for _, sequence in ipairs(list) do
    local targets = scored_targets(sequence)
    local q, out
    q, message, code = final_of(session, sequence)
    if not q then return nil, message, code end
    out, message, code = model:compare(q, file, at, targets)
    if not out then return nil, explain(message, code, model) end
    add_rows(rows, out)
    q:close()
    at = at + #targets
    progress(sequence)
  end
  return rows
end

local function reporter(list, on_progress)
  local done, _, total = 0, sequences.lengths(list)
  return function(sequence)
    done = done + #sequence.ids
    if on_progress then on_progress(done, total) end
  end
end

-- ---- texts --------------------------------------------------------------------------------------

local function same_list(a, b)
  if #a ~= #b then return false end
  for i = 1, #a do
    if a[i] ~= b[i] then return false end
  end
  return true
end

-- nil, or which sequence is not the same in two lists.
local function difference(a, b)
  for i = 1, math.max(#a, #b) do
    if not (a[i] and b[i] and same_list(a[i].ids, b[i].ids)
      and same_list(a[i].targets, b[i].targets)) then
      return i
    end
  end
end

local function file_sequences(file)
  local ids, targets, lengths = file:texts()
  local list, at = {}, 0
  for i, n in ipairs(lengths) do
    list[i] = { ids = table.move(ids, at + 1, at + n, 1, {}),
      targets = table.move(targets, at + 1, at + n, 1, {}) }
    at = at + n
  end
  return list
end

-- What is scored. Both tokenizers must agree on it, or positions would not correspond.
local function model_sequences(model, reference, opts)
  local reader = model.tokenizer and model or reference
  local list, words, code = sequences.read(reader, opts)
  if not list then return nil, words, code end
  if reference ~= reader and reference.tokenizer then
    local other, message
    other, message, code = sequences.read(reference, opts)
    if not other then return nil, message, code end
    local i = difference(list, other)
    if i then
      return nil, ("%s reads sequence %d as other tokens than %s"):format(reference.dir, i,
        model.dir), "range"
    end
  end
  return list, words
end

local function check_file_sequences(model, path, list, opts)
  if not sequences.given(opts) then return true end
  local given, message, code = sequences.read(model, opts)
  if not given then return nil, message, code end
  local i = difference(given, list)
  if not i then return true end
  return nil, ("%s: sequence %d is not the same tokens as in the text given"):format(path, i),
    "range"
end

-- ---- results ------------------------------------------------------------------------------------

local function per_position(list, rows)
  local out, at = {}, 0
  for s, sequence in ipairs(list) do
    for i, target in ipairs(sequence.targets) do
      if target >= 0 then
        at = at + 1
        out[at] = { sequence = s, position = i, token = target, kld = rows.kl[at],
          nll = rows.nll[at], reference_nll = rows.reference_nll[at], top = rows.top[at],
          reference_top = rows.reference_top[at] }
      end
    end
  end
  return out
end

local function sum(values)
  local total = 0
  for _, v in ipairs(values) do total = total + v end
  return total
end

local function result_of(list, rows, words, want_positions)
  local result = kld.statistics(rows.kl)
  local same, n = 0, #rows.kl
  for i = 1, n do same = same + (rows.top[i] == rows.reference_top[i] and 1 or 0) end
  local nll, reference_nll = sum(rows.nll), sum(rows.reference_nll)
  result.top1 = same / n
  result.tokens, result.words = n, words
  result.nll, result.reference_nll = nll, reference_nll
  result.perplexity = math.exp(nll / n)
  result.reference_perplexity = math.exp(reference_nll / n)
  if want_positions then result.positions = per_position(list, rows) end
  return result
end

-- ---- public -------------------------------------------------------------------------------------

local function with_sequences(known)
  for key, kind in pairs(sequences.OPTIONS) do known[key] = kind end
  return known
end

local KLD_OPTIONS <const> = with_sequences { reference = "table", reference_logits = "string",
  positions = "boolean", on_progress = "function" }
local SAVE_OPTIONS <const> = with_sequences { out = "string", on_progress = "function" }

local function compare_with_file(model, opts)
  local file <close>, message, code = reference_file.open(opts.reference_logits)
  if not file then return nil, message, code end
  local list = file_sequences(file)
  local same, rows
  same, message, code = check_file_sequences(model, opts.reference_logits, list, opts)
  if not same then return nil, message, code end
  rows, message, code = against_file(model, file, list, reporter(list, opts.on_progress))
  if not rows then return nil, message, code end
  local info = file:info()
  local result = result_of(list, rows, math.tointeger(info.words) or 0, opts.positions)
  result.reference = info.model
  return result
end

---KL(reference || model) and what goes with it.
---@param model moonlet.Model
---@param opts { reference?: moonlet.Model, reference_logits?: string, file?: string,
---  text?: string, chat?: string, window?: integer, windows?: integer[], dialogues?: integer[],
---  positions?: boolean, on_progress?: fun(done: integer, total: integer) }
---  a reference or the file of its logits, which knows its text; what is scored as for perplexity
---@return table? result mean, mean_error, median, p99, p999, max of the KLD; top1 (share of
---  positions where both prefer the same token); tokens, words; nll, reference_nll (sums),
---  perplexity, reference_perplexity; reference (name); positions: a list of sequence, position,
---  token, kld, nll, reference_nll, top, reference_top
---@return string? message, string? code
function kld.kld(model, opts)
  opts = options.check(opts, KLD_OPTIONS)
  if (opts.reference == nil) == (opts.reference_logits == nil) then
    options.misuse("one of reference and reference_logits expected")
  end
  if opts.reference_logits then return compare_with_file(model, opts) end
  local list, words, code = model_sequences(model, opts.reference, opts)
  if not list then return nil, words, code end
  local rows, message
  rows, message, code = against_model(model, opts.reference, list,
    reporter(list, opts.on_progress))
  if not rows then return nil, message, code end
  local result = result_of(list, rows, words, opts.positions)
  result.reference = opts.reference.dir
  return result
end

---Writes what a reference says at every scored position to a file for kld's reference_logits: two
---bytes per token of the vocabulary and position.
---@param model moonlet.Model the reference
---@param opts { out: string, file?: string, text?: string, chat?: string, window?: integer,
---  windows?: integer[], dialogues?: integer[], on_progress?: fun(done: integer, total: integer) }
---@return table? result tokens, words
---@return string? message, string? code
function kld.save_logits(model, opts)
  opts = options.check(opts, SAVE_OPTIONS)
  if not opts.out then options.misuse("option 'out' is missing") end
  local list, words, code = sequences.read(model, opts)
  if not list then return nil, words, code end
  local writer <close>, problem, kind = reference_file.create(opts.out, model, list, words)
  if not writer then return nil, problem, kind end
  local session <close>, message, code2 = open_session(model, list)
  if not session then return nil, message, code2 end
  local progress, tokens = reporter(list, opts.on_progress), 0
  for _, sequence in ipairs(list) do
    local targets = scored_targets(sequence)
    local rows, ok
    rows, message, code = final_of(session, sequence)
    if not rows then return nil, message, code end
    ok, message, code = writer:put(rows, targets)
    if not ok then return nil, explain(message, code, model) end
    rows:close()
    tokens = tokens + #targets
    progress(sequence)
  end
  local ok
  ok, message, code = writer:finish()
  if not ok then return nil, message, code end
  return { tokens = tokens, words = words }
end

return kld
