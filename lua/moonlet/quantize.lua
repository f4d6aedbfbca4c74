-- quantize: carries a recipe out and writes the checkpoint.
--
-- The source is never touched. Everything is written into OUT.partial and renamed at the end, so
-- OUT appears complete or not at all; a failure removes what was written, an interrupt or a
-- callback's "stop" leaves it to be resumed. Memory is bounded by the threads' blocks of rows,
-- whatever the size of a tensor.

local compressed_tensors = require "moonlet.compressed_tensors"
local core = require "moonlet.core"
local hessians = require "moonlet.hessians"
local hf = require "moonlet.hf"
local json = require "moonlet.json"
local mlx = require "moonlet.mlx"
local options = require "moonlet.options"
local partial = require "moonlet.partial"
local plan = require "moonlet.plan"
local provenance = require "moonlet.provenance"
local recipe = require "moonlet.recipe"
local shards = require "moonlet.shards"
local source = require "moonlet.source"
local sys = require "moonlet.sys"
local weighting = require "moonlet.weighting"

local quantize = {}

local FORMS = { mlx = mlx, ["compressed-tensors"] = compressed_tensors, bf16 = hf }

---@class moonlet.quantize.options
---@field source string       directory with config.json and safetensors
---@field out string          directory to create; may exist if it is empty
---@field recipe string|function
---@field bits integer?       options of the recipe
---@field group integer?
---@field mode string?
---@field mxfp boolean?
---@field recipe_options table?  further options of the recipe
---@field format "mlx"|"compressed-tensors"|"bf16"|nil  default mlx
---@field imatrix string|string[]|nil  what the inputs look like, see moonlet.imatrix
---@field fit "minmax"|"mse"|"imatrix"|"qstream"|"best"|nil  how scales are chosen where a decision
---  does not say; default minmax, and mse with error feedback
---@field awq "search"|"mlx-node"|"off"|nil  scales to fold in, see moonlet.awq; needs an imatrix
---@field hessians string?    file of `moonlet imatrix --hessians`: encode with error feedback
---@field gptq boolean?       whether to, where a decision does not say; default: with `hessians`
---@field threads integer?    default: all processors
---@field shard_bytes integer?  default 5 GiB
---@field flavour "metal"|"cpu"|nil   whose rounding to follow, see moonlet.quantize_tensor
---@field mx_rule "ceil"|"nearest"|nil
---@field resume boolean?     go on where a run that was cut off had stopped
---@field dry_run boolean?    check everything and estimate the time, write nothing
---@field command string?     recorded in moonlet.json
---@field on_progress fun(done: integer, total: integer, tensor: string): boolean?
---  before the first and after every tensor, in bytes of the weights as BF16; before that, while
---  scales are looked for, in groups of matrices and with "awq" as a fourth argument; returning
---  false stops

local KNOWN = { source = "string", out = "string", recipe = "any", bits = "integer",
  group = "integer", mode = "string", mxfp = "boolean", recipe_options = "table",
  format = "string", threads = "integer", fit = "string", imatrix = "any",
  awq = "string", hessians = "string", gptq = "boolean", shard_bytes = "integer",
  flavour = "string", mx_rule = "string", resume = "boolean", dry_run = "boolean",
  command = "string", on_progress = "function" }

-- Options that change bytes, besides those of the recipe.
local SETTINGS = { "format", "shard_bytes", "flavour", "mx_rule", "fit", "awq", "gptq", "imatrix",
  "hessians" }
local DEFAULTS = { format = "mlx", shard_bytes = shards.LIMIT, flavour = "metal",
  mx_rule = "ceil" }

-- What is on the disk is noted this often: the work that a power cut costs.
quantize.NOTE_SECONDS, quantize.NOTE_BYTES = 10, 1 << 30

-- ---- what is known before a byte is written ----------------------------------------------------

