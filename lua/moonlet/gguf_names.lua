-- gguf_names: what llama.cpp calls the matrices of Qwen3.5 / Qwen3.6 checkpoints.
--
-- Names on our side are those of Hugging Face below the text stack, without ".weight":
-- "layers.3.self_attn.q_proj", "layers.3.mlp.experts.gate_proj" for a whole stack and
-- "layers.3.mlp.experts.7.gate_proj" for one expert of it. Sources: gguf-py/gguf/constants.py
-- (architectures qwen3next, qwen35, qwen35moe) and llama.cpp's convert_hf_to_gguf.py.

local names = {}

local TO_GGUF = {
  ["self_attn.q_proj"] = "attn_q", ["self_attn.k_proj"] = "attn_k",
  ["self_attn.v_proj"] = "attn_v", ["self_attn.o_proj"] = "attn_output",
  ["linear_attn.in_proj_qkv"] = "attn_qkv", ["linear_attn.in_proj_z"] = "attn_gate",
  ["linear_attn.in_proj_a"] = "ssm_alpha", ["linear_attn.in_proj_b"] = "ssm_beta",
  ["linear_attn.out_proj"] = "ssm_out",
  ["mlp.gate_proj"] = "ffn_gate", ["mlp.up_proj"] = "ffn_up", ["mlp.down_proj"] = "ffn_down",
  ["mlp.gate"] = "ffn_gate_inp", ["mlp.shared_expert_gate"] = "ffn_gate_inp_shexp",
  ["mlp.experts.gate_proj"] = "ffn_gate_exps", ["mlp.experts.up_proj"] = "ffn_up_exps",
  ["mlp.experts.down_proj"] = "ffn_down_exps",
  ["mlp.shared_expert.gate_proj"] = "ffn_gate_shexp",
  ["mlp.shared_expert.up_proj"] = "ffn_up_shexp",
  ["mlp.shared_expert.down_proj"] = "ffn_down_shexp",
}
local TOP = { embed_tokens = "token_embd", lm_head = "output" }

local FROM_GGUF, FROM_TOP = {}, {}
for ours, theirs in pairs(TO_GGUF) do FROM_GGUF[theirs] = ours end
for ours, theirs in pairs(TOP) do FROM_TOP[theirs] = ours end

-- Names of other conversions, for reading: one tensor of two of ours, which have the same inputs.
FROM_GGUF.ffn_gate_up_exps = "mlp.experts.gate_proj"
FROM_GGUF.ssm_ba = "linear_attn.in_proj_a"
FROM_GGUF.ssm_in = "linear_attn.in_proj_qkv"

local PREFIXES = { "model.language_model.", "language_model.model.", "language_model.", "model." }

---The name as it is below the text stack, whatever checkpoint spelled it; and the expert (from 0)
---if it names one of a stack.
---@param name string
---@return string name
---@return integer? expert
function names.bare(name)
  for _, prefix in ipairs(PREFIXES) do
    if name:sub(1, #prefix) == prefix then
      name = name:sub(#prefix + 1)
      break
    end
  end
  name = name:gsub("%.weight$", ""):gsub("%.switch_mlp%.", ".experts.")
  local head, expert, tail = name:match("^(.*%.experts%.)(%d+)%.(.+)$")
  if head then return head .. tail, math.tointeger(expert) end
  return name
end

---"blk.3.attn_q.weight" for "layers.3.self_attn.q_proj" in any spelling; nil for what is no matrix
---of the text stack.
---@param name string
---@return string?
function names.to_gguf(name)
  name = names.bare(name)
  if TOP[name] then return TOP[name] .. ".weight" end
  local layer, path = name:match("^layers%.(%d+)%.(.+)$")
  local short = TO_GGUF[path]
  return short and ("blk.%s.%s.weight"):format(layer, short)
end

---"layers.3.self_attn.q_proj" for "blk.3.attn_q.weight"; nil for what is no matrix of ours.
---@param name string
---@return string? name
---@return integer? layer
function names.from_gguf(name)
  local layer, short = name:match("^blk%.(%d+)%.([%w_]+)%.weight$")
  if not layer then return FROM_TOP[name:match("^([%w_]+)%.weight$")] end
  local path = FROM_GGUF[short]
  return path and ("layers.%s.%s"):format(layer, path), math.tointeger(layer)
end

---All names under which a file may speak of the inputs of a matrix: its own first, then those of
---the matrices that read the same.
---@param name string  bare
---@return string[]
function names.same_inputs(name)
  local layer, path = name:match("^layers%.(%d+)%.(.+)$")
  if not layer then return { names.to_gguf(name) } end
  local list = { TO_GGUF[path] }
  for _, group in ipairs(names.READERS) do
    for _, member in ipairs(group) do
      if member == path then
        for _, other in ipairs(group) do
          if other ~= path then list[#list + 1] = TO_GGUF[other] end
        end
        table.move(group.theirs or {}, 1, #(group.theirs or {}), #list + 1, list)
      end
    end
  end
  for i, short in ipairs(list) do list[i] = ("blk.%s.%s.weight"):format(layer, short) end
  return list
end

-- Matrices of a layer that read one vector; `theirs`: tensors that only GGUF files have. (The
-- experts' gate and up read the same vector as the router, but each sees its own tokens only.)
names.READERS = {
  { "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj" },
  { "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_a",
    "linear_attn.in_proj_b", theirs = { "ssm_in", "ssm_ba" } },
  { "mlp.gate_proj", "mlp.up_proj" },
  { "mlp.gate", "mlp.shared_expert_gate", "mlp.shared_expert.gate_proj",
    "mlp.shared_expert.up_proj" },
  { "mlp.experts.gate_proj", "mlp.experts.up_proj", theirs = { "ffn_gate_up_exps" } },
}

return names
