-- shards: the files that hold a checkpoint's tensors, whatever its form.
--
-- A form of checkpoint is a module (`moonlet.mlx`, `moonlet.hf`, `moonlet.compressed_tensors`) that
-- says which tensors its files have, how each is made, and what config.json says about them:
--
--   form.bytes(tensor, decision)          what a decision costs in this form
--   form.suited(tensor, decision)         -> the decision, or the nearest that the form can have
--                                         and what it cannot; where there is one
--   form.items(decided, source)           -> sets of items to write, or nil, message, code
--   form.norm(tensor, decision)           -> dtype and shift of a norm (stored as w - shift), or
--                                         nil where it is copied bit for bit
--   form.bare_nvfp4                       true where no scale of the matrix lies above nvfp4's
--   form.config(inventory, decided, base) -> text of config.json, or nil, message, code
--
-- `decided` pairs descriptions with decisions, as moonlet.plan does; form.adapt(source), where
-- there is one, may change descriptions before they are decided on. Here is what forms share.

local json = require "moonlet.json"

local shards = {}

-- mlx_lm.utils: MAX_FILE_SIZE_GB; Hugging Face's own shards have this size, too.
shards.LIMIT = 5 << 30

shards.INDEX = "model.safetensors.index.json"

---@class moonlet.Entry  one tensor of a file
---@field name string
---@field dtype string
---@field shape integer[]
---@field data (string|fun(put: table): string)?  its bytes, where they are not made by the put

---@class moonlet.Item   what one put writes: a matrix with its scales, or a plain tensor
---@field name string
---@field tensor moonlet.Tensor  what it is made of
---@field expert integer?    0-based, where it is one expert's share of `tensor`
---@field parameters integer
---@field bytes integer
---@field entries moonlet.Entry[]  those that the put makes come first
---@field put table  moonlet.core's quantizer:put, without `entry`
---@field largest moonlet.Largest?  nvfp4 under a scale of the whole matrix

---@class moonlet.Largest  what fused matrices share: the magnitude of their largest weight
---@field puts table[]
---@field value number?    once it has been looked for

---@class moonlet.FileSet
---@field stem string
---@field format string    __metadata__.format
---@field listed boolean   sharded, and named by the index
---@field items moonlet.Item[]

---@class moonlet.File
---@field name string
---@field format string
---@field listed boolean
---@field items moonlet.Item[]

local SIZES = { U8 = 1, F8_E4M3 = 1, BF16 = 2, F16 = 2, U32 = 4, I32 = 4, F32 = 4, I64 = 8 }

---Completes an item: its size is that of its entries.
---@param item moonlet.Item
---@return moonlet.Item
function shards.item(item)
  item.bytes = 0
  for _, entry in ipairs(item.entries) do
    local n = SIZES[entry.dtype]
    for _, d in ipairs(entry.shape) do n = n * d end
    item.bytes = item.bytes + n
  end
  return item
end

---Rows first .. first + n - 1 of a tensor as one part; they must lie in one of its parts.
---@param tensor moonlet.Tensor
---@param first integer
---@param n integer
---@return table part
function shards.slice(tensor, first, n)
  local part, at = {}, first % tensor.part_rows
  assert(at + n <= tensor.part_rows, "rows of two parts")
  for k, v in pairs(tensor.parts[first // tensor.part_rows + 1]) do part[k] = v end
  part.first_row = part.first_row + at
  part.row_scale = part.row_scale and part.row_scale:sub(4 * at + 1, 4 * (at + n))
  return part
end

local function shard(set, limit)
  local lists, size = { {} }, 0
  for _, item in ipairs(set.items) do
    if size > 0 and size + item.bytes > limit then
      lists[#lists + 1], size = {}, 0
    end
    table.insert(lists[#lists], item)
    size = size + item.bytes
  end
  return lists
end

---Files for sets of items; shards are filled in order up to `limit` bytes.
---@param sets moonlet.FileSet[]
---@param limit integer
---@return moonlet.File[]
function shards.files(sets, limit)
  local files = {}
  for _, set in ipairs(sets) do
    local lists = set.listed and shard(set, limit) or { set.items }
    for i, items in ipairs(lists) do
      local name = #lists == 1 and set.stem .. ".safetensors"
        or ("%s-%05d-of-%05d.safetensors"):format(set.stem, i, #lists)
      files[#files + 1] = { name = name, format = set.format, listed = set.listed, items = items }
    end
  end
  return files
end

---Text of shards.INDEX.
---@param files moonlet.File[]
---@return string
function shards.index(files)
  local bytes, parameters, map = 0, 0, {}
  for _, file in ipairs(files) do
    for _, item in ipairs(file.listed and file.items or {}) do
      bytes, parameters = bytes + item.bytes, parameters + item.parameters
      for _, entry in ipairs(item.entries) do map[entry.name] = file.name end
    end
  end
  return json.encode({ metadata = { total_size = bytes, total_parameters = parameters },
    weight_map = json.object(map) }, { indent = 4 }) .. "\n"
end

return shards