local function check_choice(o, key, choices)
  for _, choice in ipairs(choices) do
    if o[key] == nil or o[key] == choice then return end
  end
  local expected = table.concat(choices, " or ")
  options.misuse(("option '%s': %s expected, got '%s'"):format(key, expected, o[key]))
end

local function checked(given)
  local o = setmetatable(options.check(given, KNOWN), { __index = DEFAULTS })
  for _, key in ipairs { "source", "out", "recipe" } do
    if o[key] == nil then options.misuse(("option '%s' is missing"):format(key)) end
  end
  check_choice(o, "format", { "mlx", "compressed-tensors", "bf16" })
  check_choice(o, "flavour", { "metal", "cpu" })
  check_choice(o, "mx_rule", { "ceil", "nearest" })
  check_choice(o, "fit", { "minmax", "mse", "imatrix", "qstream", "best" })
  check_choice(o, "awq", { "search", "mlx-node", "off" })
  if o.imatrix ~= nil and type(o.imatrix) ~= "string" and type(o.imatrix) ~= "table" then
    options.misuse("option 'imatrix': path or list of paths expected, got " .. type(o.imatrix))
  end
  if (o.awq or "off") ~= "off" and not o.imatrix then
    options.misuse(("option 'awq': %s needs an imatrix"):format(o.awq))
  end
  if o.fit == "imatrix" and not o.imatrix then
    options.misuse("option 'fit': imatrix needs an imatrix")
  end
  if o.gptq and not o.hessians then options.misuse("option 'gptq' needs 'hessians'") end
  if (o.threads or 0) < 0 or o.shard_bytes < 1 then
    options.misuse("threads and shard_bytes are positive")
  end
  return o
end

-- Before hours of work; every file also reserves its own space when it is opened.
local function check_space(job)
  local message, code
  job.needed = job.decisions.total_bytes - (job.found and job.found:held() or 0)
  for _, size in pairs(job.side) do job.needed = job.needed + size end
  job.free, message, code = core.free_bytes(job.place.parent)
  if not job.free then return nil, message, code end
  if job.free >= job.needed then return true end
  return nil, ("%s: needs %s, %s are free"):format(job.place.out, plan.size_text(job.needed),
    plan.size_text(job.free)), "io"
end

local function settings_of(o)
  local settings = {}
  for _, key in ipairs(SETTINGS) do settings[key] = o[key] end
  settings.imatrix, settings.hessians = nil, nil
  return json.object(settings, SETTINGS)
end

---@class moonlet.quantize.Job  all that a run does, decided and checked
---@field options moonlet.quantize.options
---@field place moonlet.Place
---@field found moonlet.Partial|false  left by another run, to be gone on with
---@field rule moonlet.Recipe
---@field inventory moonlet.Inventory
---@field decided { tensor: moonlet.Tensor, decision: table }[]
---@field decisions moonlet.Plan
---@field files moonlet.File[]
---@field weighting moonlet.Weighting?  with an imatrix
---@field hessians moonlet.Hessians?
---@field with_views boolean?  the source is quantized
---@field side table<string, integer>  files to copy
---@field config string     text of config.json
---@field source { sha256: string, stamp: string }
---@field settings table
---@field plan table<string, string>
---@field needed integer    bytes that are still to be written
---@field free integer

local function note(job, text) table.insert(job.decisions.notes, text) end

-- Whether all that is packed stays as it is.
local function keeps_codes(decided)
  for _, d in ipairs(decided) do
    if d.tensor.packed and not d.decision.exact then return false end
  end
  return true
end

-- Opens what calibration found out.
local function open_statistics(job)
  local o = job.options
  local message, code
  if o.imatrix then
    source.by_expert(job.inventory.source.tensors)
    job.weighting, message, code = weighting.open(o.imatrix, job.inventory.numbers)
    if not job.weighting then return nil, message, code end
    job.settings.imatrix = job.weighting.record
    for _, text in ipairs(job.weighting.imatrix.notes) do note(job, text) end
  end
  if o.hessians then
    job.hessians, message, code = hessians.open(o.hessians)
    if not job.hessians then return nil, message, code end
    job.settings.hessians = job.hessians.record
  end
  return true
