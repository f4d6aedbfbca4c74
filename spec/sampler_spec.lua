local cases = require "spec.support.sampling"
local core = require "moonlet.core"
local json = require "moonlet.json"
local oracle = require "spec.support.oracle"
local sampler = require "moonlet.sampler"

local inf, nan = math.huge, 0 / 0

local function view(values)
  local bytes = string.pack("<" .. ("f"):rep(#values), table.unpack(values))
  return core.tensor("f32", { 1, #values }, bytes):row(1)
end

local function draws(policy, logits, n)
  local out = {}
  for i = 1, n do out[i] = assert(policy:sample(logits)) end
  return out
end

describe("sampling as transformers does it", function()
  local doc = cases.read("spec/golden/sampling/cases.json")
  for i, case in ipairs(doc.cases) do
    it(("case %d: %s %s"):format(i, case.vector, json.encode(case.params)), function()
      cases.check(case, doc.vectors[case.vector])
    end)
  end

  it("covers all cases", function() assert.equal(389, #doc.cases) end)

  it("and on vectors never seen before #oracle", function()
    local python, path = oracle.python(), os.tmpname()
    for seed = 1, 3 do
      assert(os.execute(("%s spec/golden/sampling/make.py %s --seed %d > %s.log 2>&1")
        :format(python, path, seed, path)))
      local fresh = cases.read(path)
      assert.is_true(#fresh.cases > 300)
      for _, case in ipairs(fresh.cases) do cases.check(case, fresh.vectors[case.vector]) end
    end
    os.remove(path)
    os.remove(path .. ".log")
  end)
end)

describe("policy", function()
  local logits = view{ 0, 1, 2, 3, 2.5 }

  it("repeats itself for a seed, and only then", function()
    local spec = { { "temperature", 2 }, seed = 42 }
    local a = draws(sampler(spec), logits, 40)
    assert.same(a, draws(sampler(spec), logits, 40))
    assert.not_same(a, draws(sampler{ { "temperature", 2 }, seed = 43 }, logits, 40))
    assert.not_same(draws(sampler{ { "temperature", 2 } }, logits, 40),
      draws(sampler{ { "temperature", 2 } }, logits, 40))
    local unseeded = sampler{ { "temperature", 2 } }
    local seed = unseeded:seed()
    assert.same(draws(unseeded, logits, 40),
      draws(sampler{ { "temperature", 2 }, seed = seed }, logits, 40))
  end)

  it("draws with the frequencies of the distribution", function()
    local counts, n = {}, 20000
    local policy = sampler{ seed = 5 }
    for _ = 1, n do
      local id = policy:sample(logits)
      counts[id] = (counts[id] or 0) + 1
    end
    local chi = 0
    for id = 0, 4 do
      local want = n * math.exp(logits:logprob(id))
      chi = chi + (counts[id] - want) ^ 2 / want
    end
    assert.is_true(chi < 18.5, chi) -- chi-square of 4 degrees of freedom, 0.1 %
  end)

  it("gives the model's log probability, whatever the stages do", function()
    local id, logprob = sampler{ { "temperature", 0 } }:sample(logits)
    assert.equal(3, id)
    assert.equal(logits:logprob(3), logprob)
    assert.equal(3.0, logits:get(3))
  end)

  it("runs stages in the order given", function()
    local seen = {}
    local function look(c) seen[#seen + 1] = #c end
    sampler{ look, { "top_k", 3 }, look, { "top_p", 0.6 }, look }:sample(logits)
    assert.same({ 5, 3, 2 }, seen)
  end)

  it("gives candidates and context to functions", function()
    local ctx = { state = { avoid = 3 } }
    local policy = sampler{
      function(c, x) c:filter(function(id) return id ~= x.state.avoid end) end,
      { "temperature", 0 },
    }
    assert.equal(4, policy:sample(logits, ctx))
    local kept
    sampler{ function(c) kept = c end }:sample(logits)
    assert.error_matches(function() kept:id(1) end, "only valid during")
    assert.equal(2, (sampler{ function(c) c:pick(0.85) end }:sample(logits)))
  end)

  it("may sample inside a stage", function()
    local greedy = sampler{ { "temperature", 0 } }
    local policy = sampler{ function(c)
      assert.equal(3, greedy:sample(logits))
      c:keep(2)
      assert.equal(2, #c)
    end, seed = 1 }
    local id = policy:sample(logits)
    assert.is_true(id == 3 or id == 4)
  end)

  it("survives a stage that raises", function()
    local policy = sampler{ function(c, ctx) if ctx.bad then error("oops") end c:keep(1) end }
    assert.error_matches(function() policy:sample(logits, { bad = true }) end, "oops")
    assert.equal(3, (policy:sample(logits)))
  end)

  it("never draws ids from n_vocab on", function()
    local policy = sampler{ seed = 1 }
    local padded = view{ 0, 0, 50, 50 }
    for _ = 1, 50 do assert.is_true(policy:sample(padded, { n_vocab = 2 }) < 2) end
  end)

  it("answers bad logits and empty sets with nil, message, code", function()
    local id, message, code = sampler{}:sample(view{ 0, nan })
    assert.is_nil(id)
    assert.equal("logits are NaN at id 1", message)
    assert.equal("range", code)
    id, message, code = sampler{ function(c) c:filter(function() end) end }:sample(logits)
    assert.is_nil(id)
    assert.equal("no candidate is left", message)
    assert.equal("range", code)
    local stage = { apply = function() return nil, "nothing matches", "format" end }
    id, message, code = sampler{ stage }:sample(logits)
    assert.is_nil(id)
    assert.equal("nothing matches", message)
    assert.equal("format", code)
  end)

  local function counter()
    local stage = { n = 0 }
    function stage:apply(c) if self.n >= 2 then c:keep(1) end end
    function stage:accept() self.n = self.n + 1 end
    function stage:reset() self.n = 0 end
    function stage:clone()
      local copy = counter()
      copy.n = self.n
      return copy
    end
    return stage
  end

  it("tells stages with state what was accepted", function()
    local stage = counter()
    local policy = sampler{ { "temperature", 3 }, stage, seed = 9 }
    local first = draws(policy, logits, 10)
    policy:accept(1)
    local clone = policy:clone()
    policy:accept(1)
    assert.same({ 3, 3, 3 }, draws(policy, logits, 3))
    assert.not_same({ 3, 3, 3, 3, 3, 3, 3, 3, 3, 3 }, draws(clone, logits, 10))
    assert.equal(2, stage.n)
    policy:reset()
    assert.equal(0, stage.n)
    assert.same(first, draws(policy, logits, 10))
    policy:reset(10)
    assert.equal(10, policy:seed())
  end)

  it("clones its generator", function()
    local policy = sampler{ { "temperature", 3 }, seed = 9 }
    draws(policy, logits, 3)
    assert.same(draws(policy:clone(), logits, 20), draws(policy, logits, 20))
  end)

  it("does not clone a stage that has state and cannot", function()
    local policy = sampler{ { apply = function() end, accept = function() end } }
    assert.error_matches(function() policy:clone() end, "stage 1 has accept but no clone")
  end)

  it("needs the ids that penalties are about", function()
    local policy = sampler{ { "presence_penalty", 1 } }
    assert.error_matches(function() policy:sample(logits) end, "needs ctx.output_ids")
    policy = sampler{ { "repetition_penalty", 1.1, last = 8 } }
    local ctx = { output_ids = {} }
    assert.error_matches(function() policy:sample(logits, ctx) end, "needs ctx.prompt_ids")
    policy = sampler{ { "repetition_penalty", 2, last = 1 }, { "temperature", 0 } }
    assert.equal(4, (policy:sample(logits, { prompt_ids = { 4 }, output_ids = { 3 } })))
    assert.equal(3, (policy:sample(logits, { prompt_ids = { 3 }, output_ids = { 4 } })))
  end)

  it("raises on what it does not understand", function()
    for spec, message in pairs{
      [{ { "top_q", 1 } }] = "stage 1: unknown stage 'top_q'",
      [{ { "top_k", 1 }, { "top_p", 1.1 } }] = "stage 2: top_p: 1.1 is not in %[0, 1%]",
      [{ { "temperature", -1 } }] = "temperature: %-1 is not in",
      [{ { "temperature", nan } }] = "temperature: %-?nan is not in",
      [{ { "temperature", inf } }] = "temperature: inf is not in",
      [{ { "temperature" } }] = "temperature: number expected, got nil",
      [{ { "top_k", 1.5 } }] = "top_k: integer expected",
      [{ { "top_k", -1 } }] = "top_k: 0 or more expected",
      [{ { "repetition_penalty", 0 } }] = "repetition_penalty: 0 is not in",
      [{ { "repetition_penalty", 1, last = 0 } }] = "last: positive integer expected",
      [{ { "top_p", 1, last = 3 } }] = "top_p: unknown option 'last'",
      [{ { "logit_bias", { x = 1 } } }] = "logit_bias: x is not a token id",
      [{ { "logit_bias", { [1] = inf } } }] = "logit_bias: inf of id 1",
      [{ {} }] = "neither",
      [{ 5 }] = "table or function expected, got number",
      [{ temperature = 1 }] = "unknown option 'temperature'",
      [{ seed = "x" }] = "seed: integer expected",
    } do
      assert.error_matches(function() sampler(spec) end, message)
    end
  end)
end)

describe("options", function()
  it("line the stages up in the documented order", function()
    local policy = sampler.from_options{
      top_p = 0.9, temperature = 0.5, top_k = 3.0, repetition_penalty = 1.2, seed = 3,
      logit_bias = { [0] = 1 }, min_p = 0, presence_penalty = 0,
    }
    assert.equal(5, #policy.stages) -- min_p = 0 and presence_penalty = 0 do nothing
    assert.equal(3, policy:seed())
  end)

  it("take the best token at temperature 0", function()
    local policy = sampler.from_options{ temperature = 0, top_k = 20, top_p = 0.9 }
    assert.same({ 1, 1, 1 }, draws(policy, view{ 0, 5, 5, 4.9 }, 3))
  end)

  it("are checked without raising for those who answer requests", function()
    local ok, message, code = sampler.check_options{ temperature = 3e7 }
    assert.is_nil(ok)
    assert.matches("^temperature: 30000000.0 is not in", message)
    assert.equal("range", code)
    assert.equal("unknown option 'temp'", select(2, sampler.check_options{ temp = 1 }))
    assert.is_true(sampler.check_options{ temperature = 1, seed = 1 })
    assert.error_matches(function() sampler.from_options{ temp = 1 } end, "unknown option 'temp'")
  end)

  it("come from generation_config.json", function()
    local from = sampler.from_generation_config
    assert.same({ temperature = 0 }, from(nil))
    assert.same({ temperature = 0 }, from{ eos_token_id = 3 })
    assert.same({ temperature = 0, repetition_penalty = 1.1 },
      from{ do_sample = false, temperature = 0.7, repetition_penalty = 1.1 })
    assert.same({ temperature = 0.7, top_k = 20, top_p = 0.95 },
      from{ do_sample = true, temperature = 0.7, top_k = 20, top_p = 0.95, pad_token_id = 1 })
    assert.same({ top_p = 0.5 }, from{ top_p = 0.5, temperature = json.null })
    assert.same({}, from{ do_sample = true })
    local options, message, code = from{ do_sample = true, top_p = 7 }
    assert.is_nil(options)
    assert.equal("generation_config.json: top_p: 7 is not in [0, 1]", message)
    assert.equal("format", code)
  end)
end)
