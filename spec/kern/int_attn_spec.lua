-- Attention in integers: what csrc/kern/int_attn.h defines, worked out here in doubles and compared
-- with every variant, which agree with each other to the bit.
local core = require "moonlet.core"
local numbers = require "spec.support.numbers"
local pages_of = require "spec.support.kv_pages"

local PAGE <const>, PART <const> = 32, 64

local function f32(x) return (string.unpack("<f", string.pack("<f", x))) end

local function to_f16(pages)
  local list = {}
  for i, page in ipairs(pages) do list[i] = core.kern_run("scalar", "f16_encode", { x = page }) end
  return list
end

--- x[first .. last] in steps of the largest magnitude: codes by index, and their scale.
local function codes_of(x, first, last, steps)
  local a, codes = 0, {}
  for i = first, last do a = math.max(a, math.abs(x[i])) end
  for i = first, last do
    local scaled = a < 0x1p-100 and 0 or x[i] * f32(steps / a)
    local low = math.floor(scaled)
    local up = scaled - low > 0.5 or scaled - low == 0.5 and low % 2 == 1
    codes[i] = low + (up and 1 or 0)
  end
  return codes, a < 0x1p-100 and 0 or f32(a / steps)
end

local function part_scores(q, k, dim, factor)
  local s = 0
  for first = 1, dim, PART do
    local last = math.min(dim, first + PART - 1)
    local a, a_scale = codes_of(q, first, last, 127)
    local b, b_scale = codes_of(k, first, last, 127)
    local d = 0
    for i = first, last do d = d + a[i] * b[i] end
    s = s + d * b_scale * f32(a_scale * factor)
  end
  return s
end

local function row(t, i, dim) return table.move(t, i * dim + 1, (i + 1) * dim, 1, {}) end

--- One query's top, sum and out over n positions, and by how much a step of a weight moves out.
local function expected(q, keys, values, n, dim, factor)
  local s, top, sum, w, v_codes, out = {}, -1 / 0, 0, {}, {}, {}
  for j = 1, n do
    s[j] = part_scores(q, row(keys, j - 1, dim), dim, factor)
    top = math.max(top, s[j])
  end
  for j = 1, n do
    local e, codes, scale = math.exp(s[j] - top), codes_of(row(values, j - 1, dim), 1, dim, 2047)
    v_codes[j], sum, w[j] = codes, sum + e, e * scale
  end
  local p, scale = codes_of(w, 1, n, 4095)
  for i = 1, dim do
    out[i] = 0
    for j = 1, n do out[i] = out[i] + p[j] * v_codes[j][i] end
    out[i] = out[i] * scale
  end
  return out, top, sum, 2047 * scale
end

local function near(want, got, bound, what)
  local ok = math.abs(want - got) <= bound -- false for a NaN
  if not ok then
    error(("%s: %.9g, expected %.9g within %.3g"):format(what, got, want, bound), 2)
  end
end

local function compare(args, what)
  local want = table.pack(core.kern_run("scalar", "attend", args))
  for _, variant in ipairs(core.kernels()) do
    local got = table.pack(core.kern_run(variant.name, "attend", args))
    for i = 1, want.n do
      local difference = numbers.difference(want[i], got[i])
      if difference then
        error(("%s, %s, result %d: %s"):format(variant.name, what, i, difference), 2)
      end
    end
  end
  return table.unpack(want)
end

