local core = require "moonlet.core"
local ordered = require "spec.support.order"

local inf, nan = math.huge, 0 / 0

local function view(values)
  local bytes = string.pack("<" .. ("f"):rep(#values), table.unpack(values))
  return core.tensor("f32", { 1, #values }, bytes):row(1)
end

local function load(values, n_vocab)
  local c = core.candidates()
  assert(c:load(view(values), core.rng(1), n_vocab))
  return c
end

local function ids(c)
  local out = {}
  for i = 1, #c do out[i] = c:id(i) end
  return out
end

describe("candidates", function()
  it("lists tokens best first, equal ones by id, without those ruled out", function()
    local c = load{ 1, 3, -inf, 3, 2 }
    assert.equal(4, #c)
    assert.same({ 1, 3, 4, 0 }, ids(c))
    assert.equal(2.0, c:logit(3))
    local z = math.exp(1) + 2 * math.exp(3) + math.exp(2)
    assert.near(math.exp(2) / z, c:p(3), 1e-12)
  end)

  it("sorts as deep as one looks, in any order of looking", function()
    local values, order = ordered(3, 5000, 700, 8)
    for _, first in ipairs{ 1, 64, 65, 600, 4999, 5000 } do
      local c = load(values)
      assert.equal(order[first], c:id(first))
      assert.equal(order[1], c:id(1))
      assert.same(order, ids(c))
    end
    local rising = {}
    for i = 1, 2000 do rising[i] = i end
    assert.equal(1000, load(rising):id(1000))
  end)

  it("leaves out ids from n_vocab on", function()
    local c = load({ 1, 2, 9, 9 }, 2)
    assert.same({ 1, 0 }, ids(c))
    assert.same({ 1, 0 }, ids(load({ 1, 2 }, 100)))
    assert.same({ 0 }, ids(load({ 1, nan }, 1))) -- what is not a token need not be a number
  end)

  it("refuses what has no probabilities", function()
    local c, rng = core.candidates(), core.rng(1)
    local ok, message, code = c:load(view{ 1, nan }, rng)
    assert.is_nil(ok)
    assert.equal("logits are NaN at id 1", message)
    assert.equal("range", code)
    assert.has_error(function() return #c end)
    local empty = "no token is left: all logits are -inf"
    assert.equal(empty, select(2, c:load(view{ -inf, -inf }, rng)))
    assert.equal(empty, select(2, c:load(view{ -inf, 3 }, rng, 1)))
    assert.equal("no logits", select(2, c:load(view{}, rng)))
    assert.truthy(c:load(view{ 1 }, rng))
  end)

  it("is only valid between load and release", function()
    local c = load{ 1, 2 }
    c:release()
    assert.error_matches(function() c:id(1) end, "only valid during")
    assert.error_matches(function() return #c end, "only valid during")
    c:close()
    c:close()
    assert.error_matches(function() c:top_k(1) end, "only valid during")
  end)

  it("keeps ties of the k-th, and exactly n with keep", function()
    local c = load{ 5, 1, 4, 4, 4, 0 }
    c:top_k(2)
    assert.same({ 0, 2, 3, 4 }, ids(c))
    c:keep(2)
    assert.same({ 0, 2 }, ids(c))
    c:keep(100)
    c:top_k(100)
    c:top_k(0)
    assert.equal(2, #c)
    c = load{ 5, 1, 4, 4, 4, 0 }
    assert.equal(4, c:id(4)) -- sorted deeper than k before the cut
    c:top_k(2)
    assert.same({ 0, 2, 3, 4 }, ids(c))
  end)

  it("cuts at the mass, keeping at least one", function()
    local quarters = { 0, math.log(2), 0, -inf }
    local c = load(quarters)
    c:top_p(0)
    assert.same({ 1 }, ids(c))
    c = load(quarters)
    c:top_p(0.6)
    assert.same({ 1, 0 }, ids(c))
    assert.near(2 / 3, c:p(1), 1e-7) -- renormalised
    c = load(quarters)
    c:top_p(1)
    assert.equal(3, #c)
    c = load{ 7 }
    c:top_p(0.5)
    c:typical_p(0.5)
    c:min_p(1)
    assert.equal(1, #c)
  end)

  it("cuts and picks among many as sorting them all does", function()
    for _, spread in ipairs{ 0.3, 4, 40 } do
      local rng, list, values, z = core.rng(5), {}, {}, 0
      for i = 1, 6000 do
        values[i] = string.unpack("<f", string.pack("<f", spread * math.log(rng:uniform() + 1e-9)))
        list[i] = { id = i - 1, x = values[i] }
        z = z + math.exp(values[i])
      end
      table.sort(list, function(a, b) return a.x > b.x or (a.x == b.x and a.id < b.id) end)
      for _, p in ipairs{ 0.05, 0.5, 0.9, 0.999 } do
        local want, mass = {}, 0
        while mass < p do
          want[#want + 1] = list[#want + 1].id
          mass = mass + math.exp(list[#want].x) / z
        end
        local c = load(values)
        if p > 0.5 then assert.equal(want[3], c:id(3)) end -- some are in order already
        c:top_p(p)
        assert.same(want, ids(c))
        c = load(values)
        if p > 0.5 then c:temperature(1) end
        assert.equal(want[#want], c:pick(p))
      end
    end
  end)

  -- Stages by their definition: lists of { id =, x = }, sorted again by each.
  local reference = {}

  local function sorted(list)
    table.sort(list, function(a, b) return a.x > b.x or (a.x == b.x and a.id < b.id) end)
    return list
  end

  local function weights(list)
    local z, p = 0, {}
    for i, e in ipairs(list) do
      p[i] = math.exp(e.x - list[1].x)
      z = z + p[i]
    end
    for i in ipairs(p) do p[i] = p[i] / z end
    return p
  end

  local function head(list, keeps)
    local n = 0
    while n < #list and keeps(n + 1, list[n + 1]) do n = n + 1 end
    return table.move(list, 1, n, 1, {})
  end

  function reference.temperature(list, t)
    for _, e in ipairs(list) do e.x = e.x / t end
    return list
  end

  function reference.top_k(list, k)
    local last = list[math.min(k, #list)].x
    return head(list, function(_, e) return e.x >= last end)
  end

  function reference.top_p(list, p)
    local mass, w = 0, weights(list)
    return head(list, function(i)
      mass = mass + w[i]
      return mass - w[i] < p
    end)
  end

  function reference.min_p(list, p)
    local floor = list[1].x + math.log(p)
    return head(list, function(_, e) return e.x >= floor end)
  end

  function reference.typical_p(list, p)
    local w, entropy, by_id, mass, last = weights(list), 0, {}, 0, nil
    for i in ipairs(w) do entropy = entropy - w[i] * math.log(w[i]) end
    for i, e in ipairs(list) do by_id[e.id] = math.abs(-math.log(w[i]) - entropy) end
    local near, kept = table.move(list, 1, #list, 1, {}), {}
    table.sort(near, function(a, b) return by_id[a.id] < by_id[b.id] end)
    local p_of = {}
    for i, e in ipairs(list) do p_of[e.id] = w[i] end
    for _, e in ipairs(near) do
      if mass >= p and by_id[e.id] > last + 1e-9 then break end
      mass, last = mass + p_of[e.id], by_id[e.id]
      kept[#kept + 1] = e
    end
    return sorted(kept)
  end

  local function counts(seen)
    local n = {}
    for _, id in ipairs(seen) do n[id] = (n[id] or 0) + 1 end
    return n
  end

  function reference.penalty(list, seen, presence, frequency)
    local n = counts(seen)
    for _, e in ipairs(list) do
      if n[e.id] then e.x = e.x - (n[e.id] * frequency + presence) end
    end
    return sorted(list)
  end

  function reference.repetition_penalty(list, r, prompt, output)
    local n = counts(table.move(output, 1, #output, #prompt + 1,
      table.move(prompt, 1, #prompt, 1, {})))
    for _, e in ipairs(list) do
      if n[e.id] then e.x = e.x > 0 and e.x / r or e.x * r end
    end
    return sorted(list)
  end

  function reference.bias(list, by_id)
    local kept = {}
    for _, e in ipairs(list) do
      e.x = e.x + (by_id[e.id] or 0)
      if e.x > -inf then kept[#kept + 1] = e end
    end
    return sorted(kept)
  end

  it("narrows many as the definitions do, in any order of stages", function()
    local rng = core.rng(11)
    local function draw_ids(n)
      local out = {}
      for i = 1, n do out[i] = math.floor(rng:uniform() ^ 3 * 2100) - 20 end
      return out
    end
    local stages = {
      function() return "temperature", 0.3 + rng:uniform() end,
      function() return "temperature", 2 + rng:uniform() end,
      function() return "top_k", 1 + math.floor(1000 ^ rng:uniform()) end,
      function() return "top_p", 0.5 + rng:uniform() / 2 end,
      function() return "min_p", 10 ^ (-1 - 3 * rng:uniform()) end,
      function() return "typical_p", 0.5 + rng:uniform() / 2 end,
      function() return "penalty", draw_ids(200), 1.5, 0.25 end,
      function() return "repetition_penalty", 1.3, draw_ids(300), draw_ids(20) end,
      function() return "bias", { [3] = 8.5, [700] = -inf, [1999] = 0.125, [5000] = 1 } end,
    }
    for round = 1, 60 do
      local values, list = {}, {}
      local spread, levels = ({ 0.05, 1, 3, 20 })[round % 4 + 1], round % 3 == 0 and 8 or 1e6
      for i = 1, 2000 do
        local x = spread * math.log(math.floor(rng:uniform() * levels + 1) / levels)
        values[i] = rng:uniform() < 0.02 and -inf or string.unpack("<f", string.pack("<f", -x))
        if values[i] > -inf then list[#list + 1] = { id = i - 1, x = values[i] } end
      end
      local c, log = load(values), {}
      sorted(list)
      for _ = 1, 1 + round % 5 do
        local call = table.pack(stages[1 + math.floor(rng:uniform() * #stages)]())
        log[#log + 1] = call[1]
        if rng:uniform() < 0.3 then c:id(1 + math.floor(rng:uniform() * #c)) end
        list = reference[call[1]](list, table.unpack(call, 2, call.n))
        c[call[1]](c, table.unpack(call, 2, call.n))
        assert.equal(#list, #c, table.concat(log, " "))
      end
      local w, entropy, want = weights(list), 0, {}
      for i, e in ipairs(list) do
        want[i] = e.id
        if w[i] > 0 then entropy = entropy - w[i] * math.log(w[i]) end
      end
      assert.near(entropy, c:entropy(), 1e-6, table.concat(log, " "))
      local u, mass, at = rng:uniform(), 0, 0
      while mass < u and at < #list do at, mass = at + 1, mass + w[at + 1] end
      if round % 2 == 0 then assert.same(want, ids(c), table.concat(log, " ")) end
      assert.equal(list[at].id, c:pick(u), table.concat(log, " "))
    end
  end)

  it("keeps all of many that are equally likely, and draws among them by id", function()
    local values = {}
    for i = 1, 5000 do values[i] = 2.5 end
    local c = load(values)
    c:typical_p(0.3)
    assert.equal(5000, #c)
    c:top_p(0.5)
    assert.equal(2500, #c)
    c = load(values)
    c:temperature(0.7)
    assert.equal(1234, c:pick(1234.5 / 5000))
  end)

  it("bears any temperature among many", function()
    local big, values = 3.4028234663852886e38, {}
    for i = 1, 1000 do values[i] = i % 2 == 0 and -big or big / 3 end
    values[501] = big
    for _, t in ipairs{ 0, 1e-90, 1e-3, 1 } do
      local c = load(values)
      c:temperature(t)
      assert.equal(500, (c:pick(0.999)))
    end
    local c = load(values)
    c:temperature(1e90)
    c:top_p(0.5)
    assert.equal(500, #c)
  end)

  it("is divided by one temperature after the other", function()
    local c = load{ 4, 2, 0, -inf }
    c:temperature(2)
    assert.equal(2.0, c:logit(1))
    c:temperature(0.5)
    c:top_k(2)
    assert.equal(4.0, c:logit(1))
    c:temperature(2)
    assert.near(1 / (1 + math.exp(-1)), c:p(1), 1e-12)
    c:temperature(2)
    c:set(2, 7)
    assert.equal(1.0, c:logit(1))
    c:top_k(1)
    assert.equal(1, c:id(1))
    assert.equal(7.0, c:logit(1))
  end)

  it("drops below a share of the best", function()
    local c = load{ math.log(10), math.log(5.01), math.log(4.99), 0 }
    c:min_p(0.5)
    assert.same({ 0, 1 }, ids(c))
    c = load{ 2, 2, 1 }
    c:min_p(1)
    assert.same({ 0, 1 }, ids(c))
  end)

  it("takes the typical ones, not the top ones", function()
    -- p = 1/2, 1/8 x 4: entropy 2 bits; -log2 p is 1 and 3: equally far, all are ties
    local c = load{ math.log(4), 0, 0, 0, 0 }
    c:typical_p(0.9)
    assert.equal(5, #c)
    -- p = 0.9 and ten of 0.01: the surprise 0.105 is nearer to the entropy 0.555 than 4.6 is
    local values = { math.log(90) }
    for i = 2, 11 do values[i] = 0 end
    c = load(values)
    c:typical_p(0.5)
    assert.same({ 0 }, ids(c))
    -- p = 0.4 and sixty of 0.01: surprise 0.92 and 4.6, entropy 3.13
    values = { math.log(40) }
    for i = 2, 61 do values[i] = 0 end
    c = load(values)
    c:typical_p(0.5)
    assert.equal(60, #c)
    assert.equal(1, c:id(1))
    assert.near(1 / 60, c:p(1), 1e-9)
  end)

  it("bears any temperature", function()
    local big = 3.4028234663852886e38
    for _, t in ipairs{ 0, 1e-300, 1e-90, 1e-3 } do
      local c = load{ 1, 20, 19, -big, 20 }
      c:temperature(t)
      assert.equal(1, c:id(1))
      assert.near(t < 1e-100 and 1 or 0.5, c:p(1), 1e-9)
    end
    local c = load{ big, -big, big / 2 }
    c:temperature(1e-90)
    c:top_p(0.99)
    assert.same({ 0 }, ids(c))
    c = load{ big, -big }
    c:temperature(1e90)
    assert.near(0.5, c:p(1), 1e-9)
  end)

  it("penalises what was seen", function()
    local c = load{ 2, -2, 4, 1 }
    c:repetition_penalty(2, { 0, 0, 99 }, { 1, -5 })
    assert.same({ 2, 0, 3, 1 }, ids(c))
    assert.equal(1.0, c:logit(2))
    assert.equal(-4.0, c:logit(4))
    c = load{ 2, -2, 4, 1 }
    c:repetition_penalty(2, { 0, 1 }, { 2, 3 }, 3) -- the last three: 1, 2, 3
    assert.same({ 2.0, 2.0, 0.5, -4.0 }, { c:logit(1), c:logit(2), c:logit(3), c:logit(4) })
    c = load{ 5, 5, 5 }
    c:penalty({ 1, 2, 2, 2, 77 }, 0.5, 0.25)
    assert.same({ 0, 1, 2 }, ids(c))
    assert.same({ 5.0, 4.25, 3.75 }, { c:logit(1), c:logit(2), c:logit(3) })
    c:penalty({}, 1, 1) -- and the marks of the call before are gone
    assert.equal(5.0, c:logit(1))
  end)

  it("biases, and rules out with -inf", function()
    local c = load{ 1, 2, 3, 4 }
    c:bias{ [0] = 10, [3] = -inf, [99] = 5 }
    assert.same({ 0, 2, 1 }, ids(c))
    assert.equal(11.0, c:logit(1))
    assert.error_matches(function() c:bias{ x = 1 } end, "not a token id")
    assert.error_matches(function() c:bias{ [1] = inf } end, "bias of id 1")
    assert.error_matches(function() c:bias{ [1] = nan } end, "bias of id 1")
    assert.equal(3, #c)
  end)

  it("lets scripts set logits; positions hold until the next stage", function()
    local c = load{ 1, 2, 3, 4 }
    for i = 1, #c do c:set(i, -c:logit(i)) end
    assert.same({ 3, 2, 1, 0 }, ids(c))
    assert.near(math.exp(-1) / (math.exp(-1) + math.exp(-2) + math.exp(-3) + math.exp(-4)),
      c:p(4), 1e-12)
    c:keep(3)
    assert.same({ 0, 1, 2 }, ids(c))
    c:set(2, -inf)
    assert.equal(3, #c)
    assert.equal(0.0, c:p(2))
    c:top_p(1)
    assert.same({ 0, 2 }, ids(c))
    assert.error_matches(function() c:set(1, nan) end, "not in")
    assert.error_matches(function() c:set(1, inf) end, "not in")
    assert.error_matches(function() c:set(3, 0) end, "position 3 is not in 1..2")
  end)

  it("filters by a function", function()
    local c = load{ 1, 2, 3, 4 }
    c:filter(function(id, logit, p) return id ~= 3 and logit > 1 and p < 0.9 end)
    assert.same({ 2, 1 }, ids(c))
    assert.error_matches(function() c:filter(function() error("no") end) end, "no")
    assert.error_matches(function() c:filter(function() c:keep(1) end) end, "inside filter")
    assert.same({ 2 }, ids(c))
    c:filter(function() return false end)
    assert.equal(0, #c)
    local id, message, code = c:pick()
    assert.is_nil(id)
    assert.equal("no candidate is left", message)
    assert.equal("range", code)
    for _, stage in ipairs{ "temperature", "top_k", "top_p", "min_p", "typical_p", "keep" } do
      c[stage](c, 1)
      c[stage](c, stage == "top_k" and 3 or stage == "keep" and 2 or 0.5)
    end
    assert.equal(0, c:entropy())
  end)

  it("picks by cumulated mass, best first", function()
    local values = { 0, math.log(2), -inf, 0 } -- 1: 0.5, 0: 0.25, 3: 0.25
    for u, want in pairs{ [0] = 1, [0.49] = 1, [0.51] = 0, [0.74] = 0, [0.76] = 3, [0.999] = 3 } do
      local c = load(values)
      assert.equal(want, c:pick(u))
      assert.equal(1, #c)
      assert.equal(want, c:id(1))
      assert.equal(1.0, c:p(1))
    end
    -- never what has no probability, even where rounding leaves the mass short of u
    local c = load{ 0, 0, 0, -2000, -2000 }
    assert.equal(2, c:pick(0x1.fffffffffffffp-1))
    assert.error_matches(function() c:pick(1) end, "less than 1")
    assert.error_matches(function() c:pick(-0.1) end, "not in")
  end)

  it("raises on parameters out of range", function()
    local c = load{ 1, 2 }
    for _, call in ipairs{
      { "temperature", -1 }, { "temperature", nan }, { "top_k", -1 }, { "top_p", 1.5 },
      { "min_p", -0.1 }, { "typical_p", 2 }, { "repetition_penalty", 0, {}, {} }, { "keep", 0 },
      { "repetition_penalty", 1.1, {}, {}, -1 }, { "repetition_penalty", 1.1, {} },
      { "penalty", {}, nan, 0 }, { "penalty", { "x" }, 0, 0 },
    } do
      assert.has_error(function() c[call[1]](c, table.unpack(call, 2)) end)
    end
    assert.same({ 1, 0 }, ids(c))
  end)
end)

describe("rng", function()
  it("is xoshiro256** seeded by splitmix64", function()
    -- Reference C sources of Vigna (prng.di.unimi.it) give this for seed 1: splitmix64's first
    -- outputs as state, then the first result, of which uniform() shows the upper 53 bits.
    local function rotl(x, k) return x << k | x >> (64 - k) end
    local seed, s = 1, {}
    for i = 1, 4 do
      seed = seed + 0x9e3779b97f4a7c15
      local z = seed
      z = (z ~ z >> 30) * 0xbf58476d1ce4e5b9
      z = (z ~ z >> 27) * 0x94d049bb133111eb
      s[i] = z ~ z >> 31
    end
    assert.equal(0x910a2dec89025cc1, s[1]) -- splitmix64(1), as published widely
    local r = core.rng(1)
    for _ = 1, 5 do
      local result, t = rotl(s[2] * 5, 7) * 9, s[2] << 17
      s[3] = s[3] ~ s[1]
      s[4] = s[4] ~ s[2]
      s[2] = s[2] ~ s[3]
      s[1] = s[1] ~ s[4]
      s[3] = s[3] ~ t
      s[4] = rotl(s[4], 45)
      assert.equal((result >> 11) * 0x1p-53, r:uniform())
    end
  end)

  it("clones, and seeds itself when nobody does", function()
    local a = core.rng(7)
    a:uniform()
    local b = a:clone()
    assert.equal(a:uniform(), b:uniform())
    local c, d = core.rng(), core.rng()
    assert.not_equal(c:seed(), d:seed())
    assert.is_true(c:seed() >= 0)
    assert.equal(core.rng(c:seed()):uniform(), c:uniform())
  end)
end)
