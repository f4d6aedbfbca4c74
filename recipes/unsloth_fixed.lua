-- unsloth_fixed: the fixed map of mlx-node's later `unsloth`: 4-bit FFN, 8 bits in the last layers.
--
-- `convert --q-recipe unsloth --q-mxfp` or `--q-mode nvfp4` since July 2026 (commits 5602f12,
-- f19d369, b9260e7; build_official_unsloth_recipe), which follows the class map of Unsloth's
-- Qwen3.6 NVFP4 checkpoints and ignores widths and groups. What is not listed stays dense, the MTP
-- block too. Options:
--   mode   "mxfp4" (default): low is mxfp4, high is mxfp8
--          "nvfp4": low is nvfp4, high is fp8 with a scale per row (compressed-tensors only)

local FEED_FORWARD = { gate_proj = true, up_proj = true, down_proj = true,
  expert_gate = true, expert_up = true, expert_down = true,
  shared_gate_proj = true, shared_up_proj = true, shared_down_proj = true }
local HIGH = { q_proj = true, k_proj = true, v_proj = true, o_proj = true,
  in_proj_qkv = true, in_proj_z = true, out_proj = true, lm_head = true }
local LAST_LAYERS = 8

return function(options, kit)
  kit.options(options, { mode = { "mxfp4", "nvfp4" } })
  local low = { mode = options.mode or "mxfp4" }
  local high = { mode = low.mode == "nvfp4" and "fp8" or "mxfp8" }
  return function(tensor)
    if FEED_FORWARD[tensor.class] then
      local last = tensor.layer >= tensor.n_layers - LAST_LAYERS
      return kit.fit(tensor, last and high or low)
    end
    return HIGH[tensor.class] and kit.fit(tensor, high) or kit.keep()
  end, low
end
