local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"

local MODELS, MLX, CT = "spec/golden/models/", "spec/golden/mlx/", "spec/golden/ct/"

---The layout with all values, and its modules by name.
local function layout(dir)
  local l = assert(core.model_layout(dir, { values = true }))
  local modules = {}
  for _, m in ipairs(l.modules) do modules[m.name] = m end
  return l, modules
end

---Layout of a changed copy of a golden checkpoint: the table, or nil, message, code.
local function edited(dir, edit, extra)
  local out = checkpoint.edited(dir, edit)
  if extra then extra(out) end
  local results = table.pack(core.model_layout(out, { values = true }))
  checkpoint.remove(out)
  return table.unpack(results, 1, results.n)
end

---Message of a checkpoint that must not load, with the directory cut off.
local function refused(dir, edit)
  local l, message = edited(dir, edit)
  assert.is_nil(l)
  assert.is_nil(message:find("\n"), message)
  return (message:gsub("^[^:]*: ", ""))
end

local function modules_of(l)
  local modules = {}
  for _, m in ipairs(l.modules) do modules[m.name] = m end
  return modules
end

---f32 bytes of add + every element: one rounding, as float addition has.
local function plus(t, add)
  local out = {}
  for i, v in ipairs(checkpoint.values(t)) do out[i] = string.pack("<f", v + add) end
  return table.concat(out)
end