describe("attention in integers", function()
  it("is what its definition says", function()
    local rng = numbers.rng(31)
    local shapes = { { 1, 8 }, { 2, 64 }, { 33, 100 }, { 77, 128 }, { 256, 256 }, { 250, 72 } }
    for _, shape in ipairs(shapes) do
      local n, dim = table.unpack(shape)
      local keys, values, q = rng.floats(n * dim), rng.floats(n * dim, 3), rng.floats(dim, 4)
      for _, t in ipairs { keys, values, q } do
        for i, x in ipairs(t) do t[i] = f32(x) end
      end
      local want, want_top, want_sum, step = expected(q, keys, values, n, dim, f32(dim ^ -0.5))
      for _, variant in ipairs(core.kernels()) do
        local out, top, sum = core.kern_run(variant.name, "attend", { ints = true, n = n,
          dim = dim, keys = pages_of(keys, dim, n, true, 0 / 0),
          values = pages_of(values, dim, n, false, 0 / 0), q = numbers.pack(q),
          scale = dim ^ -0.5 })
        near(want_top, numbers.unpack(top)[1], 1e-5, variant.name .. " top")
        near(want_sum, numbers.unpack(sum)[1], 1e-5 * want_sum, variant.name .. " sum")
        for i, got in ipairs(numbers.unpack(out)) do
          -- where rounding meets a tie, f32 and doubles may differ by a step
          near(want[i], got, 2 * step, variant.name .. " out")
        end
      end
    end
  end)

  it("is the same bits in every variant, for numbers of every kind", function()
    local rng = numbers.rng(32)
    local function pages(kind, dim, f16, every)
      local list = {}
      for i = 1, 8 do list[i] = numbers.pack(rng[kind](PAGE * dim, every)) end
      return f16 and to_f16(list) or list
    end
    local lengths, turn = { 1, 2, 31, 32, 33, 100, 255, 256 }, 0
    for _, dim in ipairs { 1, 8, 16, 17, 40, 64, 65, 100, 128, 256 } do
      for _, f16 in ipairs { false, true } do
        for _, kind in ipairs { { "floats" }, { "awkward" }, { "awkward", 3000 } } do
          turn = turn + 1
          local n, n_q = lengths[turn % #lengths + 1], turn * 5 % 13 + 1
          local every = kind[2]
          compare({ ints = true, keys = pages(kind[1], dim, f16, every),
            values = pages(kind[1], dim, f16, every), f16 = f16, n = n,
            sees = n - (n > 7 and turn % 7 or 0), dim = dim,
            q = numbers.pack(rng[kind[1]](n_q * dim, every)), scale = dim ^ -0.5 },
            ("%d x %d x %d"):format(n, dim, n_q))
        end
      end
    end
  end)

  it("gives a query the same, whoever else is there and whatever is behind what it sees", function()
    local rng = numbers.rng(33)
    local dim, n, n_q = 72, 60, 15
    local keys, values = rng.floats(n * dim), rng.floats(n * dim)
    local args = { ints = true, dim = dim, n = n, sees = 41, scale = 0.2,
      keys = pages_of(keys, dim, n, true, 0), values = pages_of(values, dim, n, false, 0),
      q = numbers.pack(rng.floats(n_q * dim)) }
    local all = compare(args, "all")
    args.n, args.sees = 41, nil
    args.keys = pages_of(keys, dim, 41, true, 0 / 0)
    args.values = pages_of(values, dim, 41, false, 0 / 0)
    local queries = args.q
    for t = 0, n_q - 1 do
      args.q = queries:sub(t * dim * 4 + 1, (t + 1) * dim * 4)
      assert.equal(all:sub(t * dim * 4 + 1, (t + 1) * dim * 4), (compare(args, "alone")))
    end
  end)

  local function uniform(n, dim, change)
    local rng = numbers.rng(34)
    local args = { keys = rng.floats(n * dim), values = rng.floats(n * dim), q = rng.floats(dim) }
    change(args)
    return compare({ ints = true, dim = dim, n = n, scale = dim ^ -0.5,
      keys = pages_of(args.keys, dim, n, true, 0), values = pages_of(args.values, dim, n, false, 0),
      q = numbers.pack(args.q) }, "changed")
  end

  it("lets nothing that is not finite pass for a number", function()
    for _, what in ipairs { "keys", "values", "q" } do
      for _, x in ipairs { 1 / 0, -1 / 0, 0 / 0 } do
        local out = numbers.unpack((uniform(40, 72, function(args) args[what][70] = x end)))
        for i = 1, 72 do assert.is_true(out[i] ~= out[i], what) end
      end
    end
  end)

  it("stays finite with numbers as large and as small as there are", function()
    for _, x in ipairs { 3e38, -3e38, 0x1p-149, 0x1p-126, 0 } do
      local out = numbers.unpack((uniform(40, 72, function(args)
        args.values[70] = x
        for i = 1, 72 do args.keys[i] = 0 end
      end)))
      for i = 1, 72 do assert.is_true(out[i] - out[i] == 0, tostring(x)) end
    end
    local out = numbers.unpack((uniform(3, 8, function(args)
      for i = 1, 24 do args.values[i] = 0 end
    end)))
    assert.same({ 0, 0, 0, 0, 0, 0, 0, 0 }, out)
  end)
end)
