-- source: which stored tensors make up each tensor of a layout.
--
-- Takes what safetensors headers say ({name, dtype, shape} rows) and finds, for every description
-- of moonlet.layout, where its rows lie, whatever the prefix of the names and the layout of the
-- experts (fused gate_up_proj, stacked switch_mlp, one tensor per expert). Shapes must agree with
-- config.json; what is missing or left over is named. Matrices of a checkpoint that is quantized
-- already are found where the engine binds them, as views.

local layout = require "moonlet.layout"

local source = {}

---@class moonlet.Source
---@field tensors moonlet.Tensor[]  descriptions, with `parts` and `part_rows`: the tensor is the
---  concatenation of part_rows rows from each part { name, first_row } or { view, first_row }
---@field zero_centred boolean  norms are stored as w - 1 (Hugging Face), not as w (MLX)
---@field tied boolean  there is no lm_head
---@field quantized boolean  matrices are views, named as in csrc/model/weights.h

local FLOATS = { BF16 = true, F16 = true, F32 = true }
local TEXT_PREFIXES = { "model.language_model.", "language_model.model.", "model." }
local VISION_PREFIXES = { "model.visual.", "visual.", "vision_tower.", "model.vision_tower." }
local MTP_PREFIXES = { "mtp.", "language_model.mtp.", "model.mtp." }
local QUANTIZED = { "%.scales$", "%.biases$", "_scale$", "_scale_inv$", "_packed$",
  "_global_scale$", "zero_point$" }

local function shape_text(shape) return "[" .. table.concat(shape, ", ") .. "]" end

