-- Products with activations in bf16: every variant equals the plain C one to the bit, which equals
-- the definition written out here.

local core = require "moonlet.core"
local fast_linear = require "spec.support.fast_linear"
local numbers = require "spec.support.numbers"

local LEAST <const> = 0x1p-126

local function u16(values) return string.pack("<" .. ("I2"):rep(#values), table.unpack(values)) end

--- rows x cols of codes that `next` gives one by one.
local function matrix(rows, cols, next)
  local parts = {}
  for r = 1, rows do
    local codes = {}
    for k = 1, cols do codes[k] = next() end
    parts[r] = u16(codes)
  end
  return { mode = "bf16", bits = 16, rows = rows, cols = cols, codes = table.concat(parts) }
end

local function bits_of(x) return (string.unpack("<I4", string.pack("<f", x))) end

--- A bf16 code near x: what is below its bits is cut off.
local function code_of(x) return bits_of(x) >> 16 end

local function value_of(code) return (string.unpack("<f", string.pack("<I4", code << 16))) end

--- Weights in (-1, 1).
local function ordinary(rng)
  return function() return code_of(2 * rng.uniform() - 1) end
end

--- Any sign and mantissa, exponents of which many products and sums lie about the least normal
-- number.
local function tiny(rng)
  return function()
    return math.floor(rng.uniform() * 2) << 15 | (62 + math.floor(rng.uniform() * 5)) << 7 |
      math.floor(rng.uniform() * 128)
  end
end

--- All codes there are: one in 128 is infinite or NaN, as many are subnormal or zero.
local function any(rng)
  return function() return math.floor(rng.uniform() * 65536) end
end

--- mxfp8 of any codes but NaN; scales in [least, most].
local function mxfp8(rng, rows, cols, least, most)
  local scales = {}
  for i = 1, rows * cols // 32 do
    scales[i] = string.char(least + math.floor(rng.uniform() * (most - least + 1)))
  end
  local codes = rng.bytes(rows * cols):gsub("[\x7f\xff]", "\x08")
  return { mode = "mxfp8", bits = 8, group = 32, rows = rows, cols = cols, codes = codes,
    scales = table.concat(scales) }
end

--- fp8 of any codes, tiles of some rows and a group of columns, scales of every dtype.
local function fp8(rng, rows, cols, group, tile_rows, dtype, any_scale)
  local n, scales = (rows + tile_rows - 1) // tile_rows * ((cols + group - 1) // group), {}
  for i = 1, n do
    local x = any_scale and rng.awkward(1, 2)[1] or rng.uniform() / 64
    scales[i] = dtype == "f32" and string.pack("<f", x) or u16 { code_of(x) }
  end
  local codes = rng.bytes(rows * cols)
  return { mode = "fp8", bits = 8, group = group, tile_rows = tile_rows, rows = rows, cols = cols,
    codes = any_scale and codes or codes:gsub("[\x7f\xff]", "\x08"), scale_dtype = dtype,
    scales = table.concat(scales) }
end

local run, compare = fast_linear.run, fast_linear.compare

--- Calls f in awkward shapes.
local function each_shape(f)
  for i, cols in ipairs { 32, 64, 96, 160, 512, 2048 } do
    f(({ 1, 3, 4, 17, 33, 70 })[(i + 2) % 6 + 1], cols)
  end
end

-- The arithmetic of the definition, in numbers that have 53 bits: exact where products of 8 bits
-- and 24-bit sums lie near one another, as they do here.

local function flushed(x)
  return math.abs(x) < LEAST and (1 / x < 0 and -0.0 or 0.0) or x
end

local function to_f32(x) return (string.unpack("<f", string.pack("<f", x))) end

local function add(w, x, sum) return flushed(to_f32(w * x + sum)) end

local function defined(w, x, first, cols)
  local lane = {}
  for j = 0, 15 do
    lane[j] = 0.0
    for k = 2 * j, cols - 1, 32 do
      lane[j] = add(w[first + k + 1], x[k + 2], lane[j])
      lane[j] = add(w[first + k], x[k + 1], lane[j])
    end
  end
  for _, half in ipairs { 8, 4, 2, 1 } do
    for j = 0, half - 1 do lane[j] = flushed(to_f32(lane[j] + lane[j + half])) end
  end
  return lane[0]
end

describe("bf16 products", function()
  it("are those of the definition", function()
    local rng = numbers.rng(41)
    each_shape(function(rows, cols)
      -- few bits and exponents, so that no sum has more than 53 bits
      local function weight() return code_of((math.floor(rng.uniform() * 512) - 256) / 64) end
      local m = matrix(rows, cols, weight)
      local w, x = {}, {}
      for i = 1, rows * cols do w[i - 1] = value_of(string.unpack("<I2", m.codes, 2 * i - 1)) end
      for k = 1, cols do x[k] = value_of(weight()) end
      local y = numbers.unpack(run("scalar", m, numbers.pack(x), 1))
      for r = 0, rows - 1 do assert.equal(defined(w, x, r * cols, cols), y[r + 1]) end
    end)
  end)

  it("have the weights of mxfp8 in them", function()
    local rng = numbers.rng(45)
    each_shape(function(rows, cols)
      local m = mxfp8(rng, rows, cols, 127, 127)
      local x = {}
      for k = 1, cols do x[k] = (math.floor(rng.uniform() * 64) - 32) / 32 end
      local w, decoded = {}, numbers.unpack(core.decode_rows(m))
      for i = 1, #decoded do w[i - 1] = decoded[i] end
      local y = numbers.unpack(run("scalar", m, numbers.pack(x), 1))
      for r = 0, rows - 1 do assert.equal(defined(w, x, r * cols, cols), y[r + 1]) end
    end)
  end)

  it("scale what groups of fp8 come to", function()
    local rng = numbers.rng(47)
    each_shape(function(rows, cols)
      local m, x = fp8(rng, rows, cols, 64, 2, "bf16"), {}
      for k = 1, cols do x[k] = (math.floor(rng.uniform() * 64) - 32) / 32 end
      local decoded = numbers.unpack(core.decode_rows(m))
      local y = numbers.unpack(run("scalar", m, numbers.pack(x), 1))
      for r = 0, rows - 1 do
        local sum, size = 0, 0
        for k = 1, cols do
          sum = sum + decoded[r * cols + k] * x[k]
          size = size + math.abs(decoded[r * cols + k] * x[k])
        end
        assert.near(sum, y[r + 1], size * 0x1p-20)
      end
    end)
  end)

  it("round x to even and take what is subnormal for zero", function()
    local m = matrix(1, 32, function() return 0 end)
    m.codes = u16 { 0x3f80 } .. m.codes:sub(3)
    local cases = { [0x3f808000] = 0x3f800000, [0x3f818000] = 0x3f820000, [0x3f808001] = 0x3f810000,
      [0xbf807fff] = 0xbf800000, [0x7f7f8000] = 0x7f800000, [0x007fffff] = 0,
      [0x00800000] = 0x00800000, [0x00008000] = 0, [0x7f800000] = 0x7f800000 }
    for from, to in pairs(cases) do
      local y = compare(m, string.pack("<I4", from) .. ("\0"):rep(124), 1, "one")
      assert.equal(to, (string.unpack("<I4", y)), ("%08x"):format(from))
    end
    local weight = matrix(1, 32, function() return 0x7f end) -- the largest subnormal one
    assert.equal(("\0"):rep(4), compare(weight, string.pack("<f", 1):rep(32), 1, "subnormal"))
  end)

  it("make zeros of sums that would be subnormal after rounding", function()
    local m = matrix(1, 32, function() return 0 end)
    m.codes = u16 { 0x0080, 0x0080 } .. m.codes:sub(5) -- 2^-126
    local function product(a, b)
      local x = { b, a }
      for i = 3, 32 do x[i] = 0 end
      return (string.unpack("<f", compare(m, numbers.pack(x), 1, "least")))
    end
    assert.equal(LEAST, product(1, 0))
    assert.equal(0, product(1 - 0x1p-8, 0))
    assert.equal(0, product(1, -0x1p-8)) -- the odd one comes first
    assert.equal(LEAST, product(1, -0x1p-25))
    assert.equal(0, product(1, -0x1.8p-25))
  end)

  it("have the same bits in every variant", function()
    local rng = numbers.rng(42)
    each_shape(function(rows, cols)
      for name, codes in pairs { ordinary = ordinary, tiny = tiny, any = any } do
        local m = matrix(rows, cols, codes(rng))
        for _, n_x in ipairs { 1, 2, 3, 4, 5, 37 } do
          compare(m, numbers.pack(rng.floats(n_x * cols)), n_x, name)
          compare(m, numbers.pack(rng.floats(n_x * cols, 0x1p-63)), n_x, name .. ", small")
          compare(m, numbers.pack(rng.awkward(n_x * cols, 200)), n_x, name .. ", awkward")
        end
      end
    end)
  end)

  it("have the same bits of mxfp8 in every variant, whatever scales and codes", function()
    local rng = numbers.rng(46)
    local ranges = { { 120, 130 }, { 10, 246 }, { 0, 12 }, { 244, 254 }, { 254, 255 }, { 60, 66 } }
    each_shape(function(rows, cols)
      for i, range in ipairs(ranges) do
        local m = mxfp8(rng, rows, cols, range[1], range[2])
        if i == 2 then m.codes = rng.bytes(rows * cols) end
        for _, n_x in ipairs { 1, 2, 4, 7, 35 } do
          compare(m, numbers.pack(rng.floats(n_x * cols)), n_x, "mxfp8 " .. i)
          compare(m, numbers.pack(rng.floats(n_x * cols, 0x1p-60)), n_x, "mxfp8, small " .. i)
          compare(m, numbers.pack(rng.awkward(n_x * cols, 200)), n_x, "mxfp8, awkward " .. i)
        end
      end
    end)
  end)

  it("have the same bits of fp8 in every variant, whatever scales and codes", function()
    local rng = numbers.rng(48)
    each_shape(function(rows, cols)
      for i, form in ipairs { { 128, 128, "f32" }, { 32, 1, "bf16" }, { 96, 3, "f16" },
        { 64, 1, "f32", true }, { 128, 2, "bf16", true } } do
        local m = fp8(rng, rows, cols, table.unpack(form))
        for _, n_x in ipairs { 1, 2, 4, 7, 35 } do
          compare(m, numbers.pack(rng.floats(n_x * cols)), n_x, "fp8 " .. i)
          compare(m, numbers.pack(rng.floats(n_x * cols, 0x1p-118)), n_x, "fp8, small " .. i)
          compare(m, numbers.pack(rng.awkward(n_x * cols, 200)), n_x, "fp8, awkward " .. i)
        end
      end
    end)
  end)

  it("give a token the same bits in any batch and on any number of threads", function()
    local rng = numbers.rng(43)
    local m, x, one = matrix(77, 192, ordinary(rng)), {}, {}
    for t = 1, 40 do x[t] = numbers.pack(rng.floats(m.cols)) end
    for _, variant in ipairs(core.kernels()) do
      for t = 1, 40 do one[t] = run(variant.name, m, x[t], 1) end
      for n = 2, 40 do
        local y = run(variant.name, m, table.concat(x, "", 1, n), n, 1 + n % 3)
        assert.equal(table.concat(one, "", 1, n), y)
      end
    end
  end)

  it("stand beside products in 8 bits and in f32", function()
    local rng = numbers.rng(44)
    local cols = 128
    local mxfp4 = { mode = "mxfp4", bits = 4, group = 32, rows = 70, cols = cols,
      codes = rng.bytes(70 * cols // 2), scales = ("\x78"):rep(70 * cols // 32) }
    local f32 = { mode = "f32", bits = 32, rows = 9, cols = cols,
      codes = numbers.pack(rng.floats(9 * cols)) }
    local bf16 = matrix(65, cols, ordinary(rng))
    local matrices = { bf16, f32, bf16, mxfp4, mxfp4, bf16, f32, bf16 }
    local shared, xs = numbers.pack(rng.floats(5 * cols)), {}
    for i = 1, #matrices do xs[i] = i > 6 and numbers.pack(rng.floats(i * cols)) or shared end
    for _, variant in ipairs(core.kernels()) do
      for threads = 1, 3, 2 do
        local ys = core.kern_run(variant.name, "jobs",
          { matrices = matrices, xs = xs, threads = threads, fast = true })
        for i, m in ipairs(matrices) do
          assert.equal(run(variant.name, m, xs[i], i > 6 and i or 5), ys[i])
        end
      end
    end
  end)
end)
