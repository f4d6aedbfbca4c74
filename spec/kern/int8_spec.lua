-- Products with 8-bit activations: every variant equals the plain C one to the bit, which equals
-- the definition written out here.

local core = require "moonlet.core"
local fast_linear = require "spec.support.fast_linear"
local numbers = require "spec.support.numbers"

local function shape_of(m)
  return ("%s %d g%d, %d x %d"):format(m.mode, m.bits, m.group, m.rows, m.cols)
end

--- A scale of an affine group, around 2^-6, or a bias, around -2^-4.
local function affine_number(rng, dtype, is_bias)
  if dtype == "f32" then
    return string.pack("<f", is_bias and -rng.uniform() / 8 or rng.uniform() / 64)
  elseif dtype == "f16" then
    return string.pack("<I2", (is_bias and 0xa800 or 0x2000) + math.floor(1024 * rng.uniform()))
  end
  return string.pack("<I2", (is_bias and 0xbd00 or 0x3c00) + math.floor(128 * rng.uniform()))
end

--- A matrix of random codes; biases are of the scales' type where no other is given.
local function matrix(rng, mode, bits, group, rows, cols, scale_dtype, bias_dtype)
  local m = { mode = mode, bits = bits, group = group, rows = rows, cols = cols,
    codes = rng.bytes(rows * cols * bits // 8), scale_dtype = scale_dtype,
    bias_dtype = bias_dtype or scale_dtype }
  local n, scales, biases = rows * cols // group, {}, {}
  for i = 1, n do
    if mode == "mxfp4" then
      scales[i] = string.char(math.floor(116 + 8 * rng.uniform()))
    elseif mode == "nvfp4" then
      scales[i] = string.char(math.floor(128 * rng.uniform() * 0.99))
    else
      scales[i] = affine_number(rng, m.scale_dtype, false)
      biases[i] = affine_number(rng, m.bias_dtype, true)
    end
  end
  m.scales = table.concat(scales)
  if mode == "affine" then m.biases = table.concat(biases) end
  return m
end

local formats = {
  { "mxfp4", 4, 32 }, { "nvfp4", 4, 16 }, { "affine", 4, 64, "bf16" }, { "affine", 8, 64, "bf16" },
  { "affine", 2, 32, "f16" }, { "affine", 3, 128, "bf16" }, { "affine", 5, 32, "f32" },
  { "affine", 6, 64, "f16" }, { "affine", 4, 96, "f32" }, { "affine", 8, 32, "f16" },
  { "affine", 1, 32, "f16" }, { "affine", 7, 64, "f32" }, { "affine", 2, 64, "bf16" },
  { "affine", 2, 64, "f16" }, { "affine", 3, 64, "f16", "bf16" }, { "affine", 2, 128, "f32" },
}

--- Calls f with matrices of every format in awkward shapes.
local function each_matrix(f)
  local rng = numbers.rng(21)
  for _, format in ipairs(formats) do
    local mode, bits, group, dtype, bias_dtype = table.unpack(format)
    local unit = math.max(group, 32)
    -- A thread takes 64 rows of up to 1024 columns at a time, 32 wider ones; then a few are left.
    for _, shape in ipairs { { 1, 1 }, { 5, 2 }, { 70, 3 }, { 17, 5 }, { 66, 8 }, { 3, 9 },
      { 35, 17 } } do
      local rows, units = table.unpack(shape)
      f(matrix(rng, mode, bits, group, rows, unit * units, dtype, bias_dtype), rng)
    end
  end
end

local run, compare = fast_linear.run, fast_linear.compare

--- A row as it is after the rounding to 8 bits, from the definition.
local function rounded(x)
  local out = {}
  for first = 1, #x, 32 do
    local largest = 0
    for k = first, first + 31 do largest = math.max(largest, math.abs(x[k])) end
    local scale = largest / 127
    for k = first, first + 31 do
      local q = largest > 0 and x[k] * (127 / largest) or 0
      local floor = math.floor(q)
      local rest = q - floor
      if rest > 0.5 or (rest == 0.5 and floor % 2 == 1) then floor = floor + 1 end
      out[k] = floor * scale
    end
  end
  return out
end

describe("int8 products", function()
  it("are those of the rounded activations", function()
    each_matrix(function(m, rng)
      if m.cols > 600 then return end
      local x = rng.floats(m.cols, 3)
      local w, q = numbers.unpack(core.decode_rows(m)), rounded(numbers.unpack(numbers.pack(x)))
      local y = numbers.unpack(run("scalar", m, numbers.pack(x), 1))
      for r = 0, m.rows - 1 do
        local sum, magnitude = 0, 0
        for k = 1, m.cols do
          sum = sum + w[r * m.cols + k] * q[k]
          magnitude = magnitude + math.abs(w[r * m.cols + k] * q[k])
        end
        -- Codes and biases of affine groups cancel; 2^-20 of what is added up covers that.
        assert.near(sum, y[r + 1], magnitude * 0x1p-19, shape_of(m))
      end
    end)
  end)

  it("have the same bits in every variant", function()
    each_matrix(function(m, rng)
      for _, n_x in ipairs { 1, 2, 3, 4, 5, 6, 8, 13, 24 } do
        compare(m, numbers.pack(rng.floats(n_x * m.cols)), n_x, "ordinary")
        compare(m, numbers.pack(rng.awkward(n_x * m.cols, 200)), n_x, "awkward")
      end
    end)
  end)

  it("give a token the same bits in any batch and on any number of threads", function()
    local rng = numbers.rng(22)
    for _, format in ipairs { formats[1], formats[3], formats[4] } do
      local m = matrix(rng, format[1], format[2], format[3], 77, 192, format[4])
      local x, one = {}, {}
      for t = 1, 30 do x[t] = numbers.pack(rng.floats(m.cols)) end
      for _, variant in ipairs(core.kernels()) do
        for t = 1, 30 do one[t] = run(variant.name, m, x[t], 1) end
        for n = 2, 30 do
          local y = run(variant.name, m, table.concat(x, "", 1, n), n, 1 + n % 3)
          assert.equal(table.concat(one, "", 1, n), y)
        end
      end
    end
  end)

  it("are not finite where x is not", function()
    local rng = numbers.rng(23)
    for _, format in ipairs(formats) do
      local m = matrix(rng, format[1], format[2], format[3], 5, 384, format[4], format[5])
      for _, bad in ipairs { 1 / 0, -1 / 0, 0 / 0 } do
        local x = rng.floats(m.cols)
        x[100] = bad
        for _, variant in ipairs(core.kernels()) do
          for _, n_x in ipairs { 1, 9 } do
            local ys = run(variant.name, m, numbers.pack(x):rep(n_x), n_x)
            for _, y in ipairs(numbers.unpack(ys)) do assert.is_true(y ~= y) end
          end
        end
      end
    end
  end)

  it("take zeros, what is next to zero, and the largest numbers", function()
    local rng = numbers.rng(24)
    for _, format in ipairs(formats) do
      local m = matrix(rng, format[1], format[2], format[3], 20, 768, format[4], format[5])
      for _, scale in ipairs { 0, 0x1p-149, 0x1p-126, 0x1p-100, 0x1p-101, 0x1p100, 0x1p127 } do
        compare(m, numbers.pack(rng.floats(6 * m.cols, scale)), 6, scale)
        compare(m, numbers.pack(rng.floats(11 * m.cols, scale)), 11, scale)
        compare(m, numbers.pack(rng.floats(m.cols, scale)), 1, scale)
      end
    end
  end)

  it("hold the largest sums there are", function()
    local rng = numbers.rng(29)
    for _, format in ipairs(formats) do
      local m = matrix(rng, format[1], format[2], format[3], 6, 768, format[4], format[5])
      for _, byte in ipairs { "\xff", "\x77" } do
        m.codes = byte:rep(#m.codes)
        for _, x in ipairs { 1, -1 } do
          compare(m, numbers.pack { x }:rep(7 * m.cols), 7, byte)
          compare(m, numbers.pack { x }:rep(m.cols), 1, byte)
        end
      end
    end
  end)

  it("take any scale there is", function()
    local rng = numbers.rng(25)
    for _, format in ipairs(formats) do
      local m = matrix(rng, format[1], format[2], format[3], 41, 768, format[4], format[5])
      m.scales = rng.bytes(#m.scales)
      if m.biases then m.biases = rng.bytes(#m.biases) end
      for _, n_x in ipairs { 1, 7, 21 } do
        compare(m, numbers.pack(rng.floats(n_x * m.cols)), n_x, "random scales")
      end
    end
  end)

  it("scale by powers of two up to where products are no longer normal numbers", function()
    local rng = numbers.rng(28)
    local m = matrix(rng, "mxfp4", 4, 32, 40, 256)
    for _, code in ipairs { 0, 1, 2, 3, 60, 126, 127, 128, 129, 190, 252, 253, 254, 255 } do
      m.scales = string.char(code):rep(#m.scales)
      for _, exponent in ipairs { -99, -62, -1, 0, 7, 8, 62, 120, 127 } do
        local x = rng.floats(7 * m.cols, 2.0 ^ exponent)
        compare(m, numbers.pack(x), 7, ("scale %d, x 2^%d"):format(code, exponent))
        for k = 33, 64 do x[k] = 0 end
        compare(m, numbers.pack(x), 7, ("scale %d, x 2^%d, some zeros"):format(code, exponent))
      end
    end
  end)

  it("run beside products in f32, sharing x", function()
    local rng = numbers.rng(26)
    local function dense(cols)
      return { mode = "bf16", bits = 16, rows = 9, cols = cols, codes = rng.bytes(18 * cols) }
    end
    local bf16, ragged = dense(128), dense(40)
    local a = matrix(rng, "mxfp4", 4, 32, 70, 128)
    local b = matrix(rng, "affine", 4, 64, 33, 128, "bf16")
    local x, other = numbers.pack(rng.floats(3 * 128)), numbers.pack(rng.floats(128))
    local matrices = { a, bf16, b, ragged, b, bf16, a }
    local xs = { x, x, x, numbers.pack(rng.floats(80)), other, other, x }
    for _, variant in ipairs(core.kernels()) do
      for threads = 1, 3 do
        local ys = core.kern_run(variant.name, "jobs",
          { matrices = matrices, xs = xs, threads = threads, fast = true })
        for i, m in ipairs(matrices) do
          assert.is_nil(numbers.difference(run(variant.name, m, xs[i], #xs[i] // (4 * m.cols)),
            ys[i]))
        end
      end
    end
  end)

  it("read the rows of a shared x that each picks", function()
    local rng = numbers.rng(27)
    local a = matrix(rng, "mxfp4", 4, 32, 70, 256)
    local b = matrix(rng, "affine", 8, 64, 33, 256, "bf16")
    local nine, other = {}, numbers.pack(rng.floats(2 * 256))
    for i = 1, 9 do nine[i] = numbers.pack(rng.floats(256)) end
    local x, matrices, xs, picks, chosen = table.concat(nine), {}, {}, {}, {}
    local function add(from, m, list)
      local i = #matrices + 1
      matrices[i], xs[i], picks[i] = m, from, false
      chosen[i] = from
      if not list then return end
      local rows, numbered = {}, {}
      for k, row in ipairs(list) do
        rows[k], numbered[k] = nine[row], string.pack("<i4", row - 1)
      end
      picks[i], chosen[i] = table.concat(numbered), table.concat(rows)
    end
    local several, one = { 9, 2, 2, 5, 1, 8, 7 }, { 4 }
    add(x, a, several)
    add(x, b, several)
    add(x, b, one)
    add(x, a)
    add(x, a, { 3, 9 })
    add(other, b)
    add(x, a, { 1, 2, 3, 4, 5, 6, 7, 8, 9 })
    for _, variant in ipairs(core.kernels()) do
      for threads = 1, 3 do
        local ys = core.kern_run(variant.name, "jobs",
          { matrices = matrices, xs = xs, picks = picks, threads = threads, fast = true })
        for i, m in ipairs(matrices) do
          local n_x = #chosen[i] // (4 * m.cols)
          assert.is_nil(numbers.difference(run(variant.name, m, chosen[i], n_x), ys[i]))
        end
      end
    end
  end)
end)
