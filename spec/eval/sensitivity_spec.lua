-- moonlet.eval.sensitivity: a row is what eval.kld finds when the model runs with those copies.
local moonlet = require "moonlet"

local DEMO <const> = "examples/demo-model"
local TEXT <const> = "The old fisherman looked at the sea. He had caught nothing."

describe("eval.sensitivity", function()
  local model, reference
  lazy_setup(function()
    model = assert(moonlet.open(DEMO, { threads = 2, precision = "exact" }))
    reference = assert(moonlet.open(DEMO, { threads = 2, precision = "exact" }))
  end)
  lazy_teardown(function()
    model:close()
    reference:close()
  end)

  local function sensitivity(opts)
    opts.text = TEXT
    return assert(moonlet.eval.sensitivity(model, opts))
  end

  local MEASURES <const> = { "mean", "mean_error", "median", "p99", "p999", "max", "top1", "nll",
    "reference_nll", "perplexity", "reference_perplexity", "tokens" }

  -- eval.kld of the model with these copies against another one without.
  local function check(row, replacements)
    for _, r in ipairs(replacements) do assert(model:replace(r[1], r[2])) end
    local want = assert(moonlet.eval.kld(model, { reference = reference, text = TEXT }))
    model:restore()
    for _, name in ipairs(MEASURES) do assert.equal(want[name], row[name], name) end
    assert.is_true(row.mean > 0)
  end

  local function by_name(rows)
    local named = {}
    for _, row in ipairs(rows) do named[row.name] = row end
    return named
  end

  it("measures a class at a time", function()
    local decision = { mode = "mxfp4" }
    local result = sensitivity { decisions = { decision } }
    local rows = by_name(result.rows)
    assert.equal(19, #result.rows)
    check(rows.q_proj, { { "layers.3.self_attn.q_proj", decision },
      { "layers.7.self_attn.q_proj", decision } })
    check(rows.lm_head, { { "lm_head", decision } })
    local experts = {}
    for i = 0, 7 do experts[i + 1] = { ("layers.%d.mlp.experts.up_proj"):format(i), decision } end
    check(rows.expert_up, experts)
    local up = rows.expert_up
    assert.same({ 8, 8 * 16 * 64 * 256, up.parameters * 17 // 32, "mxfp4 g32", "expert_up" },
      { up.tensors, up.parameters, up.bytes, up.decision, up.class })
    assert.equal(2 * up.parameters - up.bytes, up.saved)
    assert.near(up.mean / (up.saved / 2 ^ 20), up.kld_per_mib, 1e-12)
    local saved = 0
    for _, row in ipairs(result.rows) do saved = saved + row.saved end
    assert.equal(saved, result.totals[1].saved)
    assert.is_true(result.totals[1].mean > up.mean)
    assert.same({ "class", DEMO, up.tokens, 11 }, { result.by, result.reference, result.tokens,
      result.words })
  end)

  it("measures a tensor or a layer at a time, as a recipe decides", function()
    local plan = assert(moonlet.plan("unsloth", DEMO, { bits = 3 }))
    local all, layer5, q7 = {}, {}, {}
    for _, tensor in ipairs(plan.tensors) do
      if tensor.decision.mode then
        local r = { tensor.name:gsub("^model%.language_model%.", ""):gsub("%.weight$", ""),
          tensor.decision }
        all[#all + 1] = r
        if r[1]:find("^layers%.5%.") then layer5[#layer5 + 1] = r end
        if r[1] == "layers.7.self_attn.q_proj" then q7[1] = r end
      end
    end
    local opts = { recipe = "unsloth", recipe_options = { bits = 3 }, by = "tensor" }
    local result = sensitivity(opts)
    local rows = by_name(result.rows)
    assert.equal(#all, #result.rows)
    check(rows["layers.7.self_attn.q_proj"], q7)
    check(result.totals[1], all)
    opts.by = "layer"
    result = sensitivity(opts)
    assert.equal(10, #result.rows)
    check(by_name(result.rows)["layer 5"], layer5)
    assert.equal(5, by_name(result.rows)["layer 5"].layer)
  end)

  it("tries several decisions, and keeps what does not divide", function()
    local result = sensitivity { decisions = { { mode = "affine", bits = 4, group = 128 },
      { mode = "affine", bits = 8 } } }
    local n = #result.rows
    assert.equal(2, #result.totals)
    assert.equal("affine 8 g64", result.rows[n].decision)
    assert.equal("affine 4 g128", result.rows[1].decision)
    local first = {}
    for _, row in ipairs(result.rows) do
      if row.decision == "affine 4 g128" then first[row.name] = row end
    end
    assert.is_nil(first.expert_down) -- rows of 64
    assert.is_not_nil(first.expert_up)
    assert.is_true(result.totals[1].mean > 10 * result.totals[2].mean)
  end)

  it("chooses scales as it is told, with an imatrix where it knows the inputs", function()
    local path = os.tmpname()
    assert(moonlet.imatrix { model = model, text = TEXT, out = path })
    local calibration <close> = assert(require("moonlet.imatrix").read(path, model:info().config))
    local function opts(extra)
      local o = { decisions = { { mode = "affine", bits = 2 } } }
      for k, v in pairs(extra) do o[k] = v end
      return o
    end
    local function copies(fit)
      local list = {}
      for layer = 0, 7 do
        local name = ("layers.%d.mlp.experts.down_proj"):format(layer)
        local importance
        if fit == "imatrix" then
          local parts = {}
          for e = 0, 15 do parts[e + 1] = calibration:importance(name, e) end
          importance = table.concat(parts)
        end
        list[layer + 1] = { name, { mode = "affine", bits = 2, fit = fit,
          importance = importance } }
      end
      return list
    end
    local plain = by_name(sensitivity(opts {}).rows).expert_down
    local mse = by_name(sensitivity(opts { fit = "mse" }).rows).expert_down
    local best = by_name(sensitivity(opts { fit = "best", imatrix = path }).rows)
    local other = by_name(sensitivity(opts { fit = "qstream" }).rows).expert_down -- mxfp4 only
    assert.equal(plain.mean, other.mean)
    check(plain, copies())
    check(mse, copies "mse")
    check(best.expert_down, copies "imatrix")
    assert.same({ "affine 2 g64", "affine 2 g64 mse", "affine 2 g64 imatrix" }, { plain.decision,
      mse.decision, best.expert_down.decision })
    check(best.embed, { { "embed_tokens", { mode = "affine", bits = 2, fit = "mse" } } })
    local said = sensitivity { decisions = { { mode = "affine", bits = 2, fit = "mse" } } }
    assert.equal(mse.mean, by_name(said.rows).expert_down.mean)
    os.remove(path)
  end)

  it("leaves the model as the checkpoint has it", function()
    assert(model:replace("lm_head", { mode = "affine", bits = 2 }))
    sensitivity { decisions = { { mode = "mxfp4" } }, by = "layer" }
    local result = assert(moonlet.eval.kld(model, { reference = reference, text = TEXT }))
    assert.equal(0, result.max)
    local stop = false
    assert.error(function()
      sensitivity { decisions = { { mode = "mxfp4" } }, on_progress = function(done, total)
        stop = done > total / 2
        if stop then error "stop" end
      end }
    end)
    assert.is_true(stop)
    result = assert(moonlet.eval.kld(model, { reference = reference, text = TEXT }))
    assert.equal(0, result.max)
  end)

  it("counts its passes for progress", function()
    local last, total = 0, nil
    sensitivity { decisions = { { mode = "mxfp4" } }, by = "layer",
      on_progress = function(done, all) last, total = done, all end }
    assert.equal(total, last)
  end)

  it("refuses decisions that are none, recipes that keep everything, and misuse", function()
    local function fails(code, message, opts)
      opts.text = TEXT
      local result, why, got = moonlet.eval.sensitivity(model, opts)
      assert.is_nil(result)
      assert.matches(message, why)
      assert.equal(code, got)
    end
    fails("range", "affine has no 7%-bit form", { decisions = { { mode = "affine", bits = 7 } } })
    fails("range", "unknown mode int", { decisions = { { mode = "int" } } })
    fails("range", "nothing is encoded", { decisions = { { keep = "bf16" } } })
    fails("io", "no recipe named nosuch", { recipe = "nosuch" })
    fails("range", "embed_tokens: fit imatrix needs an imatrix", { decisions = {
      { mode = "mxfp4" } }, fit = "imatrix" })
    fails("io", "/nosuch", { decisions = { { mode = "mxfp4" } }, imatrix = "/nosuch" })
    for _, opts in ipairs { {}, { decisions = {}, recipe = "uniform" },
      { decisions = { { mode = "mxfp4" } }, by = "row" },
      { decisions = { { mode = "mxfp4" } }, fit = "row" } } do
      opts.text = TEXT
      assert.error(function() moonlet.eval.sensitivity(model, opts) end)
    end
  end)
end)
