--- How far a model's predictions are from a reference's: KL(reference || model) in nats at every
-- scored position, over the whole vocabulary.
local json = require "moonlet.json"
local label = require "moonlet.eval.label"
local options = require "moonlet.options"
local outputs = require "moonlet.outputs"
local reference_file = require "moonlet.reference"
local rows = require "moonlet.eval.rows"
local sequences = require "moonlet.sequences"

local kld = {}

-- Every sequence through both; `reference` a model.
local function against_model(model, reference, list, progress)
  local columns, depths = rows.new(), {}
  for _, piece in ipairs(rows.passes(model, list)) do
    local mine, theirs, code = rows.both(model, reference, piece, progress, depths)
    if not mine then return nil, theirs, code end
    for i, sequence in ipairs(piece) do
      local targets = rows.targets(sequence)
      local out, message
      out, message, code = model:compare(mine[i], reference, theirs[i], targets)
      if not out then return nil, rows.explain(message, code, reference, model) end
      rows.add(columns, out)
      progress(#targets)
    end
  end
  local layers = json.array {}
  for depth, sums in ipairs(depths) do
    layers[depth] = sums.power > 0 and math.sqrt(sums.error / sums.power) or 0
  end
  return columns, layers
end

-- Every sequence through the model; `file` knows what the reference said.
local function against_file(model, file, list, progress)
  local columns, at = rows.new(), 1
  for _, piece in ipairs(rows.passes(model, list)) do
    local mine, message, code = rows.finals(model, piece, progress)
    if not mine then return nil, message, code end
    for i, sequence in ipairs(piece) do
      local targets = rows.targets(sequence)
      local out
      out, message, code = model:compare(mine[i], file, at, targets)
      if not out then return nil, rows.explain(message, code, model) end
      rows.add(columns, out)
      at = at + #targets
      progress(#targets)
    end
  end
  return columns
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
  local list, words, notes = sequences.read(reader, opts)
  if not list then return nil, words, notes end
  if reference ~= reader and reference.tokenizer then
    local other, message, code = sequences.read(reference, opts)
    if not other then return nil, message, code end
    local i = difference(list, other)
    if i then
      return nil, ("%s reads sequence %d as other tokens than %s"):format(reference.dir, i,
        model.dir), "range"
    end
  end
  return list, words, notes
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

local function per_position(list, columns)
  local out, at = {}, 0
  for s, sequence in ipairs(list) do
    for i, target in ipairs(sequence.targets) do
      if target >= 0 then
        at = at + 1
        out[at] = { sequence = s, position = i, token = target, kld = columns.kl[at],
          nll = columns.nll[at], reference_nll = columns.reference_nll[at], top = columns.top[at],
          reference_top = columns.reference_top[at] }
      end
    end
  end
  return out
end

local function result_of(model, list, columns, words, opts)
  local result = rows.summary(columns)
  result.words, result.model, result.label = words, model.dir, label.checkpoint(model.dir)
  result.histogram = rows.histogram(columns.kl)
  if opts.positions then result.positions = per_position(list, columns) end
  local matrices, message, code = model:matrices()
  if not matrices then return nil, message, code end
  local parameters = 0
  result.bytes = 0
  for _, m in ipairs(matrices) do
    parameters, result.bytes = parameters + m.parameters, result.bytes + m.bytes
  end
  result.bits_per_weight = result.bytes * 8 / parameters
  if opts.matrices then result.matrices = json.array(matrices) end
  return result
end

-- ---- public -------------------------------------------------------------------------------------

local function with_sequences(known)
  for key, kind in pairs(sequences.OPTIONS) do known[key] = kind end
  return known
end

local KLD_OPTIONS <const> = with_sequences { reference = "table", reference_logits = "string",
  positions = "boolean", matrices = "boolean", on_progress = "function" }
local SAVE_OPTIONS <const> = with_sequences { out = "string", on_progress = "function" }

local function compare_with_file(model, opts)
  local file <close>, message, code = reference_file.open(opts.reference_logits)
  if not file then return nil, message, code end
  local list = file_sequences(file)
  local same, columns
  same, message, code = check_file_sequences(model, opts.reference_logits, list, opts)
  if not same then return nil, message, code end
  columns, message, code = against_file(model, file, list,
    rows.progress(list, opts.on_progress, 1, 1))
  if not columns then return nil, message, code end
  local info = file:info()
  local result
  result, message, code = result_of(model, list, columns, math.tointeger(info.words) or 0, opts)
  if not result then return nil, message, code end
  result.reference = info.model
  return result
end

---KL(reference || model) and what goes with it.
---@param model moonlet.Model
---@param opts { reference?: moonlet.Model, reference_logits?: string, file?: string,
---  text?: string, chat?: string, window?: integer, windows?: integer[], dialogues?: integer[],
---  positions?: boolean, matrices?: boolean, on_progress?: fun(done: integer, total: integer) }
---  a reference or the file of its logits, which knows its text; what is scored as for perplexity
---@return table? result mean, mean_error, median, p99, p999, max and histogram of the KLD; top1
---  (share of positions where both prefer the same token); tokens, words; nll, reference_nll
---  (sums), perplexity, reference_perplexity; reference and model (directories), label (recipe, if
---  moonlet.json tells); bytes and bits_per_weight of the model's matrices; layers: what the
---  residual stream is off by after each layer and after the last norm, as a share of its size, if
---  the reference is a model of the same shape; with matrices, what Model:matrices returns; with
---  positions, a list of sequence, position, token, kld, nll, reference_nll, top, reference_top;
---  notes if there are any
---@return string? message, string? code
function kld.kld(model, opts)
  opts = options.check(opts, KLD_OPTIONS)
  if (opts.reference == nil) == (opts.reference_logits == nil) then
    options.misuse("one of reference and reference_logits expected")
  end
  if opts.reference_logits then return compare_with_file(model, opts) end
  local list, words, notes = model_sequences(model, opts.reference, opts)
  if not list then return nil, words, notes end
  local columns, layers, code = against_model(model, opts.reference, list,
    rows.progress(list, opts.on_progress, 2, 1))
  if not columns then return nil, layers, code end
  local result, message
  result, message, code = result_of(model, list, columns, words, opts)
  if not result then return nil, message, code end
  result.reference, result.notes = opts.reference.dir, notes
  if #layers > 0 then result.layers = layers end
  return result
end

---Writes what a reference says at every scored position to a file for kld's reference_logits: two
---bytes per token of the vocabulary and position.
---@param model moonlet.Model the reference
---@param opts { out: string, file?: string, text?: string, chat?: string, window?: integer,
---  windows?: integer[], dialogues?: integer[], on_progress?: fun(done: integer, total: integer) }
---@return table? result tokens, words, notes if there are any
---@return string? message, string? code
function kld.save_logits(model, opts)
  opts = options.check(opts, SAVE_OPTIONS)
  if not opts.out then options.misuse("option 'out' is missing") end
  local list, words, notes = sequences.read(model, opts)
  if not list then return nil, words, notes end
  local ok, message, code = outputs.check(opts.out, model.dir, opts.file, opts.chat)
  if not ok then return nil, message, code end
  local writer <close>, problem, kind = reference_file.create(opts.out, model, list, words)
  if not writer then return nil, problem, kind end
  local progress, tokens = rows.progress(list, opts.on_progress, 1, 1), 0
  for _, piece in ipairs(rows.passes(model, list)) do
    local finals
    finals, message, code = rows.finals(model, piece, progress)
    if not finals then return nil, message, code end
    for i, sequence in ipairs(piece) do
      local targets = rows.targets(sequence)
      ok, message, code = writer:put(finals[i], targets)
      if not ok then return nil, rows.explain(message, code, model) end
      tokens = tokens + #targets
      progress(#targets)
    end
  end
  ok, message, code = writer:finish()
  if not ok then return nil, message, code end
  return { tokens = tokens, words = words, notes = notes }
end

return kld
