-- run: the weights of one run of quantize on their way to the disk.
--
-- Tensors are written in order, and noted in the directory's journal once they are on the disk.

local core = require "moonlet.core"
local recipe = require "moonlet.recipe"
local sys = require "moonlet.sys"
local weighting = require "moonlet.weighting"

local run = {}

-- What is on the disk is noted this often: the work that a power cut costs.
run.NOTE_SECONDS, run.NOTE_BYTES = 10, 1 << 30

---@class moonlet.quantize.Run  weights on their way to the disk
---@field job moonlet.quantize.Job
---@field dir moonlet.Partial|false
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
  if self.unsafe >= run.NOTE_BYTES
    or sys.seconds() - self.since >= run.NOTE_SECONDS then
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
  local path = done > 0 and self.dir.dir .. "/" .. file.name or self.dir:anew(file.name)
  local ok, message, code = self.writer:create(path, entries, file.format, done)
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

-- Remembers that n Hessians of an item were of no use, for the notes of this run or of one that
-- goes on with it.
function Run:lose(name, n)
  self.job.lost[name] = n
  return self.dir:keep("lost", { name = name, n = n })
end

-- fn() while the item's parts have what their columns meet.
function Run:weighed(item, fn)
  local weights = self.job.weighting
  if not weights then return fn() end
  weights:attach(item)
  local ok, message, code = fn()
  weighting.detach(item)
  return ok, message, code
end

-- Codes that the other form cannot hold: what recipe keep can do about them.
function Run:advised(message, code, item)
  if code ~= "unsupported" or self.job.rule.name ~= "keep" then return message end
  return message .. recipe.keep_advice(item.tensor.packed.mode)
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
  local lost
  ok, lost, code = self:weighed(item, function() return self.writer:put(put) end)
  if not ok then return nil, self:advised(lost, code, item), code end
  return lost == 0 or self:lose(item.name, lost)
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
  for _, lost in ipairs(self.dir:recall "lost") do self.job.lost[lost.name] = lost.n end
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

---Writes what is not there yet. What is done when it is stopped is noted.
---@return true? ok
---@return string? message
---@return string? code
function Run:write()
  local ok, message, code
  local _ <close> = setmetatable({}, { __close = function(_, raised)
    if raised or code == "cancelled" then self:note() end
  end })
  ok, message, code = self:write_files()
  if ok then self.job:note_lost() end
  return ok, message, code
end

function Run:close() self.writer:close() end
Run.__close = Run.close

-- ---- an estimate -------------------------------------------------------------------------------

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

-- The items to come by kind: the weights of all, and the largest item.
function Run:kinds()
  local kinds = {}
  for _, file in ipairs(self.job.files) do
    for i = self:items_done(file) + 1, #file.items do
      local item = file.items[i]
      local key, weights = speed_key(item.put), weights_of(item.put)
      local kind = kinds[key] or { weights = 0, item = item }
      kind.weights = kind.weights + weights
      if weights > weights_of(kind.item.put) then kind.item = item end
      kinds[key] = kind
    end
  end
  return kinds
end

-- Seconds per weight, from some rows of an item. The second of two tries finds them in memory.
function Run:sample(item)
  local o, put = self.job.options, item.put
  local rows, seconds = math.max(SAMPLE // put.cols, 1), nil
  put.flavour, put.mx_rule = o.flavour, o.mx_rule
  for _ = 1, 2 do
    local start = sys.seconds()
    local ok, message, code = self:weighed(item, function() return self.writer:try(put, rows) end)
    if not ok then return nil, message, code end
    seconds = sys.seconds() - start
  end
  return seconds / math.min(rows * put.cols, weights_of(put))
end

---Seconds that the items to come will take, by a sample of each kind. How fast the disk is remains
---to be seen.
---@return number? seconds
---@return string? message
---@return string? code
function Run:estimate()
  local seconds = 0
  for _, kind in pairs(self:kinds()) do
    local each, message, code = self:sample(kind.item)
    if not each then return nil, message, code end
    seconds = seconds + each * kind.weights
  end
  return seconds
end

-- ---- opening ------------------------------------------------------------------------------------

---@param job moonlet.quantize.Job
---@param dir moonlet.Partial|false  false: nothing is there, and nothing will be written
---@return moonlet.quantize.Run? run
---@return string? message
---@return string? code
function run.open(job, dir)
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

return run
