-- unsloth_card_mxfp4: the table on the card of the 35B UD-MXFP4 conversion, which is not `unsloth`.
--
-- The card of Qwen3.6-35B-A3B-UD-MXFP4-mlx says that all offsets of `unsloth` at 4 bits come out as
-- mxfp4, embedding and head as 8-bit affine. mlx-node's code gives embedding and attention inputs 6
-- bits and down 5 (recipe `unsloth`, bits 4, mxfp), and only that layout has the size that the card
-- prints (20.65 GiB, called 21; this one has 18.96). Made for who wants what the card says.
-- No options.

local MXFP4 = { q_proj = true, k_proj = true, v_proj = true, in_proj_qkv = true, in_proj_z = true,
  gate_proj = true, up_proj = true, down_proj = true,
  expert_gate = true, expert_up = true, expert_down = true,
  shared_gate_proj = true, shared_up_proj = true, shared_down_proj = true }
local AFFINE = { embed = true, lm_head = true, router = true, shared_gate = true }

return function(options, kit)
  kit.options(options, {})
  return function(tensor)
    local class = tensor.class
    if class == "mtp" then return kit.drop() end
    if MXFP4[class] then return kit.fit(tensor, { mode = "mxfp4" }) end
    if AFFINE[class] then return kit.fit(tensor, kit.affine(8, 64)) end
    return kit.keep()
  end, { mode = "mxfp4" }
end
