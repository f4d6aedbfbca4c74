-- mixed: a low width, and a high one for v_proj and down_proj in some of the layers.
--
-- The scheme of llama.cpp's Q4_K_M as mlx-node has it (`convert --q-recipe mixed_L_H`,
-- crates/mlx-core convert.rs, build_recipe_predicate, commit 434bfbf), of which mixed_2_6,
-- mixed_3_4, mixed_3_6 and mixed_4_6 are the published forms. The head has the high width, the
-- embedding is dense. Options:
--   low, high  affine widths (4 and 6)          group  of affine tensors (default 64)
--   mxfp       4- and 8-bit decisions become mxfp4 and mxfp8, but not the head
--   rule       which layers, of n: "mlx-node" the first and last n/8, and multiples of 3;
--              "mlx-lm" (mlx_lm/convert.py, mixed_quant_predicate) the same with every third
--              counted from the first eighth on, and the last eighth rounded up

local LOW = { q_proj = true, k_proj = true, o_proj = true,
  in_proj_qkv = true, in_proj_z = true, out_proj = true, gate_proj = true, up_proj = true,
  expert_gate = true, expert_up = true, shared_gate_proj = true, shared_up_proj = true }
local DEEP = { v_proj = true, down_proj = true, expert_down = true, shared_down_proj = true }

local RULES = {}

RULES["mlx-node"] = function(i, n)
  return i < n // 8 or i >= n - n // 8 or i % 3 == 0
end

RULES["mlx-lm"] = function(i, n)
  return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
end

return function(options, kit)
  kit.options(options, { low = kit.widths, high = kit.widths, group = { 32, 64, 128 },
    mxfp = "boolean", rule = { "mlx-node", "mlx-lm" } })
  local group, eligible = options.group or 64, RULES[options.rule or "mlx-node"]
  local low, high = kit.affine(options.low or 4, group), kit.affine(options.high or 6, group)
  local promotion = options.mxfp and { [4] = "mxfp4", [8] = "mxfp8" } or {}

  return function(tensor)
    local class = tensor.class
    if class == "mtp" then return kit.drop() end
    if class == "router" or class == "shared_gate" then
      return kit.fit(tensor, kit.affine(8, 64))
    end
    if class == "lm_head" then return kit.fit(tensor, high) end
    if not LOW[class] and not DEEP[class] then return kit.keep() end
    local wide = DEEP[class] and eligible(tensor.layer, tensor.n_layers)
    return kit.fit(tensor, kit.promote(wide and high or low, promotion))
  end, low
end
