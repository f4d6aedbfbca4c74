-- damage: what encoding a matrix loses of what it puts out, given what its inputs look like.
--
-- Weights are those of a checkpoint, inputs what an imatrix knows of them; nothing is written.

local core = require "moonlet.core"
local imatrix = require "moonlet.imatrix"
local source = require "moonlet.source"

local damage = {}

-- Weights of one matrix (or stack) that are encoded; larger ones are sampled, rows evenly spaced.
damage.SAMPLE = 1 << 20

---@class moonlet.Damage
---@field imatrix moonlet.Imatrix
---@field writer table  of moonlet.core
local Damage = {}
Damage.__index = Damage

---@param dir string
---@param calibration string|string[]  files of an imatrix
---@param inventory moonlet.Inventory  of the directory
---@param threads integer?
---@return moonlet.Damage? damage
---@return string? message
---@return string? code
function damage.open(dir, calibration, inventory, threads)
  if not inventory.source.tensors[1].parts then
    return nil, dir .. ": there are no weights in it to measure; name a directory", "range"
  end
  local read, message, code = imatrix.read(calibration, inventory.numbers)
  if not read then return nil, message, code end
  source.by_expert(inventory.source.tensors)
  local writer
  writer, message, code = core.quant_open(dir, threads or 0, inventory.source.quantized)
  if writer then return setmetatable({ imatrix = read, writer = writer }, Damage) end
  read:close()
  return nil, message, code
end

-- The parts of a tensor with what their columns meet, as far as it is known, and what each counts:
-- an expert the share of its stack's tokens that it met.
function Damage:weighted_parts(tensor)
  local is_stack, parts, known = #tensor.shape == 3, {}, true
  local counts = is_stack and self.imatrix:tokens(tensor.name) or {}
  for i, part in ipairs(tensor.parts) do
    local copy = {}
    for k, v in pairs(part) do copy[k] = v end
    copy.importance = self.imatrix:importance(tensor.name, is_stack and i - 1 or nil)
    copy.weights = copy.importance
    parts[i], counts[i] = copy, counts[i] or 1
    known = known and copy.importance ~= nil
  end
  return parts, counts, known
end

---What each decision leaves of a matrix as error: sum of importance * squared difference over sum
---of importance * squared weight, scales being fitted.
---@param tensor moonlet.Tensor
---@param decisions table[]  { mode, bits, group }
---@return number[]? errors
---@return string? message
---@return string? code
function Damage:errors(tensor, decisions)
  local parts, counts, known = self:weighted_parts(tensor)
  local errors, rows = {}, math.max(1, damage.SAMPLE // tensor.cols)
  for i, d in ipairs(decisions) do
    local lost, all, code = self.writer:damage({ op = "encode", parts = parts,
      part_rows = tensor.part_rows, cols = tensor.cols, mode = d.mode, bits = d.bits,
      group = d.group, fit = known and "imatrix" or "mse" }, rows)
    if not lost then return nil, all, code end
    local error, size = 0, 0
    for k, count in ipairs(counts) do
      error, size = error + count * lost[k], size + count * all[k]
    end
    errors[i] = size > 0 and error / size or 0
  end
  return errors
end

function Damage:close()
  self.writer:close()
  self.imatrix:close()
end
Damage.__close = Damage.close

return damage
