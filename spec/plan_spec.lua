local budget = require "moonlet.eval.budget"
local checkpoint = require "spec.support.checkpoint"
local json = require "moonlet.json"
local plan = require "moonlet.plan"
local plans = require "spec.support.plans"

local DENSE = "spec/golden/configs/qwen3.6-27b.json"
local MOE = "spec/golden/configs/qwen3.6-35b-a3b.json"

-- mlx-node's `unsloth` recipe at commit 434bfbf, class by class, for N = 2 3 4 5 6 8; numbers are
-- affine bits in groups of 64. Written down from its source before this recipe was.
local WIDTHS = { 2, 3, 4, 5, 6, 8 }
local GATE_UP = { "2", "3", "4", "5", "6", "8" }
local DOWN = { "3", "4", "5", "6", "8", "8" }
local INPUTS = { "4", "5", "6", "8", "8", "8" }
local AFFINE = {
  gate_proj = GATE_UP, up_proj = GATE_UP, down_proj = DOWN,
  expert_gate = GATE_UP, expert_up = GATE_UP, expert_down = DOWN,
  shared_gate_proj = GATE_UP, shared_up_proj = GATE_UP, shared_down_proj = DOWN,
  q_proj = INPUTS, k_proj = INPUTS, v_proj = INPUTS, in_proj_qkv = INPUTS, in_proj_z = INPUTS,
  embed = INPUTS, lm_head = { "5", "6", "8", "8", "8", "8" },
}
-- The same with --q-mxfp.
local MX_GATE_UP = { "2", "3", "mxfp4", "5", "6", "mxfp8" }
local MX_DOWN = { "3", "mxfp4", "5", "6", "mxfp8", "mxfp8" }
local MX_INPUTS = { "mxfp4", "5", "6", "mxfp8", "mxfp8", "mxfp8" }
local MXFP = {
  gate_proj = MX_GATE_UP, up_proj = MX_GATE_UP, down_proj = MX_DOWN,
  expert_gate = MX_GATE_UP, expert_up = MX_GATE_UP, expert_down = MX_DOWN,
  shared_gate_proj = MX_GATE_UP, shared_up_proj = MX_GATE_UP, shared_down_proj = MX_DOWN,
  q_proj = MX_INPUTS, k_proj = MX_INPUTS, v_proj = MX_INPUTS,
  in_proj_qkv = MX_INPUTS, in_proj_z = MX_INPUTS,
  embed = AFFINE.embed, lm_head = AFFINE.lm_head,
}
-- And with --q-mode nvfp4.
local NVFP4 = { gate_proj = "nvfp4", up_proj = "nvfp4", down_proj = "5",
  expert_gate = "nvfp4", expert_up = "nvfp4", expert_down = "5",
  shared_gate_proj = "nvfp4", shared_up_proj = "nvfp4", shared_down_proj = "5",
  q_proj = "6", k_proj = "6", v_proj = "6", in_proj_qkv = "6", in_proj_z = "6",
  embed = "6", lm_head = "8" }

local FLOATS = { mxfp4 = { mode = "mxfp4", bits = 4, group = 32 },
  mxfp8 = { mode = "mxfp8", bits = 8, group = 32 },
  nvfp4 = { mode = "nvfp4", bits = 4, group = 16 } }

local function expected(class, cell)
  if class == "router" or class == "shared_gate" then
    return { mode = "affine", bits = 8, group = 64 }
  end
  if class == "mtp" then return { drop = true } end
  if not cell then return { keep = "bf16" } end
  return FLOATS[cell] or { mode = "affine", bits = math.tointeger(cell), group = 64 }
end

-- Every tensor of the plan against a column of the tables above.
local function check_column(config, options, column)
  for _, t in ipairs(assert(plan("unsloth", config, options)).tensors) do
    local want = expected(t.class, column(t.class))
    if t.name:find("A_log$") then want = { keep = "f32" } end
    assert.same(want, t.decision, t.name)
  end
end

-- The options of a recipe that bring it to options.target.
local function sized(name, config, options)
  local target = options.target
  options.target = nil
  return (assert(budget.options { recipe = name, source = config, target = target,
    recipe_options = options }))
end

