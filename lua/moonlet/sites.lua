--- Where matrices get their inputs: which of the sites that a calibration looks at (see
-- csrc/quant/calib.h) belongs to which matrix. Matrices that read the same rows share a site.
local sites = {}

local OF <const> = {
  ["self_attn.q_proj"] = "mixer_in", ["self_attn.k_proj"] = "mixer_in",
  ["self_attn.v_proj"] = "mixer_in", ["self_attn.o_proj"] = "mixer_out",
  ["linear_attn.in_proj_qkv"] = "mixer_in", ["linear_attn.in_proj_z"] = "mixer_in",
  ["linear_attn.in_proj_a"] = "mixer_in", ["linear_attn.in_proj_b"] = "mixer_in",
  ["linear_attn.out_proj"] = "mixer_out",
  ["mlp.gate_proj"] = "ffn_in", ["mlp.up_proj"] = "ffn_in", ["mlp.down_proj"] = "ffn_down",
  ["mlp.gate"] = "ffn_in", ["mlp.shared_expert_gate"] = "ffn_in",
  ["mlp.shared_expert.gate_proj"] = "ffn_in", ["mlp.shared_expert.up_proj"] = "ffn_in",
  ["mlp.shared_expert.down_proj"] = "ffn_down",
  ["mlp.experts.gate_proj"] = "experts_in", ["mlp.experts.up_proj"] = "experts_in",
  ["mlp.experts.down_proj"] = "experts_down",
}

---The site whose sums belong to a matrix.
---@param name string below the text stack, without ".weight": "layers.3.mlp.experts.gate_proj"; an
---  expert's number in it does not matter
---@return string? site "layers.3.experts_in"; nil for what is no matrix of the text stack
function sites.of(name)
  if name == "lm_head" then return "head_in" end
  local layer, path = name:match("^layers%.(%d+)%.(.+)$")
  if not path then return nil end
  local site = OF[path:gsub("%.experts%.%d+%.", ".experts.", 1)]
  return site and ("layers.%s.%s"):format(layer, site)
end

---The site whose Hessian belongs to a matrix: that of its sums, but experts' gate and up take that
---of all tokens (one of each expert's own would be the size of the model).
---@param name string
---@return string? site
function sites.hessian(name)
  local site = sites.of(name)
  return site and (site:gsub("%.experts_in$", ".ffn_in"))
end

return sites
