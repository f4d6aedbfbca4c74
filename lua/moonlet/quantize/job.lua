-- job: what one run of quantize is to do, decided and checked before a byte is written.

local compressed_tensors = require "moonlet.compressed_tensors"
local core = require "moonlet.core"
local hessians = require "moonlet.hessians"
local hf = require "moonlet.hf"
local json = require "moonlet.json"
local mlx = require "moonlet.mlx"
local partial = require "moonlet.partial"
local plan = require "moonlet.plan"
local provenance = require "moonlet.provenance"
local recipe = require "moonlet.recipe"
local shards = require "moonlet.shards"
local source = require "moonlet.source"
local weighting = require "moonlet.weighting"

local job = {}

local FORMS = { mlx = mlx, ["compressed-tensors"] = compressed_tensors, bf16 = hf }

-- Options that change bytes, besides those of the recipe, which has defaults for some; what
-- calibration found out is added when it is opened.
local SETTINGS = { "format", "shard_bytes", "flavour", "mx_rule", "fit", "awq", "gptq" }

local function settings_of(o, defaults)
  local settings = {}
  for _, key in ipairs(SETTINGS) do
    settings[key] = o[key]
    if settings[key] == nil then settings[key] = defaults[key] end
  end
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
---@field fits table<string, boolean>  ways in which scales are chosen
---@field hessians moonlet.Hessians?
---@field lost table<string, integer>  items written -> their Hessians that were of no use
---@field with_views boolean?  the source is quantized
---@field side table<string, integer>  files to copy
---@field config string     text of config.json
---@field source { sha256: string, stamp: string }
---@field settings table
---@field plan table<string, string>
---@field needed integer    bytes that are still to be written
---@field free integer
local Job = {}
Job.__index = Job

function Job:note(text) table.insert(self.decisions.notes, text) end

-- Whether all that is packed stays as it is.
local function keeps_codes(decided)
  for _, d in ipairs(decided) do
    if d.tensor.packed and not d.decision.exact then return false end
  end
  return true
end

-- Opens what calibration found out.
function Job:open_statistics()
  local o = self.options
  local message, code
  if o.imatrix then
    source.by_expert(self.inventory.source.tensors)
    self.weighting, message, code = weighting.open(o.imatrix, self.inventory.numbers)
    if not self.weighting then return nil, message, code end
    self.settings.imatrix = self.weighting.record
    for _, text in ipairs(self.weighting.imatrix.notes) do self:note(text) end
  elseif self:folds() then
    self:note(("the recipe's awq = %s is left out: it needs an imatrix"):format(self.settings.awq))
    self.settings.awq = "off"
  end
  if o.hessians then
    self.hessians, message, code = hessians.open(o.hessians)
    if not self.hessians then return nil, message, code end
    self.settings.hessians = self.hessians.record
  end
  return true
end

function Job:fit_of(tensor, decision)
  local fit, problem = recipe.fit_of(decision, self.settings.fit, self.weighting ~= nil)
  if not problem then return fit end
  return nil, ("recipe %s: %s: %s"):format(self.rule.name, tensor.name, problem), "range"
end

function Job:choose_fits(decisions)
  self.fits = {}
  for _, file in ipairs(self.files) do
    for _, item in ipairs(file.items) do
      if item.put.op == "encode" then
        local fit, message, code = self:fit_of(item.tensor, decisions[item.tensor])
        if message then return nil, message, code end
        item.put.fit = fit
        self.fits[fit or "minmax"] = true
      end
    end
  end
  return true
end

-- Which matrices are encoded with error feedback; returns notes on those that would be if they
-- could.
function Job:feed(decisions)
  return hessians.serve(self.hessians, self.files, function(tensor)
    if decisions[tensor].exact then return false end
    local own = decisions[tensor].gptq
    if own == nil then own = self.settings.gptq end
    if own == nil then own = self.options.hessians ~= nil end
    return own
  end, self.options.source)
end

