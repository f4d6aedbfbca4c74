-- The definition of every storage mode against its published definition, and against what the
-- compressed-tensors library makes of its own files (spec/golden/ct).
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local numbers = require "spec.support.numbers"

local E2M1 = { [0] = 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0 }

local unfloats = numbers.unpack

local function floats(...)
  return numbers.pack { ... }
end

-- f32 bytes rounded to bf16 bytes, ties to even
local function to_bf16(bytes)
  local t = {}
  for i = 1, #bytes // 4 do
    local u = string.unpack("<I4", bytes, 4 * i - 3)
    t[i] = string.pack("<I2", u + 0x7fff + (u >> 16 & 1) >> 16)
  end
  return table.concat(t)
end

-- Codes as a little-endian bit stream, built one bit at a time.
local function packed(codes, bits)
  local bytes = {}
  for k, code in ipairs(codes) do
    for b = 0, bits - 1 do
      local at = (k - 1) * bits + b
      bytes[at // 8 + 1] = (bytes[at // 8 + 1] or 0) | (code >> b & 1) << (at % 8)
    end
  end
  return string.char(table.unpack(bytes))
end

local function e4m3(byte)
  local exp, man = byte >> 3 & 15, byte & 7
  if byte & 0x7f == 0x7f then return 0 / 0 end
  local v = exp == 0 and man * 2.0 ^ -9 or (8 + man) * 2.0 ^ (exp - 10)
  return byte >= 128 and -v or v
end

-- Equal, with NaN equal to NaN and zeros told apart.
local function same(want, got, where)
  local equal = want ~= want and got ~= got or want == got and (want ~= 0 or 1 / want == 1 / got)
  if not equal then error(("%s: %g expected, got %g"):format(where, want, got), 2) end
end

local function bytes_0_255()
  local t = {}
  for i = 0, 255 do t[i + 1] = string.char(i) end
  return table.concat(t)
end

describe("decode_rows", function()
  it("widens plain elements, also at odd addresses", function()
    local f32 = core.decode_rows { mode = "f32", rows = 2, cols = 2, row_bytes = 9,
      codes = floats(1.5, -0.0) .. "x" .. floats(1e-45, 3e38) .. "y" }
    assert.equal(floats(1.5, -0.0, 1e-45, 3e38), f32)
    local bf16 = core.decode_rows { mode = "bf16", rows = 2, cols = 2, row_bytes = 5,
      codes = string.pack("<I2I2", 0x3fc0, 0x8000) .. "x"
        .. string.pack("<I2I2", 0x0001, 0xff80) .. "y" }
    assert.same({ 1.5, -0.0, 2.0 ^ -133, -math.huge }, unfloats(bf16))
    local f16 = core.decode_rows { mode = "f16", rows = 1, cols = 6,
      codes = string.pack("<I2I2I2I2I2I2", 0x3e00, 0x8001, 0x7bff, 0x7c00, 0x0400, 0x03ff) }
    assert.same({ 1.5, -(2.0 ^ -24), 65504, math.huge, 2.0 ^ -14, 1023 * 2.0 ^ -24 },
      unfloats(f16))
  end)

  it("reads affine codes of 1 to 8 bits, each group with its own scale and bias", function()
    for bits = 1, 8 do
      local codes, n = {}, 48
      for k = 1, n do codes[k] = (k * 37 + k // 7) & ((1 << bits) - 1) end
      local got = unfloats(core.decode_rows { mode = "affine", bits = bits, rows = 1, cols = n,
        group = 16, codes = packed(codes, bits), scale_dtype = "f32", bias_dtype = "f32",
        scales = floats(0.5, -0.25, 3), biases = floats(-1, 2, 0.125) })
      for k = 1, n do
        local g = (k - 1) // 16 + 1
        same(({ 0.5, -0.25, 3 })[g] * codes[k] + ({ -1, 2, 0.125 })[g], got[k], "code " .. k)
      end
    end
  end)

  it("rounds the affine product before the sum", function()
    -- 3 * 0.1f = 0x1.333334p-2 + 2^-28: rounding it first loses the last bit of the exact sum.
    local scale = string.unpack("<f", floats(0.1))
    local product = string.unpack("<f", floats(3 * scale))
    assert.not_equal(3 * scale, product)
    local bias = string.unpack("<f", floats(-0.3))
    local got = unfloats(core.decode_rows { mode = "affine", bits = 8, rows = 1, cols = 1,
      group = 1, codes = "\3", scale_dtype = "f32", bias_dtype = "f32", scales = floats(scale),
      biases = floats(bias) })
    assert.equal(product + bias, got[1])
    assert.not_equal(string.unpack("<f", floats(3 * scale + bias)), got[1])
  end)

  it("takes one scale per row and scales and biases of different types", function()
    local got = core.decode_rows { mode = "affine", bits = 4, rows = 2, cols = 6, group = 6,
      row_bytes = 4, codes = "\x10\x32\x54\0" .. "\xfe\xdc\xba\0", scale_dtype = "f16",
      bias_dtype = "bf16", scales = string.pack("<I2I2", 0x3c00, 0xc000), -- 1, -2
      biases = string.pack("<I2I2", 0x4000, 0x3f80) } -- 2, 1
    assert.same({ 2, 3, 4, 5, 6, 7, -27, -29, -23, -25, -19, -21 }, unfloats(got))
  end)

  it("decodes all mxfp4 codes under all scales, 255 being NaN", function()
    local codes = {}
    for k = 0, 31 do codes[k + 1] = k % 16 end
    local got = unfloats(core.decode_rows { mode = "mxfp4", rows = 256, cols = 32, group = 32,
      codes = packed(codes, 4):rep(256), scales = bytes_0_255() })
    for b = 0, 255 do
      for k = 0, 31 do
        local v = E2M1[k % 8] * (k % 16 >= 8 and -1 or 1)
        local scale = b == 255 and 0 / 0 or 2.0 ^ (b - 127)
        local want = string.unpack("<f", floats(v * scale))
        same(want, got[b * 32 + k + 1], ("scale %d code %d"):format(b, k % 16))
      end
    end
  end)

  it("decodes all E4M3 codes, 0x7f and 0xff being NaN", function()
    local got = unfloats(core.decode_rows { mode = "mxfp8", rows = 1, cols = 256, group = 32,
      codes = bytes_0_255(), scales = ("\128"):rep(8) })
    for b = 0, 255 do same(2 * e4m3(b), got[b + 1], "byte " .. b) end
  end)

  it("decodes all nvfp4 scales and divides them by the divisor first", function()
    local codes = packed({ 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 }, 4):rep(256)
    local got = unfloats(core.decode_rows { mode = "nvfp4", rows = 1, cols = 4096, group = 16,
      codes = codes, scales = bytes_0_255(), divisor = 3 })
    for b = 0, 255 do
      local scale = string.unpack("<f", floats(e4m3(b) / 3))
      for k = 0, 15 do
        local v = E2M1[k % 8] * (k >= 8 and -1 or 1)
        same(string.unpack("<f", floats(scale * v)), got[b * 16 + k + 1], "scale " .. b)
      end
    end
  end)

  it("shares fp8 scales in tiles whose last row and column may be cut", function()
    local got = unfloats(core.decode_rows { mode = "fp8", rows = 3, cols = 5, group = 2,
      tile_rows = 2, codes = ("\x38"):rep(15), scale_dtype = "f32",
      scales = floats(1, 2, 3, 4, 5, 6) })
    assert.same({ 1, 1, 2, 2, 3, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6 }, got)
  end)

  it("refuses sizes that do not fit", function()
    local function with(more)
      local t = { mode = "affine", bits = 4, rows = 1, cols = 8, group = 4, codes = "abcd",
        scales = "abcd", biases = "abcd" }
      for k, v in pairs(more) do t[k] = v end
      return function() core.decode_rows(t) end
    end
    assert.no_error(with {})
    assert.error_matches(with { codes = "abc" }, "codes: 4 bytes expected, got 3")
    assert.error_matches(with { scales = "abc" }, "scales: 4 bytes expected, got 3")
    assert.error_matches(with { biases = "abcde" }, "biases: 4 bytes expected, got 5")
    assert.error_matches(with { bits = 9 }, "'bits'")
    assert.error_matches(with { group = 3 }, "'group' must divide 'cols'")
    assert.error_matches(with { group = 0 }, "'group'")
    assert.error_matches(with { rows = 1 << 40 }, "'rows'")
    assert.error_matches(with { rows = 0, codes = "" }, "'rows'")
    assert.error_matches(with { cols = 0, codes = "" }, "'cols'")
    assert.error_matches(with { row_bytes = 3 }, "'row_bytes'")
    assert.error_matches(with { mode = "affine2" }, "unknown value 'affine2'")
    assert.error_matches(with { mode = "mxfp4", scales = "ab" }, "this mode has no 'biases'")
    assert.error_matches(with { scale_dtype = "f64" }, "unknown value 'f64'")
    assert.error_matches(with { colour = 1 }, "unknown option 'colour'")
  end)
end)

describe("compressed-tensors files", function()
  local function info(tensors, name, kind)
    local t = tensors[name .. "." .. kind]
    return t and t.data, t and t.shape
  end

  -- MLX's affine form of symmetric or zero-pointed integers: bias = -scale * (zero + 2^(bits-1))
  local function integer_matrix(bits)
    return function(tensors, name)
      local rows, cols = string.unpack("<i8i8", (info(tensors, name, "weight_shape")))
      local codes = info(tensors, name, "weight_packed")
      local scales, shape = info(tensors, name, "weight_scale")
      local zeros = info(tensors, name, "weight_zero_point")
      local biases = {}
      for i = 0, rows * shape[2] - 1 do
        local zero = 1 << (bits - 1)
        if zeros then -- stored with the same offset, packed down the rows
          local row, g = i // shape[2], i % shape[2]
          local at = (row * bits // 32 * shape[2] + g) * 4
          zero = string.unpack("<I4", zeros, at + 1) >> (row * bits % 32) & 15
        end
        local scale = string.unpack("<f", "\0\0" .. scales:sub(2 * i + 1, 2 * i + 2))
        biases[i + 1] = string.pack("<f", -scale * zero)
      end
      return { mode = "affine", bits = bits, rows = rows, cols = cols, group = cols // shape[2],
        row_bytes = #codes // rows, codes = codes, scales = scales,
        biases = table.concat(biases), bias_dtype = "f32" }
    end
  end

  local function packed_matrix(mode, group, kind)
    return function(tensors, name)
      local codes, shape = info(tensors, name, kind)
      local divisor = info(tensors, name, "weight_global_scale")
      return { mode = mode, rows = shape[1], cols = shape[2] * (kind == "weight" and 1 or 2),
        group = group, codes = codes, scales = info(tensors, name, "weight_scale"),
        divisor = divisor and string.unpack("<f", divisor) }
    end
  end

  local function fp8_matrix(tile_rows, group)
    return function(tensors, name)
      local codes, shape = info(tensors, name, "weight")
      return { mode = "fp8", rows = shape[1], cols = shape[2], codes = codes,
        group = group or shape[2], tile_rows = tile_rows,
        scales = info(tensors, name, "weight_scale") }
    end
  end

  local folders = {
    ["fp8-block"] = fp8_matrix(128, 128),
    ["fp8-channel"] = fp8_matrix(1),
    ["int3-group32"] = integer_matrix(3),
    ["int4-group32"] = integer_matrix(4),
    ["int4-group64-asym"] = integer_matrix(4),
    ["int8-channel"] = integer_matrix(8),
    mxfp4 = packed_matrix("mxfp4", 32, "weight_packed"),
    mxfp8 = packed_matrix("mxfp8", 32, "weight"),
    nvfp4 = packed_matrix("nvfp4", 16, "weight_packed"),
  }

  for folder, matrix in pairs(folders) do
    it("decode as the library does: " .. folder, function()
      local tensors = checkpoint.read("spec/golden/ct/" .. folder .. "/model.safetensors")
      local golden = checkpoint.read("spec/golden/ct/decompressed-" .. folder .. ".safetensors")
      local n = 0
      for name, want in pairs(golden) do
        local module = name:match "^(layers%..+)%.weight$"
        if module then
          local exact = core.decode_rows(matrix(tensors, module))
          assert.equal(want.data, to_bf16(exact), folder .. " " .. name)
          n = n + 1
        end
      end
      assert.equal(6, n)
    end)
  end
end)
