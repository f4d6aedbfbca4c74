-- What a sampler asks of a whole row: every variant gives the same bits, those of the definition in
-- csrc/kern/row.h.
local core = require "moonlet.core"
local numbers = require "spec.support.numbers"

local inf, nan = math.huge, 0 / 0
local FAR, PIECE, BLOCK = 88.0, 256, 64

local function f32(x) return (string.unpack("<f", string.pack("<f", x))) end

local function each_variant(fn)
  for _, variant in ipairs(core.kernels()) do
    fn(function(op, args) return core.kern_run(variant.name, op, args) end, variant.name)
  end
end

local function values_of(seed, n, scale)
  local list = numbers.rng(seed).floats(n, scale)
  for i, x in ipairs(list) do list[i] = f32(x) end
  return list
end

-- Sums by their definition, over terms that the kernel itself gives for distances.
local function sums(run, x, top, scale)
  local sum, weighted = 0, 0
  for first = 1, #x, PIECE do
    local d = {}
    for i = 1, PIECE do
      local a = x[first + i - 1]
      d[i] = a and math.max(0, math.min(FAR, f32((top - a) * scale))) or FAR
    end
    local t = numbers.unpack(run("row_terms", { x = numbers.pack(d) }))
    local lane, by_distance = {}, {}
    for j = 1, 8 do lane[j], by_distance[j] = 0, 0 end
    for i = 1, PIECE do
      local j = (i - 1) % 8 + 1
      lane[j] = lane[j] + t[i]
      by_distance[j] = by_distance[j] + f32(t[i] * d[i])
    end
    local function tree(l)
      return ((l[1] + l[5]) + (l[3] + l[7])) + ((l[2] + l[6]) + (l[4] + l[8]))
    end
    sum, weighted = sum + tree(lane), weighted + tree(by_distance)
  end
  return sum, weighted
end

describe("rows", function()
  it("have the largest of each block, and how many numbers are ruled out", function()
    for _, n in ipairs { 1, 15, 63, 64, 65, 500, 1023, 1024, 1025, 5000 } do
      local x, want, live = values_of(n, n, 9), {}, 0
      for i = 3, n, 7 do x[i] = -inf end
      for i = 1, n do
        local b = (i - 1) // BLOCK + 1
        want[b] = math.max(want[b] or -inf, x[i])
        live = live + (x[i] > -inf and 1 or 0)
      end
      each_variant(function(run, name)
        local tops, found, bad = run("row_scan", { x = numbers.pack(x) })
        assert.same(want, numbers.unpack(tops), name)
        assert.equal(live, found)
        assert.is_false(bad)
      end)
    end
  end)

  it("say whether a number is none or infinite, wherever it is", function()
    for _, at in ipairs { 1, 64, 1000, 1024, 1500, 2100 } do
      for _, wrong in ipairs { nan, -nan, inf } do
        local x = values_of(at, 2100, 1)
        x[at] = wrong
        each_variant(function(run, name)
          local _, _, bad = run("row_scan", { x = numbers.pack(x) })
          assert.is_true(bad, name)
        end)
      end
    end
  end)

  it("have terms within 1e-7 of exp", function()
    local rng = numbers.rng(5)
    for _ = 1, 40 do
      local d = {}
      for i = 1, PIECE do d[i] = f32(rng.uniform() * (i % 2 == 0 and FAR or 3)) end
      d[1], d[2] = 0, FAR
      local plain = core.kern_run("scalar", "row_terms", { x = numbers.pack(d) })
      local t = numbers.unpack(plain)
      for i = 1, PIECE do
        assert.near(math.exp(-d[i]), t[i], 1e-7 * math.exp(-d[i]) + 1.2e-38)
      end
      assert.equal(1.0, t[1])
      assert.equal(0.0, t[2])
      each_variant(function(run, name)
        assert.is_true(plain == run("row_terms", { x = numbers.pack(d) }), name)
      end)
    end
  end)

  it("are summed in the order that is defined", function()
    for _, n in ipairs { 1, 7, 255, 256, 257, 1000 } do
      for _, scale in ipairs { 1, 0.5, 1e30, 1e-30 } do
        local x, top = values_of(n, n, 12), -inf
        if n > 1 then x[n] = -inf end
        for _, a in ipairs(x) do top = math.max(top, a) end
        each_variant(function(run, name)
          local want, want_weighted = sums(run, x, top, f32(scale))
          local sum, weighted, alone = run("row_sums",
            { x = numbers.pack(x), top = top, scale = scale })
          assert.equal(want, sum, name)
          assert.equal(want_weighted, weighted, name)
          assert.equal(want, alone, name)
        end)
      end
    end
  end)
end)
