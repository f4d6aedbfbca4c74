local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"

local slurp = checkpoint.slurp

---A small valid text config, with fields replaced; values are JSON text, false removes a field.
local function config(changes)
  local fields = {
    model_type = '"qwen3_5_moe_text"', vocab_size = "256", hidden_size = "64",
    num_hidden_layers = "4", num_attention_heads = "4", num_key_value_heads = "2", head_dim = "32",
    linear_num_key_heads = "2", linear_num_value_heads = "4", linear_key_head_dim = "16",
    linear_value_head_dim = "16", num_experts = "8", num_experts_per_tok = "2",
    moe_intermediate_size = "32", shared_expert_intermediate_size = "64",
  }
  for k, v in pairs(changes or {}) do fields[k] = v or nil end
  local parts = {}
  for k, v in pairs(fields) do parts[#parts + 1] = ('"%s": %s'):format(k, v) end
  return "{" .. table.concat(parts, ", ") .. "}"
end

local function read(changes)
  return core.model_config(config(changes))
end

describe("config", function()
  it("reads the published models", function()
    local c = assert(core.model_config(slurp "spec/golden/configs/qwen3.6-35b-a3b.json"))
    assert.equal("qwen3_5_moe_text", c.model_type)
    assert.equal(40, c.num_hidden_layers)
    assert.equal(256, c.num_experts)
    assert.equal(8, c.num_experts_per_tok)
    assert.equal(64, c.rotary_dim)
    assert.equal(1, c.mtp_num_hidden_layers)
    assert.equal(34660610688, c.n_parameters)
    for i, kind in ipairs(c.layer_types) do
      assert.equal(i % 4 == 0 and "full_attention" or "linear_attention", kind)
    end
    c = assert(core.model_config(slurp "spec/golden/configs/qwen3.6-27b.json"))
    assert.equal("qwen3_5_text", c.model_type)
    assert.equal(0, c.num_experts)
    assert.equal("26.896", ("%.3f"):format(c.n_parameters / 1e9))
  end)

  it("fills in the defaults of transformers", function()
    local c = assert(core.model_config '{"model_type": "qwen3_5_text"}')
    assert.same({ 248320, 4096, 12288, 32, 16, 4, 256, 64, 16, 32, 128, 128, 4, 32768 },
      { c.vocab_size, c.hidden_size, c.intermediate_size, c.num_hidden_layers,
        c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rotary_dim,
        c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim,
        c.linear_value_head_dim, c.linear_conv_kernel_dim, c.max_position_embeddings })
    assert.is_false(c.tie_word_embeddings)
    assert.is_true(math.abs(c.rms_norm_eps - 1e-6) < 1e-12)
    -- theta 10000 on 64 dimensions
    assert.is_true(math.abs(c.inv_freq[2] - 10000 ^ (-2 / 64)) < 1e-6)
    c = assert(core.model_config '{"model_type": "qwen3_5_moe_text"}')
    assert.same({ 2048, 40, 2, 256, 8, 512, 512, 0 },
      { c.hidden_size, c.num_hidden_layers, c.num_key_value_heads, c.num_experts,
        c.num_experts_per_tok, c.moe_intermediate_size, c.shared_expert_intermediate_size,
        c.mtp_num_hidden_layers })
  end)

  it("takes layer_types before full_attention_interval", function()
    local function kinds(c)
      return table.concat(c.layer_types, " "):gsub("linear_attention", "L")
        :gsub("full_attention", "F")
    end
    assert.equal("L F L F", (kinds(assert(read { full_attention_interval = "2" }))))
    assert.equal("L L L F", (kinds(assert(read()))))
    local types = '["full_attention","linear_attention","linear_attention","linear_attention"]'
    assert.equal("F L L L",
      (kinds(assert(read { layer_types = types, full_attention_interval = "2" }))))
  end)

  it("lets rope_parameters win and fills gaps from beside it", function()
    local c = assert(read { rope_parameters = '{"rope_theta": 100.0}', rope_theta = "7",
      partial_rotary_factor = "0.5" })
    assert.equal(16, c.rotary_dim)
    assert.is_true(math.abs(c.inv_freq[3] - 100 ^ (-4 / 16)) < 1e-6)
  end)

  describe("rotary frequencies", function()
    local function close(want, got)
      assert.equal(#want, #got)
      for i, w in ipairs(want) do
        -- two roundings of float: the library raises to a power in another way
        assert.is_true(math.abs(got[i] - w) <= math.abs(w) * 2 ^ -22, i)
      end
    end

    for _, name in ipairs { "dense-text", "dense-tied", "moe-text", "moe-wrapped" } do
      it("equal the golden ones of " .. name, function()
        local dir = "spec/golden/models/" .. name
        local golden = checkpoint.read(dir .. "/golden.safetensors")
        local c = assert(core.model_config(slurp(dir .. "/hf/config.json")))
        close(checkpoint.values(golden["rope.inv_freq"]), c.inv_freq)
        assert.equal(1, c.rope_scale)
      end)
    end

    it("equal the golden ones of the YaRN configuration", function()
      local dir = "spec/golden/models/dense-text"
      local golden = checkpoint.read(dir .. "/golden.yarn.safetensors")
      local c = assert(core.model_config(slurp(dir .. "/hf/config.yarn.json")))
      close(checkpoint.values(golden["rope.inv_freq"]), c.inv_freq)
      close(checkpoint.values(golden["rope.scale"]), { c.rope_scale })
    end)

    local text = slurp "spec/golden/configs/rope.json"
    local case = '"name": "([^"]+)",%s*"rope_parameters": (%b{}),%s*"inv_freq": (%b[]),%s*'
      .. '"scale": ([%d.e-]+)'
    for name, rope, freqs, scale in text:gmatch(case) do
      it("equal those of transformers: " .. name, function()
        local c = assert(read { head_dim = "256", max_position_embeddings = "1048576",
          rope_parameters = rope })
        local want = {}
        for v in freqs:gmatch("[%d.e-]+") do want[#want + 1] = tonumber(v) end
        assert.equal(32, #want)
        close(want, c.inv_freq)
        close({ tonumber(scale) }, { c.rope_scale })
      end)
    end
  end)

  describe("refuses", function()
    local cases = {
      { { model_type = '"qwen3_next"' }, 'model_type "qwen3_next"', "unsupported" },
      { { model_type = false }, "model_type is missing", "format" },
      { { attention_bias = "true" }, "attention_bias", "unsupported" },
      { { attn_output_gate = "false" }, "attn_output_gate", "unsupported" },
      { { hidden_act = '"gelu"' }, "hidden_act", "unsupported" },
      { { norm_topk_prob = "false" }, "norm_topk_prob", "unsupported" },
      { { mlp_only_layers = "[0]" }, "mlp_only_layers", "unsupported" },
      { { decoder_sparse_step = "2" }, "decoder_sparse_step", "unsupported" },
      { { rope_parameters = '{"rope_type": "longrope"}' }, 'rope_type "longrope"', "unsupported" },
      { { rope_parameters = '{"type": "linear"}' }, 'rope_type "linear"', "unsupported" },
      { { rope_parameters = '{"rope_theta": "big"}' }, "rope_theta", "range" },
      { { rope_parameters = '{"rope_type": "yarn", "factor": -4}' }, "factor", "range" },
      { { layer_types = '["full_attention"]' }, "num_hidden_layers = 4", "format" },
      { { layer_types = '["full_attention","mamba","full_attention","full_attention"]' },
        'layer_types%[1%] "mamba"', "unsupported" },
      { { num_key_value_heads = "3" }, "no multiple of num_key_value_heads", "range" },
      { { linear_num_value_heads = "3" }, "no multiple of linear_num_key_heads", "range" },
      { { partial_rotary_factor = "1.5" }, "partial_rotary_factor", "range" },
      { { partial_rotary_factor = "0.1" }, "3 rotary", "range" },
      { { partial_rotary_factor = "0" }, "0 rotary", "range" },
      { { hidden_size = "0" }, "hidden_size", "range" },
      { { hidden_size = "-64" }, "hidden_size", "range" },
      { { hidden_size = "64.5" }, "hidden_size", "range" },
      { { hidden_size = '"64"' }, "hidden_size", "range" },
      { { hidden_size = "9223372036854775807" }, "hidden_size", "range" },
      { { num_hidden_layers = "2000000000" }, "num_hidden_layers", "range" },
      { { num_experts = "2000000000" }, "num_experts", "range" },
      { { num_experts_per_tok = "9" }, "num_experts_per_tok", "range" },
      { { linear_conv_kernel_dim = "1" }, "linear_conv_kernel_dim", "range" },
      { { linear_conv_kernel_dim = "17" }, "linear_conv_kernel_dim .* from 2 to 16", "range" },
      { { rms_norm_eps = '"small"' }, "rms_norm_eps", "range" },
      { { text_config = "[]" }, "text_config", "format" },
    }
    for _, case in ipairs(cases) do
      local changes, pattern, code = table.unpack(case)
      local key, value = next(changes)
      it(("%s = %s"):format(key, value), function()
        local c, message, got = read(changes)
        assert.is_nil(c)
        assert.matches(pattern, message)
        assert.is_nil(message:find "\n")
        assert.equal(code, got)
      end)
    end

    -- Kernels divide by them.
    it("matrices without rows or columns", function()
      local dense = { model_type = '"qwen3_5_text"', intermediate_size = "64" }
      assert(read(dense))
      for _, key in ipairs { "vocab_size", "hidden_size", "num_attention_heads",
        "num_key_value_heads", "head_dim", "linear_num_key_heads", "linear_num_value_heads",
        "linear_key_head_dim", "linear_value_head_dim", "intermediate_size", "num_experts",
        "moe_intermediate_size", "shared_expert_intermediate_size" } do
        local changes = { [key] = "0" }
        if key == "intermediate_size" then changes.model_type = dense.model_type end
        local c, message, code = read(changes)
        assert.same({ nil, "range" }, { c, code }, key)
        assert.matches(key, message, 1, true)
      end
    end)

    it("nothing at the limits, where the number of weights still fits an integer", function()
      local c = assert(read { hidden_size = "262144", num_hidden_layers = "4096",
        num_experts = "4096", moe_intermediate_size = "262144" })
      assert.equal(62, math.floor(math.log(c.n_parameters, 2) + 0.5))
      for key, value in pairs { hidden_size = 262145, moe_intermediate_size = 262145,
          num_hidden_layers = 4097, num_experts = 4097 } do
        assert.is_nil(read { [key] = tostring(value) })
      end
    end)

    it("what is no object", function()
      assert.same({ nil, "config.json: an object is expected", "format" },
        { core.model_config "[]" })
    end)
  end)
end)
