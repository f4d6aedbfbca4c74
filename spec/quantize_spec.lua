local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local json = require "moonlet.json"
local mlx = require "moonlet.mlx"
local quantize = require "moonlet.quantize"
local written = require "spec.support.written"

local with_out, quantized, read_all = written.with_out, written.quantized, written.tensors
local assert_same_tensors = written.assert_same_tensors

local MOE, DENSE = "spec/golden/mlx/moe4/", "spec/golden/mlx/dense4/"

-- The rules in spec.json beside the golden checkpoints, which stock mlx-lm converted by them.
local function moe_rules(t)
  if not t.matrix or t.class == "in_proj_a" or t.class == "in_proj_b" then
    return { keep = "bf16" }
  end
  if t.class == "router" or t.class == "shared_gate" then return { mode = "affine", bits = 8 } end
  if t.class == "expert_gate" or t.class == "expert_up"
    or t.class == "expert_down" and (t.layer == 0 or t.layer == 2) then
    return { mode = "mxfp4" }
  end
  local wide = { embed = true, lm_head = true, q_proj = true, k_proj = true, v_proj = true,
    o_proj = true }
  return { mode = "affine", bits = wide[t.class] and 8 or 4, group = 64 }
end

local function dense_rules(t)
  if t.part ~= "text" then return { drop = true } end
  if not t.matrix or t.class == "out_proj" then return { keep = "bf16" } end
  if t.class == "v_proj" then return { mode = "affine", bits = 8, group = 128 } end
  local bits = { embed = 6, down_proj = 5 }
  return { mode = "affine", bits = bits[t.class] or 4 }
end

-- A checkpoint of ours with the settings of every module spelled out, as stock loaders resolve it.
local function settings(dir)
  local config = assert(json.read(dir .. "/config.json"))
  local block = config.quantization
  assert.same(json.encode(block), json.encode(config.quantization_config))
  local out = {}
  for name in pairs(read_all(dir)) do
    local module = name:match("^(.*)%.scales$")
    if module then
      local s = block[module] or block
      out[module] = ("%s %d %d"):format(s.mode or "affine", s.bits, s.group_size)
    end
  end
  return out
end

-- The same matrix elements, whatever the checkpoint's spelling and order.
local function assert_same_values(want, got)
  want = assert(core.model_layout(want, { values = true }))
  got = assert(core.model_layout(got, { values = true }))
  local modules = {}
  for _, m in ipairs(got.modules) do modules[m.name] = m end
  for _, m in ipairs(want.modules) do
    if modules[m.name] or not m.name:find("^mtp") then
      assert.is_true(m.values == modules[m.name].values, m.name)
    end
  end
  return want, got
end

