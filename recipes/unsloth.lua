-- unsloth: mixed widths by tensor class, after Unsloth's per-tensor KL measurements of Qwen3.5.
--
-- The rules are those of mlx-node's `convert --q-recipe unsloth` (crates/mlx-core convert.rs,
-- build_unsloth_recipe, apply_mxfp_upgrade, apply_nvfp4_upgrade). Commit 434bfbf (May 2026) made
-- the published Q2..Q8, MXFP4, MXFP8 and NVFP4 conversions: base width for gate and up, one more
-- for down, two more for attention inputs and embedding, three more for the head; mixer outputs,
-- which suffer most, stay dense, as does whatever is small. Options:
--   bits   2 3 4 5 6 8 (default 3; 4 with mode "nvfp4")      group  of affine tensors (default 64)
--   mxfp   4- and 8-bit decisions become mxfp4 and mxfp8     mode   "affine" or "nvfp4"
--   era    "2026-05"  as published
--          "2026-06"  commits a90def7, 409a7b5: mixer outputs and the two small DeltaNet
--                     projections in 8-bit affine groups of 64, the MTP block stays
--          "2026-07"  commit 31f3502: those keep affine form under mxfp, for the sake of one
--                     kernel whose results do not depend on the size of a batch

local BITS = { 2, 3, 4, 5, 6, 8 }

-- Added to the base width before rounding up to a width that exists.
local OFFSETS = {
  gate_proj = 0, up_proj = 0, down_proj = 1,
  expert_gate = 0, expert_up = 0, expert_down = 1,
  shared_gate_proj = 0, shared_up_proj = 0, shared_down_proj = 1,
  q_proj = 2, k_proj = 2, v_proj = 2, in_proj_qkv = 2, in_proj_z = 2,
  embed = 2, lm_head = 3,
}
-- Routing decides everything downstream and costs nothing.
local ROUTERS = { router = true, shared_gate = true }
-- Dense in May, in 8 bits from June on.
local LATE = { o_proj = true, out_proj = true, in_proj_a = true, in_proj_b = true }
local FIXED_BITS, FIXED_GROUP = 8, 64
-- Loaders of that time knew these in affine form only.
local AFFINE_ONLY = { embed = true, lm_head = true }

return function(options, kit)
  local nvfp4, era = options.mode == "nvfp4", options.era or "2026-05"
  kit.options(options, { bits = nvfp4 and { 4 } or BITS, mode = { "affine", "nvfp4" },
    group = nvfp4 and { 16 } or { 32, 64, 128 }, mxfp = "boolean",
    era = { "2026-05", "2026-06", "2026-07" } })
  kit.expect(not (nvfp4 and options.mxfp), "mxfp goes with mode affine")

  local bits = options.bits or nvfp4 and 4 or 3
  local group = not nvfp4 and options.group or 64
  local fixed = kit.affine(FIXED_BITS, FIXED_GROUP)
  local promotion = {}
  if nvfp4 then promotion = { [4] = "nvfp4" } end
  if options.mxfp then promotion = { [4] = "mxfp4", [8] = "mxfp8" } end
  local late = era == "2026-06" and kit.promote(fixed, promotion) or fixed

  return function(tensor)
    local class = tensor.class
    if class == "mtp" then return era == "2026-05" and kit.drop() or kit.keep() end
    if ROUTERS[class] then return kit.fit(tensor, fixed) end
    if LATE[class] and era ~= "2026-05" then return kit.fit(tensor, late) end
    if not OFFSETS[class] then return kit.keep() end
    local decision = kit.affine(kit.snap(bits + OFFSETS[class]), group)
    if not AFFINE_ONLY[class] then decision = kit.promote(decision, promotion) end
    return kit.fit(tensor, decision)
  end, nvfp4 and { mode = "nvfp4" } or kit.affine(bits, group)
end