describe("plan", function()
  it("follows the table of the published unsloth conversions", function()
    for _, config in ipairs { DENSE, MOE } do
      for i, bits in ipairs(WIDTHS) do
        check_column(config, { bits = bits }, function(c) return AFFINE[c] and AFFINE[c][i] end)
        check_column(config, { bits = bits, mxfp = true },
          function(c) return MXFP[c] and MXFP[c][i] end)
      end
      check_column(config, { mode = "nvfp4" }, function(c) return NVFP4[c] end)
    end
    assert.same(plan("unsloth", MOE).tensors, plan("unsloth", MOE, { bits = 3 }).tensors)
  end)

  -- GiB of text stack and BF16 vision tower, without MTP, summed from the tables by hand; cards
  -- of the published files print these numbers rounded up.
  it("predicts the sizes of the published conversions", function()
    local sizes = {
      [DENSE] = { 14.50, 17.39, 20.44, 23.94, 26.59, 29.25, mxfp4 = 20.10, nvfp4 = 20.44,
        mxfp8 = 28.60, bf16 = 50.95 },
      [MOE] = { 13.24, 17.23, 21.28, 25.38, 30.40, 35.42, mxfp4 = 20.65, nvfp4 = 21.28,
        mxfp8 = 34.46, bf16 = 65.39 },
    }
    local function near(want, recipe, config, options)
      local p = assert(plan(recipe, config, options))
      local gib = (p.part_bytes.text + p.part_bytes.vision) / 2 ^ 30
      assert.is_true(math.abs(gib - want) <= 0.02, ("%s: %.3f, not %.2f"):format(config, gib, want))
      if recipe == "unsloth" then
        assert.equal(p.part_bytes.text + p.part_bytes.vision, p.total_bytes)
      end
    end
    for config, row in pairs(sizes) do
      for i, bits in ipairs(WIDTHS) do near(row[i], "unsloth", config, { bits = bits }) end
      near(row.mxfp4, "unsloth", config, { bits = 4, mxfp = true })
      near(row.mxfp8, "unsloth", config, { bits = 8, mxfp = true })
      near(row.nvfp4, "unsloth", config, { mode = "nvfp4" })
      near(row.bf16, "keep_bf16", config)
    end
    near(18.96, "unsloth_card_mxfp4", MOE)
  end)

  it("counts parameters as the published models do", function()
    local p = assert(plan("keep_bf16", MOE))
    assert.equal(34660610688, p.parameters)
    assert.equal(446571248, p.classes.vision.parameters)
    assert.equal(1, p.classes.embed.tensors)
    p = assert(plan("keep_bf16", DENSE))
    assert.equal(26895998464, p.parameters)
    assert.equal(460730096, p.classes.vision.parameters)
    -- A_log is kept in 32 bits, everything else in 16.
    assert.equal(26895998464 * 2 + 48 * 48 * 2, p.part_bytes.text)
  end)

  it("overrides as many tensors as the published 35B NVFP4 conversion does", function()
    local n = 0
    for _, t in ipairs(assert(plan("unsloth", MOE, { mode = "nvfp4" })).tensors) do
      local d = t.decision
      if d.mode and not (d.mode == "nvfp4" and d.bits == 4 and d.group == 16) then n = n + 1 end
    end
    assert.equal(252, n)
  end)

  it("sums up rows, classes and bits of what is written", function()
    local p = assert(plan("unsloth", MOE, { bits = 4, mxfp = true }))
    local total, text, parameters, by_class = 0, 0, 0, {}
    for _, t in ipairs(p.tensors) do
      total = total + t.bytes
      by_class[t.class] = (by_class[t.class] or 0) + t.bytes
      if t.class ~= "vision" and t.class ~= "mtp" then
        local n = 1
        for _, d in ipairs(t.shape) do n = n * d end
        text, parameters = text + t.bytes, parameters + n
      end
    end
    assert.equal(total, p.total_bytes)
    assert.equal(parameters, p.parameters)
    assert.near(text * 8 / parameters, p.bits_per_weight, 1e-12)
    for class, bytes in pairs(by_class) do assert.equal(bytes, p.classes[class].bytes) end
    assert.near(4.25, p.classes.expert_gate.bits_per_weight, 1e-12)
    assert.near(5.5, p.classes.expert_down.bits_per_weight, 1e-12)
    assert.near(8.5, p.classes.router.bits_per_weight, 1e-12)
    assert.equal(0, p.classes.mtp.bytes)
  end)

  for _, model in ipairs { "qwen3.6-27b", "qwen3.6-35b-a3b" } do
    it("decides as the tools that recipes are named after do: " .. model, function()
      local n, text = 0, checkpoint.slurp(("spec/golden/plan/%s.txt"):format(model))
      for heading, section in (text .. "\n"):gmatch("## ([^\n]*)\n(.-\n)\n") do
        local name, options = plans.options(heading)
        local config = ("spec/golden/configs/%s.json"):format(model)
        if options.target then options = sized(name, config, options) end
        local p = assert(plan(name, config, options))
        assert.equal(section, plans.text(p), heading)
        n = n + 1
      end
      assert.is_true(n > 40)
    end)
  end

  -- TurboQuant's converter, per class: bytes / 10^6 in the boundary layers and in the others.
  it("gives Config-I its published size, class by class", function()
    local published = { experts_in = { 2281.7, 6039.8 }, expert_down = { 1140.9, 4227.9 },
      router = 41.9, shared_in = { 8.9, 23.6 }, shared_down_proj = { 4.5, 16.5 },
      shared_gate = 0.05, delta_in = { 80.2, 382.2 }, out_proj = { 26.7, 127.4 },
      delta_small = { 0.4, 2.0 }, attention = { 29.0, 138.0 }, embed = 540.3, lm_head = 540.3 }
    local names = { expert_gate = "experts_in", expert_up = "experts_in",
      shared_gate_proj = "shared_in", shared_up_proj = "shared_in", in_proj_qkv = "delta_in",
      in_proj_z = "delta_in", in_proj_a = "delta_small", in_proj_b = "delta_small",
      q_proj = "attention", k_proj = "attention", v_proj = "attention", o_proj = "attention" }
    local p = assert(plan("config_i", MOE))
    assert.equal("3.6132", ("%.4f"):format(p.bits_per_weight))
    assert.equal(15655, math.floor(p.total_bytes / 1e6 + 0.5))
    local sums = {}
    for _, t in ipairs(p.tensors) do
      local name, layer = names[t.class] or t.class, tonumber(t.name:match("layers%.(%d+)"))
      sums[name] = sums[name] or { 0, 0 }
      local i = layer and (layer < 2 or layer >= 38) and 1 or 2
      sums[name][i] = sums[name][i] + t.bytes / 1e6
    end
    for name, want in pairs(published) do
      local got = sums[name]
      if type(want) == "number" then got, want = { got[1] + got[2] }, { want } end
      for i in ipairs(want) do assert.near(want[i], got[i], 0.051, name .. i) end
    end
  end)

  it("counts as many matrices in the fixed maps as the tool reports", function()
    for config, want in pairs { [MOE] = { 192, 179 }, [DENSE] = { 168, 233 } } do
      for mode, high in pairs { mxfp4 = "mxfp8", nvfp4 = "fp8" } do
        local n = {}
        for _, t in ipairs(assert(plan("unsloth_fixed", config, { mode = mode })).tensors) do
          local m = t.decision.mode or "dense"
          n[m] = (n[m] or 0) + 1
        end
        assert.same({ want[1], want[2], nil }, { n[mode], n[high], n.affine })
      end
    end
  end)

  it("prints and encodes", function()
    local p = assert(plan("unsloth", MOE, { bits = 4 }))
    local text = p:text()
    assert.matches("expert_down +40 +10737418240 +6%.88 GiB +5%.50  affine 5 g64\n", text)
    assert.matches("decay .* bf16 x 30, f32 x 30\n", text)
    assert.matches("unsloth: 21%.29 GiB, text stack 34660610688 parameters at 5%.069 bits", text)
    local read = assert(json.decode(json.encode(p)))
    assert.equal(p.total_bytes, read.total_bytes)
    assert.equal("unsloth", read.recipe)
    assert.same({ mode = "affine", bits = 6, group = 64 }, read.tensors[1].decision)
  end)

  describe("of a directory", function()
    it("lists what the files hold, with the same decisions as config.json alone", function()
      for _, dir in ipairs { "mlx/moe4/hf", "models/moe-wrapped/hf", "models/moe-text/hf",
          "models/dense-text/hf", "models/dense-tied/hf" } do
        local path = "spec/golden/" .. dir
        local from_files = assert(plan("unsloth", path, { bits = 4 }))
        local from_config = assert(plan("unsloth", path .. "/config.json", { bits = 4 }))
        assert.equal(from_config.parameters, from_files.parameters)
        local rows = {}
        for _, t in ipairs(from_config.tensors) do rows[t.name] = t end
        for _, t in ipairs(from_files.tensors) do
          local same = rows[t.name]
          assert.same(same and same.shape, t.shape, t.name)
          if not t.name:find("A_log$") then assert.same(same.decision, t.decision, t.name) end
          rows[t.name] = nil
        end
        assert.is_nil((next(rows)))
      end
    end)

    local function broken(change, pattern, code_wanted, recipe)
      local dir = checkpoint.directory()
      local tensors = checkpoint.read("spec/golden/mlx/moe4/hf/model.safetensors")
      local config = assert(json.read("spec/golden/mlx/moe4/hf/config.json"))
      change(tensors, config)
      checkpoint.write(dir .. "/model.safetensors", tensors)
      checkpoint.spit(dir .. "/config.json", json.encode(config))
      local p, message, code = plan(recipe or "unsloth", dir)
      checkpoint.remove(dir)
      if not pattern then return assert(p, message) end
      assert.is_nil(p)
      assert.matches(pattern, message)
      assert.matches(dir, message, 1, true)
      assert.equal(code_wanted, code)
    end
    local PREFIX = "model.language_model.layers.1."

    it("names what is missing, left over or of another shape", function()
      broken(function(t) t[PREFIX .. "mlp.gate.weight"] = nil end,
        "layers%.1%.mlp%.gate%.weight is missing", "format")
      broken(function(t) t[PREFIX .. "mlp.experts.down_proj"] = nil end,
        "layers%.1%.mlp%.experts%.down_proj%.weight is missing", "format")
      broken(function(t) t[PREFIX .. "mlp.gate.bias"] = t[PREFIX .. "linear_attn.dt_bias"] end,
        "layers%.1%.mlp%.gate%.bias is none that the model has", "format")
      broken(function(t) t[PREFIX .. "mlp.gate.weight"].shape = { 8, 64 } end,
        "mlp%.gate%.weight has shape %[8, 64%]; config%.json asks for %[4, 128%]", "format")
      broken(function(t) t["model.norm.weight"] = t["model.language_model.norm.weight"] end,
        "are the same tensor", "format")
      broken(function(t)
        local conv = t[PREFIX .. "linear_attn.conv1d.weight"]
        conv.shape = { conv.shape[1], conv.shape[3], 1 }
      end, "layers%.1%.linear_attn%.conv1d%.weight lies otherwise", "format")
    end)

    it("names what a quantized checkpoint has wrong", function()
      broken(function(_, config)
        config.quantization_config = json.object { quant_method = "gguf" }
      end, 'quant_method "gguf"', "unsupported")
      broken(function(t)
        t[PREFIX .. "mlp.gate.scales"] = t[PREFIX .. "linear_attn.dt_bias"]
      end, "mlp%.gate", "format")
      broken(function(t) t[PREFIX .. "linear_attn.dt_bias"].dtype = "I16" end,
        "dt_bias is I16: only BF16, F16 and F32", "unsupported")
    end)

    it("lets what is packed beside the text stack be dropped, not carried along", function()
      local function packed(t)
        t["mtp.fc.weight"] = { dtype = "U32", shape = { 2, 4 }, data = ("\0"):rep(32) }
      end
      broken(packed, "mtp%.fc%.weight %(U32 %[2, 4%]%) cannot be carried along", "unsupported",
        "keep_bf16")
      broken(function(t)
        t["mtp.fc.weight"] = { dtype = "BF16", shape = { 0, 4 }, data = "" }
      end, "mtp%.fc%.weight %(BF16 %[0, 4%]%) is empty", "unsupported")
      broken(packed, nil)
    end)

    it("reports config files that cannot be read", function()
      local p, message, code = plan("unsloth", "/no/such/dir")
      assert.is_nil(p)
      assert.matches("/no/such/dir/config.json", message, 1, true)
      assert.equal("io", code)
      local dir = checkpoint.directory()
      for text, pattern in pairs { ["[1]"] = "an object is expected", ["{"] = "config.json",
          ['{"model_type": "llama"}'] = "llama", } do
        checkpoint.spit(dir .. "/config.json", text)
        p, message = plan("unsloth", dir .. "/config.json")
        assert.is_nil(p)
        assert.matches(pattern, message)
        assert.matches(dir, message, 1, true)
      end
      checkpoint.remove(dir)
    end)
  end)

  it("raises on misuse", function()
    assert.error_matches(function() plan("unsloth") end, "directory or config.json expected")
    assert.error_matches(function() plan("unsloth", MOE, 4) end, "option table expected")
  end)
end)