describe("quantize", function()
  describe("writes what stock mlx-lm writes", function()
    for dir, rules in pairs { [MOE] = moe_rules, [DENSE] = dense_rules } do
      it("from " .. dir, function()
        quantized({ source = dir .. "hf", recipe = rules, flavour = "cpu" }, function(out)
          assert_same_tensors(checkpoint.read(dir .. "mlx/model.safetensors"), read_all(out))
          assert.same(settings(dir .. "mlx"), settings(out))
          local index = assert(json.read(out .. "/model.safetensors.index.json"))
          local stock = assert(json.read(dir .. "mlx/model.safetensors.index.json"))
          assert.same(stock.metadata, index.metadata)
          assert.is_true(json.encode(stock.weight_map, { sort_keys = true })
            == json.encode(index.weight_map))
        end)
      end)
    end

    it("in Metal's rounding by default, within the same settings", function()
      quantized({ source = MOE .. "hf", recipe = moe_rules }, function(out)
        local ours, stock = read_all(out), checkpoint.read(MOE .. "mlx/model.safetensors")
        local same, other = 0, 0
        for name, t in pairs(stock) do
          assert.equal(#t.data, #ours[name].data)
          if t.data == ours[name].data then same = same + 1 else other = other + 1 end
        end
        assert.is_true(same > 0 and other > 0)
        assert.same(settings(MOE .. "mlx"), settings(out))
      end)
    end)
  end)

  it("gives the binder the same model", function()
    for _, dir in ipairs { "models/moe-wrapped", "models/moe-text", "models/dense-text",
        "models/dense-tied", "mlx/dense4" } do
      local source = "spec/golden/" .. dir .. "/hf"
      quantized({ source = source, recipe = "keep_bf16" }, function(out)
        local want, got = assert_same_values(source, out)
        assert.equal("mlx", got.family)
        assert.equal(want.n_parameters, got.n_parameters)
        assert.equal(want.n_ignored, got.n_ignored)
        assert.equal(want.mtp, got.mtp)
        assert.equal(want.tied, got.tied)
        assert.same(want.config, got.config)
        for name, v in pairs(want.vectors) do
          for i = 1, #v, 4 do
            local a, b = string.unpack("<f", v, i), string.unpack("<f", got.vectors[name], i)
            local shifted = name:find("norm") and not name:find("%.norm$")
            assert.is_true(a == b or (shifted or name == "norm") and math.abs(a - b) <= 2 ^ -8 * a,
              name)
          end
        end
        assert.is_nil((json.read(out .. "/config.json")).quantization)
      end)
    end
  end)

  it("does not care in which precision or order the source lies", function()
    local function variant(change)
      local dir = checkpoint.directory()
      local tensors = checkpoint.read(MOE .. "hf/model.safetensors")
      change(tensors)
      checkpoint.write(dir .. "/model.safetensors", tensors)
      checkpoint.spit(dir .. "/config.json", checkpoint.slurp(MOE .. "hf/config.json"))
      quantized({ source = dir, recipe = moe_rules, flavour = "cpu", threads = 3 }, function(out)
        assert_same_tensors(checkpoint.read(MOE .. "mlx/model.safetensors"), read_all(out))
      end)
      checkpoint.remove(dir)
    end
    variant(function(tensors) -- float32
      for _, t in pairs(tensors) do
        if t.dtype == "BF16" then
          t.dtype, t.data = "F32", t.data:gsub("..", "\0\0%0")
        end
      end
    end)
    variant(function(tensors) -- one tensor per expert
      for name, t in pairs(checkpoint.read(MOE .. "hf/model.safetensors")) do
        local head, kind = name:match("^(.*%.experts%.)(%l+_?%l*)_proj$")
        if head then
          tensors[name] = nil
          local E, rows, cols = table.unpack(t.shape)
          local bytes = rows * cols * 2
          for e = 0, E - 1 do
            local data = t.data:sub(e * bytes + 1, (e + 1) * bytes)
            local function add(projection, n, part)
              tensors[("%s%d.%s_proj.weight"):format(head, e, projection)] =
                { dtype = "BF16", shape = { n, cols }, data = part }
            end
            if kind == "down" then
              add("down", rows, data)
            else
              add("gate", rows // 2, data:sub(1, bytes // 2))
              add("up", rows // 2, data:sub(bytes // 2 + 1))
            end
          end
        end
      end
    end)
    variant(function(tensors) -- a text-only export's prefix
      for name, t in pairs(checkpoint.read(MOE .. "hf/model.safetensors")) do
        tensors[name] = nil
        tensors[(name:gsub("^model%.language_model%.", "model."))] = t
      end
    end)
  end)

  it("re-reads its own dense output", function()
    quantized({ source = MOE .. "hf", recipe = "keep_bf16" }, function(dense)
      quantized({ source = dense, recipe = moe_rules, flavour = "cpu" }, function(out)
        assert_same_tensors(checkpoint.read(MOE .. "mlx/model.safetensors"), read_all(out))
      end)
    end)
  end)

  it("gives the same bytes on any number of threads", function()
    local first
    for _, threads in ipairs { 1, 2, 5 } do
      quantized({ source = MOE .. "hf", recipe = "unsloth", bits = 3, threads = threads },
        function(out)
          local bytes = checkpoint.slurp(out .. "/model.safetensors")
          first = first or bytes
          assert.is_true(bytes == first)
        end)
    end
  end)

  it("fills shards in order and lists them", function()
    quantized({ source = MOE .. "hf", recipe = moe_rules, flavour = "cpu",
      shard_bytes = 100000 }, function(out)
      assert_same_tensors(checkpoint.read(MOE .. "mlx/model.safetensors"), read_all(out))
      local map = assert(json.read(out .. "/model.safetensors.index.json")).weight_map
      local n, sizes = 0, {}
      for name, file in pairs(map) do
        local t = checkpoint.read(out .. "/" .. file)[name]
        assert.truthy(t, name)
        sizes[file] = (sizes[file] or 0) + #t.data
        n = n + 1
      end
      local files = 0
      for name in pairs(core.list_dir(out)) do
        if name:find("^model%-%d+%-of%-%d+%.safetensors$") then files = files + 1 end
      end
      local listed = 0
      for file, size in pairs(sizes) do
        listed = listed + 1
        assert.is_true(size <= 100000, file)
        assert.matches(("of%%-%05d"):format(files), file)
      end
      assert.equal(files, listed)
      assert.is_true(files >= 5)
      assert.equal(n, #assert(core.st_open(out)):names())
    end)
  end)

  it("carries vision and MTP along, MTP where stock loaders do not look", function()
    local source = "spec/golden/models/moe-wrapped/hf"
    quantized({ source = source, recipe = "keep_bf16" }, function(out)
      local stored, got = read_all(source), read_all(out)
      local mtp = checkpoint.read(out .. "/mtp.safetensors")
      local seen = { mtp = 0, visual = 0 }
      for name, t in pairs(stored) do
        local kind = name:match("^(mtp)%.") or name:match("^model%.(visual)%.")
        if kind then
          seen[kind] = seen[kind] + 1
          local output = name:gsub("^model%.visual", "vision_tower")
          assert.same(t, kind == "mtp" and mtp[name] or got[output], name)
        end
      end
      assert.same({ mtp = 19, visual = 33 }, seen)
      local map = assert(json.read(out .. "/model.safetensors.index.json")).weight_map
      for name in pairs(mtp) do assert.is_nil(map[name]) end
    end)
    quantized({ source = source, recipe = "unsloth" }, function(out)
      assert.is_nil(core.list_dir(out)["mtp.safetensors"])
    end)
  end)

  it("copies the files beside the weights unchanged, and no others", function()
    local source = checkpoint.directory()
    os.execute(("cp %shf/* %s; mkdir %s/assets"):format(MOE, source, source))
    for _, name in ipairs { "LICENSE", "README.md", "merges.txt", "vocab.json",
        "preprocessor_config.json", "video_preprocessor_config.json", "eval.jsonl",
        ".hidden.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
        "hf_quant_config.json", "moonlet.json" } do
      checkpoint.spit(source .. "/" .. name, name .. "\n\0\n")
    end
    quantized({ source = source, recipe = "unsloth" }, function(out)
      local copied = { "LICENSE", "README.md", "merges.txt", "vocab.json",
        "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "generation_config.json" }
      local files = core.list_dir(out)
      for _, name in ipairs(copied) do
        assert.equal(checkpoint.slurp(source .. "/" .. name), checkpoint.slurp(out .. "/" .. name))
        files[name] = nil
      end
      assert.same({ ["config.json"] = true, ["model.safetensors"] = true,
        ["model.safetensors.index.json"] = true, ["moonlet.json"] = true }, files)
    end)
    os.execute("rm -r " .. source)
  end)

  it("spells out what stock loaders have other defaults for", function()
    local source = checkpoint.directory()
    checkpoint.spit(source .. "/model.safetensors",
      checkpoint.slurp "spec/golden/models/dense-text/hf/model.safetensors")
    local config = assert(json.read "spec/golden/models/dense-text/hf/config.json")
    config.rope_theta, config.rope_parameters = 12345.5, nil
    config.linear_conv_kernel_dim = nil
    checkpoint.spit(source .. "/config.json", json.encode(config))
    quantized({ source = source, recipe = "uniform" }, function(out)
      local c = assert(json.read(out .. "/config.json"))
      assert.equal("qwen3_5", c.model_type)
      assert.equal("qwen3_5_text", c.text_config.model_type)
      assert.same({ rope_type = "default", rope_theta = 12345.5, partial_rotary_factor = 0.25 },
        setmetatable(c.text_config.rope_parameters, nil))
      assert.equal(4, c.text_config.full_attention_interval)
      assert.equal(4, c.text_config.linear_conv_kernel_dim)
      assert.is_false(c.text_config.tie_word_embeddings)
      assert.same(core.model_config(json.encode(config)).inv_freq,
        core.model_config(json.encode(c)).inv_freq)
    end)
    checkpoint.remove(source)
  end)

  it("refuses layer patterns that stock loaders cannot express", function()
    local function text(...)
      return mlx.config({ config = json.object { text_config = json.object() },
        numbers = { wrapped = true, num_experts = 0, layer_types = { ... } },
        source = { tied = false } }, {})
    end
    local full, linear = "full_attention", "linear_attention"
    for interval, kinds in pairs { [4] = { linear, linear, linear, full },
        [2] = { linear, full, linear, full, linear }, [1] = { full, full },
        [3] = { linear, linear } } do
      local config = json.decode(text(table.unpack(kinds)))
      assert.equal(interval, config.text_config.full_attention_interval)
    end
    for _, kinds in ipairs { { full, linear, linear, full }, { linear, full, full },
        { linear, full, linear, linear } } do
      local got, message, code = text(table.unpack(kinds))
      assert.is_nil(got)
      assert.matches("no regular interval", message)
      assert.equal("unsupported", code)
    end
  end)

  it("writes the blocks of config.json so that every tensor that differs has its mode", function()
    quantized({ source = "examples/demo-model", recipe = "unsloth", bits = 4, mxfp = true },
      function(out, p)
        local block = assert(json.read(out .. "/config.json")).quantization
        local entries = 0
        for key, value in pairs(block) do
          if type(value) == "table" then
            entries = entries + 1
            assert.truthy(value.mode and value.bits and value.group_size, key)
          end
        end
        local modules, common = 0, 0
        for _, t in ipairs(p.tensors) do
          local d = t.decision
          if d.mode then
            modules = modules + 1
            if d.mode == block.mode and d.bits == block.bits and d.group == block.group_size then
              common = common + 1
            end
          end
        end
        assert.equal(modules - common, entries)
        local bytes = 0
        for _, t in pairs(read_all(out)) do bytes = bytes + #t.data end
        assert.equal(p.total_bytes, bytes)
      end)
  end)

  it("puts the widths that were asked for at the top of the block", function()
    local function top(o, wanted)
      o.source = MOE .. "hf"
      quantized(o, function(out)
        local b = assert(json.read(out .. "/config.json")).quantization
        assert.equal(wanted, ("%s %d %d"):format(b.mode, b.bits, b.group_size))
      end)
    end
    top({ recipe = "unsloth" }, "affine 3 64")
    top({ recipe = "unsloth", bits = 4, group = 32 }, "affine 4 32")
    top({ recipe = "unsloth", bits = 4, mxfp = true }, "affine 4 64")
    top({ recipe = "unsloth", mode = "nvfp4" }, "nvfp4 4 16")
    top({ recipe = "uniform", mode = "mxfp8" }, "mxfp8 8 32")
    -- a function asks for nothing: what most matrices have
    top({ recipe = function(t)
      if not t.matrix then return { keep = "bf16" } end
      return { mode = "affine", bits = t.class == "embed" and 8 or 5, group = 32 }
    end }, "affine 5 32")
  end)

  describe("leaves nothing behind", function()
    local function refused(o, pattern, code_wanted)
      with_out(function(out, dir)
        o.out = o.out or out
        local p, message, code = quantize(o)
        assert.is_nil(p)
        assert.matches(pattern, message)
        assert.equal(code_wanted, code)
        assert.same({}, core.list_dir(dir))
        o.out = nil
      end)
    end

    -- The demo-sized checkpoint with one weight replaced by the bytes of a NaN.
    local function with_nan(name, at, fn)
      local dir = checkpoint.directory()
      local tensors = checkpoint.read(MOE .. "hf/model.safetensors")
      local t = tensors[name]
      t.data = t.data:sub(1, at) .. "\xc0\x7f" .. t.data:sub(at + 3)
      checkpoint.write(dir .. "/model.safetensors", tensors)
      checkpoint.spit(dir .. "/config.json", checkpoint.slurp(MOE .. "hf/config.json"))
      fn(dir)
      checkpoint.remove(dir)
    end

    it("when a weight is not a number", function()
      local head = "model.language_model.layers.2."
      local cases = {
        [head .. "mlp.experts.gate_up_proj"] = "gate_up_proj row 130 column 3",
        [head .. "linear_attn.in_proj_a.weight"] = "in_proj_a.weight row 2 column 3",
        [head .. "input_layernorm.weight"] = "input_layernorm.weight row 0 column 19",
        [head .. "linear_attn.conv1d.weight"] = "conv1d.weight row 5 column 1",
      }
      local at = { [head .. "mlp.experts.gate_up_proj"] = 2 * (130 * 128 + 3),
        [head .. "linear_attn.in_proj_a.weight"] = 2 * (2 * 128 + 3),
        [head .. "input_layernorm.weight"] = 2 * 19,
        [head .. "linear_attn.conv1d.weight"] = 2 * (5 * 4 + 1) }
      for name, text in pairs(cases) do
        with_nan(name, at[name], function(dir)
          for _, threads in ipairs { 1, 4 } do
            refused({ source = dir, recipe = moe_rules, threads = threads },
              "tensor " .. head:gsub("%.", "%%.") .. ".*" .. text .. ": %-?nan", "format")
          end
        end)
      end
    end)

    it("when a weight has no place in the format", function()
      local dir = checkpoint.directory()
      local tensors = checkpoint.read(MOE .. "hf/model.safetensors")
      local t = tensors["lm_head.weight"]
      t.dtype, t.data = "F32", t.data:gsub("..", "\0\0%0")
      local at = 4 * 128 * 7
      t.data = t.data:sub(1, at) .. string.pack("<f", 3.4e38) .. t.data:sub(at + 5)
      checkpoint.write(dir .. "/model.safetensors", tensors)
      checkpoint.spit(dir .. "/config.json", checkpoint.slurp(MOE .. "hf/config.json"))
      for _, recipe in ipairs { "uniform", "keep_bf16" } do
        refused({ source = dir, recipe = recipe }, "lm_head%.weight row 7 column 0: 3%.4e%+38",
          "format")
      end
      checkpoint.remove(dir)
    end)

    it("when the callback stops or raises before a tensor is complete", function()
      refused({ source = MOE .. "hf", recipe = "unsloth", on_progress = function()
        return false
      end }, "stopped", "cancelled")
      with_out(function(out, dir)
        assert.error_matches(function()
          quantize { source = MOE .. "hf", out = out, recipe = "unsloth",
            on_progress = function() error("no more") end }
        end, "no more")
        assert.same({}, core.list_dir(dir))
      end)
    end)

    -- Quantizes the demo model in a process of its own, which prints what came of it.
    local function elsewhere(shell, callback, pattern)
      with_out(function(_, dir)
        local script = dir .. "/run.lua"
        checkpoint.spit(script, ([[
          package.path, package.cpath = %q, %q
          require("moonlet.core").catch_interrupt()
          print(require("moonlet.quantize") { source = "examples/demo-model", out = %q,
            recipe = "unsloth", on_progress = function(done) %s end })]]):format(
          package.path, package.cpath, dir .. "/out", callback))
        local p = assert(io.popen(("bash -c %q 2>&1"):format(shell .. " lua5.4 " .. script)))
        assert.matches(pattern, p:read("a"))
        p:close()
        os.remove(script)
        assert.same({}, core.list_dir(dir))
      end)
    end

    it("when there is no room for it", function()
      local free_bytes = core.free_bytes
      core.free_bytes = function(path) return math.min(assert(free_bytes(path)), 500000) end
      finally(function() core.free_bytes = free_bytes end)
      refused({ source = MOE .. "hf", recipe = "unsloth", bits = 4 },
        "/out: needs 546%.64 KiB, 488%.28 KiB are free", "io")
    end)

    it("when files may not grow", function()
      elsewhere("trap '' XFSZ; ulimit -f 1000; exec", "", "^nil\t.*model%.safetensors.*\tio\n")
    end)

    it("when the place is taken or wrong", function()
      refused({ source = MOE .. "hf", recipe = "unsloth", out = MOE .. "hf" },
        "exists and is not empty", "io")
      refused({ source = MOE .. "hf", recipe = "unsloth", out = MOE .. "hf/new" },
        "lies in the source", "io")
      refused({ source = MOE .. "hf", recipe = "unsloth", out = MOE .. "hf/../hf/new/" },
        "lies in the source", "io")
      refused({ source = MOE .. "hf", recipe = "unsloth", out = "/no/such/parent/out" },
        "/no/such/parent", "io")
      refused({ source = MOE .. "hf", recipe = "unsloth", out = "LICENSE" }, "LICENSE", "io")
      local journal <close> = checkpoint.scope()
      checkpoint.spit(journal.path .. "/journal", "")
      refused({ source = MOE .. "hf", recipe = "unsloth", out = journal.path, resume = true },
        "exists and is not empty", "io")
      assert.equal("", checkpoint.slurp(journal.path .. "/journal"))
    end)

    it("when the place is a link, which no directory can be renamed onto", function()
      local links <close> = checkpoint.scope()
      os.execute(("cd %s && mkdir d && ln -s d to-d && ln -s none to-none"):format(links.path))
      for _, name in ipairs { "to-d", "to-none", "to-d/" } do
        refused({ source = MOE .. "hf", recipe = "unsloth", out = links.path .. "/" .. name },
          "is a link; name a new directory", "io")
      end
    end)

    it("when the source cannot be quantized or the recipe fails", function()
      refused({ source = MOE .. "hf", recipe = "no_such" }, "no recipe named no_such", "io")
      refused({ source = MOE .. "hf", recipe = "unsloth", bits = 7 }, "bits must be", "format")
      local function everything() return { mode = "affine", bits = 4 } end
      refused({ source = MOE .. "hf", recipe = everything }, "only matrices", "range")
    end)
  end)

  it("reports progress in bytes of the weights as BF16", function()
    local calls, last, whole = 0, -1, nil
    quantized({ source = MOE .. "hf", recipe = "unsloth", on_progress = function(done, total, name)
      calls = calls + 1
      assert.is_true(done > last and done <= total)
      assert.truthy(calls == 1 and name == "" or name:find("^language_model%."))
      last, whole = done, total
    end }, function(_, p)
      local elements = 0
      for _, class in pairs(p.classes) do elements = elements + class.parameters end
      assert.equal(2 * elements, whole)
      assert.equal(whole, last)
      assert.equal(#p.tensors + 1, calls)
    end)
  end)

  it("chooses scales as the decision, the run or the recipe say", function()
    local function sums(o)
      local found = {}
      o.source = MOE .. "hf"
      quantized(o, function(out)
        for name, t in pairs(read_all(out)) do found[name] = core.sha256(t.data) end
        found.settings = assert(json.read(out .. "/moonlet.json")).settings.fit
      end)
      return found
    end
    local function rules(fits, defaults)
      local path = os.tmpname() .. ".lua"
      checkpoint.spit(path, ([[return function() return function(t)
        if not t.matrix then return { keep = "bf16" } end
        local fits, mode = { %s }, t.class == "lm_head" and "affine" or "mxfp4"
        return { mode = mode, bits = 4, fit = fits[t.class] }
      end, nil, { fit = %q } end]]):format(fits, defaults))
      finally(function() os.remove(path) end)
      return path
    end
    local Q, K = "language_model.model.layers.3.self_attn.q_proj.weight",
      "language_model.model.layers.3.self_attn.k_proj.weight"
    local HEAD = "language_model.lm_head.weight"
    local minmax, mse = sums { recipe = rules("", "minmax") }, sums { recipe = rules("", "mse") }
    assert.not_equal(minmax[Q], mse[Q])
    assert.not_equal(minmax[HEAD], mse[HEAD])
    assert.same(mse, sums { recipe = rules("", "mse") })

    local mixed = sums { recipe = rules("q_proj = 'minmax'", "minmax"), fit = "mse" }
    assert.equal(minmax[Q], mixed[Q])
    assert.equal(mse[K], mixed[K])
    assert.equal(mse[HEAD], mixed[HEAD])
    assert.equal("mse", mixed.settings)
    local best = sums { recipe = rules("", "minmax"), fit = "best" }
    assert.equal(mse[Q], best[Q])
    local qstream = sums { recipe = rules("", "mse"), fit = "qstream" }
    assert.not_equal(mse[Q], qstream[Q])
    assert.not_equal(minmax[Q], qstream[Q])
    assert.equal(minmax[HEAD], qstream[HEAD])

    local p, message, code = quantize { source = MOE .. "hf", out = "/tmp/never",
      recipe = rules("q_proj = 'imatrix'", "mse") }
    assert.is_nil(p)
    assert.matches("layers%.3%.self_attn%.q_proj%.weight: fit imatrix needs an imatrix", message)
    assert.equal("range", code)
  end)

  it("says when a choice of scales concerns no matrix", function()
    local function notes(o)
      o.source, o.fit = MOE .. "hf", "qstream"
      local scope <close> = checkpoint.scope()
      o.out = scope.path .. "/out"
      return { table.unpack(assert(quantize(o)).notes) }
    end
    assert.same({ "fit qstream changes nothing: no matrix is encoded in mxfp4" },
      notes { recipe = "uniform" })
    assert.same({}, notes { recipe = "unsloth", bits = 4, mxfp = true })
  end)

  it("says that a source without a tokenizer gives a checkpoint without one", function()
    for _, source in ipairs { "examples/demo-model", "spec/golden/models/moe-text/hf" } do
      written.quantized({ source = source, recipe = "uniform" }, function(out, p)
        local files = assert(core.list_dir(out))
        assert.equal(files["tokenizer.json"] == nil,
          p.notes[1] == "the source has no tokenizer, and neither will the checkpoint")
      end)
    end
  end)

  it("checks everything and writes nothing in a dry run", function()
    local o = { source = MOE .. "hf", recipe = "unsloth", bits = 4 }
    local plan_written
    written.quantized(o, function(_, p) plan_written = p end)
    written.with_out(function(out, dir)
      o.out, o.dry_run = out, true
      o.on_progress = function() error("no work is done") end
      local p = assert(quantize(o))
      assert.same({}, core.list_dir(dir))
      local dry = p.dry_run
      p.dry_run = nil
      assert.same(plan_written, p)
      assert.is_true(dry.seconds > 0 and dry.seconds < 5)
      assert.is_true(dry.needed_bytes > p.total_bytes and dry.free_bytes > dry.needed_bytes)

      local free_bytes = core.free_bytes
      core.free_bytes = function() return 1000 end
      local ok, message = quantize(o)
      core.free_bytes = free_bytes
      assert.is_nil(ok)
      assert.matches("1000 B are free", message)
      local check_writable = core.check_writable
      core.check_writable = function(place) return check_writable(place .. "/nosuch") end
      ok, message = quantize(o)
      core.check_writable = check_writable
      assert.is_nil(ok)
      assert.matches("/nosuch: cannot write in: No such file", message)
      o.out = MOE .. "hf"
      ok, message = quantize(o)
      assert.is_nil(ok)
      assert.matches("exists and is not empty", message)
    end)
  end)

  it("says what it made of what in moonlet.json", function()
    local function facts(o)
      o.source = o.source or MOE .. "hf"
      local got
      quantized(o, function(out) got = assert(json.read(out .. "/moonlet.json")) end)
      return got
    end
    local text = checkpoint.slurp "recipes/unsloth.lua"
    local a = facts { recipe = "unsloth", bits = 4, command = "moonlet quantize a b" }
    assert.equal(require("moonlet")._VERSION, a.moonlet)
    assert.equal("moonlet quantize a b", a.command)
    assert.matches("^%d%d%d%d%-%d%d%-%d%dT%d%d:%d%d:%d%dZ$", a.date)
    assert.equal("hf", a.source.name)
    assert.equal("unsloth", a.recipe.name)
    assert.equal(4, a.recipe.options.bits)
    assert.equal(text, a.recipe.text)
    assert.equal("metal", a.settings.flavour)
    assert.equal("mlx", a.settings.format)
    assert.is_true(a.result.bits_per_weight > 4)

    -- The hash is of the tensors' names and sizes, wherever the files are.
    local copy = checkpoint.directory()
    local _ <close> = setmetatable({}, { __close = function() checkpoint.remove(copy) end })
    os.execute(("cp -r %shf %s/again; touch -d 2001-01-01 %s/again/*"):format(MOE, copy, copy))
    local b = facts { source = copy .. "/again/", recipe = function()
      return { keep = "bf16" }
    end }
    assert.equal(a.source.sha256, b.source.sha256)
    assert.equal("again", b.source.name)
    assert.is_nil(b.recipe.text)
    assert.equal("function", b.recipe.name)
    assert.not_equal(a.source.sha256,
      facts { source = "spec/golden/models/moe-text/hf", recipe = "uniform" }.source.sha256)
  end)

  it("keeps what a source says of its own making", function()
    quantized({ source = MOE .. "hf", recipe = "keep_bf16", command = "first" }, function(dense)
      quantized({ source = dense, recipe = "unsloth", command = "second" }, function(out)
        local facts = assert(json.read(out .. "/moonlet.json"))
        assert.equal("second", facts.command)
        assert.equal("first", facts.source.made_by.command)
      end)
    end)
  end)

  it("fills an empty directory that is there", function()
    with_out(function(out)
      assert(core.make_dir(out))
      assert(quantize { source = MOE .. "hf", recipe = "unsloth", out = out .. "/" })
      assert.is_true(core.list_dir(out)["config.json"])
    end)
  end)

  -- A source of 2 GB that takes no room on disk: zeros are a hole in the file.
  local function write_sparse(dir)
    local config = assert(json.read "spec/golden/models/dense-text/hf/config.json")
    config.vocab_size = 4000000
    local header, at = {}, 0
    for name, t in pairs(checkpoint.read "spec/golden/models/dense-text/hf/model.safetensors") do
      if t.shape[1] == 256 and (name == "lm_head.weight" or name:find("embed")) then
        t.shape[1] = config.vocab_size
      end
      local bytes = 2
      for _, d in ipairs(t.shape) do bytes = bytes * d end
      header[#header + 1] = ('"%s": {"dtype": "BF16", "shape": [%s], "data_offsets": [%d, %d]}')
        :format(name, table.concat(t.shape, ","), at, at + bytes)
      at = at + bytes
    end
    local text = "{" .. table.concat(header, ",") .. "}"
    checkpoint.spit(dir .. "/model.safetensors", string.pack("<I8", #text) .. text)
    assert(os.execute(("truncate -s %d %s/model.safetensors"):format(8 + #text + at, dir)))
    checkpoint.spit(dir .. "/config.json", json.encode(config))
  end

  it("needs little memory, however large a tensor is #slow", function()
    local source = checkpoint.directory()
    write_sparse(source)
    with_out(function(out, dir)
      checkpoint.spit(dir .. "/run.lua", ([[
        package.path, package.cpath = %q, %q
        assert(require("moonlet.quantize") { source = %q, out = %q, recipe = "unsloth", bits = 2,
          threads = 4 })
        print(io.open("/proc/self/status"):read("a"):match("VmHWM:%%s*(%%d+) kB"))]]):format(
        package.path, package.cpath, source, out))
      local p = assert(io.popen("lua5.4 " .. dir .. "/run.lua"))
      local peak = p:read("n")
      p:close()
      assert.is_true(peak < 200 * 1024, ("peak %s KiB"):format(peak))
    end)
    checkpoint.remove(source)
  end)

  it("raises on misuse", function()
    local function misuse(o, pattern)
      assert.error_matches(function() quantize(o) end, pattern)
    end
    misuse({ source = MOE .. "hf", out = "x" }, "'recipe' is missing")
    misuse({ source = MOE .. "hf", out = "x", recipe = "unsloth", bit = 4 }, "unknown option 'bit'")
    misuse({ source = 4, out = "x", recipe = "unsloth" }, "'source': string expected")
    misuse({ source = MOE .. "hf", out = "x", recipe = "unsloth", flavour = "gpu" },
      "metal or cpu expected, got 'gpu'")
    misuse({ source = MOE .. "hf", out = "x", recipe = "unsloth", fit = "best-ever" },
      "minmax or mse or imatrix or qstream or best expected, got 'best%-ever'")
    misuse({ source = MOE .. "hf", out = "x", recipe = "unsloth", format = "gguf" },
      "mlx or compressed%-tensors or bf16 expected, got 'gguf'")
    misuse({ source = MOE .. "hf", out = "x", recipe = "unsloth", threads = -1 }, "positive")
  end)
end)
