--- Calibration: a model reads texts, and what its matrices were given is kept as an imatrix (sums
-- over tokens) and, if wanted, as Hessians (sums of products of inputs).
--
-- All texts go through one layer before the next one, so each weight is read once: see
-- csrc/model/layers.h. What is summed where: csrc/quant/calib.h.
local Model = require "moonlet.model"
local gguf_names = require "moonlet.gguf_names"
local imatrix = require "moonlet.imatrix"
local layout = require "moonlet.layout"
local options = require "moonlet.options"
local outputs = require "moonlet.outputs"
local sequences = require "moonlet.sequences"
local sites = require "moonlet.sites"

local calibrate = {}

local CHUNK <const> = 512
-- Sites with more inputs get no Hessian: of 8192 it has 256 MiB, and a use for it takes minutes.
local HESSIAN_COLS <const> = 8192
-- Above this the rows of all tokens lie in a file beside the output instead of in memory.
local STREAM_BYTES <const> = 1 << 30

local OPTIONS <const> = { model = "any", file = "string", text = "string", chat = "string",
  chunk = "integer", chunks = "integer", dialogues = "table", out = "string", hessians = "string",
  hessian_cols = "integer", threads = "integer", on_progress = "function" }

local function check_options(opts)
  opts = options.check(opts, OPTIONS)
  if opts.model == nil then options.misuse("option 'model' is missing: a directory or a model") end
  if not (opts.file or opts.text or opts.chat) then
    options.misuse("texts to calibrate with: file, text or chat expected")
  end
  if opts.file and opts.text then options.misuse("one of file and text expected") end
  if not (opts.out or opts.hessians) then options.misuse("option 'out' or 'hessians' expected") end
  if opts.out == opts.hessians then options.misuse("options 'out' and 'hessians' are one file") end
  for _, key in ipairs { "chunk", "chunks", "hessian_cols" } do
    local least = key == "chunk" and 2 or 1
    if opts[key] and opts[key] < least then
      options.misuse(("option '%s': %d or more expected"):format(key, least))
    end
  end
  return opts
end

-- ---- texts --------------------------------------------------------------------------------------

