-- A model with replaced matrices computes what a checkpoint that holds them computes.
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local moonlet = require "moonlet"
local numbers = require "spec.support.numbers"

local SOURCE <const> = "spec/golden/models/moe-wrapped/hf"
local TIED <const> = "spec/golden/models/dense-tied/hf"
local IDS <const> = { 5, 17, 255, 3, 99, 42, 7 }

local function quantized(source, options)
  local out = os.tmpname()
  os.remove(out)
  options.source, options.out = source, out
  assert(moonlet.quantize(options))
  return out
end

local function logits(model)
  return assert(model:forward(IDS)).logits:bytes()
end

-- Names of all matrices of the text stack, experts as stacks, with the decision of a plan.
local function stacks(plan)
  local list = {}
  for _, row in ipairs(plan.tensors) do
    local name = row.name:gsub("^model%.language_model%.", ""):gsub("^model%.", "")
      :gsub("%.weight$", "")
    if row.decision.mode then list[#list + 1] = { name = name, decision = row.decision } end
  end
  return list
end

describe("replaced matrices", function()
  local base, model, before
  lazy_setup(function()
    -- norms as MLX checkpoints have them, so that nothing but matrices differs
    base = quantized(SOURCE, { recipe = "keep_bf16" })
    model = assert(moonlet.open(base, { threads = 2, precision = "exact" }))
    before = logits(model)
  end)
  lazy_teardown(function()
    model:close()
    checkpoint.remove(base)
  end)
  after_each(function() model:restore() end)

  for _, options in ipairs { { recipe = "uniform", mode = "mxfp4" },
    { recipe = "uniform", mode = "nvfp4" }, { recipe = "uniform", mode = "mxfp8" },
    { recipe = "uniform", bits = 3, group = 64 }, { recipe = "unsloth", bits = 4 } } do
    it(("give the logits of the checkpoint that quantize writes: %s %s"):format(options.recipe,
      options.mode or options.bits), function()
      local dir = quantized(SOURCE, options)
      local plan = assert(moonlet.plan(options.recipe, SOURCE, { bits = options.bits,
        group = options.group, mode = options.mode }))
      local other <close> = assert(moonlet.open(dir, { precision = "exact" }))
      checkpoint.remove(dir)
      local list, bytes = stacks(plan), 0
      assert.is_true(#list > 20)
      for _, row in ipairs(list) do
        bytes = bytes + assert(model:replace(row.name, row.decision))
      end
      assert.is_nil(numbers.difference(logits(other), logits(model)))
      local expected = 0
      for _, row in ipairs(plan.tensors) do
        if row.decision.mode then expected = expected + row.bytes end
      end
      assert.equal(expected, bytes)
    end)
  end

  it("are gone after restore, one or all", function()
    assert(model:replace("layers.0.mlp.experts.up_proj", { mode = "affine", bits = 2 }))
    local one = logits(model)
    assert(model:replace("lm_head", { mode = "mxfp4" }))
    assert.is_not_nil(numbers.difference(one, logits(model)))
    assert(model:restore("lm_head"))
    assert.is_nil(numbers.difference(one, logits(model)))
    assert.is_not_nil(numbers.difference(before, one))
    assert(model:restore("lm_head")) -- nothing to do
    assert(model:restore())
    assert.is_nil(numbers.difference(before, logits(model)))
    assert(model:replace("lm_head", { mode = "mxfp4" }))
    assert.equal(0, model:replace("lm_head", { keep = "bf16" }))
    assert.is_nil(numbers.difference(before, logits(model)))
  end)

  it("are made from the checkpoint's weights, not from an earlier copy", function()
    assert(model:replace("layers.3.self_attn.q_proj", { mode = "mxfp8" }))
    local want = logits(model)
    assert(model:replace("layers.3.self_attn.q_proj", { mode = "affine", bits = 2 }))
    assert.is_not_nil(numbers.difference(want, logits(model)))
    assert(model:replace("layers.3.self_attn.q_proj", { mode = "mxfp8" }))
    assert.is_nil(numbers.difference(want, logits(model)))
  end)

  it("can be one expert", function()
    for e = 0, 7 do
      assert(model:replace(("layers.1.mlp.experts.%d.down_proj"):format(e), { mode = "mxfp4" }))
    end
    local one_by_one = logits(model)
    model:restore()
    assert(model:replace("layers.1.mlp.experts.down_proj", { mode = "mxfp4" }))
    assert.is_nil(numbers.difference(logits(model), one_by_one))
    assert(model:restore("layers.1.mlp.experts.3.down_proj"))
    assert.is_not_nil(numbers.difference(logits(model), one_by_one))
    assert.is_not_nil(numbers.difference(before, logits(model)))
  end)

  it("can be given as bytes", function()
    local layout = assert(core.model_layout(base, { values = true }))
    for _, options in ipairs { { mode = "affine", bits = 4, group = 64 },
      { mode = "nvfp4", group = 16 }, { mode = "mxfp8", group = 32 } } do
      for _, module in ipairs(layout.modules) do
        if module.name == "layers.0.linear_attn.in_proj_z" then
          options.rows, options.cols, options.dtype = module.rows, module.cols, "f32"
          local parts = assert(moonlet.quantize_tensor(module.values, options))
          for k, v in pairs(options) do parts[k] = v end
          assert.equal(#parts.weight + #parts.scales + #(parts.biases or ""),
            model:replace(module.name, parts))
        end
      end
      local by_bytes = logits(model)
      assert.is_not_nil(numbers.difference(before, by_bytes))
      model:restore()
      if options.mode ~= "affine" then -- whose scales are bf16 when encoded from bf16
        assert(model:replace("layers.0.linear_attn.in_proj_z", { mode = options.mode }))
        assert.is_nil(numbers.difference(logits(model), by_bytes))
      end
    end
  end)

  -- f32 importance of n columns, some of them zero.
  local function importance(n, seed)
    local rng = numbers.rng(seed)
    local values = rng.floats(n, 1)
    for i = 1, n do values[i] = rng.uniform() < 0.1 and 0 or values[i] ^ 2 end
    return numbers.pack(values)
  end

  it("are encoded with the fit that is asked for", function()
    local layout = assert(core.model_layout(base, { values = true }))
    local stack = "layers.0.mlp.experts.down_proj"
    for _, given in ipairs { { mode = "affine", bits = 3, group = 64, fit = "mse" },
      { mode = "affine", bits = 3, group = 64, fit = "imatrix" },
      { mode = "nvfp4", group = 16, fit = "imatrix" }, { mode = "mxfp4", fit = "qstream" } } do
      local n_experts, weights = 0, {}
      for _, module in ipairs(layout.modules) do
        local expert = module.name:match("^layers%.0%.mlp%.experts%.(%d+)%.down_proj$")
        if expert then
          local one = { rows = module.rows, cols = module.cols, dtype = "f32" }
          for k, v in pairs(given) do one[k] = v end
          if given.fit == "imatrix" then
            one.importance = importance(module.cols, expert + 1)
            weights[expert + 1] = one.importance
          end
          -- scales of f32 weights would be f32
          one.dtype = "bf16"
          local parts = assert(moonlet.quantize_tensor(checkpoint.to_bf16(module.values), one))
          parts.rows, parts.cols, parts.mode, parts.bits = one.rows, one.cols, one.mode, one.bits
          parts.group, parts.dtype = one.group or 32, one.bits and "bf16" or nil
          assert(model:replace(module.name, parts))
          n_experts = n_experts + 1
        end
      end
      local want = logits(model)
      model:restore()
      local decision = { importance = weights[1] and table.concat(weights) }
      for k, v in pairs(given) do decision[k] = v end
      assert(model:replace(stack, decision))
      assert.is_nil(numbers.difference(want, logits(model)))
      decision.fit, decision.importance = nil, nil
      assert(model:replace(stack, decision))
      assert.is_not_nil(numbers.difference(want, logits(model)))
      model:restore()
      assert.equal(8, n_experts)
    end
  end)

  it("may share the importance of a stack's inputs", function()
    local one = importance(64, 7)
    local name = "layers.1.mlp.experts.up_proj"
    assert(model:replace(name, { mode = "affine", bits = 2, fit = "imatrix", importance = one }))
    local shared = logits(model)
    assert(model:replace(name, { mode = "affine", bits = 2, fit = "imatrix",
      importance = one:rep(8) }))
    assert.is_nil(numbers.difference(shared, logits(model)))
  end)

  it("can be rows of fp8", function()
    local bytes = assert(model:replace("layers.0.linear_attn.in_proj_z", { mode = "fp8" }))
    local plan = assert(moonlet.plan(function(t)
      return t.class == "in_proj_z" and { mode = "fp8" } or { keep = "bf16" }
    end, SOURCE))
    for _, row in ipairs(plan.tensors) do
      if row.name:find("layers%.0%.linear_attn%.in_proj_z") then assert.equal(row.bytes, bytes) end
    end
    assert.is_not_nil(numbers.difference(before, logits(model)))
  end)

  it("are the head too where embeddings are tied", function()
    local tied <close> = assert(moonlet.open(TIED, { precision = "exact" }))
    local dir = checkpoint.edited(TIED, function(tensors)
      tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    end)
    local untied <close> = assert(moonlet.open(dir, { precision = "exact" }))
    checkpoint.remove(dir)
    assert.is_nil(numbers.difference(logits(untied), logits(tied)))
    assert(tied:replace("embed_tokens", { mode = "mxfp4" }))
    assert(untied:replace("embed_tokens", { mode = "mxfp4" }))
    assert.is_not_nil(numbers.difference(logits(untied), logits(tied)))
    assert(untied:replace("lm_head", { mode = "mxfp4" }))
    assert.is_nil(numbers.difference(logits(untied), logits(tied)))
    local _, message = tied:replace("lm_head", { mode = "mxfp4" })
    assert.equal("this model has no matrix lm_head", message)
    assert(tied:restore())
    assert(untied:restore())
    assert.is_nil(numbers.difference(logits(untied), logits(tied)))
  end)

  it("leave open sessions as they are", function()
    local session <close> = assert(model:session { ctx = 16 })
    assert(session:sync(IDS))
    assert(model:replace("layers.2.mlp.experts.up_proj", { mode = "affine", bits = 2 }))
    assert(session:step(1))
    model:restore()
    assert(session:step(1))
    assert.equal(#IDS + 2, session:n_past())
  end)

  it("are measured against the model without them, the head included", function()
    local targets, scored = { 1, 2, 3, 4, 5, 6, 7 }, { 1, 2, 3, 4, 5, 6, 7 }
    local function final()
      local session <close> = assert(model:session { ctx = 7 })
      return assert(session:final(IDS, targets))
    end
    local p = final()
    assert(model:replace("lm_head", { mode = "affine", bits = 2 }))
    local fresh <close> = assert(moonlet.open(base, { precision = "exact" }))
    local want = assert(model:compare(final(), fresh, p, scored))
    local got = assert(model:compare(final(), model, p, scored))
    assert.equal(want.kl:bytes(), got.kl:bytes())
    assert.is_true(got.kl:at(1) > 1e-4)
  end)

  it("refuse what is not there or cannot be", function()
    local function fails(code, message, ...)
      local done, why, got = model:replace(...)
      assert.is_nil(done)
      assert.matches(message, why)
      assert.equal(code, got)
    end
    fails("range", "no matrix layers.9.mlp.gate", "layers.9.mlp.gate", { mode = "mxfp4" })
    fails("range", "no matrix layers.0.mlp.experts.8.up_proj", "layers.0.mlp.experts.8.up_proj",
      { mode = "mxfp4" })
    fails("range", "no matrix layers.0.mlp.experts", "layers.0.mlp.experts", { mode = "mxfp4" })
    fails("unsupported", "lm_head: ", "lm_head", { mode = "affine", bits = 7 })
    fails("range", "is %[320, 64%], not %[1, 64%]", "lm_head", { weight = ("\0"):rep(32),
      scales = "\0\0", rows = 1, cols = 64, mode = "mxfp4", group = 32 })
    fails("range", "a stack: name one expert", "layers.0.mlp.experts.up_proj", {
      weight = ("\0"):rep(32), scales = "\0\0", rows = 1, cols = 64, mode = "mxfp4", group = 32 })
    local _, message, code = model:restore("layers.9.mlp.gate")
    assert.same({ "this model has no matrix layers.9.mlp.gate", "range" }, { message, code })
    assert.is_nil(numbers.difference(before, logits(model)))
    fails("range", "importance of 3 inputs, not 64", "lm_head", { mode = "mxfp4", fit = "qstream",
      importance = numbers.pack { 1, 2, 3 } })
    fails("unsupported", "lm_head: ", "lm_head", { mode = "mxfp8", fit = "qstream" })
    for _, with in ipairs { { mode = "mxfp4", fit = "imatrix" }, { mode = "mxfp4", fit = "no" },
      { mode = "mxfp4", fit = "imatrix", importance = "abc" },
      { mode = "mxfp4", fit = "imatrix", importance = numbers.pack { -1 } },
      5, { mode = "mxfp4", bitz = 4 }, { mode = "no" },
      { weight = "", mode = "mxfp4", rows = 1, cols = 64 } } do
      assert.error(function() model:replace("lm_head", with) end)
    end
    assert.error(function() model:replace(nil, { mode = "mxfp4" }) end)
  end)

  it("name the weight that cannot be encoded, and change nothing", function()
    local dir = checkpoint.edited("spec/golden/models/moe-text/hf", function(tensors)
      local t = tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
      t.data = t.data:sub(1, 2 * (64 + 5)) .. "\x80\x7f" .. t.data:sub(2 * (64 + 5) + 3)
    end)
    local broken <close> = assert(moonlet.open(dir, { precision = "exact" }))
    checkpoint.remove(dir)
    local was = logits(broken)
    local done, message, code = broken:replace("layers.0.mlp.experts.up_proj", { mode = "mxfp4" })
    assert.is_nil(done)
    assert.equal("layers.0.mlp.experts.up_proj: row 1 column 5: inf cannot be encoded", message)
    assert.equal("format", code)
    assert.is_nil(numbers.difference(was, logits(broken)))
  end)
end)