-- The tensors to write, as they were decided on; returns notes.
function Job:lay_out()
  local decisions = {}
  for _, d in ipairs(self.decided) do decisions[d.tensor] = d.decision end
  local sets, message, code = FORMS[self.options.format].items(self.decided, self.inventory.source)
  if not sets then return nil, message, code end
  self.files = shards.files(sets, self.options.shard_bytes)
  local ok
  ok, message, code = self:choose_fits(decisions)
  if not ok then return nil, message, code end
  return self:feed(decisions)
end

-- Whether scales are folded into columns.
function Job:folds() return (self.settings.awq or "off") ~= "off" end

-- Notes on the decisions that do not go well with the form; each has a place for their number.
function Job:note_changed()
  local counts, texts = {}, {}
  for _, d in ipairs(self.decided) do
    if d.note then
      if not counts[d.note] then texts[#texts + 1] = d.note end
      counts[d.note] = (counts[d.note] or 0) + 1
    end
  end
  for _, text in ipairs(texts) do self:note(text:format(counts[text])) end
end

-- Notes on what was asked for and has nothing to work on.
function Job:note_idle()
  if self.weighting and not self.fits.imatrix and not self:folds() then
    self:note("the imatrix changes nothing: neither fit nor awq asks for it")
  end
  if self.settings.fit == "qstream" and not self.fits.qstream then
    self:note("fit qstream changes nothing: no matrix is encoded in mxfp4")
  end
end

-- What becomes of every tensor: fills in rule, inventory, decisions, what was decided, files and
-- config.
function Job:decide()
  local o = self.options
  local form = FORMS[o.format]
  local message, code, inventory, ok, notes
  self.rule, message, code = recipe.load(o.recipe, recipe.options_of(o))
  if not self.rule then return nil, message, code end
  self.settings = settings_of(o, self.rule.defaults)
  inventory, message, code = plan.inventory(o.source)
  if not inventory then return nil, message, code end
  if form.adapt then form.adapt(inventory.source) end
  self.inventory = inventory
  self.decisions, self.decided, code = plan.decide(self.rule, inventory.source.tensors, form)
  if not self.decisions then return nil, self.decided, code end
  self.decisions.notes = json.array {}
  self:note_changed()
  self.with_views = inventory.source.quantized
  if self.with_views and not keeps_codes(self.decided) then
    self:note("the source is quantized already: what it lost stays lost, and what changes its "
      .. "format loses more; quantize the original if there is one")
  end
  ok, message, code = self:open_statistics()
  if not ok then return nil, message, code end
  notes, message, code = self:lay_out()
  if not notes then return nil, message, code end
  for _, text in ipairs(notes) do self:note(text) end
  self:note_idle()
  self.config, message, code = form.config(inventory, self.decided, self.rule.base)
  if not self.config then return nil, ("%s/config.json: %s"):format(o.source, message), code end
  return true
end

-- Before hours of work; every file also reserves its own space when it is opened.
function Job:check_space()
  local writable, message, code = core.check_writable(self.place.parent)
  if not writable then return nil, message, code end
  self.needed = self.decisions.total_bytes - (self.found and self.found:held() or 0)
  for _, size in pairs(self.side) do self.needed = self.needed + size end
  self.needed = math.max(self.needed, 0) -- what is held has headers and the journal, too
  self.free, message, code = core.free_bytes(self.place.parent)
  if not self.free then return nil, message, code end
  if self.free >= self.needed then return true end
  return nil, ("%s: needs %s, %s are free"):format(self.place.out, plan.size_text(self.needed),
    plan.size_text(self.free)), "io"
end

-- Scales that a run before this one has found, by group.
local function chosen_scales(dir)
  local chosen = {}
  for _, results in ipairs(dir:recall "awq") do chosen[results[1].name] = results end
  return chosen
end

---Looks for scales, if the run is to fold any, and lays out again what they change. What is found
---is written down in the directory as it comes.
---@param dir moonlet.Partial
---@return table|true|nil ok
---@return string? message
---@return string? code
function Job:fold(dir)
  if not self:folds() then return true end
  local o, chosen = self.options, chosen_scales(dir)
  local writer, message, code = core.quant_open(o.source, o.threads or 0, self.with_views)
  if not writer then return nil, message, code end
  local _ <close> = writer
  local text
  text, message, code = self.weighting:fold { how = self.settings.awq, writer = writer,
    numbers = self.inventory.numbers, decided = self.decided, chosen = chosen,
    zero_centred = self.inventory.source.zero_centred, form = FORMS[o.format],
    flavour = o.flavour, mx_rule = o.mx_rule,
    fit_of = function(d) return self:fit_of(d.tensor, d.decision) or self.hessians and "mse" end,
    on_search = function(results) return dir:keep("awq", results) end,
    on_group = o.on_progress and function(done, total, name)
      return o.on_progress(done, total, name, "awq")
    end }
  if not text then return nil, message, code end
  self:note(text)
  return self:lay_out()
end

---Closes what calibration found out.
function Job:close()
  if self.weighting then self.weighting:close() end
end
Job.__close = Job.close

local function has_tokenizer(files)
  for name in pairs(files) do
    if name == "tokenizer.json" or name == "vocab.json" or name:find("^tokenizer%.model")
      or name:find("%.tiktoken$") then
      return true
    end
  end
  return false
end

-- Whether the run writes a file of this name.
function Job:writes(name)
  for _, file in ipairs(self.files) do
    if file.name == name then return true end
  end
  return self.side[name] ~= nil or name == shards.INDEX or name == "config.json"
    or name == "moonlet.json"
end

-- Files of a run before this one have the size that they say they have: each was reserved whole
-- before it was filled.
function Job:check_found()
  for _, file in ipairs(self.files) do
    local progress = self.found:progress(file.name)
    if progress ~= 0 then
      local path = self.found.dir .. "/" .. file.name
      local set, message, code = core.st_open(progress == "complete" and path
        or path .. ".partial")
      if not set then
        return nil, ("%s (it has not the bytes that it was left with); %s cannot be gone on with; "
          .. "remove it"):format(message, self.found.dir), code
      end
      set:close()
    end
  end
  return true
end

-- Everything but the space: what is to be written, and what of it is there.
function Job:prepare()
  local o = self.options
  local ok, message, code
  self.place, message, code = partial.place(o.source, o.out, function(name)
    return self:writes(name)
  end)
  if not self.place then return nil, message, code end
  ok, message, code = self:decide()
  if not ok then return nil, message, code end
  self.side, message, code = partial.side_files(o.source)
  if not self.side then return nil, message, code end
  if not has_tokenizer(self.side) then
    self:note("the source has no tokenizer, and neither will the checkpoint")
  end
  self.source, message, code = provenance.source(o.source)
  if not self.source then return nil, message, code end
  self.plan = provenance.plan(self.source, self.rule, self.decisions, self.settings)
  self.found, message, code = partial.find(self.place, self.plan, o.resume or false)
  if self.found == nil then return nil, message, code end
  if not self.found then return true end
  return self:check_found()
end

---@param o moonlet.quantize.options  checked, with defaults
---@return moonlet.quantize.Job? job
---@return string? message
---@return string? code
function job.new(o)
  local self = setmetatable({ options = o, lost = {} }, Job)
  local ok, message, code = self:prepare()
  if ok then ok, message, code = self:check_space() end
  if ok then return self end
  if self.found then self.found:close() end
  self:close()
  return nil, message, code
end

---Text of the index of the weight files.
---@return string
function Job:index() return shards.index(self.files) end

---Says what was encoded without error feedback although there was a Hessian.
function Job:note_lost()
  local note = hessians.lost_note(self.files, self.lost)
  if note then self:note(note) end
end

---Text of moonlet.json.
---@param head { date: string, command: string? }
---@return string
function Job:provenance(head)
  return provenance.text { source_dir = self.options.source, source = self.source,
    rule = self.rule, decisions = self.decisions, settings = self.settings, date = head.date,
    command = head.command }
end

return job