local function starts(name, prefixes)
  for _, prefix in ipairs(prefixes) do
    if name:sub(1, #prefix) == prefix then return prefix end
  end
end

-- Sorts the stored tensors: text ones by their name without prefix, passengers in a list.
local function sort_stored(stored)
  local text, passengers = {}, {}
  for _, t in ipairs(stored) do
    if starts(t.name, MTP_PREFIXES) then
      passengers[#passengers + 1] = { part = "mtp", tensor = t }
    elseif starts(t.name, VISION_PREFIXES) then
      passengers[#passengers + 1] = { part = "vision", tensor = t }
    else
      local prefix = starts(t.name, TEXT_PREFIXES)
      local bare = prefix and t.name:sub(#prefix + 1) or t.name:gsub("^language_model%.", "")
      if text[bare] then
        return nil, ("%s and %s are the same tensor"):format(text[bare].name, t.name), "format"
      end
      text[bare] = t
    end
  end
  return text, passengers
end

-- The path of a description without prefix, as in `text`.
local function bare_name(desc)
  return (desc.output:gsub("^language_model%.", ""):gsub("^model%.", ""))
end

-- Finding one description: the stored tensors it consists of, with the shape each must have and
-- the first row to take. nil and the name that would have been right if there is none.
local function locate(desc, text)
  local bare = bare_name(desc)
  local t = text[bare]
  if t then
    local shape = desc.shape
    if desc.class == "conv" and t.shape[3] == 1 then shape = { shape[1], shape[3], 1 } end
    return { { tensor = t, shape = shape, first_row = 0 } }
  end
  local head, projection = bare:match("^(.*%.mlp%.)switch_mlp%.(%l+)_proj%.weight$")
  if not head then return nil, desc.name end
  local E, rows, cols = table.unpack(desc.shape)
  local fused = text[head .. "experts.gate_up_proj"]
  if projection == "down" then
    t = text[head .. "experts.down_proj"]
    if t then return { { tensor = t, shape = desc.shape, first_row = 0 } } end
  elseif fused then
    local parts = {}
    for e = 0, E - 1 do
      parts[e + 1] = { tensor = fused, shape = { E, 2 * rows, cols },
        first_row = e * 2 * rows + (projection == "up" and rows or 0) }
    end
    return parts
  end
  local parts = {}
  for e = 0, E - 1 do
    t = text[("%sexperts.%d.%s_proj.weight"):format(head, e, projection)]
    if not t then return nil, e == 0 and desc.name or ("%s, expert %d"):format(desc.name, e) end
    parts[e + 1] = { tensor = t, shape = { rows, cols }, first_row = 0 }
  end
  return parts
end

local function bind_text(desc, text, used)
  local found, missing = locate(desc, text)
  if not found then return nil, ("tensor %s is missing"):format(missing), "format" end
  desc.parts, desc.part_rows = {}, desc.rows // #found
  for i, part in ipairs(found) do
    local t = part.tensor
    if not FLOATS[t.dtype] then
      return nil, ("tensor %s is %s: only BF16, F16 and F32 can be quantized"):format(t.name,
        t.dtype), "unsupported"
    end
    if shape_text(t.shape) ~= shape_text(part.shape) then
      return nil, ("tensor %s has shape %s; config.json asks for %s"):format(t.name,
        shape_text(t.shape), shape_text(part.shape)), "format"
    end
    desc.parts[i] = { name = t.name, first_row = part.first_row }
    used[t] = true
  end
  desc.dtype = found[1].tensor.dtype
  if desc.stored then desc.stored = desc.dtype:lower() end
  return desc
end

-- Whether the convolutions lie as in Hugging Face files ([C, 1, K]) or as in MLX ones ([C, K, 1]);
-- norms follow suit, which their values alone cannot tell (mlx_lm/models/qwen3_5.py, sanitize).
local function is_raw(tensors, text)
  local raw
  for _, desc in ipairs(tensors) do
    local t = desc.class == "conv" and text[bare_name(desc)]
    if t then
      local this = t.shape[3] ~= 1
      if raw ~= nil and raw ~= this then
        return nil, ("tensor %s lies otherwise than those before it"):format(t.name), "format"
      end
      raw = this
    end
  end
  return raw ~= false
end

---Whether stored tensors are packed, or scales of packed ones.
---@param stored { name: string }[]
---@return boolean
function source.is_quantized(stored)
  for _, t in ipairs(stored) do
    for _, pattern in ipairs(QUANTIZED) do
      if t.name:find(pattern) then return true end
    end
  end
  return false
end

-- What matrices of the engine are stored as, if it is one format for all of them.
local function packed_as(matrices)
  local m, divisors = matrices[1], {}
  for i, other in ipairs(matrices) do
    if other.mode ~= m.mode or other.bits ~= m.bits or other.group ~= m.group
      or other.tile_rows ~= m.tile_rows or other.scale_dtype ~= m.scale_dtype then
      return { problem = "its experts are stored in several formats" }
    end
    divisors[i] = other.divisor
  end
  if m.mode == "fp8" and (m.tile_rows ~= 1 and m.rows ~= 1 or m.group ~= m.cols) then
    return { mode = "fp8",
      problem = ("it is fp8 in tiles of %d x %d"):format(m.tile_rows, m.group) }
  end
  local float_scales = m.mode == "affine" or m.mode == "fp8"
  return { mode = m.mode, bits = m.bits, group = m.group, divisors = divisors[1] and divisors,
    scales = float_scales and m.scale_dtype:upper() or nil }
end

-- The matrices of a description among the engine's, one per expert.
local function bind_views(desc, modules)
  local name = bare_name(desc):gsub("%.weight$", "")
  local head, projection = name:match("^(.*%.mlp%.)switch_mlp%.(.*)$")
  local matrices = {}
  desc.parts = {}
  for e = 0, head and desc.shape[1] - 1 or 0 do
    local view = head and ("%sexperts.%d.%s"):format(head, e, projection) or name
    if not modules[view] then return nil, ("tensor %s is missing"):format(desc.name), "format" end
    desc.parts[e + 1] = { view = view, first_row = 0 }
    matrices[e + 1] = modules[view]
  end
  desc.part_rows = desc.rows // #desc.parts
  local packed = packed_as(matrices)
  if FLOATS[(packed.mode or ""):upper()] then
    desc.dtype = packed.mode:upper()
  else
    desc.packed = packed
  end
  return desc
end

-- Vision and MTP tensors are carried along as they are or dropped. What is packed has no meaning in
-- another checkpoint: it can only be dropped.
local function add_passengers(c, passengers, tensors)
  for _, p in ipairs(passengers) do
    local t = p.tensor
    local spelled = ("tensor %s (%s %s)"):format(t.name, t.dtype, shape_text(t.shape))
    if layout.elements(t.shape) == 0 then return nil, spelled .. " is empty", "unsupported" end
    local desc = layout.passenger(c, p.part, t.name, t.shape, t.dtype:lower())
    desc.parts, desc.part_rows = { { name = t.name, first_row = 0 } }, desc.rows
    if not FLOATS[t.dtype] then desc.unreadable = spelled .. " cannot be carried along" end
    tensors[#tensors + 1] = desc
  end
  return tensors
end

-- Text tensors that no description took.
local function leftover(text, used)
  local left = {}
  for _, t in pairs(text) do
    if not used[t] then left[#left + 1] = t.name end
  end
  table.sort(left)
  return left[1]
end

---Cuts stacks of experts that are one part into a part for each: what is true of an expert is said
---of its part.
---@param tensors moonlet.Tensor[]
function source.by_expert(tensors)
  for _, tensor in ipairs(tensors) do
    local experts = tensor.matrix and #tensor.shape == 3 and tensor.shape[1] or 1
    if experts > #tensor.parts then
      local rows, whole = tensor.rows // experts, tensor.parts[1]
      for e = 0, experts - 1 do
        local part = {}
        for k, v in pairs(whole) do part[k] = v end
        part.first_row = whole.first_row + e * rows
        tensor.parts[e + 1] = part
      end
      tensor.part_rows = rows
    end
  end
end

---@param c table  numbers of the text stack, as moonlet.core.model_config gives them
---@param stored { name: string, dtype: string, shape: integer[] }[]
---@param modules table<string, table>?  matrices that the engine binds, by name, of a checkpoint
---  that is quantized
---@return moonlet.Source? source
---@return string? message
---@return string? code
function source.bind(c, stored, modules)
  local text, passengers, code = sort_stored(stored)
  if not text then return nil, passengers, code end

  -- The files decide what there is besides the layers.
  local tied = text["lm_head.weight"] == nil
  if modules then tied = modules["lm_head"] == nil end
  local present = setmetatable({ tie_word_embeddings = tied, mtp_num_hidden_layers = 0 },
    { __index = c })
  local tensors = assert(layout.tensors(present))
  local raw, message
  raw, message, code = is_raw(tensors, text)
  if raw == nil then return nil, message, code end

  local used = {}
  for _, desc in ipairs(tensors) do
    local ok
    if modules and desc.matrix then
      ok, message, code = bind_views(desc, modules)
    else
      ok, message, code = bind_text(desc, text, used)
    end
    if not ok then return nil, message, code end
  end
  -- Of a quantized checkpoint the engine has bound every tensor.
  local left = not modules and leftover(text, used)
  if left then return nil, ("tensor %s is none that the model has"):format(left), "format" end
  tensors, message, code = add_passengers(c, passengers, tensors)
  if not tensors then return nil, message, code end
  return { tensors = tensors, zero_centred = raw, tied = tied, quantized = modules ~= nil }
end

return source