end

-- How scales are chosen: as the decision says, or the run's option, or the recipe's defaults; nil
-- if nobody says. qstream is about exponents of mxfp4: as an option it leaves other modes alone.
local function fit_of(job, tensor, decision)
  local fit = decision.fit or job.options.fit or job.rule.defaults.fit
  if fit == "imatrix" and not job.weighting then
    return nil, ("recipe %s: %s: fit imatrix needs an imatrix"):format(job.rule.name, tensor.name),
      "range"
  elseif fit == "best" then
    return job.weighting and "imatrix" or "mse"
  elseif fit == "qstream" and decision.mode ~= "mxfp4" then
    return nil
  end
  return fit
end

local function choose_fits(job, decisions)
  for _, file in ipairs(job.files) do
    for _, item in ipairs(file.items) do
      if item.put.op == "encode" then
        local fit, message, code = fit_of(job, item.tensor, decisions[item.tensor])
        if message then return nil, message, code end
        item.put.fit = fit
      end
    end
  end
  return true
end

-- Which matrices are encoded with error feedback; returns notes on those that would be if they
-- could.
local function feed(job, decisions)
  local o = job.options
  return hessians.serve(job.hessians, job.files, function(tensor)
    local own = decisions[tensor].gptq
    if own == nil then own = o.gptq end
    if own == nil then own = job.rule.defaults.gptq end
    if own == nil then own = o.hessians ~= nil end
    return own
  end)
end

-- The tensors to write, as they were decided on; returns notes.
local function lay_out(job)
  local decisions = {}
  for _, d in ipairs(job.decided) do decisions[d.tensor] = d.decision end
  local sets, message, code = FORMS[job.options.format].items(job.decided, job.inventory.source)
  if not sets then return nil, message, code end
  job.files = shards.files(sets, job.options.shard_bytes)
  local ok
  ok, message, code = choose_fits(job, decisions)
  if not ok then return nil, message, code end
  return feed(job, decisions)
end

-- What becomes of every tensor: fills in rule, inventory, decisions, what was decided, files and
-- config.
local function decide(job)
  local o = job.options
  local form = FORMS[o.format]
  local message, code, inventory, ok, notes
  job.rule, message, code = recipe.load(o.recipe, recipe.options_of(o))
  if not job.rule then return nil, message, code end
  inventory, message, code = plan.inventory(o.source)
  if not inventory then return nil, message, code end
  if form.adapt then form.adapt(inventory.source) end
  job.inventory = inventory
  job.decisions, job.decided, code = plan.decide(job.rule, inventory.source.tensors, form.bytes)
  if not job.decisions then return nil, job.decided, code end
  job.decisions.notes = json.array {}
  job.with_views = inventory.source.quantized
  if job.with_views and not keeps_codes(job.decided) then
    note(job, "the source is quantized already: what it lost stays lost, and what changes its "
      .. "format loses more; quantize the original if there is one")
  end
  ok, message, code = open_statistics(job)
  if not ok then return nil, message, code end
  notes, message, code = lay_out(job)
  if not notes then return nil, message, code end
  for _, text in ipairs(notes) do note(job, text) end
  job.config, message, code = form.config(inventory, job.decided, job.rule.base)
  if not job.config then return nil, ("%s/config.json: %s"):format(o.source, message), code end
  return true
end

