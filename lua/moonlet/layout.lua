-- layout: every tensor of a Qwen3.5 / Qwen3.6 checkpoint, from the numbers in config.json alone.
--
-- A tensor description is what recipes decide on:
--   name      in Hugging Face spelling; expert stacks are split as experts.{gate,up,down}_proj,
--             since gate and up may get different decisions though files often hold them fused
--   output    the tensor's name in an MLX checkpoint
--   part      "text", "vision" or "mtp"
--   class     what it is: see `docs/recipes.md`; "vision" and "mtp" for everything in those parts
--   shape     array of integers; rows and cols are its last two (rows counts the experts in)
--   layer     0-based index, nil outside layers;  n_layers  of the text stack
--   kind      "linear_attention" or "full_attention", nil outside layers
--   matrix    true for what a loader can hold quantized: linears, embeddings, expert stacks
-- Shapes: facts of transformers' modeling_qwen3_5(_moe).py; MLX names: mlx_lm/models/qwen3_5.py.

local layout = {}

---@class moonlet.Packed
---@field mode string?
---@field bits integer?
---@field group integer?
---@field scales string?      dtype of scales (affine and fp8)
---@field divisors number[]?  nvfp4: weight_global_scale of each part, 1 where there is none
---@field problem string?     instead of all these: why no decision says it

---@class moonlet.Tensor
---@field name string
---@field output string
---@field part "text"|"vision"|"mtp"
---@field class string
---@field shape integer[]
---@field rows integer
---@field cols integer
---@field layer integer?
---@field n_layers integer
---@field kind string?
---@field matrix boolean
---@field dtype string?   that of its first part in the files ("BF16")
---@field packed moonlet.Packed?  what the files hold it as, where that is not a float
---@field stored string?   dtype kept as stored ("f32"); nil: written as bf16
---@field unreadable string?  why it can only be dropped
---@field zero_centred boolean?  a norm whose stored weight is w - 1 in Hugging Face files

local function elements(shape)
  local n = 1
  for _, d in ipairs(shape) do n = n * d end
  return n
end
layout.elements = elements