-- The token ids of all chunks and dialogues, and how many chunks the text is.
local function read_texts(model, opts)
  local list = {}
  local function add(source)
    local found, message, code = sequences.read(model, source)
    if not found then return nil, message, code end
    for _, sequence in ipairs(found) do list[#list + 1] = sequence.ids end
    return true
  end
  local ok, message, code = true, nil, nil
  if opts.file or opts.text then
    ok, message, code = add { file = opts.file, text = opts.text, window = opts.chunk or CHUNK,
      windows = opts.chunks and { 1, opts.chunks } }
  end
  if ok and opts.chat then
    ok, message, code = add { chat = opts.chat, dialogues = opts.dialogues }
  end
  if not ok then return nil, message, code end
  local n_tokens = 0
  for _, ids in ipairs(list) do n_tokens = n_tokens + #ids end
  return list, n_tokens
end

-- ---- running ------------------------------------------------------------------------------------

local function directory(path)
  return path:match("^(.*)/[^/]*$") or "."
end

local function open_calibration(model, list, n_tokens, opts)
  local place = opts.out or opts.hessians
  for _, key in ipairs { "out", "hessians" } do
    if opts[key] then
      local ok, message, code = outputs.check(opts[key], model.dir, opts.file, opts.chat)
      if not ok then return nil, message, code end
    end
  end
  local stream = n_tokens * model.core:info().config.hidden_size * 4
  return model.core:calibrate(list, {
    scratch = stream > STREAM_BYTES and directory(place) or nil,
    hessians = opts.hessians,
    hessian_cols = opts.hessian_cols or HESSIAN_COLS,
    meta = { "model", model.dir, "tokens", tostring(n_tokens) },
  })
end

-- All steps; progress counts tokens that are through all layers. (The last norm takes no time.)
local function run(calibration, list, n_layers, n_tokens, on_progress)
  local n_done, n_steps, rows = 0, 1, 0
  while n_done < n_steps do
    local done, total, code = calibration:step()
    if not done then return nil, total, code end
    n_done, n_steps = done, total
    rows = rows + #list[(n_done - 1) % #list + 1]
    if on_progress and rows <= n_layers * n_tokens
      and on_progress(rows / n_layers, n_tokens) == false then
      return nil, "stopped", "cancelled"
    end
  end
  return true
end

-- Activations that are not finite mostly come from weights that are not.
local function explain(model, message, code)
  local why = code == "range" and select(2, model:check_finite())
  return nil, why and ("%s: %s"):format(message, why) or message, code
end

-- ---- results ------------------------------------------------------------------------------------

-- Site name -> the matrices (or stacks of experts) that read it.
local function readers(numbers)
  local list = { head_in = { "lm_head" } }
  for _, t in ipairs(assert(layout.tensors(numbers))) do
    local name = gguf_names.bare(t.name)
    local site = t.part == "text" and t.matrix and name ~= "lm_head" and sites.of(name)
    if site then
      list[site] = list[site] or {}
      table.insert(list[site], name)
    end
  end
  return list
end

local function count_zeros(counts)
  local n = 0
  for at = 1, #counts, 4 do
    if string.unpack("<f", counts, at) == 0 then n = n + 1 end
  end
  return n
end

-- The entries of an imatrix, and what there is to say about them.
local function collect(calibration, numbers)
  local entries, result = {}, { matrices = 0, experts = 0, never_met = 0 }
  local names = readers(numbers)
  for i, site in ipairs(calibration:sites()) do
    local sums2, sums, counts = calibration:sums(i)
    local read_by = assert(names[site.name], site.name)
    entries[i] = { name = read_by, n_in = site.n_in, n_mat = site.n_mat, sums2 = sums2,
      sums = sums, counts = counts }
    result.matrices = result.matrices + #read_by
    if site.name:find("%.experts_in$") then
      result.experts = result.experts + site.n_mat
      result.never_met = result.never_met + count_zeros(counts)
    end
  end
  return entries, result
end

local function add_notes(result, calibration)
  result.notes, result.hessians = {}, 0
  local wide, example = 0, nil
  for _, site in ipairs(calibration:sites()) do
    if site.hessian then
      result.hessians = result.hessians + 1
    elseif not site.name:find("%.experts_in$") then
      wide, example = wide + 1, example or site
    end
  end
  if wide > 0 then
    result.notes[1] = ("no Hessian of %s, which has %d inputs%s"):format(example.name, example.n_in,
      wide > 1 and (", and %d more"):format(wide - 1) or "")
  end
end

local function write(calibration, model, opts, n_chunks)
  local numbers = model.core:info().config
  local entries, result = collect(calibration, numbers)
  local ok, message, code = calibration:finish()
  if not ok then return nil, message, code end
  if opts.hessians then add_notes(result, calibration) end
  if opts.out then
    local texts = { opts.file or opts.text and "text", opts.chat }
    local datasets = {}
    for i = 1, 2 do datasets[#datasets + 1] = texts[i] or nil end
    ok, message, code = imatrix.write(opts.out, entries, { numbers = numbers, datasets = datasets,
      chunk_count = n_chunks, chunk_size = opts.chunk or CHUNK })
    if not ok then return nil, message, code end
  end
  return result
end

local function with_model(model, opts)
  local list, n_tokens, code = read_texts(model, opts)
  if not list then return nil, n_tokens, code end
  local calibration <close>, message, kind = open_calibration(model, list, n_tokens, opts)
  if not calibration then return nil, message, kind end
  local ok
  ok, message, code = run(calibration, list, model.core:info().config.num_hidden_layers, n_tokens,
    opts.on_progress)
  if not ok then return explain(model, message, code) end
  local result
  result, message, code = write(calibration, model, opts, #list)
  if not result then return nil, message, code end
  result.tokens, result.chunks = n_tokens, #list
  return result
end

---Runs a model over texts and writes what its matrices' inputs look like.
---@param opts { model: string|moonlet.Model, file?: string, text?: string, chat?: string,
---  chunk?: integer, chunks?: integer, dialogues?: integer[], out?: string, hessians?: string,
---  hessian_cols?: integer, threads?: integer,
---  on_progress?: fun(done: number, total: integer): boolean? }
---  model: an open one or a directory; file or text: cut into chunks (of 512 tokens; only the first
---  `chunks`); chat: dialogues through the checkpoint's template, as in moonlet.eval; out: GGUF;
---  hessians: safetensors, of sites with at most hessian_cols (8192) inputs; on_progress counts
---  tokens and stops by returning false
---@return table? result matrices, tokens, chunks; experts and never_met (experts that no token
---  reached); with Hessians how many, and notes
---@return string? message, string? code
function calibrate.run(opts)
  opts = check_options(opts)
  if getmetatable(opts.model) == Model then return with_model(opts.model, opts) end
  local model <close>, message, code = Model.open(opts.model,
    { threads = opts.threads, precision = "exact" })
  if not model then return nil, message, code end
  return with_model(model, opts)
end

return calibrate
