-- unsloth: mixed widths by tensor class, after Unsloth's per-tensor KL measurements of Qwen3.5.
--
-- The rules are those of mlx-node's `convert --q-recipe unsloth` as of commit 434bfbf (May 2026),
-- which made the published Q2..Q8, MXFP4, MXFP8 and NVFP4 conversions: base width for gate and up,
-- one more for down, two more for attention inputs and embedding, three more for the head; mixer
-- outputs, which suffer most, stay dense, as does whatever is small. Options:
--   bits   2 3 4 5 6 8 (default 3; 4 with mode "nvfp4")      group  of affine tensors (default 64)
--   mxfp   4- and 8-bit decisions become mxfp4 and mxfp8     mode   "affine" or "nvfp4"

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
local ROUTER_BITS, ROUTER_GROUP = 8, 64
-- Loaders of that time knew these in affine form only.
local AFFINE_ONLY = { embed = true, lm_head = true }

return function(options, kit)
  local mode = options.mode or "affine"
  local nvfp4 = mode == "nvfp4"
  kit.expect(nvfp4 or mode == "affine", "mode must be affine or nvfp4")
  kit.expect(not (nvfp4 and options.mxfp), "mxfp goes with mode affine")
  kit.expect(not (nvfp4 and (options.bits or 4) ~= 4), "nvfp4 has 4 bits")
  kit.expect(not (nvfp4 and (options.group or 16) ~= 16), "nvfp4 has groups of 16")

  local bits = options.bits or nvfp4 and 4 or 3
  kit.expect(kit.contains(BITS, bits), "bits must be one of " .. table.concat(BITS, " "))
  local group = not nvfp4 and options.group or 64
  kit.expect(kit.contains({ 32, 64, 128 }, group), "group must be 32, 64 or 128")

  local promotion = {}
  if nvfp4 then promotion = { [4] = "nvfp4" } end
  if options.mxfp then promotion = { [4] = "mxfp4", [8] = "mxfp8" } end

  return function(tensor)
    local class = tensor.class
    if class == "mtp" then return kit.drop() end
    if ROUTERS[class] then return kit.fit(tensor, kit.affine(ROUTER_BITS, ROUTER_GROUP)) end
    if not OFFSETS[class] then return kit.keep() end
    local decision = kit.affine(kit.snap(bits + OFFSETS[class]), group)
    if not AFFINE_ONLY[class] then decision = kit.promote(decision, promotion) end
    return kit.fit(tensor, decision)
  end, nvfp4 and { mode = mode } or kit.affine(bits, group)
end
