-- compressed_tensors: checkpoints as llm-compressor and qstream write them.
--
-- One tensor per expert and projection; matrices in the formats of compressed-tensors 0.20
-- (compressors/*, quantization/quant_args.py), everything else under its Hugging Face name:
--
--   mode     format                  tensors of a module
--   mxfp4    mxfp4-pack-quantized    weight_packed U8, weight_scale U8
--   nvfp4    nvfp4-pack-quantized    weight_packed U8, weight_scale F8_E4M3,
--                                    weight_global_scale F32
--   mxfp8    mxfp8-quantized         weight F8_E4M3, weight_scale U8
--   fp8      float-quantized         weight F8_E4M3, weight_scale BF16 per row
--   affine   pack-quantized          weight_packed I32, weight_scale BF16, weight_zero_point I32,
--                                    weight_shape I64
--
-- All are weight-only: no scales of activations.

local hf = require "moonlet.hf"
local json = require "moonlet.json"
local recipe = require "moonlet.recipe"
local shards = require "moonlet.shards"

local ct = {}

ct.adapt, ct.norm = hf.adapt, hf.norm

-- ---- tensors -----------------------------------------------------------------------------------

-- E4M3 of 0.125, which the library puts where a group's scale would be 0
-- (quantization/utils/helpers.py, generate_gparam and its users).
local LEAST_NVFP4_SCALE = 0x20

-- Known when the matrix is written.
local function global_scale(put)
  return string.pack("<f", put.global_scale > 0 and 2688 / put.global_scale or 1)
end

-- The entries that each mode's put makes of [rows, cols], then those that are data.
local ENTRIES = {
  mxfp4 = function(rows, cols)
    return { { "weight_packed", "U8", rows, cols // 2 },
      { "weight_scale", "U8", rows, cols // 32 } }
  end,
  nvfp4 = function(rows, cols)
    return { { "weight_packed", "U8", rows, cols // 2 },
      { "weight_scale", "F8_E4M3", rows, cols // 16 },
      { "weight_global_scale", "F32", 1, data = global_scale } }
  end,
  mxfp8 = function(rows, cols)
    return { { "weight", "F8_E4M3", rows, cols }, { "weight_scale", "U8", rows, cols // 32 } }
  end,
  fp8 = function(rows, cols, d)
    return { { "weight", "F8_E4M3", rows, cols }, { "weight_scale", d.scales or "BF16", rows, 1 } }
  end,
  affine = function(rows, cols, d)
    return { { "weight_packed", "I32", rows, cols * d.bits // 32 },
      { "weight_scale", d.scales or "BF16", rows, cols // d.group },
      { "weight_zero_point", "I32", (rows * d.bits + 31) // 32, cols // d.group },
      { "weight_shape", "I64", 2, data = string.pack("<i8i8", rows, cols) } }
  end,
}

local function quantized(tensor, d, share)
  local entries, global = {}, global_scale
  if d.exact and d.mode == "nvfp4" then
    global = string.pack("<f", tensor.packed.divisors[(share.expert or 0) + 1])
  end
  for i, e in ipairs(ENTRIES[d.mode](share.shape[1], tensor.cols, d)) do
    entries[i] = { name = ("%s.%s"):format(share.module, e[1]), dtype = e[2],
      shape = { table.unpack(e, 3) }, data = e.data == global_scale and global or e.data }
  end
  return shards.item { name = share.module .. ".weight", tensor = tensor, expert = share.expert,
    parameters = share.shape[1] * tensor.cols, entries = entries,
    put = { op = "encode", parts = share.parts, part_rows = share.part_rows, cols = tensor.cols,
      mode = d.mode, bits = d.bits, group = d.group, zero_point = d.mode == "affine",
      exact = d.exact, scale_dtype = d.scales and d.scales:lower(),
      least_scale = d.mode == "nvfp4" and LEAST_NVFP4_SCALE or nil } }
end

-- What a stack of experts [experts, rows, cols] is to one of them: fused gate and up are halves.
local function projections(tensor)
  local stem, fused = tensor.name:match("^(.*%.mlp%.experts)%.(%l+_?%l+_proj)")
  if not stem or #tensor.shape ~= 3 then return nil end
  if fused == "gate_up_proj" then return stem, { "gate_proj", "up_proj" } end
  return stem, { fused }
end

-- The shares of a tensor that become modules of their own.
local function shares_of(tensor)
  local stem, names = projections(tensor)
  if not stem then
    return { { module = hf.name(tensor):gsub("%.weight$", ""), name = hf.name(tensor),
      shape = tensor.shape, parts = tensor.parts, part_rows = tensor.part_rows } }
  end
  local list, rows = {}, tensor.shape[2] // #names
  for e = 0, tensor.shape[1] - 1 do
    for i, name in ipairs(names) do
      local module = ("%s.%d.%s"):format(stem, e, name)
      list[#list + 1] = { module = module, name = module .. ".weight", expert = e,
        shape = { rows, tensor.cols }, part_rows = rows,
        parts = { shards.slice(tensor, (e * #names + i - 1) * rows, rows) } }
    end
  end
  return list
end

-- vLLM fuses these and then has one global scale for them; theirs must be the same.
local FUSED = { q_proj = "qkv_proj", k_proj = "qkv_proj", v_proj = "qkv_proj",
  gate_proj = "gate_up_proj", up_proj = "gate_up_proj", in_proj_qkv = "in_proj_qkvz",
  in_proj_z = "in_proj_qkvz", in_proj_b = "in_proj_ba", in_proj_a = "in_proj_ba" }

local function share_scale(item, module, groups)
  local stem, last = module:match("^(.*)%.([^.]+)$")
  local key = ("%s.%s"):format(stem or "", FUSED[last] or last or module)
  groups[key] = groups[key] or { puts = {} }
  item.largest = groups[key]
  table.insert(groups[key].puts, item.put)
end

-- Zero points of this many rows and 4 bits are one word for each group, which compressed-tensors
-- 0.20.0 cannot take apart (pack_quantized/helpers.py, unpack_from_int32: a transposed view whose
-- last stride is not 1).
local ROWS_OF_A_WORD = 8

---The decision, or BF16 where the stock library could not read what it makes. Codes that are taken
---over stay what they are: that nothing is lost weighs more than who can read it.
---@param tensor moonlet.Tensor
---@param decision table
---@return table decision
---@return string? note
function ct.suited(tensor, decision)
  local rows = #tensor.shape == 3 and tensor.shape[2] or tensor.rows
  if decision.mode ~= "affine" or decision.bits ~= 4 or rows > ROWS_OF_A_WORD then
    return decision
  end
  local why = "compressed-tensors 0.20 cannot unpack the zero points of a 4-bit matrix of at most "
    .. "8 rows: "
  if decision.exact then return decision, why .. "%d matrices keep them all the same" end
  return { keep = "bf16" }, why .. "%d matrices are written in BF16"
end

---@param decided { tensor: moonlet.Tensor, decision: table }[]
---@param source moonlet.Source
---@return moonlet.FileSet[] sets
function ct.items(decided, source)
  local set = { stem = "model", format = "pt", listed = true, items = {} }
  local groups = {}
  for _, d in ipairs(decided) do
    local decision = d.decision
    for _, share in ipairs(decision.drop and {} or shares_of(d.tensor)) do
      local item = decision.mode and quantized(d.tensor, decision, share)
        or hf.dense(d.tensor, decision.keep, source.zero_centred, share)
      if decision.mode == "nvfp4" and not decision.exact then
        share_scale(item, share.module, groups)
      end
      set.items[#set.items + 1] = item
    end
  end
  return { set }
end

---Bytes that a tensor takes in such a checkpoint, whatever its scales and shapes take included.
---@param tensor moonlet.Tensor
---@param decision table
---@return integer
function ct.bytes(tensor, decision)
  if not decision.mode then return recipe.bytes(tensor, decision) end
  local experts = #tensor.shape == 3 and tensor.shape[1] or 1
  local share = { module = "", shape = { tensor.rows // experts } }
  return experts * quantized(tensor, decision, share).bytes
end

-- ---- config.json -------------------------------------------------------------------------------

local function float_args(bits, group, strategy, scale_dtype)
  return { num_bits = bits, type = "float", symmetric = true, group_size = group or json.null,
    strategy = strategy, dynamic = false, scale_dtype = scale_dtype }
end

local SCHEMES = {
  mxfp4 = { "mxfp4-pack-quantized", float_args(4, 32, "group", "torch.uint8") },
  nvfp4 = { "nvfp4-pack-quantized", float_args(4, 16, "tensor_group", "torch.float8_e4m3fn") },
  mxfp8 = { "mxfp8-quantized", float_args(8, 32, "group", "torch.uint8") },
  fp8 = { "float-quantized", float_args(8, nil, "channel") },
}

local function scheme_of(d)
  if SCHEMES[d.mode] then return table.unpack(SCHEMES[d.mode]) end
  return "pack-quantized", { num_bits = d.bits, type = "int", symmetric = false,
    group_size = d.group, strategy = "group", dynamic = false }
end

local ARGS = { "num_bits", "type", "symmetric", "group_size", "strategy", "dynamic", "scale_dtype" }
local GROUP = { "targets", "format", "weights", "input_activations", "output_activations" }

-- Decisions that make the same scheme, in order of appearance, with their tensors.
local function schemes(decided)
  local list, by_label = {}, {}
  for _, d in ipairs(decided) do
    if d.decision.mode then
      local label = recipe.decision_text(d.decision)
      if not by_label[label] then
        by_label[label] = { decision = d.decision, tensors = {} }
        list[#list + 1] = by_label[label]
      end
      table.insert(by_label[label].tensors, d.tensor)
    end
  end
  return list
end

local function escaped(text) return (text:gsub("[.]", "\\.")) end

-- Patterns for modules of the text stack: the layers of each kind of module are listed, whatever
-- prefix a loader gives them. Python's re.match anchors at the start only.
local function patterns(tensors)
  local layers, order, list = {}, {}, {}
  for _, tensor in ipairs(tensors) do
    local layer, path = tensor.name:match("%.layers%.(%d+)%.(.*)%.weight$")
    if layer then
      if not layers[path] then
        layers[path] = {}
        order[#order + 1] = path
      end
      table.insert(layers[path], layer)
    else
      list[#list + 1] = "re:.*" .. escaped(tensor.name:match("([%w_]+)%.weight$")) .. "$"
    end
  end
  for _, path in ipairs(order) do
    list[#list + 1] = ("re:.*(?<!mtp)\\.layers\\.(%s)\\.%s$"):format(
      table.concat(layers[path], "|"), (escaped(path):gsub("experts\\%.", "%0\\d+\\.")))
  end
  return json.array(list)
end

-- "Linear", as in published files, where every matrix is of one format or ignored.
local function targets(scheme, alone)
  if not alone then return patterns(scheme.tensors) end
  local list = json.array { "Linear" }
  for _, tensor in ipairs(scheme.tensors) do
    if tensor.class == "embed" then list[2] = "re:.*embed_tokens$" end
  end
  return list
end

-- Every module that keeps a plain weight, norms and convolutions included, as qstream lists them.
local function ignored(decided)
  local list = json.array {}
  for _, d in ipairs(decided) do
    if not d.decision.mode and not d.decision.drop then
      for _, share in ipairs(shares_of(d.tensor)) do
        if share.name:find("%.weight$") then list[#list + 1] = share.module end
      end
    end
  end
  return list
end

---The quantization_config block; nil when nothing is quantized.
---@param decided { tensor: moonlet.Tensor, decision: table }[]
---@return table?
function ct.quantization(decided)
  local list, groups, names = schemes(decided), {}, {}
  if #list == 0 then return nil end
  local common
  for i, scheme in ipairs(list) do
    local format, args = scheme_of(scheme.decision)
    common = (common == nil or common == format) and format or "mixed-precision"
    names[i] = ("group_%d"):format(i - 1)
    groups[names[i]] = json.object({ targets = targets(scheme, #list == 1), format = format,
      weights = json.object(args, ARGS), input_activations = json.null,
      output_activations = json.null }, GROUP)
  end
  return json.object({ quant_method = "compressed-tensors", format = common,
    quantization_status = "compressed", config_groups = json.object(groups, names),
    ignore = ignored(decided), kv_cache_scheme = json.null,
    global_compression_ratio = json.null, sparsity_config = json.object {},
    transform_config = json.object {}, version = "0.20.0" },
    { "quant_method", "format", "quantization_status", "config_groups", "ignore" })
end

---Text of config.json.
---@param inventory moonlet.Inventory  its config is changed in place
---@param decided { tensor: moonlet.Tensor, decision: table }[]
---@return string
function ct.config(inventory, decided)
  local config = hf.plain_config(inventory)
  config.quantization_config = ct.quantization(decided)
  return json.encode(config, { indent = 2 }) .. "\n"
end

return ct