local function describe(t)
  t.cols = t.shape[#t.shape] or 1
  t.rows = elements(t.shape) // t.cols
  t.matrix = t.matrix or false
  return t
end

-- ---- text stack --------------------------------------------------------------------------------

-- One decoder layer (also the body of the MTP block) as rows {path, class, shape, flags}.
local function layer_rows(c, kind)
  local H, rows = c.hidden_size, {}
  local function vector(path, class, n, flags)
    flags = flags or {}
    rows[#rows + 1] = { path = path, class = class, shape = { n }, stored = flags.stored,
      zero_centred = flags.zero_centred, bare = flags.bare }
  end
  local function matrix(path, class, ...)
    rows[#rows + 1] = { path = path, class = class, shape = { ... }, matrix = true }
  end
  local norm = { zero_centred = true }

  vector("input_layernorm", "norm", H, norm)
  if kind == "full_attention" then
    matrix("self_attn.q_proj", "q_proj", 2 * c.num_attention_heads * c.head_dim, H)
    matrix("self_attn.k_proj", "k_proj", c.num_key_value_heads * c.head_dim, H)
    matrix("self_attn.v_proj", "v_proj", c.num_key_value_heads * c.head_dim, H)
    matrix("self_attn.o_proj", "o_proj", H, c.num_attention_heads * c.head_dim)
    vector("self_attn.q_norm", "norm", c.head_dim, norm)
    vector("self_attn.k_norm", "norm", c.head_dim, norm)
  else
    local keys = c.linear_num_key_heads * c.linear_key_head_dim
    local values = c.linear_num_value_heads * c.linear_value_head_dim
    matrix("linear_attn.in_proj_qkv", "in_proj_qkv", 2 * keys + values, H)
    matrix("linear_attn.in_proj_z", "in_proj_z", values, H)
    matrix("linear_attn.in_proj_b", "in_proj_b", c.linear_num_value_heads, H)
    matrix("linear_attn.in_proj_a", "in_proj_a", c.linear_num_value_heads, H)
    rows[#rows + 1] = { path = "linear_attn.conv1d", class = "conv",
      shape = { 2 * keys + values, 1, c.linear_conv_kernel_dim } }
    vector("linear_attn.A_log", "decay", c.linear_num_value_heads, { stored = "f32", bare = true })
    vector("linear_attn.dt_bias", "decay", c.linear_num_value_heads, { bare = true })
    vector("linear_attn.norm", "norm", c.linear_value_head_dim)
    matrix("linear_attn.out_proj", "out_proj", H, values)
  end
  vector("post_attention_layernorm", "norm", H, norm)
  if c.num_experts == 0 then
    matrix("mlp.gate_proj", "gate_proj", c.intermediate_size, H)
    matrix("mlp.up_proj", "up_proj", c.intermediate_size, H)
    matrix("mlp.down_proj", "down_proj", H, c.intermediate_size)
  else
    local E, I, S = c.num_experts, c.moe_intermediate_size, c.shared_expert_intermediate_size
    matrix("mlp.gate", "router", E, H)
    matrix("mlp.experts.gate_proj", "expert_gate", E, I, H)
    matrix("mlp.experts.up_proj", "expert_up", E, I, H)
    matrix("mlp.experts.down_proj", "expert_down", E, H, I)
    matrix("mlp.shared_expert.gate_proj", "shared_gate_proj", S, H)
    matrix("mlp.shared_expert.up_proj", "shared_up_proj", S, H)
    matrix("mlp.shared_expert.down_proj", "shared_down_proj", H, S)
    matrix("mlp.shared_expert_gate", "shared_gate", 1, H)
  end
  return rows
end

local function text_tensors(c, list)
  local hf = c.wrapped and "model.language_model." or "model."
  local function add(path, row, layer, kind)
    local weight = row.bare and "" or ".weight"
    list[#list + 1] = describe {
      name = hf .. path .. weight,
      output = "language_model.model." .. path:gsub("%.experts%.", ".switch_mlp.") .. weight,
      part = "text", class = row.class, shape = row.shape, matrix = row.matrix,
      layer = layer, n_layers = c.num_hidden_layers, kind = kind,
      stored = row.stored, zero_centred = row.zero_centred,
    }
  end
  local H, V = c.hidden_size, c.vocab_size
  add("embed_tokens", { class = "embed", shape = { V, H }, matrix = true })
  for i, kind in ipairs(c.layer_types) do
    for _, row in ipairs(layer_rows(c, kind)) do
      add(("layers.%d.%s"):format(i - 1, row.path), row, i - 1, kind)
    end
  end
  add("norm", { class = "norm", shape = { H }, zero_centred = true })
  if not c.tie_word_embeddings then
    list[#list + 1] = describe { name = "lm_head.weight", output = "language_model.lm_head.weight",
      part = "text", class = "lm_head", shape = { V, H }, matrix = true,
      n_layers = c.num_hidden_layers }
  end
end

-- ---- the parts that pass through ---------------------------------------------------------------

---A description of a tensor that is carried along or dropped, never changed.
---@param c table
---@param part "vision"|"mtp"
---@param name string
---@param shape integer[]
---@param stored string?
---@return moonlet.Tensor
function layout.passenger(c, part, name, shape, stored)
  local output = name
  if part == "vision" then
    output = "vision_tower." .. name:gsub("^model%.", ""):gsub("^vision_tower%.", "")
      :gsub("^visual%.", "")
  end
  return describe { name = name, output = output, part = part, class = part, shape = shape,
    n_layers = c.num_hidden_layers, stored = stored }
end

local function mtp_tensors(c, list)
  local function add(path, shape)
    list[#list + 1] = layout.passenger(c, "mtp", "mtp." .. path, shape)
  end
  local H = c.hidden_size
  add("fc.weight", { H, 2 * H })
  add("pre_fc_norm_embedding.weight", { H })
  add("pre_fc_norm_hidden.weight", { H })
  for i = 0, c.mtp_num_hidden_layers - 1 do
    for _, row in ipairs(layer_rows(c, "full_attention")) do
      local path = ("layers.%d.%s"):format(i, row.path)
      if row.class == "expert_gate" then -- gate and up are one tensor in the files
        add(path:gsub("gate_proj", "gate_up_proj"),
          { row.shape[1], 2 * row.shape[2], row.shape[3] })
      elseif row.class == "expert_down" then
        add(path, row.shape)
      elseif row.class ~= "expert_up" then
        add(path .. ".weight", row.shape)
      end
    end
  end
  add("norm.weight", { H })
end

-- Names and shapes of transformers' Qwen3_5VisionModel.
local function vision_tensors(c, v, list)
  local function add(path, ...)
    list[#list + 1] = layout.passenger(c, "vision", "model.visual." .. path, { ... })
  end
  local function biased(path, rows, ...)
    add(path .. ".weight", rows, ...)
    add(path .. ".bias", rows)
  end
  local h, f = v.hidden_size, v.intermediate_size
  local merged = h * v.spatial_merge_size * v.spatial_merge_size
  biased("patch_embed.proj", h, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
  add("pos_embed.weight", v.num_position_embeddings, h)
  for i = 0, v.depth - 1 do
    local b = ("blocks.%d."):format(i)
    biased(b .. "norm1", h)
    biased(b .. "norm2", h)
    biased(b .. "attn.qkv", 3 * h, h)
    biased(b .. "attn.proj", h, h)
    biased(b .. "mlp.linear_fc1", f, h)
    biased(b .. "mlp.linear_fc2", h, f)
  end
  biased("merger.norm", h)
  biased("merger.linear_fc1", merged, merged)
  biased("merger.linear_fc2", v.out_hidden_size, merged)
end

-- Fields of vision_config with the defaults of transformers' Qwen3_5VisionConfig.
local VISION_DEFAULTS = { depth = 27, hidden_size = 1152, intermediate_size = 4304,
  in_channels = 3, patch_size = 16, temporal_patch_size = 2, spatial_merge_size = 2,
  num_position_embeddings = 2304, out_hidden_size = 3584 }
-- Far above any published tower; keeps sizes within 64 bits and lists within memory.
local MAX_VISION_DEPTH, MAX_VISION_WIDTH = 4096, 1 << 20

local function vision_numbers(given)
  local v = {}
  for field, default in pairs(VISION_DEFAULTS) do
    local value = given[field]
    if type(value) == "userdata" or value == nil then value = default end -- JSON null
    local max = field == "depth" and MAX_VISION_DEPTH or MAX_VISION_WIDTH
    if math.type(value) ~= "integer" or value < 1 or value > max then
      return nil, ("vision_config.%s must be an integer from 1 to %d"):format(field, max), "range"
    end
    v[field] = value
  end
  return v
end

---Every tensor that a checkpoint with this configuration holds, text stack first.
---@param c table  numbers of the text stack, as moonlet.core.model_config gives them
---@param vision table?  vision_config of config.json
---@return moonlet.Tensor[]? tensors
---@return string? message
---@return string? code
function layout.tensors(c, vision)
  local list = {}
  text_tensors(c, list)
  if vision then
    local v, message, code = vision_numbers(vision)
    if not v then return nil, message, code end
    vision_tensors(c, v, list)
  end
  if c.mtp_num_hidden_layers > 0 then mtp_tensors(c, list) end
  return list
end

return layout
