local moonlet = require "moonlet"
local plan = require "moonlet.plan"
local recipe = require "moonlet.recipe"
local target = require "moonlet.target"

local DEMO <const> = "examples/demo-model"
local MOE <const> = "spec/golden/configs/qwen3.6-35b-a3b.json"
local DENSE <const> = "spec/golden/configs/qwen3.6-27b.json"

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
      local damage, by_name = 0, {}
      for _, tensor in ipairs(assert(plan.inventory(MOE)).source.tensors) do
        by_name[tensor.name] = tensor
      end
      for _, row in ipairs(p.tensors) do
        local tensor = by_name[row.name]
        if tensor.matrix then damage = damage + kit.damage(tensor, row.decision) end
      end
      local solved = assert(moonlet.budget.solve { source = MOE, mtp = "drop",
        target = ("%.6fbpw"):format(p.bits_per_weight) })
      assert.is_true(solved.damage <= damage, other[1])
    end
  end)

  it("tells what other sizes would cost, falling", function()
    local solved = assert(moonlet.budget.solve { source = DEMO, target = "10MiB" })
    for i = 2, #solved.frontier do
      local a, b = solved.frontier[i - 1], solved.frontier[i]
      assert.is_true(b.bytes > a.bytes and b.damage <= a.damage)
    end
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

  it("refuses what cannot be", function()
    local got, message = moonlet.budget.solve { source = DEMO, target = "1MB" }
    assert.is_nil(got)
    assert.matches("budget cannot be that small", message)
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
