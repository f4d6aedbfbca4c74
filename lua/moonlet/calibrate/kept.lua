-- kept: what a calibration leaves for a process that goes on with it.
--
-- OUT.partial has the residual stream, the sums of the layers that are done, and a journal of the
-- last layer behind which both were on the disk; HESSIANS.partial the Hessians (OUT.partial itself,
-- when they are the only output). Both are locked, so that nobody else writes either output.

local core = require "moonlet.core"
local partial = require "moonlet.partial"

local kept = {}

local HESSIANS <const>, IMATRIX <const> = "hessians.safetensors", "imatrix.gguf"
local RESERVED <const>, WORK <const> = "imatrix.reserved", { "stream-0", "stream-1", "sums" }
local NAMES <const> = { [HESSIANS] = true, [IMATRIX] = true, [RESERVED] = true }
for _, name in ipairs(WORK) do NAMES[name] = true end

---@class moonlet.calibrate.Kept
---@field main moonlet.Partial
---@field beside moonlet.Partial  where Hessians grow; perhaps the same
---@field out string?             the imatrix to be
---@field hessians string?        the Hessians to be
---@field layers integer          done by processes before this one
---@field stream integer          which has the rows behind them
---@field head table              what the first of them wrote down
---@field is_gone boolean?        it was left or removed
local Kept = {}
Kept.__index = Kept

-- ---- opening -----------------------------------------------------------------------------------

-- Opens what is there for each output: nothing is written before all of them are free.
local function find(places, plan, resume)
  local found = {}
  for i, place in ipairs(places) do
    local message, code
    found[i], message, code = partial.find(place, plan, resume)
    if found[i] == nil then
      if found[1] then found[1]:close() end
      return nil, message, code
    end
  end
  return found
end

local function begin(places, found, head)
  local list = {}
  for i, place in ipairs(places) do
    local message, code
    list[i], message, code = partial.begin(place, found[i], head)
    if not list[i] then
      for k = i, #places do
        if found[k] then found[k]:close() end
      end
      if list[1] then list[1]:leave() end
      return nil, message, code
    end
  end
  return list
end

local function new(main, beside, o)
  return setmetatable({ main = main, beside = beside or main, out = o.out, hessians = o.hessians,
    head = main.head }, Kept)
end