-- Looks for scales and lays out again what they changed.
local function fold(job)
  local o, how = job.options, job.options.awq or job.rule.defaults.awq or "off"
  if how == "off" or not job.weighting then return true end
  local writer, message, code = core.quant_open(o.source, o.threads or 0, job.with_views)
  if not writer then return nil, message, code end
  local _ <close> = writer
  local text
  text, message, code = job.weighting:fold { how = how, numbers = job.inventory.numbers,
    decided = job.decided, zero_centred = job.inventory.source.zero_centred, writer = writer,
    form = FORMS[o.format], flavour = o.flavour, mx_rule = o.mx_rule,
    fit_of = function(d) return fit_of(job, d.tensor, d.decision) or job.hessians and "mse" end,
    on_group = o.on_progress and function(done, total, name)
      return o.on_progress(done, total, name, "awq")
    end }
  if not text then return nil, message, code end
  note(job, text)
  return lay_out(job)
end

---@return moonlet.quantize.Job? job
---@return string? message
---@return string? code
local function prepare(o)
  local job = { options = o, settings = settings_of(o) }
  local ok, message, code
  job.place, message, code = partial.place(o.source, o.out)
  if not job.place then return nil, message, code end
  ok, message, code = decide(job)
  if not ok then return nil, message, code end
  job.side, message, code = partial.side_files(o.source)
  if not job.side then return nil, message, code end
  job.source, message, code = provenance.source(o.source)
  if not job.source then return nil, message, code end
  job.plan = provenance.plan(job.source, job.rule, job.decisions, job.settings)
  job.found, message, code = partial.find(job.place, job.plan, o.resume or false)
  if job.found == nil then return nil, message, code end
  ok, message, code = check_space(job)
  if ok and not o.dry_run then ok, message, code = fold(job) end
  if ok then return job end
  if job.found then job.found:close() end
  return nil, message, code
end

-- ---- weights -----------------------------------------------------------------------------------

---@class moonlet.quantize.Run  weights on their way to the disk
---@field job moonlet.quantize.Job
---@field dir moonlet.Partial
---@field writer table    of moonlet.core
---@field total integer   bytes of the source
---@field done integer
---@field file string?    that is being written
---@field items integer   of it that were put
---@field noted integer   of it that are noted
---@field unsafe integer  bytes put since
---@field since number    when that was
local Run = {}
Run.__index = Run

-- Progress counts weights as BF16, which is what most sources hold.
local function source_bytes(item)
  local put = item.put
  return 2 * #put.parts * put.part_rows * put.cols
end

-- Puts the items of the file that were written so far on the disk.
function Run:note()
  if not self.file or self.items == self.noted then return true end
  local ok, message, code = self.writer:sync()
  if not ok then return nil, message, code end
  ok, message, code = self.dir:note(self.file, self.items)
  if not ok then return nil, message, code end
  self.noted, self.unsafe, self.since = self.items, 0, sys.seconds()
  return true
end

-- After each item; may be asked to stop.
function Run:step(item)
  self.done = self.done + source_bytes(item)
  self.items, self.unsafe = self.items + 1, self.unsafe + item.bytes
  if self.unsafe >= quantize.NOTE_BYTES
    or sys.seconds() - self.since >= quantize.NOTE_SECONDS then
    local ok, message, code = self:note()
    if not ok then return nil, message, code end
  end
  return self:report(item.name)
end

function Run:report(name)
  local report = self.job.options.on_progress
  if report and report(self.done, self.total, name) == false then
    return nil, "stopped", "cancelled"
  end
  return true
end

