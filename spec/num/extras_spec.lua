-- What formats of compressed-tensors have that MLX's do not: integer zero points, a scale over the
-- whole matrix with a floor for those of groups, and fp8 with a scale per row. Compared with the
-- rules written out.
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local numbers = require "spec.support.numbers"

local floats, unfloats = numbers.pack, numbers.unpack

local function to_bf16(x)
  local u = string.unpack("<I4", string.pack("<f", x))
  return (string.unpack("<f", string.pack("<I4", (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000)))
end

local function deviates(n, centre)
  local rng, list = numbers.rng(7), {}
  for i = 1, n do list[i] = to_bf16(rng.uniform() + rng.uniform() - 1 + centre) end
  return list
end

local function half_even(x)
  local low = math.floor(x)
  local d = x - low
  if d == 0.5 then return low % 2 == 0 and low or low + 1 end
  return d < 0.5 and low or low + 1
end

local function f32(x) return (string.unpack("<f", string.pack("<f", x))) end

local function codes_of(bytes, n, bits)
  local out = {}
  for i = 0, n - 1 do
    local code = 0
    for b = 0, bits - 1 do
      local at = i * bits + b
      code = code | (bytes:byte(at // 8 + 1) >> at % 8 & 1) << b
    end
    out[i + 1] = code
  end
  return out
end

describe("affine with an integer zero point", function()
  for _, bits in ipairs { 2, 3, 4, 5, 6, 8 } do
    for _, centre in ipairs { 0, 0.4, -0.9, 3 } do
      it(("in %d bits around %g"):format(bits, centre), function()
        local w, top = deviates(32, centre), (1 << bits) - 1
        local parts = assert(core.quantize_tensor(floats(w), { rows = 1, cols = 32,
          mode = "affine", bits = bits, group = 32, zero_point = true }))
        local lo, hi = math.min(0, table.unpack(w)), math.max(0, table.unpack(w))
        local scale = f32(f32(hi - lo) / top)
        local zero = half_even(f32(-lo / scale))
        assert.equal(floats { scale }, parts.scales)
        assert.equal(f32(-(scale * zero)), unfloats(parts.biases)[1])
        for i, code in ipairs(codes_of(parts.weight, 32, bits)) do
          local want = half_even(f32(w[i] / scale)) + zero
          assert.equal(math.max(0, math.min(top, want)), code)
        end
      end)
    end
  end

  it("decodes to scale * (code - zero), zeros to zeros", function()
    local w = deviates(64, 0.2)
    w[5] = 0.0
    local o = { rows = 2, cols = 32, mode = "affine", bits = 4, group = 32, zero_point = true,
      dtype = "bf16" }
    local parts = assert(core.quantize_tensor(checkpoint.to_bf16(floats(w)), o))
    local scales = unfloats(checkpoint.widen(parts.scales))
    local biases = unfloats(parts.biases)
    o.dtype, o.scale_dtype = "f32", "bf16"
    local values = unfloats(assert(core.dequantize_tensor(parts, o)))
    for i, code in ipairs(codes_of(parts.weight, 64, 4)) do
      local g = (i - 1) // 32 + 1
      local zero = -biases[g] / scales[g]
      assert.equal(zero, math.floor(zero))
      assert.equal(scales[g] * (code - zero), values[i])
    end
    assert.equal(0.0, values[5])
  end)

  it("keeps a group of zeros", function()
    local o = { rows = 1, cols = 32, mode = "affine", bits = 4, group = 32, zero_point = true }
    local parts = assert(core.quantize_tensor(("\0"):rep(128), o))
    assert.equal(("\0"):rep(128), core.dequantize_tensor(parts, o))
  end)
end)

describe("affine around zero", function()
  for _, bits in ipairs { 2, 3, 4, 5, 6, 8 } do
    it(("in %d bits"):format(bits), function()
      local middle = 1 << bits - 1
      for _, centre in ipairs { 0, 0.4, -0.9 } do
        local w, largest = deviates(32, centre), 0
        for _, x in ipairs(w) do largest = math.max(largest, math.abs(x)) end
        local parts = assert(core.quantize_tensor(floats(w), { rows = 1, cols = 32,
          mode = "affine", bits = bits, group = 32, zero_point = "symmetric" }))
        local scale = f32(largest / (((1 << bits) - 1) / 2))
        assert.equal(floats { scale }, parts.scales)
        assert.equal(floats { -scale * middle }, parts.biases)
        for i, code in ipairs(codes_of(parts.weight, 32, bits)) do
          local want = half_even(f32(w[i] / scale)) + middle
          assert.equal(math.max(0, math.min(2 * middle - 1, want)), code)
        end
      end
    end)
  end
end)

describe("fp8 with a scale per row", function()
  it("has the row's maximum as 448", function()
    local w = deviates(3 * 20, 0.1) -- rows need not divide into anything
    for i = 41, 60 do w[i] = 0.0 end
    local o = { rows = 3, cols = 20, mode = "fp8", dtype = "f32" }
    local parts = assert(core.quantize_tensor(floats(w), o))
    local scales, values = unfloats(parts.scales), unfloats(core.dequantize_tensor(parts, o))
    for row = 0, 1 do
      local top = 0
      for i = row * 20 + 1, row * 20 + 20 do top = math.max(top, math.abs(w[i])) end
      assert.equal(f32(top / 448), scales[row + 1])
      for i = row * 20 + 1, row * 20 + 20 do
        -- three bits of mantissa, down to steps of 2^-9 of a scale
        local step = math.max(math.abs(w[i]) / 16, scales[row + 1] / 1024)
        assert.is_true(math.abs(values[i] - w[i]) <= step * 1.0001)
      end
    end
    assert.equal(1, scales[3])
    assert.equal(("\0"):rep(20), parts.weight:sub(41))
  end)
end)

describe("nvfp4 under a scale of the matrix", function()
  it("never has a group scale of zero if it has a least one", function()
    local w = {}
    for i = 1, 32 do w[i] = i <= 16 and 1e-9 or (i - 24) / 8 end
    local o = { rows = 1, cols = 32, mode = "nvfp4", global_scale = 1 }
    assert.equal("\0", assert(core.quantize_tensor(floats(w), o)).scales:sub(1, 1))
    o.least_scale = 0x20
    local parts = assert(core.quantize_tensor(floats(w), o))
    assert.equal("\x20\x7e", parts.scales)
    assert.equal(("\0"):rep(8), parts.weight:sub(1, 8))
    o.least_scale = nil
    local values = unfloats(core.dequantize_tensor(parts, o))
    assert.equal(1.0, values[32])
    assert.equal(0.0, values[1])
  end)
end)

describe("formats refuse", function()
  local function fails(more, text)
    local o = { rows = 1, cols = 32, group = 32 }
    for k, v in pairs(more) do o[k] = v end
    local parts, message = core.quantize_tensor(("\0"):rep(128), o)
    assert.is_nil(parts)
    assert.truthy(message:find(text, 1, true), message)
  end

  it("what only others have", function()
    fails({ mode = "mxfp4", zero_point = true }, "mxfp4 has no zero points")
    fails({ mode = "affine", bits = 1, zero_point = true }, "codes of one bit")
    fails({ mode = "fp8", least_scale = 1 }, "fp8 has no global scale")
    fails({ mode = "nvfp4", group = 16, least_scale = 0x7f }, "scale byte 127")
    fails({ mode = "nvfp4", group = 16, least_scale = -1 }, "scale byte 255")
    fails({ mode = "fp8", bits = 4 }, "fp8 is 8 bits with a scale per row of 32, not 4")
  end)
end)
