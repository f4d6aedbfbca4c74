-- mlx: what an MLX checkpoint directory looks like, as stock mlx-lm 0.31.3 and 0.32.2 load it.
--
-- Turns decisions into files: which arrays each tensor becomes, in which shard they lie, and what
-- config.json says about them. Writes nothing itself. Rules: mlx_lm/utils.py (load_model, save),
-- mlx_lm/models/qwen3_5.py and qwen3_5_moe.py (sanitize, TextModelArgs).

local json = require "moonlet.json"
local recipe = require "moonlet.recipe"
local shards = require "moonlet.shards"

local mlx = {}

local SCALES = { affine = "BF16", mxfp4 = "U8", mxfp8 = "U8", nvfp4 = "U8" }

local function with_last(shape, last)
  local copy = table.move(shape, 1, #shape, 1, {})
  copy[#copy] = last
  return copy
end

local function module_of(tensor) return (tensor.output:gsub("%.weight$", "")) end

local function quantized_entries(tensor, d)
  local module, cols = module_of(tensor), tensor.cols
  local entries = { { name = module .. ".weight", dtype = "U32",
    shape = with_last(tensor.shape, cols * d.bits // 32) } }
  for _, part in ipairs(d.mode == "affine" and { ".scales", ".biases" } or { ".scales" }) do
    entries[#entries + 1] = { name = module .. part, dtype = d.scales or SCALES[d.mode],
      shape = with_last(tensor.shape, cols // d.group) }
  end
  return entries
end

-- Norms of raw checkpoints get their 1 here, rounded to bf16 as stock loaders do it; a float32
-- norm would turn every activation behind it into float32.
local function dense(tensor, decision, zero_centred)
  local shape = tensor.shape
  if tensor.class == "conv" then shape = { shape[1], shape[3], 1 } end
  local entry = { name = tensor.output, dtype = decision.keep:upper(), shape = shape }
  if tensor.stored or decision.keep ~= "bf16" then return entry, "copy" end
  return entry, "bf16", zero_centred and tensor.zero_centred and 1 or nil
end

-- Stock converters count the parameters of leaf modules, which decay vectors are not part of
-- (mlx_lm/utils.py, get_total_parameters).
local function parameters(tensor)
  return tensor.class == "decay" and 0 or tensor.rows * tensor.cols
end

local function item_of(tensor, decision, zero_centred)
  local op, mode, add
  local entries = {}
  if decision.mode then
    entries, op, mode = quantized_entries(tensor, decision), "encode", decision.mode
  else
    entries[1], op, add = dense(tensor, decision, zero_centred)
  end
  return shards.item { name = tensor.output, tensor = tensor, parameters = parameters(tensor),
    entries = entries, put = { op = op, parts = tensor.parts, part_rows = tensor.part_rows,
      cols = tensor.cols, add = add, mode = mode, bits = decision.bits, group = decision.group,
      exact = decision.exact, scale_dtype = decision.scales and decision.scales:lower() } }
end

mlx.bytes = recipe.bytes

mlx.bare_nvfp4 = true

function mlx.norm(_, decision)
  if decision.keep == "bf16" then return "bf16", 0 end
end

-- What MLX has no form for, or nil.
local function problem(tensor, decision)
  if decision.mode == "fp8" then
    return "MLX has no fp8 with a scale per row; compressed-tensors has"
  end
  for _, divisor in ipairs(decision.exact and tensor.packed.divisors or {}) do
    if divisor ~= 1 then
      return "nvfp4 under a scale of the whole matrix cannot be kept in MLX's form, which has none"
    end
  end
end

---The tensors to write: those of the model's shards, and those of mtp.safetensors, which holds
---Hugging Face tensors as they were. mlx-lm reads model*.safetensors and nothing else; releases up
---to 0.31.3 misread a file with MTP tensors among them.
---@param decided { tensor: moonlet.Tensor, decision: table }[]
---@param source moonlet.Source
---@return moonlet.FileSet[]? sets
---@return string? message
---@return string? code
function mlx.items(decided, source)
  local model = { stem = "model", format = "mlx", listed = true, items = {} }
  local mtp = { stem = "mtp", format = "pt", listed = false, items = {} }
  for _, d in ipairs(decided) do
    local refused = problem(d.tensor, d.decision)
    if refused then
      if d.decision.exact then refused = refused .. recipe.keep_advice(d.decision.mode) end
      return nil, ("tensor %s: %s"):format(d.tensor.name, refused), "unsupported"
    end
    if not d.decision.drop then
      local list = d.tensor.part == "mtp" and mtp.items or model.items
      list[#list + 1] = item_of(d.tensor, d.decision, source.zero_centred)
    end
  end
  return #mtp.items > 0 and { model, mtp } or { model }
end

-- ---- config.json -------------------------------------------------------------------------------

local function setting(d) return { group_size = d.group, bits = d.bits, mode = d.mode } end

-- The most frequent decision.
local function most_frequent(quantized)
  local counts, best = {}, nil
  for _, d in ipairs(quantized) do
    local label = recipe.decision_text(d.decision)
    counts[label] = (counts[label] or 0) + 1
    if not best or counts[label] > counts[recipe.decision_text(best)] then best = d.decision end
  end
  return best
end

---The block that goes into config.json as `quantization` and `quantization_config`: one setting,
---and an entry with its mode for every module that differs. The one setting is the recipe's base,
---which is what stock converters put there (the widths on the command line, even where hardly a
---module has them), or the most frequent decision. nil when nothing is quantized. (An entry
---without a mode means affine, whatever the block says.)
---@param decided { tensor: moonlet.Tensor, decision: table }[]
---@param base table?  moonlet.Recipe's
---@return table?
function mlx.quantization(decided, base)
  local quantized = {}
  for _, d in ipairs(decided) do
    if d.decision.mode then quantized[#quantized + 1] = d end
  end
  if #quantized == 0 then return nil end
  local common = base and base.mode and base or most_frequent(quantized)
  local keys = { "group_size", "bits", "mode" }
  local block = json.object(setting(common), keys)
  for _, d in ipairs(quantized) do
    local s = d.decision
    if s.mode ~= common.mode or s.bits ~= common.bits or s.group ~= common.group then
      block[module_of(d.tensor)] = json.object(setting(s), keys)
    end
  end
  return block
end

-- mlx-lm looks at full_attention_interval only; the interval of a list of kinds, or nil.
local function interval_of(layer_types)
  local interval = #layer_types + 1
  for i, kind in ipairs(layer_types) do
    if kind == "full_attention" then
      interval = i
      break
    end
  end
  for i, kind in ipairs(layer_types) do
    if (i % interval == 0) ~= (kind == "full_attention") then return nil end
  end
  return interval
end

-- Integers of the text stack that mlx-lm has other defaults for than transformers.
local SPELLED_OUT = { "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings",
  "num_attention_heads", "num_key_value_heads", "head_dim", "linear_num_key_heads",
  "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
  "linear_conv_kernel_dim" }
local SPELLED_OUT_DENSE = { "intermediate_size" }
local SPELLED_OUT_MOE = { "num_experts", "num_experts_per_tok", "moe_intermediate_size",
  "shared_expert_intermediate_size" }

local function absent(v) return v == nil or v == json.null end

-- transformers falls back to fields beside rope_parameters and then to its own defaults; mlx-lm
-- looks inside rope_parameters only and defaults to another theta.
local function spell_out_rope(text)
  local rope = text.rope_parameters
  if absent(rope) then rope = text.rope_scaling end
  if absent(rope) then rope = json.object { rope_type = "default" } end
  local function fill(key, default)
    if not absent(rope[key]) then return end
    rope[key] = absent(text[key]) and default or text[key]
  end
  fill("rope_theta", 10000.0)
  fill("partial_rotary_factor", 0.25)
  text.rope_parameters = rope
end

local function spell_out(text, numbers, tied)
  local lists = { SPELLED_OUT, numbers.num_experts > 0 and SPELLED_OUT_MOE or SPELLED_OUT_DENSE }
  for _, list in ipairs(lists) do
    for _, key in ipairs(list) do
      if absent(text[key]) then text[key] = numbers[key] end
    end
  end
  spell_out_rope(text)
  text.tie_word_embeddings = tied
end

-- mlx-lm knows the wrappers' model types only.
local function wrap(config, numbers)
  if numbers.wrapped then return config end
  local moe = numbers.num_experts > 0
  config.model_type = numbers.model_type
  return json.object({
    architectures = json.array {
      moe and "Qwen3_5MoeForConditionalGeneration" or "Qwen3_5ForConditionalGeneration" },
    model_type = moe and "qwen3_5_moe" or "qwen3_5",
    text_config = config,
  }, { "architectures", "model_type", "text_config" })
end

---Text of config.json, or nil when stock loaders cannot express the model.
---@param inventory moonlet.Inventory  its config is changed in place
---@param decided { tensor: moonlet.Tensor, decision: table }[]
---@param base table?  moonlet.Recipe's
---@return string? text
---@return string? message
---@return string? code
function mlx.config(inventory, decided, base)
  local config, numbers, tied = inventory.config, inventory.numbers, inventory.source.tied
  local interval = interval_of(numbers.layer_types)
  if not interval then
    return nil, "layer_types has no regular interval of full attention; MLX cannot express it",
      "unsupported"
  end
  config = wrap(config, numbers)
  local text = config.text_config
  spell_out(text, numbers, tied)
  text.full_attention_interval = interval
  config.tie_word_embeddings = tied
  local block = mlx.quantization(decided, base)
  config.quantization, config.quantization_config = block, block
  return json.encode(config, { indent = 4 }) .. "\n"
end

return mlx
