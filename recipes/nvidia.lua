-- nvidia: mxfp4 for FFN and head, mxfp8 for attention and DeltaNet, embedding dense.
--
-- mlx-node's `convert --q-recipe nvidia` (July 2026, commits 31f3502, 3141228; crates/mlx-core
-- convert.rs, build_nvidia_recipe). The small DeltaNet projections and routers are 8-bit affine,
-- everything else dense, the MTP block too. It refuses an imatrix there: scales are taken from
-- ranges. No options.

local LOW = { gate_proj = true, up_proj = true, down_proj = true,
  expert_gate = true, expert_up = true, expert_down = true,
  shared_gate_proj = true, shared_up_proj = true, shared_down_proj = true, lm_head = true }
local HIGH = { q_proj = true, k_proj = true, v_proj = true, o_proj = true,
  in_proj_qkv = true, in_proj_z = true, out_proj = true }
local SMALL = { in_proj_a = true, in_proj_b = true, router = true, shared_gate = true }

return function(options, kit)
  kit.options(options, {})
  return function(tensor)
    local class = tensor.class
    if LOW[class] then return kit.fit(tensor, { mode = "mxfp4" }) end
    if HIGH[class] then return kit.fit(tensor, { mode = "mxfp8" }) end
    if SMALL[class] then return kit.fit(tensor, kit.affine(8, 64)) end
    return kit.keep()
  end, { mode = "mxfp4" }
end