---Rows [first, first + n) of matrix `i` in a stack of bf16 matrices with `rows` rows each.
local function slice(t, i, rows, first, n)
  local row = 2 * t.shape[#t.shape]
  local from = (i * rows + first) * row
  return t.data:sub(from + 1, from + n * row)
end

describe("binding a Hugging Face checkpoint", function()
  for _, case in ipairs {
    { "dense-text", "model.", false, 0 }, { "dense-tied", "model.", true, 0 },
    { "moe-text", "model.", false, 0 }, { "moe-wrapped", "model.language_model.", false, 33 },
  } do
    local name, prefix, tied, n_ignored = table.unpack(case)
    local dir = MODELS .. name .. "/hf"

    it("finds every value of " .. name, function()
      local tensors = checkpoint.load(dir)
      local l, modules = layout(dir)
      assert.equal("hf", l.family)
      assert.equal(tied, l.tied)
      assert.equal(n_ignored, l.n_ignored)
      local n = 0
      for local_name, m in pairs(modules) do
        local in_stack = not local_name:find("^lm_head") and not local_name:find("^mtp%.")
        local full = (in_stack and prefix or "") .. local_name
        local head, e, projection = full:match("^(.*%.experts%.)(%d+)%.(%a+)_proj$")
        local data
        if head and tensors[head .. "gate_up_proj"] then
          local width = m.rows
          local fused = tensors[head .. (projection == "down" and "down_proj" or "gate_up_proj")]
          data = projection == "down" and slice(fused, e, width, 0, width)
            or slice(fused, e, 2 * width, projection == "up" and width or 0, width)
        else
          data = tensors[full .. ".weight"].data
        end
        assert.equal("bf16", m.mode)
        assert.equal(#data, m.bytes)
        assert.is_true(m.values == checkpoint.widen(data), local_name)
        if not local_name:find("^mtp%.") then n = n + #data end
      end
      assert.same({ bf16 = n }, l.bytes_by_mode)
    end)

    it("adds 1 to the zero-centred norms of " .. name .. " and to no other", function()
      local tensors = checkpoint.load(dir)
      local l = layout(dir)
      local function check(key, tensor, add)
        assert.is_true(l.vectors[key] == plus(tensors[tensor], add), key)
      end
      check("norm", prefix .. "norm.weight", 1)
      for i, kind in ipairs(l.config.layer_types) do
        local key, at = ("layers.%d."):format(i - 1), ("%slayers.%d."):format(prefix, i - 1)
        check(key .. "input_norm", at .. "input_layernorm.weight", 1)
        check(key .. "post_norm", at .. "post_attention_layernorm.weight", 1)
        if kind == "full_attention" then
          check(key .. "q_norm", at .. "self_attn.q_norm.weight", 1)
          check(key .. "k_norm", at .. "self_attn.k_norm.weight", 1)
        else
          check(key .. "norm", at .. "linear_attn.norm.weight", 0)
          check(key .. "conv", at .. "linear_attn.conv1d.weight", 0)
          check(key .. "dt_bias", at .. "linear_attn.dt_bias", 0)
          local a = checkpoint.values(tensors[at .. "linear_attn.A_log"])
          for h, v in ipairs(checkpoint.floats(l.vectors[key .. "neg_exp_a"])) do
            assert.is_true(math.abs(v + math.exp(a[h])) <= math.exp(a[h]) * 2 ^ -24)
          end
        end
      end
      if l.mtp then
        check("mtp.norm", "mtp.norm.weight", 1)
        check("mtp.norm_embedding", "mtp.pre_fc_norm_embedding.weight", 1)
        check("mtp.norm_hidden", "mtp.pre_fc_norm_hidden.weight", 1)
        check("mtp.layers.0.q_norm", "mtp.layers.0.self_attn.q_norm.weight", 1)
      end
    end)

    it("counts the parameters of " .. name, function()
      local n = 0
      for tensor, t in pairs(checkpoint.load(dir)) do
        if not tensor:find("^mtp%.") and not tensor:find("visual") then
          local size = 1
          for _, d in ipairs(t.shape) do size = size * d end
          n = n + size
        end
      end
      local l = layout(dir)
      assert.equal(n, l.n_parameters)
      assert.equal(n, l.config.n_parameters)
    end)
  end

  it("reads MTP blocks, dense and MoE", function()
    local _, modules = layout(MODELS .. "moe-wrapped/hf")
    assert.equal(128, modules["mtp.fc"].cols)
    assert.equal(64, modules["mtp.layers.0.mlp.experts.7.down_proj"].rows)
    local l, dense = layout(MLX .. "dense4/hf")
    assert.is_true(l.mtp)
    assert.equal(2, l.n_ignored)
    assert.equal(128, dense["mtp.layers.0.mlp.up_proj"].rows)
  end)

  for _, prefix in ipairs { "model.language_model.", "language_model.model.", "" } do
    it(("accepts the prefix '%s'"):format(prefix), function()
      local dir = MODELS .. "dense-tied/hf"
      local want = layout(dir)
      local got = assert(edited(dir, function(tensors)
        local renamed = {}
        for name, t in pairs(tensors) do renamed[name:gsub("^model%.", prefix)] = t end
        for name in pairs(tensors) do tensors[name] = nil end
        for name, t in pairs(renamed) do tensors[name] = t end
      end))
      assert.same(want.modules, got.modules)
      assert.same(want.vectors, got.vectors)
    end)
  end

  it("reads F32 and F16 weights as well", function()
    local dir = MODELS .. "dense-tied/hf"
    local want, want_modules = layout(dir)
    local got = assert(edited(dir, function(tensors)
      for _, t in pairs(tensors) do
        t.data, t.dtype = t.dtype == "BF16" and checkpoint.widen(t.data) or t.data, "F32"
      end
    end))
    assert.same({ f32 = 2 * want.bytes_by_mode.bf16 }, got.bytes_by_mode)
    for _, m in ipairs(got.modules) do
      assert.is_true(m.values == want_modules[m.name].values)
    end
    assert.same(want.vectors, got.vectors)
    got = assert(edited(dir, function(tensors)
      -- 1.0 and -2.0 in binary16
      local t = tensors["model.layers.0.mlp.up_proj.weight"]
      t.dtype, t.data = "F16", ("\0\x3c\0\xc0"):rep(#t.data // 4)
    end))
    local m = modules_of(got)["layers.0.mlp.up_proj"]
    assert.equal("f16", m.mode)
    assert.same({ 1, -2 }, { table.unpack(checkpoint.floats(m.values), 1, 2) })
  end)

  it("lets the file decide about tying where config.json is silent", function()
    local dir = MODELS .. "dense-text/hf"
    local function headless(tensors, config)
      tensors["lm_head.weight"] = nil
      return config
    end
    assert.matches("^tensor lm_head.weight is missing$", refused(dir, headless))
    local l = assert(edited(dir, function(tensors, config)
      return (headless(tensors, config):gsub('"tie_word_embeddings": false,', ""))
    end))
    assert.is_true(l.tied)
    l = assert(edited(MODELS .. "dense-tied/hf", function(tensors)
      tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    end))
    assert.is_false(l.tied)
    assert.equal(l.config.n_parameters + 320 * 64, l.n_parameters)
  end)
end)

describe("binding an MLX checkpoint", function()
  local modes = { -- what the conversion rules in spec.json ask for
    ["moe4/mlx"] = {
      embed_tokens = "affine 8 64", lm_head = "affine 8 64",
      ["layers.0.linear_attn.in_proj_qkv"] = "affine 4 64",
      ["layers.0.linear_attn.in_proj_a"] = "bf16 16",
      ["layers.0.mlp.gate"] = "affine 8 64",
      ["layers.1.mlp.experts.3.gate_proj"] = "mxfp4 4 32",
      ["layers.1.mlp.experts.3.down_proj"] = "affine 4 64",
      ["layers.2.mlp.experts.3.down_proj"] = "mxfp4 4 32",
      ["layers.3.self_attn.q_proj"] = "affine 8 64",
    },
    ["moe4/mlx-nvfp4gs"] = { ["layers.0.mlp.experts.0.up_proj"] = "nvfp4 4 16" },
    ["dense4/mlx"] = {
      embed_tokens = "affine 6 64", ["layers.0.mlp.down_proj"] = "affine 5 64",
      ["layers.3.self_attn.v_proj"] = "affine 8 128",
      ["layers.0.linear_attn.out_proj"] = "bf16 16",
    },
  }
  -- relative error that a format may cause on the conversion's input; rows or experts in the
  -- wrong place give more than 1
  local budget = { [16] = 0, [8] = 0.02, [6] = 0.05, [5] = 0.1, [4] = 0.2 }

  local function error_of(got, want)
    local a, b, sum, square = checkpoint.floats(got), checkpoint.floats(want), 0, 0
    assert.equal(#b, #a)
    for i = 1, #a do
      sum, square = sum + (a[i] - b[i]) ^ 2, square + b[i] ^ 2
    end
    return math.sqrt(sum / square)
  end

  for dir, want in pairs(modes) do
    it("reads the formats of " .. dir, function()
      local l, modules = layout(MLX .. dir)
      assert.equal("mlx", l.family)
      for name, text in pairs(want) do
        local m = modules[name]
        local got = table.concat({ m.mode, m.bits, m.group }, " ")
        assert.equal(text, got, name)
      end
    end)

    it("finds in " .. dir .. " what was converted", function()
      local l, modules = layout(MLX .. dir)
      local base, base_modules = layout(MLX .. dir:match("^%w+") .. "/hf")
      assert.equal(base.n_parameters, l.n_parameters)
      for name, m in pairs(modules) do
        local e = error_of(m.values, base_modules[name].values)
        assert.is_true(e <= budget[m.bits], name .. ": " .. e)
      end
      for name, bytes in pairs(l.vectors) do
        -- norms went through bf16(1 + w)
        assert.is_true(error_of(bytes, base.vectors[name]) < 2 ^ -8, name)
      end
    end)
  end

  it("leaves norms as they are stored", function()
    local tensors = checkpoint.load(MLX .. "moe4/mlx")
    local l = layout(MLX .. "moe4/mlx")
    local prefix = "language_model.model.layers.0."
    assert.is_true(l.vectors["layers.0.input_norm"]
      == plus(tensors[prefix .. "input_layernorm.weight"], 0))
    assert.is_true(l.vectors["layers.0.conv"]
      == plus(tensors[prefix .. "linear_attn.conv1d.weight"], 0))
  end)

  describe("holds config.json against the tensors:", function()
    local dir = MLX .. "moe4/mlx"
    local gate = '"language_model.model.layers.0.mlp.gate": '
    local entry = '{%s*"group_size": 64,%s*"bits": 8%s*}'
    ---Replaces the entry of layer 0's router, in both blocks.
    local function with(text, key)
      return function(_, config)
        local n
        config, n = config:gsub(gate:gsub("%p", "%%%0") .. entry, (key or gate) .. text)
        assert.equal(2, n)
        return config
      end
    end

    it("entries may be missing", function()
      assert.truthy(edited(dir, function(_, config)
        return (config:gsub('"quantization%a*"', '"unused"'):gsub('"quantization_config"', '"x"'))
      end))
    end)

    it("entries may claim nothing, or be null", function()
      assert.truthy(edited(dir, with '{"group_size": null, "bits": null}'))
      assert.truthy(edited(dir, with "null"))
    end)

    it("entries may use Hugging Face paths", function()
      local path = '"model.language_model.layers.0.mlp.gate": '
      assert.truthy(edited(dir, with('{"group_size": 64, "bits": 8}', path)))
      assert.matches("^language_model.model.layers.0.mlp.gate: .*config.json says",
        refused(dir, with('{"group_size": 64, "bits": 4}', path)))
    end)

    it("a missing mode is affine", function()
      assert.truthy(edited(dir, with '{"group_size": 64, "bits": 8, "mode": "affine"}'))
      local switch = '("[^"]*layers.0.mlp.switch_mlp.up_proj": {[^}]*),%s*"mode": "mxfp4"'
      assert.matches("switch_mlp.up_proj: the tensors are mxfp4 .* config.json says affine",
        refused(dir, function(_, config) return (config:gsub(switch, "%1")) end))
    end)

    it("bits, group and mode must agree", function()
      assert.matches("mlp.gate: the tensors are affine with 8 bits, group 64; config.json says "
        .. "affine with 4 bits, group 64", refused(dir, with '{"group_size": 64, "bits": 4}'))
      assert.matches("group 32", refused(dir, with '{"group_size": 32, "bits": 8}'))
      assert.matches("mxfp8",
        refused(dir, with '{"group_size": 64, "bits": 8, "mode": "mxfp8"}'))
    end)

    it("true means the global values, false means plain", function()
      assert.matches("says affine with 4 bits", refused(dir, with "true"))
      assert.matches("are quantized, config.json says false", refused(dir, with "false"))
      local key = '"language_model.model.layers.0.linear_attn.in_proj_a": '
      local also = '{"group_size": 64, "bits": 8}, ' .. key
      assert.truthy(edited(dir, with(also .. "false")))
      assert.matches("in_proj_a: the tensors are plain, config.json says true",
        refused(dir, with(also .. "true")))
    end)
  end)

  it("wants the tensor scales that config.json announces", function()
    local name = "language_model.model.layers.0.mlp.switch_mlp.gate_proj.global_scale"
    assert.equal("tensor " .. name .. " is missing",
      refused(MLX .. "moe4/mlx-nvfp4gs", function(tensors) tensors[name] = nil end))
  end)

  it("takes byte scales in types that MLX reads as bytes only", function()
    local name = "language_model.model.layers.0.mlp.switch_mlp.up_proj.scales"
    local function typed(dtype)
      return function(tensors) tensors[name].dtype = dtype end
    end
    assert.truthy(edited(MLX .. "moe4/mlx", typed "F8_E8M0"))
    for _, dtype in ipairs { "I8", "BOOL", "F8_E5M2" } do
      assert.matches("tensor " .. name .. ": dtype " .. dtype .. ", expected U8",
        refused(MLX .. "moe4/mlx", typed(dtype)))
    end
  end)

  it("looks at raw and finished MTP norms", function()
    local raw = checkpoint.load(MLX .. "dense4/hf")
    local want = layout(MLX .. "dense4/hf")
    for _, shift in ipairs { 0, 1 } do
      local mtp = {}
      for name, t in pairs(raw) do
        if name:find("^mtp%.") then mtp[name] = t end
        if name:find("^mtp%.") and name:find("norm%.weight$") or name:find("^mtp.pre_fc_norm") then
          mtp[name] = { dtype = "F32", shape = t.shape, data = plus(t, shift) }
        end
      end
      local got = assert(edited(MLX .. "dense4/mlx", function() end, function(out)
        checkpoint.write(out .. "/mtp.safetensors", mtp)
      end))
      assert.is_true(got.mtp)
      for name, bytes in pairs(want.vectors) do
        if name:find("^mtp%.") then assert.is_true(got.vectors[name] == bytes, name) end
      end
    end
  end)
end)

describe("binding compressed-tensors", function()
  local originals = checkpoint.read(CT .. "original.safetensors")
  local formats = {
    mxfp4 = "mxfp4 4 32", nvfp4 = "nvfp4 4 16", mxfp8 = "mxfp8 8 32",
    ["fp8-channel"] = "fp8 8 128", ["fp8-block"] = "fp8 8 128",
    ["int4-group32"] = "affine 4 32", ["int4-group64-asym"] = "affine 4 64",
    ["int8-channel"] = "affine 8 128", ["int3-group32"] = "affine 3 32",
  }
  for folder, text in pairs(formats) do
    it("decodes " .. folder .. " to the library's values", function()
      local golden = checkpoint.read(CT .. "decompressed-" .. folder .. ".safetensors")
      local n = 0
      for name, t in pairs(originals) do
        local module = name:match("^(layers%..*)%.weight$")
        if module then
          local m = assert(core.model_module(CT .. folder, module, t.shape[1], t.shape[2]))
          if t.shape[2] == 128 then
            assert.equal(text, table.concat({ m.mode, m.bits, m.group }, " "))
          end
          assert.is_true(checkpoint.to_bf16(m.values) == golden[name].data, name)
          n = n + 1
        end
      end
      assert.equal(6, n)
    end)
  end

  it("binds a model of mixed formats", function()
    local l, modules = layout(CT .. "model-mixed/checkpoint")
    assert.equal("compressed-tensors", l.family)
    local base, base_modules = layout(MODELS .. "moe-text/hf")
    assert.equal(base.n_parameters, l.n_parameters)
    assert.same(base.vectors, l.vectors)
    local function mode(name) return modules[name].mode end
    assert.equal("mxfp4", mode "layers.5.mlp.experts.7.down_proj")
    assert.equal("nvfp4", mode "layers.3.self_attn.k_proj")
    assert.equal("fp8", mode "layers.0.linear_attn.in_proj_qkv")
    assert.equal("affine", mode "layers.0.mlp.shared_expert.up_proj")
    assert.equal("bf16", mode "layers.0.mlp.gate")
    for name, m in pairs(modules) do
      local a = checkpoint.floats(m.values)
      local b = checkpoint.floats(base_modules[name].values)
      local sum, square = 0, 0
      for i = 1, #a do sum, square = sum + (a[i] - b[i]) ^ 2, square + b[i] ^ 2 end
      assert.is_true(sum <= 0.03 * square, name)
    end
  end)

  local mixed = CT .. "model-mixed/checkpoint"
  local q = "model.layers.3.self_attn.q_proj."
  local shared = "model.layers.0.mlp.shared_expert.up_proj."
  local function with(name, t)
    return function(tensors) tensors[name] = t end
  end
  local refusals = {
    ["activation order"] = { with(q .. "weight_g_idx", { dtype = "I32", shape = { 1 },
      data = "\0\0\0\0" }), "^tensor " .. q .. "weight_g_idx: activation order is not supported" },
    ["a missing global scale"] = { with(q .. "weight_global_scale"),
      "weight_global_scale is missing" },
    ["a global scale of zero"] = { with(q .. "weight_global_scale", { dtype = "F32", shape = { 1 },
      data = "\0\0\0\0" }), "weight_global_scale: 0 is no positive number" },
    ["a wrong weight_shape"] = { with(shared .. "weight_shape", { dtype = "I64", shape = { 2 },
      data = string.pack("<i8i8", 64, 32) }), "shape: says %[64, 32%], expected %[64, 64%]" },
    ["scales of another shape"] = { function(t)
      t[shared .. "weight_scale"].shape = { 32, 4 }
    end, "weight_scale: shape %[32, 4%], expected %[64, 4%]" },
    ["packed and plain weights side by side"] = { with(q .. "weight", { dtype = "BF16",
      shape = { 1 }, data = "\0\0" }), "q_proj.weight: stands beside" },
    ["an undeclared scheme"] = { function(_, config)
      return (config:gsub('"group_size": 16,', '"group_size": 32,'))
    end, "q_proj: the tensors are float with 4 bits, group 16; no group of" },
    ["rotated weights"] = { function(_, config)
      return (config:gsub('"transform_config": {}',
        '"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}'))
    end, "rotated weights" },
    ["another method"] = { function(_, config)
      return (config:gsub('"compressed%-tensors"', '"gptq"'))
    end, 'quant_method "gptq" is not supported' },
  }
  for what, case in pairs(refusals) do
    it("refuses " .. what, function() assert.matches(case[2], refused(mixed, case[1])) end)
  end

  it("wants the zero points that config.json announces", function()
    local dir = checkpoint.edited(CT .. "int4-group64-asym", function(tensors)
      tensors["layers.gauss.weight_zero_point"] = nil
    end)
    local m, message = core.model_module(dir, "layers.gauss", 48, 128)
    assert.is_nil(m)
    assert.matches("tensor layers.gauss.weight_zero_point is missing$", message)
    assert.truthy(core.model_module(dir, "layers.tall", 136, 128))
    checkpoint.remove(dir)
  end)

  it("leaves scales of activations and caches alone", function()
    local one = { dtype = "F32", shape = { 1 }, data = string.pack("<f", 1) }
    assert.truthy(edited(mixed, function(t)
      t[q .. "input_global_scale"] = one
      t["model.layers.0.linear_attn.in_proj_z.input_scale"] = one
      t["model.layers.3.self_attn.k_scale"], t["model.layers.3.self_attn.v_scale"] = one, one
    end))
  end)

  it("reads block-scaled FP8 releases", function()
    local name = "model.layers.0.mlp.up_proj"
    local l = assert(edited(MODELS .. "dense-text/hf", function(tensors, config)
      -- 192 x 128: tiles of 128 x 128, the second one cut; code 0x38 is 1.0
      tensors[name .. ".weight"] = { dtype = "F8_E4M3", shape = { 192, 128 },
        data = ("\x38"):rep(192 * 128) }
      tensors[name .. ".weight_scale_inv"] = { dtype = "F32", shape = { 2, 1 },
        data = string.pack("<ff", 0.5, 0.25) }
      return (config:gsub("^{", '{"quantization_config": {"quant_method": "fp8", '
        .. '"weight_block_size": [128, 128]},'))
    end))
    local m = modules_of(l)["layers.0.mlp.up_proj"]
    assert.equal("fp8 128 128", table.concat({ m.mode, m.tile_rows, m.group }, " "))
    assert.is_true(m.values == string.pack("<f", 0.5):rep(128 * 128)
      .. string.pack("<f", 0.25):rep(64 * 128))
    assert.equal("hf", l.family)
  end)

  it("reads fused experts in block-scaled FP8", function()
    local layer = "model.language_model.layers.0.mlp.experts."
    local function fuse(tensors, config)
      -- [8, 128, 64] and [8, 64, 64] in tiles of 64 x 64; scales count up from 1
      local function put(name, rows)
        local scales = {}
        for i = 1, 8 * rows // 64 do scales[i] = string.pack("<f", i) end
        tensors[layer .. name] = { dtype = "F8_E4M3", shape = { 8, rows, 64 },
          data = ("\x38"):rep(8 * rows * 64) }
        tensors[layer .. name .. "_scale_inv"] = { dtype = "F32", shape = { 8, rows // 64, 1 },
          data = table.concat(scales) }
      end
      put("gate_up_proj", 128)
      put("down_proj", 64)
      return (config:gsub("^{", '{"quantization_config": {"quant_method": "fp8", '
        .. '"weight_block_size": [64, 64]},'))
    end
    local modules = modules_of(assert(edited(MODELS .. "moe-wrapped/hf", fuse)))
    for i = 0, 7 do
      local expert = ("layers.0.mlp.experts.%d."):format(i)
      for name, scale in pairs { gate_proj = 2 * i + 1, up_proj = 2 * i + 2, down_proj = i + 1 } do
        assert.is_true(modules[expert .. name].values == string.pack("<f", scale):rep(64 * 64))
      end
    end
    assert.matches("tiles of 128 rows straddle gate and up",
      refused(MODELS .. "moe-wrapped/hf", function(tensors, config)
        config = fuse(tensors, config):gsub("%[64, 64%]", "[128, 128]")
        for _, name in ipairs { "gate_up_proj", "down_proj" } do
          tensors[layer .. name .. "_scale_inv"] = { dtype = "F32", shape = { 8, 1, 1 },
            data = string.pack("<f", 1):rep(8) }
        end
        return config
      end))
  end)
end)

describe("a broken checkpoint", function()
  ---Names of layer 0 and of the first full layer, and all names outside the layers.
  local function sample(dir)
    local names = {}
    for name in pairs(checkpoint.load(dir)) do
      local i, e = name:match("layers%.(%d+)"), name:match("experts%.(%d+)")
      if (not i or i == "0" or i == "3") and (not e or e == "5") and not name:find("visual") then
        names[#names + 1] = name
      end
    end
    table.sort(names)
    return names
  end

  for _, dir in ipairs {
    MODELS .. "dense-tied/hf", MODELS .. "moe-wrapped/hf", MLX .. "moe4/mlx",
    CT .. "model-mixed/checkpoint",
  } do
    it("names each tensor that is missing from " .. dir, function()
      for _, name in ipairs(sample(dir)) do
        local message = refused(dir, function(tensors) tensors[name] = nil end)
        local stem = name:gsub("%.weight$", ""):gsub("%.weight_packed$", "")
        assert.truthy(message:find(stem, 1, true), name .. ": " .. message)
      end
    end)

    it("names each tensor of a wrong shape in " .. dir, function()
      for _, name in ipairs(sample(dir)) do
        if not name:find("global_scale") then
          local message = refused(dir, function(tensors)
            local shape = tensors[name].shape
            shape[#shape + 1], shape[1] = shape[1], 1
          end)
          local stem = name:gsub("%.scales$", ""):gsub("%.biases$", "")
          assert.truthy(message:find(stem, 1, true), name .. ": " .. message)
          assert.matches("shape %[.*%], expected %[.*%]", message)
        end
      end
    end)

    it("names each tensor of a wrong type in " .. dir, function()
      for _, name in ipairs(sample(dir)) do
        local message = refused(dir, function(tensors)
          local t = tensors[name]
          local n = 1
          for _, d in ipairs(t.shape) do n = n * d end
          t.dtype, t.data = "I16", ("\0\0"):rep(n)
        end)
        assert.truthy(message:find(name, 1, true), name .. ": " .. message)
      end
    end)
  end

  it("names tensors that nobody knows", function()
    local dir = MODELS .. "dense-tied/hf"
    for _, name in ipairs { "model.layers.0.mlp.gate.weight", "model.layers.8.mlp.up_proj.weight",
      "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight_scale",
      "adapter.weight", "mtp.layers.1.fc.weight" } do
      local message = refused(dir, function(tensors)
        tensors[name] = { dtype = "BF16", shape = { 1 }, data = "\0\0" }
      end)
      assert.truthy(message:find(name:match("^mtp") or name, 1, true), message)
    end
    assert.matches("layers.0.mlp.up_proj.bias: a bias is not supported",
      refused(dir, function(tensors)
        local bias = { dtype = "BF16", shape = { 1 }, data = "\0\0" }
        tensors["model.layers.0.mlp.up_proj.bias"] = bias
      end))
  end)

  it("may not hold experts twice", function()
    local message = refused(MODELS .. "moe-wrapped/hf", function(tensors)
      local p = "model.language_model.layers.0.mlp.experts.0.gate_proj.weight"
      tensors[p] = { dtype = "BF16", shape = { 1 }, data = "\0\0" }
    end)
    assert.matches("layers.0.mlp: experts are stored twice, as experts.gate_up_proj "
      .. "experts.0.gate_proj", message)
  end)

  it("names vectors that are not finite", function()
    for _, bytes in ipairs { "\xc0\x7f", "\x80\x7f", "\x80\xff" } do
      local message = refused(MODELS .. "dense-tied/hf", function(tensors)
        local t = tensors["model.layers.0.linear_attn.A_log"]
        t.data = t.data:sub(1, 2) .. bytes .. t.data:sub(5)
      end)
      assert.equal("tensor model.layers.0.linear_attn.A_log: element 1 is not finite", message)
    end
  end)

  it("reports a missing directory, configuration or stack", function()
    local l, message, code = core.model_layout("/nonexistent")
    assert.is_nil(l)
    assert.matches("/nonexistent/config.json", message)
    assert.equal("io", code)
    assert.matches("^tensor model.language_model.embed_tokens.weight is missing$",
      refused(MODELS .. "dense-tied/hf", function(tensors)
        for name in pairs(tensors) do tensors[name] = nil end
        tensors["x"] = { dtype = "BF16", shape = { 1 }, data = "\0\0" }
      end))
  end)
end)

describe("a module with sizes of zero", function()
  it("has no groups, which divides nothing", function()
    local dir = checkpoint.directory()
    checkpoint.spit(dir .. "/config.json", "{}")
    checkpoint.write(dir .. "/model.safetensors", {
      ["m.weight"] = { dtype = "U32", shape = { 2, 4 }, data = ("\0"):rep(32) },
      ["m.scales"] = { dtype = "BF16", shape = { 2, 0 }, data = "" },
      ["m.biases"] = { dtype = "BF16", shape = { 2, 0 }, data = "" },
    })
    local m, message, code = core.model_module(dir, "m", 2, 32)
    checkpoint.remove(dir)
    assert.is_nil(m)
    assert.matches("tensor m.scales: shape %[2, 0%], expected %[2, 1%]", message)
    assert.equal("format", code)
  end)
end)

describe("block sizes of FP8 that config.json makes up", function()
  for _, size in ipairs { "9223372036854775807", "-9223372036854775808", "0" } do
    it("are no sizes: " .. size, function()
      local tensors = {
        ["m.weight"] = { dtype = "F8_E4M3", shape = { 4, 32 }, data = ("\56"):rep(128) },
        ["m.weight_scale_inv"] = { dtype = "F32", shape = { 3, 3 }, data = ("\0"):rep(36) },
      }
      local dir = checkpoint.directory()
      checkpoint.spit(dir .. "/config.json", (
        '{"quantization_config": {"quant_method": "fp8", "weight_block_size": [%s, %s]}}'):format(
        size, size))
      checkpoint.write(dir .. "/model.safetensors", tensors)
      local m, message = core.model_module(dir, "m", 4, 32)
      checkpoint.remove(dir)
      assert.is_nil(m)
      assert.matches("tensor m.weight_scale_inv: shape %[3, 3%], expected %[1, 1%]", message)
    end)
  end
end)
