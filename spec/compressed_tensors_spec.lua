local checkpoint = require "spec.support.checkpoint"
local json = require "moonlet.json"
local numbers = require "spec.support.numbers"
local quantize = require "moonlet.quantize"
local rules = require "spec.support.rules"
local written = require "spec.support.written"

local WRAPPED, TEXT = "spec/golden/models/moe-wrapped/hf", "spec/golden/models/moe-text/hf"
local TIED = "spec/golden/models/dense-tied/hf"

local function as_ct(source, recipe, fn)
  written.quantized({ source = source, recipe = recipe, format = "compressed-tensors" }, fn)
end

local function config_of(dir) return assert(json.read(dir .. "/config.json")) end

local function f32_at(bytes, i) return (string.unpack("<f", bytes, 4 * i + 1)) end

-- How a module's tensors end, in order.
local function parts_of(tensors, module)
  local list = {}
  for name, t in pairs(tensors) do
    local last = name:match("^" .. module:gsub("%p", "%%%0") .. "%.([%w_]+)$")
    if last then
      list[#list + 1] = ("%s %s [%s]"):format(last, t.dtype, table.concat(t.shape, ", "))
    end
  end
  table.sort(list)
  return table.concat(list, ", ")
end

describe("compressed-tensors output", function()
  it("names and shapes the tensors of every format", function()
    as_ct(WRAPPED, rules.every_format, function(out)
      local t, head = written.tensors(out), "model.language_model.layers."
      assert.equal("weight_packed U8 [64, 32], weight_scale U8 [64, 2]",
        parts_of(t, head .. "1.mlp.experts.7.gate_proj"))
      assert.equal("weight F8_E4M3 [64, 64], weight_scale U8 [64, 2]",
        parts_of(t, head .. "1.mlp.experts.0.down_proj"))
      assert.equal("weight_global_scale F32 [1], weight_packed U8 [256, 32], "
        .. "weight_scale F8_E4M3 [256, 4]", parts_of(t, head .. "3.self_attn.q_proj"))
      assert.equal("weight F8_E4M3 [64, 128], weight_scale BF16 [64, 1]",
        parts_of(t, head .. "3.self_attn.o_proj"))
      assert.equal("weight_packed I32 [320, 16], weight_scale BF16 [320, 1], "
        .. "weight_shape I64 [2], weight_zero_point I32 [80, 1]",
        parts_of(t, "model.language_model.embed_tokens"))
      assert.equal("weight_packed I32 [128, 6], weight_scale BF16 [128, 1], "
        .. "weight_shape I64 [2], weight_zero_point I32 [12, 1]",
        parts_of(t, head .. "0.linear_attn.in_proj_qkv"))
      assert.equal("weight BF16 [64, 64]", parts_of(t, head .. "0.mlp.experts.3.up_proj"))
      assert.equal("weight BF16 [64, 64]", parts_of(t, "mtp.layers.0.mlp.experts.1.down_proj"))
      assert.equal(string.pack("<i8i8", 320, 64),
        t["model.language_model.embed_tokens.weight_shape"].data)
    end)
  end)

  it("leaves what is not quantized as it is stored, experts taken apart", function()
    local source = checkpoint.load(WRAPPED)
    as_ct(WRAPPED, "keep_bf16", function(out)
      local t = written.tensors(out)
      for name, s in pairs(source) do
        local stem, last = name:match("^(.*%.experts)%.(.*)$")
        if not stem then
          assert.equal(s.dtype, t[name].dtype, name)
          assert.same(s.shape, t[name].shape)
          assert.is_true(s.data == t[name].data, name)
        else
          local got = {}
          for e = 0, s.shape[1] - 1 do
            for _, p in ipairs(last == "down_proj" and { last } or { "gate_proj", "up_proj" }) do
              got[#got + 1] = t[("%s.%d.%s.weight"):format(stem, e, p)].data
            end
          end
          assert.is_true(s.data == table.concat(got), name)
        end
      end
      assert.is_nil(config_of(out).quantization_config)
    end)
  end)

  for _, source in ipairs { WRAPPED, TEXT, TIED } do
    it("holds the values that MLX's files hold, where both have the format: " .. source, function()
      for _, d in ipairs { { mode = "mxfp4" }, { mode = "mxfp8" } } do
        local recipe = rules.only(d)
        as_ct(source, recipe, function(out)
          written.quantized({ source = source, recipe = recipe }, function(mlx)
            local ours, theirs = written.modules(out), written.modules(mlx)
            for name, m in pairs(theirs) do
              assert.is_true(m.values == ours[name].values, name)
              assert.equal(m.mode, ours[name].mode)
            end
          end)
        end)
      end
    end)
  end

  it("takes what the plan says", function()
    for _, source in ipairs { WRAPPED, TIED } do
      as_ct(source, rules.every_format, function(out, p)
        local bytes = 0
        for _, t in pairs(written.tensors(out)) do bytes = bytes + #t.data end
        assert.equal(bytes, p.total_bytes)
        local index = assert(json.read(out .. "/model.safetensors.index.json"))
        assert.equal(bytes, index.metadata.total_size)
      end)
    end
  end)

  it("has one global scale for q, k and v, and one per expert for gate and up", function()
    local function nvfp4(t)
      return t.class:find("^[qkvo]_proj$") and { mode = "nvfp4" }
        or t.class:find("^expert_") and { mode = "nvfp4" } or { keep = "bf16" }
    end
    local dense = written.modules(WRAPPED)
    local function largest(...)
      local top = 0
      for _, name in ipairs { ... } do
        for _, v in ipairs(numbers.unpack(dense[name].values)) do
          top = math.max(top, math.abs(v))
        end
      end
      return top
    end
    as_ct(WRAPPED, nvfp4, function(out)
      local t = written.tensors(out)
      local function check(stem, ...)
        local names = {}
        for i, last in ipairs { ... } do names[i] = stem .. last end
        local want = string.pack("<f", 2688 / largest(table.unpack(names)))
        for _, name in ipairs(names) do
          local got = t["model.language_model." .. name .. ".weight_global_scale"]
          assert.equal(want, got.data, name)
        end
      end
      check("layers.3.self_attn.", "q_proj", "k_proj", "v_proj")
      check("layers.3.self_attn.", "o_proj")
      for e = 0, 7 do
        check(("layers.2.mlp.experts.%d."):format(e), "gate_proj", "up_proj")
        check(("layers.2.mlp.experts.%d."):format(e), "down_proj")
      end
      local ours = written.modules(out)
      for name, m in pairs(ours) do
        if m.mode == "nvfp4" then
          local a, b, err, all = m.values, dense[name].values, 0, 0
          for i = 0, #a // 4 - 1 do
            err = err + (f32_at(a, i) - f32_at(b, i)) ^ 2
            all = all + f32_at(b, i) ^ 2
          end
          assert.is_true(math.sqrt(err / all) < 0.11, name) -- 0.094 for Gaussian weights
        end
      end
    end)
  end)

  it("keeps a matrix of zeros in nvfp4", function()
    local source = checkpoint.edited(TIED, function(tensors)
      local t = tensors["model.layers.0.mlp.down_proj.weight"]
      t.data = ("\0"):rep(#t.data)
    end)
    as_ct(source, rules.only { mode = "nvfp4" }, function(out)
      local module = "model.layers.0.mlp.down_proj.weight_"
      local t = written.tensors(out)
      assert.equal(string.pack("<f", 1), t[module .. "global_scale"].data)
      assert.matches("^\x20+$", t[module .. "scale"].data)
      assert.matches("^%z+$", t[module .. "packed"].data)
    end)
    checkpoint.remove(source)
  end)

  it("needs no more rows than a matrix has to pack zero points", function()
    local function narrow(t) -- 4 and 1 rows
      local class = t.class == "in_proj_a" or t.class == "shared_gate"
      return class and { mode = "affine", bits = 5, group = 32 } or { keep = "bf16" }
    end
    local dense = written.modules(WRAPPED)
    as_ct(WRAPPED, narrow, function(out)
      for name, m in pairs(written.modules(out)) do
        if name:find "^layers.*in_proj_a$" or name:find "^layers.*shared_expert_gate$" then
          assert.equal("affine", m.mode)
          for i = 0, #m.values // 4 - 1 do
            assert.is_true(math.abs(f32_at(m.values, i) - f32_at(dense[name].values, i)) < 0.08)
          end
        end
      end
    end)
  end)

  it("leaves in BF16 what the stock library could not unpack, and says so", function()
    local function narrow(bits)
      return function(t) -- 1 row and 4
        local class = t.class == "shared_gate" or t.class == "in_proj_a"
        return class and { mode = "affine", bits = bits, group = 32 } or { keep = "bf16" }
      end
    end
    for bits, mode in pairs { [4] = "bf16", [5] = "affine" } do
      as_ct(WRAPPED, narrow(bits), function(out, p)
        local modules = written.modules(out)
        assert.equal(mode, modules["layers.0.mlp.shared_expert_gate"].mode)
        assert.equal(mode, modules["layers.0.linear_attn.in_proj_a"].mode)
        assert.same({ bits == 4 and "compressed-tensors 0.20 cannot unpack the zero points of a "
          .. "4-bit matrix of at most 8 rows: 7 matrices are written in BF16" or nil },
          written.notes(p))
        local total = 0
        for _, t in pairs(written.tensors(out)) do total = total + #t.data end
        assert.equal(total, p.total_bytes)
      end)
    end
    written.quantized({ source = WRAPPED, recipe = narrow(4) }, function(out) -- MLX has no trouble
      assert.equal("affine", written.modules(out)["layers.0.mlp.shared_expert_gate"].mode)
    end)
  end)

  it("gives the same bytes on any number of threads, in any shards", function()
    local o = { source = WRAPPED, recipe = rules.every_format, format = "compressed-tensors",
      threads = 1 }
    written.quantized(o, function(out)
      local want = written.tensors(out)
      o.threads, o.shard_bytes = 4, 200000
      written.quantized(o, function(sharded)
        written.assert_same_tensors(want, written.tensors(sharded))
        local index = assert(json.read(sharded .. "/model.safetensors.index.json"))
        for name in pairs(want) do assert.truthy(index.weight_map[name], name) end
        assert.matches("model%-00001%-of%-0%d+%.safetensors",
          index.weight_map["model.language_model.embed_tokens.weight_packed"])
      end)
    end)
  end)
end)

describe("compressed-tensors output that was stopped", function()
  it("goes on to the same bytes, in the middle of experts and of fused scales", function()
    local function nvfp4(t) return t.matrix and { mode = "nvfp4" } or { keep = "bf16" } end
    local o = { source = WRAPPED, recipe = nvfp4, format = "compressed-tensors" }
    written.quantized(o, function(whole)
      local want = written.tensors(whole)
      for _, calls in ipairs { 2, 40, 77, 130 } do
        written.with_out(function(out)
          local given, n = { out = out, resume = true }, 0
          for k, v in pairs(o) do given[k] = v end
          given.on_progress = function()
            n = n + 1
            return n < calls
          end
          local p, _, code = quantize(given)
          assert.is_nil(p)
          assert.equal("cancelled", code)
          given.on_progress = nil
          assert(quantize(given))
          written.assert_same_tensors(want, written.tensors(out))
        end)
      end
    end)
  end)
end)

describe("quantization_config", function()
  -- What Python's re.match makes of our patterns, which use one construct that Lua lacks.
  local function matches(target, module)
    local pattern = target:match "^re:(.*)$"
    if not pattern then return target == module or target == "Linear" end
    local layers = pattern:match "layers\\.%(([%d|]+)%)"
    if layers then
      local head, layer, rest = module:match "^(.-)%.layers%.(%d+)%.(.*)$"
      if not head or head:find "mtp$" then return false end
      local listed = ("|" .. layers .. "|"):find("|" .. layer .. "|", 1, true)
      local path = pattern:match "[%d|]%)\\%.(.*)$"
      path = "^" .. path:gsub("\\d%+", "%%d+"):gsub("\\%.", "%%.")
      return listed ~= nil and rest:find(path) ~= nil
    end
    return module:find((pattern:gsub("^%.%*", ""))) ~= nil
  end

  for _, source in ipairs { WRAPPED, TEXT, TIED } do
    it("targets each quantized module once and ignores the others: " .. source, function()
      as_ct(source, rules.every_format, function(out)
        local q, t = config_of(out).quantization_config, written.tensors(out)
        assert.equal("mixed-precision", q.format)
        local ignored = {}
        for _, name in ipairs(q.ignore) do ignored[name] = true end
        for name in pairs(t) do
          local module, last = name:match "^(.*)%.([%w_]+)$"
          local hits = {}
          for _, group in pairs(q.config_groups) do
            for _, target in ipairs(group.targets) do
              if matches(target, module) then hits[#hits + 1] = group end
            end
          end
          local packed = last == "weight_packed"
            or last == "weight" and t[module .. ".weight_scale"]
          if packed then
            assert.equal(1, #hits, name)
            assert.is_nil(ignored[module], name)
            local w = hits[1].weights
            local bits = #t[name].data * 8 / #t[module .. ".weight_scale"].data
            assert.equal(w.scale_dtype == "torch.uint8" and "U8"
              or w.scale_dtype and "F8_E4M3" or "BF16", t[module .. ".weight_scale"].dtype)
            if w.type == "int" then
              assert.equal(w.num_bits * w.group_size / 2, bits)
              assert.is_false(w.symmetric)
            end
          elseif last == "weight" then
            assert.is_true(ignored[module], name)
            assert.equal(0, #hits, name)
          end
        end
      end)
    end)
  end

  it("says Linear where there is one format, as published files do", function()
    local function experts(t)
      return t.class:find "^expert_" and { mode = "mxfp4" } or { keep = "bf16" }
    end
    as_ct(WRAPPED, experts, function(out)
      local q = config_of(out).quantization_config
      assert.equal("compressed-tensors", q.quant_method)
      assert.equal("mxfp4-pack-quantized", q.format)
      assert.equal("compressed", q.quantization_status)
      assert.same({ "Linear" }, setmetatable(q.config_groups.group_0.targets, nil))
      local ignored = {}
      for _, name in ipairs(q.ignore) do ignored[name] = true end
      for _, name in ipairs { "lm_head", "model.language_model.embed_tokens",
          "model.language_model.layers.0.mlp.gate", "model.language_model.layers.0.input_layernorm",
          "model.visual.blocks.0.attn.qkv", "mtp.layers.0.mlp.experts.3.gate_proj" } do
        assert.is_true(ignored[name], name)
      end
      for name in pairs(ignored) do assert.is_nil(name:find "^model.*experts%.%d") end
    end)
    as_ct(TIED, function(t) return t.matrix and { mode = "mxfp8" } or { keep = "bf16" } end,
      function(out)
        local q = config_of(out).quantization_config
        assert.same({ "Linear", "re:.*embed_tokens$" },
          setmetatable(q.config_groups.group_0.targets, nil))
      end)
  end)
end)

describe("quantize to fp8", function()
  it("is refused where MLX files are written, naming the tensor", function()
    written.with_out(function(out)
      local p, message, code = quantize { source = TIED, out = out,
        recipe = rules.only { mode = "fp8" } }
      assert.is_nil(p)
      assert.matches("tensor model%.layers%.0%.linear_attn%.in_proj_qkv%.weight: MLX has no fp8",
        message)
      assert.equal("unsupported", code)
    end)
  end)
end)
