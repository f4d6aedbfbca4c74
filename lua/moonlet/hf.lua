-- hf: what a Hugging Face checkpoint looks like, in BF16, as the published ones do.
--
-- Names and shapes are those of transformers' modeling_qwen3_5(_moe).py: experts fused into
-- gate_up_proj and down_proj, convolutions [channels, 1, kernel], norms stored as w - 1. What is
-- not a matrix and lies in float32 stays float32. moonlet.compressed_tensors builds on this.

local json = require "moonlet.json"
local recipe = require "moonlet.recipe"
local shards = require "moonlet.shards"

local hf = {}

---The published name of a tensor, however the files at hand spell it.
---@param tensor moonlet.Tensor
---@return string
function hf.name(tensor)
  if tensor.part == "vision" then
    return (tensor.output:gsub("^vision_tower%.", "model.visual."))
  elseif tensor.part == "mtp" then
    return (tensor.name:gsub("^.-mtp%.", "mtp.", 1))
  end
  return tensor.name
end

-- Descriptions follow the stored dtype where MLX checkpoints want bf16 throughout.
---@param source moonlet.Source
function hf.adapt(source)
  for _, tensor in ipairs(source.tensors) do
    if not tensor.matrix and not tensor.stored and tensor.dtype == "F32" then
      tensor.stored = "f32"
    end
  end
end

-- What is added to a norm and subtracted again: it is stored as w - 1 here, and scales that are
-- folded into it are those of w.
local function shifts(tensor, zero_centred)
  if not tensor.zero_centred then return nil end
  local folded = tensor.parts[1].col_scale ~= nil
  return folded and zero_centred and 1 or nil, (folded or not zero_centred) and 1 or nil
end

-- An unquantized tensor of `parts`, its share of `tensor`, in the dtype `keep`.
---@param tensor moonlet.Tensor
---@param keep string
---@param zero_centred boolean  norms of the source are stored as w - 1
---@param share { name: string, shape: integer[], expert: integer?, parts: table[]?,
---  part_rows: integer? }
---@return moonlet.Item
function hf.dense(tensor, keep, zero_centred, share)
  local op = (tensor.stored or keep ~= "bf16") and "copy" or "bf16"
  if keep == "f32" and tensor.part == "text" then op = "f32" end
  local add, subtract = shifts(tensor, zero_centred)
  local n = 1
  for _, d in ipairs(share.shape) do n = n * d end
  return shards.item { name = share.name, tensor = tensor, expert = share.expert, parameters = n,
    entries = { { name = share.name, dtype = keep:upper(),
      shape = share.shape } },
    put = { op = op, parts = share.parts or tensor.parts,
      part_rows = share.part_rows or tensor.part_rows, cols = tensor.cols,
      add = add, subtract = subtract } }
end

hf.bytes = recipe.bytes

function hf.norm(tensor, decision)
  if decision.keep == "f16" then return nil end
  return decision.keep, tensor.zero_centred and 1 or 0
end

-- Gate and up of every expert, one after the other.
local function gate_up(gate, up, keep)
  local experts, width, cols = table.unpack(gate.shape)
  local parts = {}
  for e = 0, experts - 1 do
    parts[2 * e + 1] = shards.slice(gate, e * width, width)
    parts[2 * e + 2] = shards.slice(up, e * width, width)
  end
  return hf.dense(gate, keep, true, { name = gate.name:gsub("gate_proj%.weight$", "gate_up_proj"),
    shape = { experts, 2 * width, cols }, parts = parts, part_rows = width })
end

local function item_of(tensor, up, keep, zero_centred)
  if tensor.class == "expert_gate" then return gate_up(tensor, up, keep) end
  local name = hf.name(tensor)
  if tensor.class == "expert_down" then name = name:gsub("%.weight$", "") end
  return hf.dense(tensor, keep, zero_centred, { name = name, shape = tensor.shape })
end

---@param decided { tensor: moonlet.Tensor, decision: table }[]
---@param source moonlet.Source
---@return moonlet.FileSet[]? sets
---@return string? message
---@return string? code
function hf.items(decided, source)
  local set = { stem = "model", format = "pt", listed = true, items = {} }
  for i, d in ipairs(decided) do
    local tensor = d.tensor
    if d.decision.mode then
      return nil, ("tensor %s: %s has no place in a bf16 checkpoint; recipe keep_bf16 has")
        :format(tensor.name, recipe.decision_text(d.decision)), "unsupported"
    end
    if not d.decision.drop and tensor.class ~= "expert_up" then
      local up = tensor.class == "expert_gate" and decided[i + 1].tensor
      set.items[#set.items + 1] = item_of(tensor, up, d.decision.keep, source.zero_centred)
    end
  end
  return { set }
end

---The configuration of the source without what it says about quantization, as transformers spells
---it.
---@param inventory moonlet.Inventory  its config is changed in place
---@return table config
function hf.plain_config(inventory)
  local config = inventory.config
  local text = json.is_object(config.text_config) and config.text_config or config
  for _, t in ipairs { config, text } do
    t.quantization, t.quantization_config = nil, nil
    t.tie_word_embeddings = inventory.source.tied
  end
  local rope = text.rope_parameters -- stock MLX converters rename its rope_type
  if json.is_object(rope) and rope.type and not rope.rope_type then
    rope.rope_type, rope.type = rope.type, nil
  end
  return config
end

---Text of config.json.
---@param inventory moonlet.Inventory  its config is changed in place
---@return string
function hf.config(inventory)
  return json.encode(hf.plain_config(inventory), { indent = 2 }) .. "\n"
end

return hf
