local calibration = require "spec.support.calibration"
local checkpoint = require "spec.support.checkpoint"
local damage = require "moonlet.damage"
local moonlet = require "moonlet"
local plan = require "moonlet.plan"
local recipe = require "moonlet.recipe"
local target = require "moonlet.target"

local DEMO <const> = "examples/demo-model"
local DIALOGUES <const> = DEMO .. "/eval.jsonl"
local MOE <const> = "spec/golden/configs/qwen3.6-35b-a3b.json"
local DENSE <const> = "spec/golden/configs/qwen3.6-27b.json"
local TINY <const> = "spec/golden/models/moe-wrapped/hf"

describe("target.parse", function()
  it("reads sizes as people write them", function()
    assert.same({ bytes = 15.7e9 }, target.parse "15.7GB")
    assert.same({ bytes = 2 ^ 30 }, target.parse " 1 gib ")
    assert.same({ bytes = 1000 }, target.parse "1000")
    assert.same({ bits_per_weight = 3.6 }, target.parse "3.6bpw")
  end)

  it("refuses what is none", function()
    for _, text in ipairs { "", "x", "3 parsec", "-1GB", "0", "1e3GB", "4.5", "999" } do
      local got, message = target.parse(text)
      assert.is_nil(got)
      assert.matches("is no size", message)
    end
  end)
end)

describe("recipe moonlet", function()
  it("fills a size and keeps to it", function()
    for _, case in ipairs { { DEMO, "10MB" }, { DEMO, "6bpw" }, { MOE, "18GB" }, { MOE, "3.6bpw" },
      { DENSE, "14GB" }, { DENSE, "4.5bpw" } } do
      local goal = assert(target.parse(case[2]))
      local p = assert(plan("moonlet", case[1], assert(target.level("moonlet", case[1], goal))))
      assert.is_true(target.fits(p, goal))
      local share = goal.bytes and p.total_bytes / goal.bytes
        or p.bits_per_weight / goal.bits_per_weight
      assert.is_true(share > 0.97, ("%s %s: %.3f"):format(case[1], case[2], share))
    end
  end)

  it("grows with its level", function()
    local last = 0
    for level = 20, 50, 2 do
      local p = assert(plan("moonlet", MOE, { level = level }))
      assert.is_true(p.total_bytes >= last)
      last = p.total_bytes
    end
  end)

  it("gives what is cheap and sensitive more than what is neither", function()
    local p = assert(plan("moonlet", MOE,
      assert(target.level("moonlet", MOE, assert(target.parse "3.6bpw")))))
    local function bits(class) return p.classes[class].bits_per_weight end
    assert.is_true(bits("router") > bits("out_proj") and bits("out_proj") > bits("expert_down"))
    assert.is_true(bits("expert_down") > bits("expert_gate"))
  end)

  it("says what its least is, and takes no options of others", function()
    local got, message = target.level("moonlet", DEMO, { bytes = 1000 })
    assert.is_nil(got)
    assert.matches("moonlet cannot be that small: its least is 6", message)
    got, message = plan("moonlet", DEMO, { bits = 4 })
    assert.is_nil(got)
    assert.matches("no option 'bits'; there are: level mtp", message)
    got, message = target.level("unsloth", DEMO, { bytes = 1e9 })
    assert.is_nil(got)
    assert.matches("recipe unsloth has no sizes; moonlet and budget have", message)
  end)
end)

