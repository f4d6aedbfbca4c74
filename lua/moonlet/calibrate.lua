--- Calibration: a model reads texts, and what its matrices were given is kept as an imatrix (sums
-- over tokens) and, if wanted, as Hessians (sums of products of inputs).
--
-- All texts go through one layer before the next one, so each weight is read once: see
-- csrc/model/layers.h. What is summed where: csrc/quant/calib.h. Behind each layer another process
-- can go on with a run: see moonlet.calibrate.kept.
local Model = require "moonlet.model"
local core = require "moonlet.core"
local gguf_names = require "moonlet.gguf_names"
local imatrix = require "moonlet.imatrix"
local json = require "moonlet.json"
local kept = require "moonlet.calibrate.kept"
local layout = require "moonlet.layout"
local options = require "moonlet.options"
local outputs = require "moonlet.outputs"
local plan = require "moonlet.plan"
local provenance = require "moonlet.provenance"
local sequences = require "moonlet.sequences"
local sites = require "moonlet.sites"
local sys = require "moonlet.sys"
local version = require "moonlet.version"

local calibrate = {}

local CHUNK <const> = 512
-- Sites with more inputs get blocks: of 8192 a Hessian has 256 MiB, and a use for it takes minutes.
local HESSIAN_COLS <const> = 8192

-- What is done is put on the disk between layers, not more often than this: the work that a power
-- cut costs, besides that of a layer.
calibrate.NOTE_SECONDS = 60

local OPTIONS <const> = { model = "any", file = "string", text = "string", chat = "string",
  chunk = "integer", chunks = "integer", dialogues = "table", out = "string", hessians = "string",
  hessian_cols = "integer", threads = "integer", resume = "boolean", on_progress = "function" }

local function check_options(opts)
  opts = options.check(opts, OPTIONS)
  if opts.model == nil then options.misuse("option 'model' is missing: a directory or a model") end
  if not (opts.file or opts.text or opts.chat) then
    options.misuse("texts to calibrate with: file, text or chat expected")
  end
  if opts.file and opts.text then options.misuse("one of file and text expected") end
  if not (opts.out or opts.hessians) then options.misuse("option 'out' or 'hessians' expected") end
  local clash = outputs.clash(opts.out, opts.hessians, "options 'out' and 'hessians'")
  if clash then options.misuse(clash) end
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

-- ---- what is kept -------------------------------------------------------------------------------

local function text_hash(list)
  local hashes = {}
  for i, ids in ipairs(list) do hashes[i] = core.sha256(table.concat(ids, " ")) end
  return core.sha256(table.concat(hashes))
end

-- What must be the same for the bytes to be the same, in the order in which a difference is named.
local function plan_of(model, list, opts)
  local source, message, code = provenance.source(model.dir)
  if not source then return nil, message, code end
  local names = { "precision", "chunk", "hessian_cols" }
  local settings = json.object({ precision = model.precision, chunk = opts.chunk or CHUNK,
    hessian_cols = opts.hessian_cols or HESSIAN_COLS }, names)
  return json.object({
    ["version of moonlet"] = version,
    model = source.stamp,
    ["choice of texts"] = text_hash(list),
    ["choice of options"] = core.sha256(json.encode(settings)),
    imatrix = opts.out and outputs.real(opts.out) or "",
    ["file of Hessians"] = opts.hessians and outputs.real(opts.hessians) or "",
  }, { "version of moonlet", "model", "choice of texts", "choice of options", "imatrix",
    "file of Hessians" })
end

