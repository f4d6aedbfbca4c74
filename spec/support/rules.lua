--- Recipes of specs that bring every format into one checkpoint.
local rules = {}

local EVERY_FORMAT = {
  embed = { mode = "affine", bits = 8 }, lm_head = { mode = "mxfp8" },
  expert_gate = { mode = "mxfp4" }, expert_up = { mode = "mxfp4" },
  expert_down = { mode = "mxfp8" }, shared_gate_proj = { mode = "fp8" },
  shared_up_proj = { mode = "fp8" }, shared_down_proj = { mode = "affine", bits = 4, group = 32 },
  q_proj = { mode = "nvfp4" }, k_proj = { mode = "nvfp4" }, v_proj = { mode = "nvfp4" },
  o_proj = { mode = "fp8" }, in_proj_qkv = { mode = "affine", bits = 3 },
  in_proj_z = { mode = "affine", bits = 5, group = 32 },
  out_proj = { mode = "affine", bits = 6, group = 32 }, gate_proj = { mode = "nvfp4" },
  up_proj = { mode = "nvfp4" }, down_proj = { mode = "affine", bits = 2, group = 32 },
}

---Every mode that compressed-tensors has, by class; the experts of layer 0 stay as they are.
function rules.every_format(t)
  local kept = t.layer == 0 and t.class:find "^expert_"
  return not kept and EVERY_FORMAT[t.class] or { keep = "bf16" }
end

---A recipe of one decision for all matrices except embedding, head, routers and gates.
function rules.only(decision)
  local dense = { embed = true, lm_head = true, router = true, shared_gate = true,
    in_proj_a = true, in_proj_b = true }
  return function(t)
    return t.matrix and not dense[t.class] and decision or { keep = "bf16" }
  end
end

return rules
