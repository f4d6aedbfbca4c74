--- Files of a reference model's log-probabilities, so that a large model runs once and many others
-- are compared with what it said.
--
-- Safetensors: two bytes per token of the vocabulary and position (csrc/model/kld.h says which and
-- how exact), the texts' ids and targets, and the name of the model.
local core = require "moonlet.core"

local reference = {}

---@class moonlet.ReferenceFile an open file; close it
---@field info fun(self): { positions: integer, vocab: integer, model: string?, words: string? }
---@field texts fun(self): integer[], integer[], integer[] ids, targets and lengths of sequences
---@field close fun(self)

---@param path string
---@return moonlet.ReferenceFile? file, string? message, string? code
function reference.open(path)
  return core.reference_open(path)
end

local Writer = {}
Writer.__index = Writer

---Begins a file, which is at its path once finish() succeeds; close() gives it up.
---@param path string
---@param model moonlet.Model the reference
---@param sequences { ids: integer[], targets: integer[] }[]
---@param words integer
---@return table? writer put(final, targets), finish(), close()
---@return string? message, string? code
function reference.create(path, model, sequences, words)
  local ids, targets, lengths = {}, {}, {}
  for i, sequence in ipairs(sequences) do
    lengths[i] = #sequence.ids
    table.move(sequence.ids, 1, #sequence.ids, #ids + 1, ids)
    table.move(sequence.targets, 1, #sequence.targets, #targets + 1, targets)
  end
  local handle, message, code = core.reference_create(path, model.core:info().config.vocab_size,
    ids, targets, lengths, model.dir, tostring(words))
  if not handle then return nil, message, code end
  return setmetatable({ core = handle, model = model }, Writer)
end

---@param final userdata what Session:final returned
---@param targets integer[] one for each row
function Writer:put(final, targets)
  return self.core:put(self.model.core, final, targets)
end

function Writer:finish()
  return self.core:finish()
end

function Writer:close()
  self.core:close()
end

Writer.__close = Writer.close

return reference