-- Opens what is kept; refuses outputs that are read, or that are parts of a checkpoint.
local function open_kept(model, list, opts)
  for _, key in ipairs { "out", "hessians" } do
    if opts[key] then
      local ok, message, code = outputs.spare(opts[key], model.dir, opts.file, opts.chat)
      if not ok then return nil, message, code end
    end
  end
  local wanted, message, code = plan_of(model, list, opts)
  if not wanted then return nil, message, code end
  local datasets = json.array {}
  for _, name in ipairs { opts.file or opts.text and "text" or opts.chat,
      (opts.file or opts.text) and opts.chat } do
    datasets[#datasets + 1] = name
  end
  return kept.open { out = opts.out, hessians = opts.hessians, resume = opts.resume or false,
    head = { plan = wanted, model = model.dir, datasets = datasets } }
end

-- ---- running ------------------------------------------------------------------------------------

local function note(calibration, held)
  local layers, stream, code = calibration:keep()
  if not layers then return nil, stream, code end
  return held:note(layers, stream)
end

-- All steps; progress counts tokens that are through all layers. (The last norm takes no time.)
-- Who is asked to stop behind a layer first keeps it.
local function run(calibration, list, n_tokens, n_layers, held, opts)
  local n_done, n_steps = held.layers * #list, (n_layers + 1) * #list
  local rows, since, stops = held.layers * n_tokens, sys.seconds(), false
  while n_done < n_steps and not stops do
    local done, message, code = calibration:step()
    if not done then return nil, message, code end
    n_done = done
    rows = rows + #list[(n_done - 1) % #list + 1]
    if opts.on_progress and rows <= n_layers * n_tokens then
      stops = opts.on_progress(rows / n_layers, n_tokens) == false
    end
    if n_done % #list == 0 and (stops or n_done == n_steps or sys.interrupted()
      or sys.seconds() - since >= calibrate.NOTE_SECONDS) then
      local ok
      ok, message, code = note(calibration, held)
      if not ok then return nil, message, code end
      since = sys.seconds()
    end
  end
  if stops then return nil, "stopped", "cancelled" end
  return true
end

-- Activations that are not finite mostly come from weights that are not.
local function explain(model, message, code)
  local why = code == "range" and select(2, model:check_finite())
  return why and ("%s: %s"):format(message, why) or message
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

-- The calibration's sites, each with the matrices that read it.
local function read_sites(calibration, numbers)
  local names, list = readers(numbers), calibration:sites()
  for _, site in ipairs(list) do site.read_by = assert(names[site.name], site.name) end
  return list
end

-- The entries of an imatrix, and what there is to say about them.
local function collect(calibration, numbers)
  local entries, result = {}, { matrices = 0, experts = 0, never_met = 0 }
  for i, site in ipairs(read_sites(calibration, numbers)) do
    local sums2, sums, counts = calibration:sums(i)
    entries[i] = { name = site.read_by, n_in = site.n_in, n_mat = site.n_mat, sums2 = sums2,
      sums = sums, counts = counts }
    result.matrices = result.matrices + #site.read_by
    if site.name:find("%.experts_in$") then
      result.experts = result.experts + site.n_mat
      result.never_met = result.never_met + count_zeros(counts)
    end
  end
  return entries, result
end

local function and_more(sites_of_kind)
  return #sites_of_kind > 1 and (", and %d more"):format(#sites_of_kind - 1) or ""
end

