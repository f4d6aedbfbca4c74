-- quantize_tensor and dequantize_tensor: a worked example by hand, what each format costs, and
-- what is refused.
local core = require "moonlet.core"
local numbers = require "spec.support.numbers"

local floats, unfloats = numbers.pack, numbers.unpack

local function words(bytes)
  return (bytes:gsub("....", function(w) return ("%08x "):format((string.unpack("<I4", w))) end)
    :gsub(" $", ""))
end

local function hex(bytes)
  return (bytes:gsub(".", function(c) return ("%02x"):format(c:byte()) end))
end

local function fill(n, f)
  local t = {}
  for i = 1, n do t[i] = f(i - 1) end
  return t
end

-- Normal deviates rounded to bf16, as f32 values
local function gaussian(rng, n, sigma)
  return fill(n, function()
    local x = sigma * math.sqrt(-2 * math.log(1 - rng.uniform()))
      * math.cos(2 * math.pi * rng.uniform())
    local u = string.unpack("<I4", string.pack("<f", x))
    return (string.unpack("<f", string.pack("<I4", (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000)))
  end)
end

local function one_row(weights, options)
  options.rows, options.cols = 1, #weights
  return assert(core.quantize_tensor(floats(weights), options))
end

describe("the worked example, w = (i - 8) / 8 for i = 0 .. 31,", function()
  local w = fill(32, function(i) return (i - 8) / 8 end)

  -- bits -> scale (the bias is 2.875), words
  local affine = {
    [2] = { -1.4375, "5aaaaabf 00055555" },
    [3] = { -0.575, "6db76dbf 26db7249 00124a49" },
    [4] = { -2.875 / 11, "bccddeef 8899aabb 44556677 00112233" },
    [5] = { -0.125, "75be77df 3a56d7c6 35cf8465 c74254b6 00443214" },
    [6] = { -2.875 / 47, "77e7bf7f bb6fc73d 863967a6 1665b75f a30e4125 00210620" },
    [8] = { -2.875 / 189,
      "e6eef7ff c5cdd6de a4adb5bd 838c949c 636b737b 424a525a 2129313a 00081019" },
  }
  for bits, want in pairs(affine) do
    it("in affine " .. bits, function()
      local parts = one_row(w, { mode = "affine", bits = bits, group = 32 })
      assert.equal(string.pack("<f", want[1]), parts.scales)
      assert.equal(string.pack("<f", 2.875), parts.biases)
      assert.equal(want[2], words(parts.weight))
    end)
  end

  it("in mxfp4", function()
    local parts = one_row(w, { mode = "mxfp4" })
    assert.equal("7e", hex(parts.scales))
    assert.equal("89aaabcc 43222100 66555444 77766666", words(parts.weight))
    assert.is_nil(parts.biases)
    parts = one_row(w, { mode = "mxfp4", flavour = "cpu" }) -- no -0, ties to the smaller
    assert.equal("09", hex(parts.weight:sub(4, 4)))
  end)

  it("in mxfp8", function()
    local parts = one_row(w, { mode = "mxfp8" })
    assert.equal("78", hex(parts.scales))
    assert.equal("f0eeeceae8e4e0d800586064", hex(parts.weight:sub(1, 12)))
  end)

  it("in nvfp4", function()
    local parts = one_row(w, { mode = "nvfp4" })
    assert.equal("232f", hex(parts.scales))
    assert.equal("ff" .. "ee" .. "cd" .. "9b" .. "10" .. "43" .. "65" .. "76",
      hex(parts.weight:sub(1, 8)))
  end)

  it("in mxfp4 under the older exponent rule, which clips", function()
    local top = fill(32, function(i) return i == 0 and 3.5 or 0 end)
    local decoded = {}
    for _, rule in ipairs { "ceil", "nearest" } do
      local parts = one_row(top, { mode = "mxfp4", mx_rule = rule })
      decoded[rule] = unfloats(core.dequantize_tensor(parts,
        { rows = 1, cols = 32, mode = "mxfp4" }))[1]
    end
    assert.same({ ceil = 4, nearest = 3 }, decoded)
  end)
end)

describe("a group", function()
  it("of zeros is all zero codes", function()
    local zeros = fill(128, function() return 0 end)
    local affine = one_row(zeros, { mode = "affine" })
    assert.equal(("\0"):rep(64), affine.weight)
    assert.equal(string.pack("<ff", -1e-7, -1e-7), affine.scales)
    assert.equal(("\0"):rep(8), affine.biases)
    for mode, scale in pairs { mxfp4 = { "\0", "\127" }, mxfp8 = { "\0", "\127" },
      nvfp4 = { "\0", "\0" } } do
      for i, flavour in ipairs { "metal", "cpu" } do
        local parts = one_row(zeros, { mode = mode, flavour = flavour })
        assert.equal(("\0"):rep(#parts.weight), parts.weight)
        assert.equal(scale[i]:rep(#parts.scales), parts.scales, mode .. " " .. flavour)
      end
    end
  end)

  it("of negative weights has 0 as its maximum on Metal alone", function()
    local w = fill(32, function(i) return -1 - i / 32 end)
    local function scale(flavour)
      local parts = one_row(w, { mode = "affine", group = 32, flavour = flavour })
      assert.equal(string.pack("<f", -1.96875), parts.biases)
      return parts.scales
    end
    assert.equal(string.pack("<f", 0.13125), scale "metal")
    -- -1.96875 over the 30 steps of 0.0645833 that it takes to reach 0
    assert.equal(string.pack("<f", 0.065625), scale "cpu")
  end)

  it("with a scale below every E4M3 step loses its weights, not its sign rules", function()
    local w = fill(16, function(i) return i % 2 == 0 and -1e-4 or 1e-4 end)
    local parts = one_row(w, { mode = "nvfp4" })
    assert.equal("\0", parts.scales)
    assert.equal(("\8"):rep(8), parts.weight)
    assert.equal(("\0"):rep(8), one_row(w, { mode = "nvfp4", flavour = "cpu" }).weight)
  end)

  it("of nvfp4 under a tensor scale of 0 stands for zeros", function()
    local w = fill(16, function() return 0 end)
    local parts = one_row(w, { mode = "nvfp4", global_scale = 0 })
    assert.equal(("\0"):rep(8), parts.weight)
    parts = one_row(fill(16, function() return 1e-35 end), { mode = "nvfp4", global_scale = 1e-35 })
    local decoded = core.dequantize_tensor(parts,
      { rows = 1, cols = 16, mode = "nvfp4", global_scale = 1e-35 })
    assert.equal(floats(w), decoded)
  end)
end)

describe("half precision", function()
  it("of the input gives the codes of the widened weights and scales of its type", function()
    local w = gaussian(numbers.rng(3), 256, 1)
    local half, brain = {}, {}
    for i, x in ipairs(w) do
      local u = string.unpack("<I4", string.pack("<f", x))
      -- bf16 values of this size are f16 values too
      local exp = (u >> 23 & 255) - 112
      if exp < 1 or exp > 30 then exp, u = 0, 0 end
      half[i] = string.pack("<I2", u >> 16 & 0x8000 | exp << 10 | u >> 13 & 0x3ff)
      w[i] = exp > 0 and x or 0
    end
    local o = { rows = 2, cols = 128, mode = "affine", bits = 5, group = 32 }
    local function run(bytes, dtype)
      o.dtype = dtype
      return assert(core.quantize_tensor(bytes, o))
    end
    local f32, f16 = run(floats(w), "f32"), run(table.concat(half), "f16")
    assert.equal(f32.weight, f16.weight)
    for _, part in ipairs { "scales", "biases" } do
      assert.equal(2 * #f16[part], #f32[part])
      for i, want in ipairs(unfloats(f32[part])) do
        local h = string.unpack("<I2", f16[part], 2 * i - 1)
        local got = (1 + (h & 0x3ff) / 1024) * 2.0 ^ ((h >> 10 & 31) - 15)
        if h >= 0x8000 then got = -got end
        assert.is_true(math.abs(got - want) <= math.abs(want) * 2.0 ^ -11)
      end
    end
    for i, x in ipairs(w) do brain[i] = string.pack("<f", x):sub(3) end
    local bf16 = run(table.concat(brain), "bf16")
    assert.equal(f32.weight, bf16.weight)
    assert.equal(#f16.scales, #bf16.scales)
  end)
end)

-- Relative RMS error in percent of gaussian weights rounded to bf16 with bf16 scales; computed
-- with an independent implementation of the formats in numpy. A quantizer that is a little worse
-- or better than its definition is wrong. 3% of the error is allowed, three or more standard
-- deviations over samples of this size; where few groups clip and they make the error, that is 7%.
local budgets = {
  -- mode, options, error at sigma 0.02, at sigma 1, relative tolerance
  { "affine", { bits = 2 }, 39.4, 39.4 },
  { "affine", { bits = 3 }, 19.0, 19.0 },
  { "affine", { bits = 4 }, 9.10, 9.11 },
  { "affine", { bits = 4, group = 32 }, 8.10, 8.11 },
  { "affine", { bits = 5 }, 4.43, 4.43 },
  { "affine", { bits = 6 }, 2.21, 2.22 },
  { "affine", { bits = 8 }, 0.68, 0.73 },
  { "mxfp4", { mx_rule = "nearest" }, 11.71, 12.14 },
  { "mxfp4", {}, 11.84, 11.55 },
  { "mxfp8", { mx_rule = "nearest" }, 5.77, 7.52, 0.07 },
  { "mxfp8", {}, 2.66, 2.66 },
  { "nvfp4", {}, 10.31, 9.52 },
  { "nvfp4", { global_scale = true }, 9.50, 9.51 },
}

describe("round-trip error", function()
  local rng, rows, cols = numbers.rng(20), 64, 512
  local inputs = { [0.02] = gaussian(rng, rows * cols, 0.02), [1] = gaussian(rng, rows * cols, 1) }

  local function error_percent(w, mode, options)
    local o, top = { rows = rows, cols = cols, mode = mode, dtype = "bf16" }, 0
    local parts = {}
    for i, x in ipairs(w) do
      parts[i] = string.pack("<f", x):sub(3)
      top = math.max(top, math.abs(x))
    end
    for k, v in pairs(options) do o[k] = v end
    if o.global_scale then o.global_scale = top end
    local q = assert(core.quantize_tensor(table.concat(parts), o))
    local d = assert(core.dequantize_tensor(q, { rows = rows, cols = cols, mode = mode,
      bits = o.bits, group = o.group, scale_dtype = "bf16", global_scale = o.global_scale }))
    local err, power = 0, 0
    for i, x in ipairs(unfloats(d)) do
      err, power = err + (x - w[i]) ^ 2, power + w[i] ^ 2
    end
    return 100 * math.sqrt(err / power)
  end

  for _, budget in ipairs(budgets) do
    local mode, options = budget[1], budget[2]
    local name = ("of %s %s %s"):format(mode, options.bits or "", options.mx_rule
      or options.group or options.global_scale and "with a tensor scale" or "")
    it(name, function()
      for i, sigma in ipairs { 0.02, 1 } do
        local got, want = error_percent(inputs[sigma], mode, options), budget[2 + i]
        assert.is_true(math.abs(got - want) < (budget[5] or 0.03) * want,
          ("sigma %g: %.3f%%, not %.3f%%"):format(sigma, got, want))
      end
    end)
  end
end)

describe("quantize_tensor refuses", function()
  local w = floats(fill(64, function(i) return i end))

  local function try(more, bytes)
    local o = { rows = 1, cols = 64, mode = "affine" }
    for k, v in pairs(more) do o[k] = v end
    return core.quantize_tensor(bytes or w, o)
  end

  local function fails(code, text, more, bytes)
    local parts, message, got = try(more, bytes)
    assert.is_nil(parts)
    assert.equal(code, got)
    assert.truthy(message:find(text, 1, true), message)
    assert.falsy(message:find "\n")
  end

  it("formats that MLX does not have", function()
    fails("unsupported", "affine has no 7-bit codes", { bits = 7 })
    fails("unsupported", "affine has no 0-bit codes", { bits = 0 })
    fails("unsupported", "affine has no groups of 16", { group = 16 })
    fails("unsupported", "affine has no groups of 0", { group = 0 })
    fails("unsupported", "affine has no groups of -64", { group = -64 })
    fails("unsupported", "mxfp4 is 4 bits in groups of 32, not 4 bits in 64",
      { mode = "mxfp4", group = 64 })
    fails("unsupported", "mxfp8 is 8 bits", { mode = "mxfp8", bits = 4 })
    fails("unsupported", "nvfp4 is 4 bits in groups of 16", { mode = "nvfp4", group = 32 })
    fails("unsupported", "does not quantize to bf16", { mode = "bf16" })
    fails("unsupported", "fp8 is 8 bits with a scale per row of 64", { mode = "fp8", group = 32 })
    fails("unsupported", "mxfp4 has no global scale", { mode = "mxfp4", global_scale = 1 })
    fails("unsupported", "affine has no global scale", { global_scale = 1 })
    fails("range", "global scale -1", { mode = "nvfp4", global_scale = -1 })
    fails("range", "global scale", { mode = "nvfp4", global_scale = 0 / 0 })
    fails("range", "global scale", { mode = "nvfp4", global_scale = math.huge })
  end)

  it("rows that do not split into groups", function()
    fails("range", "rows of 64 weights do not split into groups of 128", { group = 128 })
    fails("range", "rows of 24 weights", { mode = "nvfp4", cols = 24 }, w:sub(1, 96))
  end)

  it("weights that have no encoding, naming the place", function()
    for _, case in ipairs { { 0 / 0, "nan" }, { math.huge, "inf" }, { -math.huge, "-inf" },
      { 3e38, "3e+38" } } do
      for _, mode in ipairs { "affine", "mxfp4", "mxfp8", "nvfp4" } do
        local bytes = w .. w:sub(1, 4 * 40) .. string.pack("<f", case[1]) .. w:sub(4 * 41 + 1)
        fails("range", "row 1, column 40: " .. mode .. " cannot hold",
          { rows = 2, mode = mode }, bytes)
      end
    end
  end)

  it("what would overflow a scale of type f16", function()
    local half = string.pack("<I2", 0x7800):rep(32) .. string.pack("<I2", 0x7bff) -- 32768, 65504
      .. ("\0\0"):rep(31)
    fails("range", "row 0, column 0", { dtype = "f16", bits = 1, group = 32 }, half)
    for bits = 2, 8 do
      if bits ~= 7 then
        local parts = assert(try({ dtype = "f16", bits = bits, group = 32 }, half))
        assert.equal(string.pack("<I2I2", 0x7800, 0x7bff), parts.biases)
      end
    end
  end)

  it("calls that are mistakes, by raising", function()
    assert.error_matches(function() try({}, w .. "x") end, "256 bytes expected, got 257")
    assert.error_matches(function() try({ dtype = "bf16" }) end, "128 bytes expected, got 256")
    assert.error_matches(function() try { colour = 1 } end, "unknown option 'colour'")
    assert.error_matches(function() try { mode = "mxfp5" } end, "unknown value 'mxfp5'")
    assert.error_matches(function() try { flavour = "cuda" } end, "unknown value 'cuda'")
    assert.error_matches(function() try { mx_rule = "floor" } end, "unknown value 'floor'")
    assert.error_matches(function() try { fit = "best" } end, "unknown value 'best'")
    assert.error_matches(function() try { dtype = "f64" } end, "unknown value 'f64'")
    assert.error_matches(function() try { bits = "four" } end, "integer expected")
    assert.error_matches(function() try { rows = 0 } end, "'rows'")
    assert.error_matches(function() try { cols = 1 << 60 } end, "'cols'")
    local vast = { rows = 0x7fffffff, cols = 0x7fffff80 }
    assert.error_matches(function() try(vast) end, "out of range")
    assert.error(function() core.quantize_tensor(w) end)
    assert.error(function()
      core.quantize_tensor(nil, { rows = 1, cols = 64, mode = "affine" })
    end)
    assert.error_matches(function() core.quantize_tensor(w, { rows = 1, cols = 64 }) end,
      "'mode' is missing")
  end)
end)

describe("dequantize_tensor", function()
  local w = floats(fill(64, function(i) return i - 20 end))
  local options = { rows = 2, cols = 32, mode = "affine", bits = 8, group = 32 }
  local parts = assert(core.quantize_tensor(w, options))

  it("gives values of the type asked for", function()
    local f32 = assert(core.dequantize_tensor(parts, options))
    for i, x in ipairs(unfloats(f32)) do assert.near(i - 21, x, 0.1) end
    local o = { rows = 2, cols = 32, mode = "affine", bits = 8, group = 32, dtype = "bf16",
      scale_dtype = "f32" }
    local bf16 = assert(core.dequantize_tensor(parts, o))
    for i = 0, 63 do
      local wide = string.unpack("<f", "\0\0" .. bf16:sub(2 * i + 1, 2 * i + 2))
      assert.near(i - 20, wide, 0.25)
    end
    o.dtype = "f16"
    assert.equal(128, #core.dequantize_tensor(parts, o))
  end)

  it("raises on parts that are missing, too many or of the wrong size", function()
    local function try(changes, more)
      local p, o = {}, {}
      for k, v in pairs(parts) do p[k] = v end
      for k, v in pairs(options) do o[k] = v end
      for k, v in pairs(changes) do p[k] = v or nil end
      for k, v in pairs(more or {}) do o[k] = v end
      return function() core.dequantize_tensor(p, o) end
    end
    assert.error_matches(try { biases = false }, "'biases' is missing")
    assert.error_matches(try { scales = "abc" }, "scales: 8 bytes expected, got 3")
    assert.error_matches(try { weight = 7 }, "'weight': string expected")
    assert.error_matches(try { colour = "" }, "unknown option 'colour'")
    assert.error_matches(try({}, { flavour = "cpu" }), "unknown option 'flavour'")
    assert.error_matches(try({}, { rows = 3 }), "weight: 96 bytes expected, got 64")
    assert.error_matches(try({ scales = "ab" }, { mode = "mxfp8" }), "no 'biases'")
  end)

  it("reports formats that MLX does not have", function()
    local bytes, _, code = core.dequantize_tensor(parts,
      { rows = 2, cols = 32, mode = "affine", bits = 7, group = 32 })
    assert.is_nil(bytes)
    assert.equal("unsupported", code)
  end)
end)
