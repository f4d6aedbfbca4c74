-- qwen3_5: mlx-node's own: attention two bits above the base, down one; embedding and head dense.
--
-- `convert --q-recipe qwen3_5` (crates/mlx-core convert.rs, build_qwen35_recipe, commit 434bfbf).
-- Widths are base + 2 and base + 1, at most 8, and nothing rounds them to widths that exist: bases
-- 5 and 6 ask for 7 bits, which no kernel has. mlx-node's documents list this as a trap; here those
-- bases are refused. Options:
--   bits   2 3 4 8 (default 4)                             group  of affine tensors (default 64)
--   mxfp   4- and 8-bit decisions become mxfp4 and mxfp8   mode   "affine" or "nvfp4"
--   era    "2026-05", or "2026-06" (commit a90def7): o_proj, out_proj and the two small DeltaNet
--          projections in 8-bit affine groups of 64, the MTP block stays

local ROUTERS = { router = true, shared_gate = true }
local ATTENTION = { q_proj = true, k_proj = true, v_proj = true, o_proj = true,
  in_proj_qkv = true, in_proj_z = true }
local FEED_FORWARD = { gate_proj = 0, up_proj = 0, down_proj = 1,
  expert_gate = 0, expert_up = 0, expert_down = 1,
  shared_gate_proj = 0, shared_up_proj = 0, shared_down_proj = 1 }
local LATE = { o_proj = true, out_proj = true, in_proj_a = true, in_proj_b = true }

return function(options, kit)
  local bits = options.bits or 4
  kit.expect(bits ~= 5 and bits ~= 6, ("bits %s asks for 7 bits in %s (a known trap of this "
    .. "recipe: it does not round), and nothing has 7 bits; take 2 3 4 8, or recipe unsloth")
    :format(bits, bits == 5 and "attention" or "down_proj"))
  local nvfp4, late = options.mode == "nvfp4", options.era == "2026-06"
  kit.options(options, { bits = nvfp4 and { 4 } or { 2, 3, 4, 8 }, mode = { "affine", "nvfp4" },
    group = nvfp4 and { 16 } or { 32, 64, 128 }, mxfp = "boolean",
    era = { "2026-05", "2026-06" } })
  kit.expect(not (nvfp4 and options.mxfp), "mxfp goes with mode affine")

  local group = not nvfp4 and options.group or 64
  local promotion = {}
  if nvfp4 then promotion = { [4] = "nvfp4" } end
  if options.mxfp then promotion = { [4] = "mxfp4", [8] = "mxfp8" } end

  return function(tensor)
    local class = tensor.class
    if class == "mtp" then return late and kit.keep() or kit.drop() end
    if ROUTERS[class] then return kit.fit(tensor, kit.affine(8, 64)) end
    local more = ATTENTION[class] and 2 or FEED_FORWARD[class]
    local decision = more and kit.affine(math.min(bits + more, 8), group)
    if late and LATE[class] then decision = kit.affine(8, 64) end
    return decision and kit.fit(tensor, kit.promote(decision, promotion)) or kit.keep()
  end, nvfp4 and { mode = "nvfp4" } or kit.affine(bits, group)
end