local function add_notes(result, calibration)
  result.notes, result.hessians = {}, 0
  local wide, cut = {}, {}
  for _, site in ipairs(calibration:sites()) do
    if site.hessian then
      result.hessians = result.hessians + 1
      if site.hessian < site.n_in then cut[#cut + 1] = site end
    elseif not site.name:find("%.experts_in$") then
      wide[#wide + 1] = site
    end
  end
  if cut[1] then
    table.insert(result.notes, ("the Hessian of %s, which has %d inputs, is of blocks of %d%s")
      :format(cut[1].name, cut[1].n_in, cut[1].hessian, and_more(cut)))
  end
  if wide[1] then
    table.insert(result.notes, ("no Hessian of %s, which has %d inputs%s"):format(wide[1].name,
      wide[1].n_in, and_more(wide)))
  end
end

local function write(calibration, model, held, n_tokens, n_chunks, opts)
  local numbers = model.core:info().config
  local entries, result = collect(calibration, numbers)
  result.tokens, result.chunks = n_tokens, n_chunks
  local ok, message, code = calibration:finish()
  if not ok then return nil, message, code end
  if opts.hessians then add_notes(result, calibration) end
  ok, message, code = held:deliver(function(path)
    return imatrix.write(path, entries, { numbers = numbers, datasets = held.head.datasets,
      chunk_count = n_chunks, chunk_size = opts.chunk or CHUNK })
  end, result)
  if not ok then return nil, message, code end
  return result
end

-- ---- all of it ----------------------------------------------------------------------------------

-- Everything but the imatrix has reserved its space when a calibration is open.
local function reserve_imatrix(calibration, numbers, held)
  local needed = 0
  for _, site in ipairs(read_sites(calibration, numbers)) do
    needed = needed + #site.read_by * 4 * site.n_mat * (2 * site.n_in + 1)
  end
  local free, message, code = core.free_bytes(held:dir())
  if not free then return nil, message, code end
  if free + held:reserved() >= needed then return held:reserve(needed) end
  return nil, ("%s: needs %s, %s are free"):format(held.out, plan.size_text(needed),
    plan.size_text(free)), "io"
end

local function open_calibration(model, list, n_tokens, held, opts)
  local numbers = model.core:info().config
  local calibration, message, code = model.core:calibrate(list, {
    dir = held:dir(), layers = held.layers, kept = held.stream,
    hessians = held.layers > 0 and held:growing() or held:begun(),
    written = held:written(numbers.num_hidden_layers + 1),
    hessian_cols = opts.hessian_cols or HESSIAN_COLS,
    meta = { "model", held.head.model, "tokens", tostring(n_tokens) },
  })
  if not calibration then return nil, message, code end
  local ok = true
  if opts.out then ok, message, code = reserve_imatrix(calibration, numbers, held) end
  if ok then return calibration end
  calibration:close()
  return nil, message, code
end

local function with_held(model, list, n_tokens, held, opts)
  local calibration <close>, message, code = open_calibration(model, list, n_tokens, held, opts)
  if not calibration and code == "format" and held.layers > 0 then
    held:leave()
    return nil, ("%s; %s cannot be gone on with; remove it"):format(message, held:dir()), code
  elseif not calibration then
    return nil, held:left(message), code
  end
  local ok, result
  ok, message, code = run(calibration, list, n_tokens, model.core:info().config.num_hidden_layers,
    held, opts)
  if ok then
    result, message, code = write(calibration, model, held, n_tokens, #list, opts)
  else
    message = explain(model, message, code)
  end
  if result or code == "range" then -- numbers that would be the same again
    held:remove()
  else
    message = held:left(message)
  end
  return result, message, code
end

local function with_model(model, opts)
  local list, n_tokens, code = read_texts(model, opts)
  if not list then return nil, n_tokens, code end
  local held <close>, message, kind = open_kept(model, list, opts)
  if not held then return nil, message, kind end
  local result = held:result()
  if not result then return with_held(model, list, n_tokens, held, opts) end
  held:remove()
  return result
end

---Runs a model over texts and writes what its matrices' inputs look like.
---@param opts { model: string|moonlet.Model, file?: string, text?: string, chat?: string,
---  chunk?: integer, chunks?: integer, dialogues?: integer[], out?: string, hessians?: string,
---  hessian_cols?: integer, threads?: integer, resume?: boolean,
---  on_progress?: fun(done: number, total: integer): boolean? }
---  model: an open one or a directory; file or text: cut into chunks (of 512 tokens; only the first
---  `chunks`); chat: dialogues through the checkpoint's template, as in moonlet.eval; out: GGUF;
---  hessians: safetensors, in blocks where sites have more than hessian_cols (8192) inputs; resume:
---  go on where a run that was cut off had stopped, if there is one; on_progress counts tokens and
---  stops by returning false
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