local function last_of(list) return list[#list] end

-- Whether the file of Hessians has its name: it is the one that was to get it. An older one is not.
local function has_delivered(self)
  local was = last_of(self.main:recall "delivered")
  local bytes, changed = core.file_info(self.hessians)
  return was ~= nil and bytes == was.bytes and changed == was.changed
end

-- The last border, if all that belongs to it is there; `missing` is a directory that is not.
function Kept:check(missing)
  local last = last_of(self.main:recall "border")
  if self:result() or not last then return { layers = 0, stream = 0 } end
  if missing then return nil, missing .. ": is missing" end
  local files = core.list_dir(self.main.dir) or {}
  for _, name in ipairs(WORK) do
    if not files[name] then return nil, ("%s/%s: is missing"):format(self.main.dir, name) end
  end
  files = core.list_dir(self.beside.dir) or {}
  if self.hessians and not files[HESSIANS] and not files[HESSIANS .. ".partial"]
    and not has_delivered(self) then
    return nil, self:growing() .. ": is missing"
  end
  return last
end

---Takes the places of the outputs, with what another process left there.
---@param o { out: string?, hessians: string?, head: table, resume: boolean }  head: with `plan`,
---  what must be the same for the bytes to be the same
---@return moonlet.calibrate.Kept? kept
---@return string? message
---@return string? code
function kept.open(o)
  local places = {}
  for _, path in ipairs { o.out or o.hessians, o.out and o.hessians } do
    places[#places + 1] = partial.place_of_file(path, NAMES)
  end
  local found, message, code = find(places, o.head.plan, o.resume)
  if not found then return nil, message, code end
  local main, last = found[1], { layers = 0, stream = 0 }
  if main then
    local self = new(main, found[2], o)
    last, message = self:check(places[2] and not found[2] and places[2].dir)
    if not last then
      main:close()
      if found[2] then found[2]:close() end
      return nil, ("%s; %s cannot be gone on with; remove it"):format(message, main.dir), "format"
    end
  end
  local list
  list, message, code = begin(places, found, o.head)
  if not list then return nil, message, code end
  local self = new(list[1], list[2], o)
  self.layers, self.stream = last.layers, last.stream
  return self
end

-- ---- going on ----------------------------------------------------------------------------------

---Directory of the stream and the sums.
---@return string
function Kept:dir() return self.main.dir end

---Where Hessians grow.
---@return string? path
function Kept:growing() return self.hessians and self.beside.dir .. "/" .. HESSIANS end

---Where they grow from the beginning.
---@return string? path
function Kept:begun() return self.hessians and self.beside:anew(HESSIANS) end

---Whether a process before this one completed the Hessians of all layers: they are called so then,
---or have their place already.
---@param n_layers integer  with the head
---@return boolean
function Kept:written(n_layers)
  local files = core.list_dir(self.beside.dir) or {}
  return self.layers == n_layers and not files[HESSIANS .. ".partial"]
end

---What is done so far is there to be gone on with.
---@param layers integer
---@param stream integer
function Kept:note(layers, stream)
  return self.main:keep("border", { layers = layers, stream = stream })
end

-- ---- the end -----------------------------------------------------------------------------------

---What the run has to say about itself, if all that is left to do is to clear up.
---@return table? result
function Kept:result()
  return last_of(self.main:recall "result")
end

---Takes the imatrix's space, so that a disk that fills up meanwhile costs nobody the calibration.
---@param bytes integer
---@return true? ok
---@return string? message
---@return string? code
function Kept:reserve(bytes) return core.reserve(self.main.dir .. "/" .. RESERVED, bytes) end

---What is reserved already.
---@return integer bytes
function Kept:reserved() return core.file_info(self.main.dir .. "/" .. RESERVED) or 0 end

---Gives the outputs their names. `write(path)` writes the imatrix.
---@param write fun(path: string): boolean?, string?, string?
---@param result table
---@return true? ok
---@return string? message
---@return string? code
function Kept:deliver(write, result)
  local ok, message, code = true, nil, nil
  if self.out then
    os.remove(self.main.dir .. "/" .. RESERVED)
    ok, message, code = write(self.main:anew(IMATRIX))
    if ok then ok, message, code = self.main:deliver(IMATRIX) end
  end
  if ok and self.hessians then
    local bytes, changed = core.file_info(self:growing())
    if bytes then
      ok, message, code = self.main:keep("delivered", { bytes = bytes, changed = changed })
    end
    if ok and not (not bytes and has_delivered(self)) then
      ok, message, code = self.beside:deliver(HESSIANS)
    end
  end
  if not ok then return nil, message, code end
  return self.main:keep("result", result)
end

---Removes what was kept: the outputs have their names, or never will.
function Kept:remove()
  self.is_gone = true
  if self.beside ~= self.main then self.beside:remove() end
  self.main:remove()
end

---Leaves what was kept for another process, or removes it if there is nothing to go on with.
---@return boolean left
function Kept:leave()
  self.is_gone = true
  if not self.main.noted then
    self:remove()
    return false
  end
  if self.beside ~= self.main then self.beside:close() end
  self.main:close()
  return true
end

function Kept:close()
  if not self.is_gone then self:leave() end
end
Kept.__close = Kept.close

---The text of an error with where to go on, if anything is left.
---@param message string
---@return string
function Kept:left(message)
  if not self:leave() then return message end
  return ("%s; %s holds what is done, to be resumed (--resume)"):format(message, self.main.dir)
end

return kept