-- Begins a file, or goes on with it; entries of its items, and where those of each begin.
function Run:open(file, n_done)
  local entries, first = {}, {}
  for i, item in ipairs(file.items) do
    first[i] = #entries + 1
    table.move(item.entries, 1, #item.entries, #entries + 1, entries)
  end
  local done = n_done > 0 and (first[n_done + 1] or #entries + 1) - 1 or 0
  local ok, message, code = self.writer:create(self.dir.dir .. "/" .. file.name, entries,
    file.format, done)
  if not ok then return nil, message, code end
  self.file, self.items, self.noted = file.name, n_done, n_done
  self.unsafe, self.since = 0, sys.seconds()
  return first
end

-- The scale over a whole matrix, and over those fused with it, is looked for when the first of them
-- is written.
function Run:find_largest(item)
  local shared = item.largest
  if not shared then return true end
  if not shared.value then
    local top = 0.0
    for _, put in ipairs(shared.puts) do
      local found, message, code = self.writer:largest(put)
      if not found then return nil, message, code end
      top = math.max(top, found)
    end
    shared.value = top
  end
  item.put.global_scale = shared.value
  return true
end

-- `first` is the entry that the item begins with.
function Run:put(item, first)
  local o, put = self.job.options, item.put
  put.entry, put.flavour, put.mx_rule = first, o.flavour, o.mx_rule
  local ok, message, code = self:find_largest(item)
  if not ok then return nil, message, code end
  for i, entry in ipairs(item.entries) do
    local data = entry.data
    if type(data) == "function" then data = data(put) end
    if data then
      ok, message, code = self.writer:put_data(first + i - 1, data)
      if not ok then return nil, message, code end
    end
  end
  local weights = self.job.weighting
  if not weights then return self.writer:put(put) end
  weights:attach(item)
  ok, message, code = self.writer:put(put)
  weighting.detach(item)
  return ok, message, code
end

function Run:write_file(file, n_done)
  local first, message, code = self:open(file, n_done)
  if not first then return nil, message, code end
  local ok
  for i = n_done + 1, #file.items do
    local item = file.items[i]
    ok, message, code = self:put(item, first[i])
    if not ok then return nil, message, code end
    ok, message, code = self:step(item)
    if not ok then return nil, message, code end
  end
  self.file = nil
  return self.writer:finish()
end

-- Items of a file that a run before this one has completed.
function Run:items_done(file)
  local progress = self.dir and self.dir:progress(file.name) or 0
  return progress == "complete" and #file.items or progress
end

function Run:write_files()
  local ok, message, code
  for _, file in ipairs(self.job.files) do
    for i = 1, self:items_done(file) do self.done = self.done + source_bytes(file.items[i]) end
  end
  ok, message, code = self:report("")
  if not ok then return nil, message, code end
  for _, file in ipairs(self.job.files) do
    local progress = self.dir:progress(file.name)
    if progress ~= "complete" then
      ok, message, code = self:write_file(file, progress)
      if not ok then return nil, message, code end
      self.dir.noted = true
    end
  end
  return true
end

-- ---- a dry run ----------------------------------------------------------------------------------

-- Weights to encode for an estimate, and the settings on which the time for a weight depends.
local SAMPLE <const> = 1 << 23
local SPEED_FIELDS = { "op", "mode", "bits", "group", "fit" }

local function speed_key(put)
  local key = {}
  for i, field in ipairs(SPEED_FIELDS) do key[i] = tostring(put[field]) end
  if put.hessian then key[#key + 1] = put.cols end
  return table.concat(key, " ")
end

local function weights_of(put) return #put.parts * put.part_rows * put.cols end

-- The items to come by kind: the weights of all, and the put of the largest.
function Run:kinds()
  local kinds = {}
  for _, file in ipairs(self.job.files) do
    for i = self:items_done(file) + 1, #file.items do
      local put = file.items[i].put
      local key = speed_key(put)
      local kind = kinds[key] or { weights = 0, put = put }
      kind.weights = kind.weights + weights_of(put)
      if weights_of(put) > weights_of(kind.put) then kind.put = put end
      kinds[key] = kind
    end
  end
  return kinds
end

-- Seconds per weight, from some rows of a put. The second of two tries finds them in memory.
function Run:sample(put)
  local o, rows, seconds = self.job.options, math.max(SAMPLE // put.cols, 1), nil
  put.flavour, put.mx_rule = o.flavour, o.mx_rule
  for _ = 1, 2 do
    local start = sys.seconds()
    local ok, message, code = self.writer:try(put, rows)
    if not ok then return nil, message, code end
    seconds = sys.seconds() - start
  end
  return seconds / math.min(rows * put.cols, weights_of(put))
end

-- Seconds that the items to come will take, by a sample of each kind. How fast the disk is remains
-- to be seen.
function Run:estimate()
  local seconds = 0
  for _, kind in pairs(self:kinds()) do
    local each, message, code = self:sample(kind.put)
    if not each then return nil, message, code end
    seconds = seconds + each * kind.weights
  end
  return seconds
end

-- ---- the whole checkpoint ----------------------------------------------------------------------

---@param dir moonlet.Partial|false
local function open_run(job, dir)
  local o, total = job.options, 0
  for _, file in ipairs(job.files) do
    for _, item in ipairs(file.items) do total = total + source_bytes(item) end
  end
  local writer, message, code = core.quant_open(o.source, o.threads or 0, job.with_views)
  if not writer then return nil, message, code end
  if job.hessians then
    local ok
    ok, message, code = writer:hessians(job.hessians.path)
    if not ok then
      writer:close()
      return nil, message, code
    end
  end
  return setmetatable({ job = job, dir = dir, writer = writer, total = total, done = 0 }, Run)
end

local function write_weights(job, dir)
  local run, message, code = open_run(job, dir)
  if not run then return nil, message, code end
  local _ <close> = run.writer
  local _ <close> = setmetatable({}, { __close = function(_, raised)
    if raised or code == "cancelled" then run:note() end
  end })
  local ok
  ok, message, code = run:write_files()
  if ok then return true end
  return nil, message, code
end

-- Everything into the directory; config.json behind what it describes, as readers start with it.
local function write_checkpoint(job, dir)
  local ok, message, code = write_weights(job, dir)
  if not ok then return nil, message, code end
  local o = job.options
  ok, message, code = dir:write("model.safetensors.index.json", shards.index(job.files))
  if not ok then return nil, message, code end
  ok, message, code = dir:copy(o.source, job.side)
  if not ok then return nil, message, code end
  ok, message, code = dir:write("moonlet.json", provenance.text { source_dir = o.source,
    source = job.source, rule = job.rule, decisions = job.decisions, settings = job.settings,
    date = dir.head.date, command = dir.head.command })
  if not ok then return nil, message, code end
  ok, message, code = dir:write("config.json", job.config)
  if not ok then return nil, message, code end
  return dir:finish()
end

local function write(job)
  local dir, message, code = partial.begin(job.place, job.found,
    { plan = job.plan, date = provenance.date(), command = job.options.command })
  if not dir then return nil, message, code end
  local settled = false
  local _ <close> = setmetatable({}, { __close = function()
    if not settled then dir:leave() end
  end })
  local ok
  ok, message, code = write_checkpoint(job, dir)
  settled = true
  if ok then return job.decisions end
  if code ~= "cancelled" then
    dir:remove()
  elseif dir:leave() then
    message = ("%s; %s holds what is done, to be resumed (--resume)"):format(message, dir.dir)
  end
  return nil, message, code
end

-- The plan with what a run would take, in the field dry_run.
local function rehearse(job)
  local run, message, code = open_run(job, job.found)
  local seconds
  if run then
    local _ <close> = run.writer
    seconds, message, code = run:estimate()
  end
  if job.found then job.found:close() end
  if not seconds then return nil, message, code end
  job.decisions.dry_run = { seconds = seconds, files = #job.files, needed_bytes = job.needed,
    free_bytes = job.free }
  return job.decisions
end

---Quantizes a checkpoint.
---@param given moonlet.quantize.options
---@return moonlet.Plan? plan  what was decided and written; `notes` is a list of lines that the
---  user should read; `dry_run` has what a run would take, when only that was asked for
---@return string? message
---@return string? code
function quantize.run(given)
  local job, message, code = prepare(checked(given))
  if not job then return nil, message, code end
  local _ <close> = job.weighting
  if job.options.dry_run then return rehearse(job) end
  return write(job)
end

return setmetatable(quantize, { __call = function(_, ...) return quantize.run(...) end })
