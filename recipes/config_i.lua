-- config_i: TurboQuant+ Config-I: 2-bit gate and up, 3-bit down, 4-bit rest, boundary layers 8-bit.
--
-- The rules of the converter behind the published MLX checkpoint (mlx-swift-lm,
-- scripts/convert_config_i.py at 6b6a064, in the order in which it tests names): 3.6132 bits per
-- weight and 15,655 MB for the text stack of Qwen3.6-35B-A3B. The shared expert falls under the
-- same 2 and 3 bits as the routed ones, every DeltaNet projection under 4; routers stay dense.
-- Dense models get 4 bits for gate and up. All affine in groups of 64. Vision tower and MTP block
-- are dropped, as mlx-lm's text models do. No options.

local BOUNDARY = 2 -- layers at either end
local DOWN = { down_proj = true, expert_down = true, shared_down_proj = true }
local EXPERTS_IN = { expert_gate = true, expert_up = true, shared_gate_proj = true,
  shared_up_proj = true }

return function(options, kit)
  kit.options(options, {})
  local function bits_of(tensor)
    local class, layer = tensor.class, tensor.layer
    if class == "embed" or class == "lm_head" then return 8 end
    if layer < BOUNDARY or layer >= tensor.n_layers - BOUNDARY then return 8 end
    if DOWN[class] then return 3 end
    return EXPERTS_IN[class] and 2 or 4
  end
  return function(tensor)
    if tensor.part ~= "text" then return kit.drop() end
    if not tensor.matrix or tensor.class == "router" then return kit.keep() end
    return kit.fit(tensor, kit.affine(bits_of(tensor), 64))
  end, kit.affine(4, 64)
end
