-- What encoding loses, by its definition: the weights of columns times the squared difference
-- between weights and what dequantize_tensor makes of quantize_tensor's bytes, in the units of
-- unscaled outputs.

local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local numbers = require "spec.support.numbers"

local ROWS, COLS = 96, 128
local dir, values

setup(function()
  dir, values = checkpoint.directory(), numbers.rng(3).floats(ROWS * COLS, 0.1)
  checkpoint.write(dir .. "/in.safetensors",
    { w = { dtype = "F32", shape = { ROWS, COLS }, data = numbers.pack(values) } })
end)

teardown(function() checkpoint.remove(dir) end)

local function damage(put, rows, threads)
  local writer <close> = assert(core.quant_open(dir .. "/in.safetensors", threads or 1))
  put.op, put.part_rows, put.cols = "encode", put.part_rows or ROWS, COLS
  put.parts = put.parts or { { name = "w", first_row = 0 } }
  return writer:damage(put, rows or ROWS)
end

-- Error and size of rows first .. last, with the scales and the weights of a part.
local function expected(format, first, last, part)
  local error, size = 0, 0
  local function scale(key, i) return part[key] and numbers.unpack(part[key])[i] or 1 end
  for r = first, last do
    local row, rows = {}, scale("row_scale", r - first + 1)
    for c = 1, COLS do row[c] = values[r * COLS + c] end
    row = numbers.unpack(numbers.pack(row))
    for c = 1, COLS do row[c] = row[c] * rows * scale("col_scale", c) end
    local bytes = numbers.pack(row)
    local options = { rows = 1, cols = COLS, dtype = "f32", mode = format.mode,
      bits = format.bits, group = format.group }
    if format.mode == "affine" then options.scale_dtype = "bf16" end
    local coded = assert(core.quantize_tensor(bytes, options))
    local back = numbers.unpack(assert(core.dequantize_tensor(coded, options)))
    row = numbers.unpack(bytes)
    for c = 1, COLS do
      local k = scale("weights", c) / rows ^ 2
      error, size = error + k * (back[c] - row[c]) ^ 2, size + k * row[c] ^ 2
    end
  end
  return error, size
end

local function near(want, got)
  assert.is_true(math.abs(got / want - 1) < 1e-5, got .. " " .. want)
end

local weights, columns = {}, {}
for c = 1, COLS do weights[c], columns[c] = c % 7 + 0.25, 0.5 + c % 5 end

describe("the damage of a put", function()
  for _, format in ipairs { { mode = "mxfp4", bits = 4, group = 32 },
    { mode = "nvfp4", bits = 4, group = 16 }, { mode = "mxfp8", bits = 8, group = 32 } } do
    it("is the weighted error of " .. format.mode, function()
      local part = { name = "w", first_row = 0, weights = numbers.pack(weights),
        col_scale = numbers.pack(columns) }
      local put = { parts = { part } }
      for k, v in pairs(format) do put[k] = v end
      local wrong, all = damage(put)
      local error, size = expected(format, 0, ROWS - 1, part)
      near(error, wrong[1])
      near(size, all[1])
    end)
  end

  it("is told part by part, rows in the units that they had", function()
    local rows = {}
    for r = 1, 48 do rows[r] = 2.0 ^ (r % 4 - 2) * 1.25 end
    local parts = { { name = "w", first_row = 48, row_scale = numbers.pack(rows) },
      { name = "w", first_row = 0 } }
    local wrong, all = damage { mode = "mxfp4", bits = 4, group = 32, part_rows = 48,
      parts = parts }
    for i, first in ipairs { 48, 0 } do
      local error, size = expected({ mode = "mxfp4", bits = 4, group = 32 }, first, first + 47,
        parts[i])
      near(error, wrong[i])
      near(size, all[i])
    end
  end)

  it("is that of fewer rows, evenly spaced, when asked", function()
    local wrong, all = damage({ mode = "mxfp4", bits = 4, group = 32 }, 20)
    local error, size = 0, 0
    for r = 0, ROWS - 1, 5 do
      local e, s = expected({ mode = "mxfp4", bits = 4, group = 32 }, r, r, {})
      error, size = error + e, size + s
    end
    near(error, wrong[1])
    near(size, all[1])
  end)

  it("is that of all rows when more are asked for than there are", function()
    local f = { mode = "mxfp4", bits = 4, group = 32 }
    assert.same({ damage(f) }, { damage(f, math.maxinteger) })
  end)

  it("is the same to the bit for every number of threads", function()
    local one, two = { damage { mode = "affine", bits = 3, group = 64 } },
      { damage({ mode = "affine", bits = 3, group = 64 }, nil, 2) }
    assert.same(one, two)
    assert.is_true(one[1][1] > 0 and one[1][1] < one[2][1])
  end)

  it("names what cannot be encoded", function()
    checkpoint.write(dir .. "/nan.safetensors", { w = { dtype = "F32", shape = { 2, 32 },
      data = ("\0"):rep(140) .. numbers.pack { 0 / 0 } .. ("\0"):rep(112) } })
    local writer <close> = assert(core.quant_open(dir .. "/nan.safetensors", 1))
    local wrong, message, code = writer:damage({ op = "encode", mode = "mxfp4", bits = 4,
      group = 32, part_rows = 2, cols = 32, parts = { { name = "w", first_row = 0 } } }, 2)
    assert.is_nil(wrong)
    assert.equal(dir .. "/nan.safetensors: tensor w row 1 column 3: nan cannot be written",
      (message:gsub("%-nan", "nan")))
    assert.equal("format", code)
  end)
end)

describe("the values of a put", function()
  it("are what would be rounded", function()
    local writer <close> = assert(core.quant_open(dir .. "/in.safetensors", 1))
    local got = numbers.unpack(assert(writer:values { op = "f32", part_rows = 1, cols = COLS,
      add = 1, subtract = 0.5,
      parts = { { name = "w", first_row = 3, col_scale = numbers.pack(columns) } } }))
    for c = 1, COLS do
      local want = (numbers.unpack(numbers.pack { values[3 * COLS + c] })[1] + 1) * columns[c] - 0.5
      assert.is_true(math.abs(want - got[c]) < 1e-6)
    end
  end)
end)
