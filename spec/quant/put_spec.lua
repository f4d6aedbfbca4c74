local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"

-- What one put makes of one F32 tensor [rows, cols]: the bytes of every entry.
local function put(values, cols, entries, job)
  local dir = checkpoint.directory()
  local _ <close> = setmetatable({}, { __close = function() checkpoint.remove(dir) end })
  local data = string.pack("<" .. ("f"):rep(#values), table.unpack(values))
  checkpoint.write(dir .. "/in.safetensors",
    { w = { dtype = "F32", shape = { #values // cols, cols }, data = data } })
  local writer <close> = assert(core.quant_open(dir .. "/in.safetensors", 1))
  assert(writer:create(dir .. "/out.safetensors", entries, "mlx"))
  job.cols, job.entry = cols, 1
  local ok, message, code = writer:put(job)
  if not ok then return nil, message, code end
  assert(writer:finish())
  return checkpoint.read(dir .. "/out.safetensors")
end

local function f32(...) return string.pack("<" .. ("f"):rep(select("#", ...)), ...) end

local function bf16_values(data)
  local out = {}
  for i = 1, #data, 2 do out[#out + 1] = string.unpack("<f", "\0\0" .. data:sub(i, i + 1)) end
  return out
end

describe("one tensor's put", function()
  local VALUES = { 1, 2, 3, 4, 5, 6, 7, 8 }

  it("scales rows and columns of every part by its own vectors", function()
    local got = put(VALUES, 2, { { name = "out", dtype = "BF16", shape = { 4, 2 } } }, {
      op = "bf16", part_rows = 2, parts = {
        { name = "w", first_row = 2, col_scale = f32(2, 0.5) },
        { name = "w", first_row = 0, row_scale = f32(4, -1), col_scale = f32(1, 3) },
      } })
    assert.same({ 10, 3, 14, 4, 4, 24, -3, -12 }, bf16_values(got.out.data))
  end)

  it("adds before the scales and subtracts behind them", function()
    local function norm(add, subtract)
      return bf16_values(put({ 0.5, -0.25, 0, 1 }, 4,
        { { name = "out", dtype = "BF16", shape = { 4 } } }, { op = "bf16", part_rows = 1,
          add = add, subtract = subtract,
          parts = { { name = "w", first_row = 0, col_scale = f32(2, 4, 0.5, 1) } } }).out.data)
    end
    assert.same({ 1, -1, 0, 1 }, norm())
    assert.same({ 3, 3, 0.5, 2 }, norm(1))
    assert.same({ 2, 2, -0.5, 1 }, norm(1, 1))
    assert.same({ 0, -2, -1, 0 }, norm(nil, 1))
  end)

  it("encodes what the scales make of the weights", function()
    local row, scaled, scales = {}, {}, {}
    for i = 1, 32 do
      row[i], scales[i] = math.sin(i), 2.0 ^ (i % 3)
      scaled[i] = row[i] * scales[i]
    end
    local function encode(values, col_scale)
      return put(values, 32, { { name = "w", dtype = "U32", shape = { 1, 4 } },
        { name = "s", dtype = "U8", shape = { 1, 1 } } }, { op = "encode", mode = "mxfp4",
        bits = 4, group = 32, part_rows = 1,
        parts = { { name = "w", first_row = 0, col_scale = col_scale } } })
    end
    assert.same(encode(scaled), encode(row, f32(table.unpack(scales))))
    assert.not_same(encode(row), encode(scaled))
  end)

  it("names the weight that a scale takes out of range", function()
    local got, message, code = put(VALUES, 4, { { name = "out", dtype = "BF16",
      shape = { 2, 4 } } }, { op = "bf16", part_rows = 2,
      parts = { { name = "w", first_row = 0, row_scale = f32(1, 1e38) } } })
    assert.is_nil(got)
    assert.matches("tensor w row 1 column 0: inf cannot be written", message)
    assert.equal("format", code)
  end)

  it("says that a finite weight is too large for bf16", function()
    local got, message = put({ 1, 3.4e38 }, 2, { { name = "out", dtype = "BF16",
      shape = { 1, 2 } } }, { op = "bf16", part_rows = 1,
      parts = { { name = "w", first_row = 0 } } })
    assert.is_nil(got)
    assert.matches("row 0 column 1: 3.4e%+38 cannot be written: it is too large for the format",
      message)
  end)

  it("names a weight whose range of one bit leaves bf16", function()
    local function one_bit(top)
      local row = {}
      for i = 1, 32 do row[i] = (-1) ^ i * top end
      return put(row, 32, { { name = "w", dtype = "U32", shape = { 1, 1 } },
        { name = "s", dtype = "BF16", shape = { 1, 1 } },
        { name = "b", dtype = "BF16", shape = { 1, 1 } } },
        { op = "encode", mode = "affine", bits = 1, group = 32, part_rows = 1,
          parts = { { name = "w", first_row = 0 } } })
    end
    local limit = 2.0 ^ 127 - 2.0 ^ 118 -- twice that is half a step above the largest bf16
    local got, message = one_bit(limit)
    assert.is_nil(got)
    assert.matches("tensor w row 0 column 0: ", message)
    assert.same({ 2.0 ^ 128 - 2.0 ^ 120 }, bf16_values(one_bit(limit - 2.0 ^ 104).s.data))
  end)

  it("raises on vectors of other lengths", function()
    for field, vector in pairs { col_scale = f32(1, 2, 3), row_scale = f32(1),
        importance = f32(1) } do
      assert.error_matches(function()
        put(VALUES, 2, { { name = "out", dtype = "BF16", shape = { 4, 2 } } }, { op = "bf16",
          part_rows = 4, parts = { { name = "w", first_row = 0, [field] = vector } } })
      end, "field '" .. field .. "': [24] floats expected")
    end
    assert.error_matches(function()
      put(VALUES, 2, { { name = "out", dtype = "BF16", shape = { 4, 2 } } }, { op = "bf16",
        part_rows = 4, parts = { { name = "w", first_row = 0, col_scale = 1 } } })
    end, "string of floats expected, got number")
  end)

  it("raises on importance that is no mean square", function()
    for _, bad in ipairs { math.huge, 0 / 0, -1 } do
      assert.error_matches(function()
        put(VALUES, 2, { { name = "out", dtype = "BF16", shape = { 4, 2 } } }, { op = "bf16",
          part_rows = 4, parts = { { name = "w", first_row = 0, importance = f32(1, bad) } } })
      end, "option 'importance': weight 1 is ")
    end
  end)

  it("raises on sizes and entries that are not there, however large", function()
    for _, n in ipairs { math.mininteger, -1, 0, 3, (1 << 62) + 2, math.maxinteger } do
      for _, field in ipairs { "part_rows", "cols", "first_row", "entry" } do
        local dir <close> = checkpoint.scope()
        checkpoint.write(dir.path .. "/in.safetensors", { w = { dtype = "F32",
          shape = { 2, 2 }, data = f32(1, 2, 3, 4) } })
        local writer <close> = assert(core.quant_open(dir.path .. "/in.safetensors", 1))
        assert(writer:create(dir.path .. "/out.safetensors",
          { { name = "out", dtype = "F32", shape = { 2, 2 } } }, "mlx"))
        local part = { name = "w", first_row = 0, col_scale = f32(1, 2) }
        local job = { op = "f32", part_rows = 2, cols = 2, entry = 1, parts = { part } }
        local into = field == "first_row" and part or job
        local valid = into[field] == n
        into[field] = n
        local done, result = pcall(writer.put, writer, job)
        assert.equal(valid, done and result == true, field .. " " .. n)
      end
    end
    assert.error_matches(function()
      put(VALUES, 2, {}, { op = "nothing", part_rows = 2, parts = {} })
    end, "field 'op': unknown value 'nothing'")
  end)

  it("does not let a copy be changed", function()
    local got, message = put(VALUES, 2, { { name = "out", dtype = "F32", shape = { 4, 2 } } },
      { op = "copy", part_rows = 4,
        parts = { { name = "w", first_row = 0, col_scale = f32(1, 2) } } })
    assert.is_nil(got)
    assert.matches("a copy has no scales", message)
  end)
end)

describe("a file that was left unfinished", function()
  local ENTRIES <const> = { { name = "a", dtype = "F32", shape = { 2 } },
    { name = "b", dtype = "F32", shape = { 2 } } }
  local dir, path

  before_each(function()
    dir = checkpoint.directory()
    path = dir .. "/out.safetensors"
    checkpoint.write(dir .. "/in.safetensors", {
      a = { dtype = "F32", shape = { 2 }, data = f32(1, 2) },
      b = { dtype = "F32", shape = { 2 }, data = f32(3, 4) } })
  end)
  after_each(function() checkpoint.remove(dir) end)

  local function copy(writer, i)
    return writer:put { op = "copy", parts = { { name = ENTRIES[i].name, first_row = 0 } },
      part_rows = 1, cols = 2, entry = i }
  end

  local function begin()
    local writer <close> = assert(core.quant_open(dir .. "/in.safetensors", 1))
    assert(writer:create(path, ENTRIES, "mlx"))
    assert(copy(writer, 1))
    assert(writer:sync())
  end

  it("is gone on with behind the tensors that are complete", function()
    begin()
    assert.is_nil(io.open(path))
    local writer <close> = assert(core.quant_open(dir .. "/in.safetensors", 1))
    assert(writer:create(path, ENTRIES, "mlx", 1))
    assert(copy(writer, 2))
    assert(writer:finish())
    local got = checkpoint.read(path)
    assert.equal(f32(1, 2), got.a.data)
    assert.equal(f32(3, 4), got.b.data)
    assert.is_nil(io.open(path .. ".partial"))
  end)

  it("is not finished while a tensor is missing", function()
    begin()
    local writer <close> = assert(core.quant_open(dir .. "/in.safetensors", 1))
    assert(writer:create(path, ENTRIES, "mlx", 1))
    local ok, message = writer:finish()
    assert.is_nil(ok)
    assert.matches("tensor b: 0 of 8 bytes were written", message)
  end)

  it("has to be the same file", function()
    begin()
    local writer <close> = assert(core.quant_open(dir .. "/in.safetensors", 1))
    local ok, message, code = writer:create(path, { ENTRIES[2], ENTRIES[1] }, "mlx", 1)
    assert.is_nil(ok)
    assert.equal(path .. ".partial: is not the beginning of this file", message)
    assert.equal("format", code)
    ok, message, code = writer:create(dir .. "/other.safetensors", ENTRIES, "mlx", 1)
    assert.is_nil(ok)
    assert.matches("other.safetensors.partial: No such file", message)
    assert.equal("io", code)
    ok, message, code = writer:create(path, ENTRIES, "mlx", 3)
    assert.is_nil(ok)
    assert.matches("3 of 2 tensors", message)
    assert.equal("range", code)
  end)
end)