describe("budget", function()
  it("solves for a size what a recipe then carries out", function()
    for _, size in ipairs { "9.5MiB", "5bpw" } do
      local solved = assert(moonlet.budget.solve { source = DEMO, target = size, mtp = "drop" })
      local p = assert(plan(solved.recipe, DEMO, solved.options))
      assert.equal(solved.bytes, p.total_bytes)
      local goal = assert(target.parse(size))
      assert.is_true(target.fits(p, goal))
      assert.is_true((goal.bytes and p.total_bytes / goal.bytes
        or p.bits_per_weight / goal.bits_per_weight) > 0.99)
    end
  end)

  it("expects no more damage than any other recipe at its size", function()
    local kit = recipe.kit()
    local others = { { "unsloth", { bits = 4 } }, { "config_i", {} }, { "uniform", { bits = 4 } },
      { "mixed_3_6", {} }, { "unsloth", { bits = 3, mxfp = true } } }
    for _, other in ipairs(others) do
      local p = assert(plan(other[1], MOE, other[2]))
      local sum, by_name = 0, {}
      for _, tensor in ipairs(assert(plan.inventory(MOE)).source.tensors) do
        by_name[tensor.name] = tensor
      end
      for _, row in ipairs(p.tensors) do
        local tensor = by_name[row.name]
        if tensor.matrix then sum = sum + kit.damage(tensor, row.decision) end
      end
      local solved = assert(moonlet.budget.solve { source = MOE, mtp = "drop",
        target = ("%.6fbpw"):format(p.bits_per_weight) })
      assert.is_true(solved.damage <= sum, other[1])
    end
  end)

  it("tells what other sizes would cost, falling", function()
    local solved = assert(moonlet.budget.solve { source = DEMO, target = "10MiB" })
    for i = 2, #solved.frontier do
      local a, b = solved.frontier[i - 1], solved.frontier[i]
      assert.is_true(b.bytes > a.bytes and b.damage <= a.damage)
    end
    local last = solved.frontier[#solved.frontier] -- everything as it is
    local whole = assert(plan("keep_bf16", DEMO))
    assert.same({ whole.total_bytes, whole.bits_per_weight, 0 },
      { last.bytes, last.bits_per_weight, last.damage })
  end)

  it("measures the classes of a model when asked to", function()
    local model <close> = assert(moonlet.open(DEMO, { threads = 2, precision = "exact" }))
    local calls = 0
    local solved = assert(moonlet.budget.solve { source = DEMO, target = "9MiB", mtp = "drop",
      sensitivity = "kld", model = model, chat = DEMO .. "/eval.jsonl", dialogues = { 1, 2 },
      on_progress = function() calls = calls + 1 end })
    local by_experience = assert(moonlet.budget.solve { source = DEMO, target = "9MiB",
      mtp = "drop" })
    assert.is_true(calls > 0)
    assert.is_true(solved.bytes <= 9 * 2 ^ 20)
    assert.not_same(by_experience.options.choice, solved.options.choice)
  end)

  it("goes by the errors of this checkpoint where an imatrix is given", function()
    local scope <close> = checkpoint.scope()
    local path = scope.path .. "/imatrix.gguf"
    calibration.loud_imatrix(assert(plan.inventory(TINY)), path):close()
    local seen = {}
    local function solve(o)
      o.source, o.target = TINY, "5bpw"
      return assert(moonlet.budget.solve(o))
    end
    local measured = solve { imatrix = path, threads = 1, on_progress = function(done, total, what)
      seen[#seen + 1] = ("%d %d %s"):format(done, total, what)
    end }
    assert.equal(("%d %d errors"):format(#seen, #seen), seen[#seen])
    assert.is_true(#seen > 40)
    assert.same(measured.options, solve({ imatrix = { path }, threads = 3 }).options)
    assert.not_same(measured.options, solve({}).options)

    local stopped = { moonlet.budget.solve { source = TINY, target = "5bpw", imatrix = path,
      on_progress = function() return false end } }
    assert.same({ nil, "stopped", "cancelled" }, { stopped[1], stopped[2], stopped[3] })
    local got, message = moonlet.budget.solve { source = MOE, target = "5bpw", imatrix = path }
    assert.is_nil(got)
    assert.matches("no weights in it to measure", message)
  end)

  -- Of the sizes at which the two allocations differ most.
  it("is not worse by measured errors than by those of normal weights #slow", function()
    local scope <close> = checkpoint.scope()
    local place, dialogues = scope.path, DEMO .. "/eval.jsonl"
    assert(moonlet.imatrix { model = DEMO, chat = dialogues, dialogues = { 151, 300 },
      out = place .. "/i.gguf" })
    local reference <close> = assert(moonlet.open(DEMO, { precision = "exact" }))
    local function divergence(size, calibrated)
      local out = ("%s/%s-%s"):format(place, size, calibrated)
      local solved = assert(moonlet.budget.solve { source = DEMO, target = size, mtp = "drop",
        imatrix = calibrated and place .. "/i.gguf" or nil })
      assert(moonlet.quantize { source = DEMO, out = out, recipe = "budget",
        recipe_options = solved.options, imatrix = place .. "/i.gguf" })
      local model <close> = assert(moonlet.open(out, { precision = "exact" }))
      return assert(moonlet.eval.kld(model, { reference = reference, chat = dialogues,
        dialogues = { 1, 100 } })).mean
    end
    local product = 1
    for _, size in ipairs { "3bpw", "4.5bpw", "5.5bpw" } do
      product = product * divergence(size, true) / divergence(size, false)
    end
    assert.is_true(product < 1, "ratio of divergences, three sizes: " .. product)
  end)

  -- What a class does in 4 bits is known by experience or measured: errors, in whatever unit, only
  -- share it out among its matrices and among formats.
  it("expects of a class in 4 bits what is known of it, whatever its errors are", function()
    local scope <close> = checkpoint.scope()
    local path = scope.path .. "/imatrix.gguf"
    calibration.loud_imatrix(assert(plan.inventory(TINY)), path):close()
    local kit, known = recipe.kit(), 0
    for _, t in ipairs(assert(plan.inventory(TINY)).source.tensors) do
      if t.matrix then
        known = known + kit.damage(t, { mode = "affine", bits = 4, group = 64 })
      end
    end
    local four = assert(plan("uniform", TINY, { bits = 4, group = 64 }))
    for _, o in ipairs { {}, { imatrix = path } } do
      o.source, o.target = TINY, ("%.6fbpw"):format(four.bits_per_weight + 0.2)
      assert.is_true(assert(moonlet.budget.solve(o)).damage < known)
      o.target = ("%.6fbpw"):format(four.bits_per_weight - 1)
      assert.is_true(assert(moonlet.budget.solve(o)).damage > known)
    end
  end)

  it("measures with the inputs that imatrices tell of", function()
    local path = os.tmpname()
    assert(moonlet.imatrix { model = DEMO, chat = DIALOGUES, dialogues = { 3, 3 }, out = path })
    local model <close> = assert(moonlet.open(DEMO, { threads = 2, precision = "exact" }))
    local solved = assert(moonlet.budget.solve { source = DEMO, target = "9MiB", mtp = "drop",
      sensitivity = "kld", model = model, chat = DIALOGUES, dialogues = { 1, 1 },
      imatrix = { path, path } })
    os.remove(path)
    assert.is_true(solved.bytes <= 9 * 2 ^ 20)
  end)

  it("and recipe moonlet beat published recipes at their sizes #slow", function()
    local dir = os.tmpname()
    os.remove(dir)
    assert(os.execute("mkdir " .. dir))
    local given = { imatrix = dir .. "/i.gguf", hessians = dir .. "/h.safetensors" }
    assert(moonlet.imatrix { model = DEMO, chat = DIALOGUES, dialogues = { 151, 220 },
      out = given.imatrix, hessians = given.hessians })
    local reference <close> = assert(moonlet.open(DEMO, { threads = 2, precision = "exact" }))
    assert(moonlet.eval.save_logits(reference, { out = dir .. "/logits", chat = DIALOGUES,
      dialogues = { 1, 50 } }))
    local function kld(recipe_name, recipe_options, more)
      local job = { source = DEMO, out = dir .. "/q", recipe = recipe_name,
        recipe_options = recipe_options }
      for key, value in pairs(more or {}) do job[key] = value end
      local p = assert(moonlet.quantize(job))
      local model <close> = assert(moonlet.open(job.out, { threads = 2, precision = "exact" }))
      local result = assert(moonlet.eval.kld(model, { reference_logits = dir .. "/logits" }))
      os.execute("rm -r " .. job.out)
      return result.mean, p.bits_per_weight
    end
    local solved = assert(moonlet.budget.solve { source = DEMO, target = "6bpw", mtp = "drop",
      sensitivity = "kld", model = reference, chat = DIALOGUES, dialogues = { 201, 210 } })
    for _, case in ipairs { { "config_i", {}, 0.5 }, { "unsloth", { bits = 4 }, 0.7 } } do
      local theirs, bits = kld(case[1], case[2])
      local size = ("%.6fbpw"):format(bits)
      local level = assert(target.level("moonlet", DEMO, assert(target.parse(size)),
        { mtp = "drop" }))
      local ours, our_bits = kld("moonlet", level, given)
      assert.is_true(our_bits <= bits and ours <= case[3] * theirs, case[1])
      local choice = assert(moonlet.budget.solve { source = DEMO, target = size, mtp = "drop",
        sensitivity = "kld", weights = solved.weights }).options
      ours, our_bits = kld("budget", choice, given)
      assert.is_true(our_bits <= bits and ours <= theirs, case[1])
    end
    os.execute("rm -r " .. dir)
  end)

  it("refuses what cannot be", function()
    local got, message = moonlet.budget.solve { source = DEMO, target = "1MB" }
    assert.is_nil(got)
    assert.matches("budget cannot be that small: its least is 6.32 MiB, 2.%d+ bits", message)
    got, message = moonlet.budget.solve { source = DEMO, target = "much" }
    assert.is_nil(got)
    assert.matches("is no size", message)
    got, message = plan("budget", DEMO)
    assert.is_nil(got)
    assert.matches("give %-%-target", message)
    got, message = plan("budget", DEMO, { choice = { "x affine 4 64" } })
    assert.is_nil(got)
    assert.matches("nothing is said of it", message)
    got, message = plan("budget", DEMO, { choice = { "nonsense" } })
    assert.is_nil(got)
    assert.matches("choice 1: NAME MODE BITS GROUP expected", message)
  end)
end)

describe("a target of quantize", function()
  it("is met by both recipes that have sizes", function()
    for _, name in ipairs { "moonlet", "budget" } do
      local scope <close> = checkpoint.scope()
      local p = assert(moonlet.quantize { source = TINY, out = scope.path .. "/out", recipe = name,
        target = "400KB", recipe_options = { mtp = "drop" } })
      assert.is_true(p.total_bytes <= 400000 and p.total_bytes > 380000)
      assert.equal("drop", p.options.mtp)
      assert.equal(name == "budget", p.frontier ~= nil)
      local carried = assert(plan(name, TINY, p.options))
      assert.equal(p.total_bytes, carried.total_bytes)
    end
  end)

  it("measures on the way, and says so", function()
    local scope <close> = checkpoint.scope()
    local path, stages, sample = scope.path .. "/i.gguf", {}, damage.SAMPLE
    damage.SAMPLE = 1 << 12 -- what comes out does not matter here
    finally(function() damage.SAMPLE = sample end)
    calibration.loud_imatrix(assert(plan.inventory(DEMO)), path):close()
    local p = assert(moonlet.quantize { source = DEMO, out = scope.path .. "/out",
      recipe = "budget", target = "9MiB", sensitivity = "kld", chat = DEMO .. "/eval.jsonl",
      dialogues = { 1, 1 }, imatrix = { path }, threads = 2, dry_run = true,
      on_progress = function(_, _, _, stage) stages[stage or "put"] = true end })
    assert.is_true(p.total_bytes <= 9 * 2 ^ 20 and #p.frontier > 100)
    assert.same({ kld = true, errors = true }, stages)
  end)

  it("that cannot be met ends the run before it begins", function()
    local function refused(o, pattern)
      o.source, o.out = TINY, "/tmp/never"
      local got, message = moonlet.quantize(o)
      assert.is_nil(got)
      assert.matches(pattern, message)
    end
    refused({ recipe = "budget", target = "1kB" }, "budget cannot be that small")
    refused({ recipe = "moonlet", target = "1kB" }, "moonlet cannot be that small")
    refused({ recipe = "uniform", target = "1GB" }, "recipe uniform has no sizes")
    refused({ recipe = "budget", target = "9 stone" }, "'9 stone' is no size")
  end)

  it("raises on misuse", function()
    local function raises(o, pattern)
      o.source, o.out, o.recipe = TINY, "/tmp/never", o.recipe or "budget"
      assert.error_matches(function() moonlet.quantize(o) end, pattern)
    end
    raises({ sensitivity = "kld" }, "'sensitivity' goes with 'target'")
    raises({ target = "1MB", sensitivity = "kld" }, "goes with one of chat and file")
    raises({ target = "1MB", chat = "x" }, "kld goes with one of chat and file")
    raises({ target = "1MB", by = "class" }, "kld goes with one of chat and file")
    raises({ target = "1MB", sensitivity = "much" }, "error or kld expected, got 'much'")
    raises({ target = "1MB", recipe = "moonlet", sensitivity = "kld", chat = "x" },
      "kld goes with recipe budget")
    raises({ target = "1MB", recipe_options = { choice = {} } }, "'choice' is what 'target' finds")
    raises({ target = "1MB", recipe = function() end }, "a function as a recipe has no sizes")
    raises({ target = 5 }, "'target': string expected, got integer")
  end)
end)
