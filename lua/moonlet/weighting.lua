-- weighting: what an imatrix does for a run of quantize.
--
-- Scales are folded before anything is written (moonlet.awq); every matrix that is encoded with its
-- inputs in mind gets their mean squares when its turn comes, so that those of one matrix are in
-- memory at a time.

local awq = require "moonlet.awq"
local core = require "moonlet.core"
local imatrix = require "moonlet.imatrix"
local json = require "moonlet.json"

---@class moonlet.Weighting
---@field imatrix moonlet.Imatrix
---@field record table  what moonlet.json says about the files
local Weighting = {}
Weighting.__index = Weighting

local weighting = {}

local function record_of(paths)
  local list = json.array {}
  for i, path in ipairs(paths) do
    local hash, message, code = core.sha256_file(path)
    if not hash then return nil, message, code end
    list[i] = json.object({ name = path:match("([^/]+)$"), sha256 = hash }, { "name", "sha256" })
  end
  return list
end

---@param path string|string[]
---@param numbers table
---@return moonlet.Weighting? weighting
---@return string? message
---@return string? code
function weighting.open(path, numbers)
  local read, record, message, code
  read, message, code = imatrix.read(path, numbers)
  if not read then return nil, message, code end
  record, message, code = record_of(type(path) == "table" and path or { path })
  if record then return setmetatable({ imatrix = read, record = record }, Weighting) end
  read:close()
  return nil, message, code
end

---Folds scales into the parts of what was decided; see moonlet.awq.
---@param o moonlet.awq.options  without the imatrix
---@return string? note
---@return string? message
---@return string? code
function Weighting:fold(o)
  o.imatrix = self.imatrix
  local results, message, code = awq.fold(o)
  if not results then return nil, message, code end
  return awq.summary(results)
end

-- The expert that part i of an item is of; nil if the item is no stack.
local function expert_of(item, i)
  if #item.tensor.shape ~= 3 then return nil end
  return item.expert or i - 1
end

---Gives the parts of an item what their columns meet, if its fit is "imatrix": with scales folded
---in, their inputs are so much smaller. Where the imatrix says nothing, the fit becomes "mse".
---@param item moonlet.Item
function Weighting:attach(item)
  local put = item.put
  if put.op ~= "encode" or put.fit ~= "imatrix" then return end
  for i, part in ipairs(put.parts) do
    local importance = self.imatrix:importance(item.tensor.name, expert_of(item, i))
    part.importance = importance and core.awq_weights(importance, part.col_scale)
    if not importance then put.fit = "mse" end
  end
end

---Lets go of what an item's parts were given.
---@param item moonlet.Item
function weighting.detach(item)
  for _, part in ipairs(item.put.parts) do part.importance = nil end
end

function Weighting:close() self.imatrix:close() end
Weighting.__close = Weighting.close

return weighting
