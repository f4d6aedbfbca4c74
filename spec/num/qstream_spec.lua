-- mxfp4 as qstream writes it: vectors computed by hand, and its bytes for many kinds of blocks.
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local numbers = require "spec.support.numbers"

local floats = numbers.pack

local function hex(bytes)
  return (bytes:gsub(".", function(c) return ("%02x"):format(c:byte()) end))
end

local function unhex(text)
  return (text:gsub("..", function(h) return string.char(tonumber(h, 16)) end))
end

local function block(f)
  local w = {}
  for i = 0, 31 do w[i + 1] = f(i) end
  return w
end

local D = { 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6,
  0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 0 }

-- weights, scale byte, codes under the largest magnitude as anchor; the errors of the three
-- exponents, where they are known
local vectors = {
  ["a ramp"] = { block(function(i) return (i - 16) / 64 end), 123,
    "eeddddccbcab9a890011223344545565", { 5.1270e-3, 4.5776e-4, 2.4414e-4 } },
  ["an outlier"] = { block(function(i) return i == 7 and 1 or ((37 * i + 11) % 32 - 16) / 128 end),
    125, "08109168009189009189081189081099", { 1.2291e-2, 2.2812e-3, 1.3046e-3 } },
  ["a ramp that is better clipped"] = {
    block(function(i) return ((29 * i + 5) % 64 - 32) * 0.109375 end), 126,
    "1fa7c7d6e5f3707a6c5e3f0fb7d7e6f4", { 7.8491e-1, 4.9927e-2, 5.4077e-2 } },
  ["ties"] = { D, 127, "1032547698badcfe10325476a9cbed0f" },
  ["zeros"] = { block(function() return 0 end), 103, ("00"):rep(16) },
}

describe("qstream, anchored at the largest magnitude, encodes", function()
  for name, v in pairs(vectors) do
    local w, byte, codes, errors = table.unpack(v)
    it(name, function()
      local parts = assert(core.quantize_tensor(floats(w),
        { rows = 1, cols = 32, mode = "mxfp4", fit = "qstream-amax" }))
      assert.equal(byte, parts.scales:byte())
      assert.equal(codes, hex(parts.weight))
      local best = errors and math.min(table.unpack(errors))
      if not best then return end
      local o = { rows = 1, cols = 32, mode = "mxfp4" }
      local sum = 0
      for i, x in ipairs(numbers.unpack(core.dequantize_tensor(parts, o))) do
        sum = sum + (x - w[i]) ^ 2
      end
      assert.near(best, sum / 32, 1e-4 * best)
    end)
  end

  it("the ramp as compressed-tensors would, but for ties", function()
    -- the same exponent; 0.75 and 1.75 halves go to the even code there
    local parts = assert(core.quantize_tensor(floats(vectors["a ramp"][1]),
      { rows = 1, cols = 32, mode = "mxfp4", mx_rule = "nearest", fit = "mse" }))
    assert.equal("eededdccccabaa890021224344545566", hex(parts.weight))
    assert.equal(123, parts.scales:byte())
  end)
end)

describe("qstream's bytes", function()
  local t = checkpoint.read "spec/golden/qstream/qstream.safetensors"
  local rows, cols = table.unpack(t["in"].shape)
  local kinds = { "gaussian", "heavy tails", "many sizes", "near 1e-6", "multiples of 1/64",
    "middles", "sparse", "outliers", "two values", "zeros", "one about 7" }
  local cases = {
    percentile = { fit = "qstream" },
    amax = { fit = "qstream-amax" },
    weighted = { fit = "qstream", importance = t.importance.data },
  }

  for name, options in pairs(cases) do
    it("are reproduced: " .. name, function()
      assert.equal(#kinds, rows)
      for row, kind in ipairs(kinds) do
        local o = { rows = 1, cols = cols, mode = "mxfp4", fit = options.fit,
          importance = options.importance }
        local function part(tensor, bytes)
          return t[tensor].data:sub((row - 1) * bytes + 1, row * bytes)
        end
        local parts = assert(core.quantize_tensor(part("in", 4 * cols), o))
        assert.equal(hex(part(name .. ".scales", cols // 32)), hex(parts.scales), kind)
        assert.equal(hex(part(name .. ".weight", cols // 2)), hex(parts.weight), kind)
      end
    end)
  end

  it("differ between the anchors and with importance", function()
    assert.not_equal(t["percentile.scales"].data, t["amax.scales"].data)
    assert.not_equal(t["percentile.scales"].data, t["weighted.scales"].data)
  end)

  it("begin with a rounding to bf16", function()
    local w = floats(block(function(i) return math.sin(i) end))
    local rounded = checkpoint.widen(checkpoint.to_bf16(w))
    local o = { rows = 1, cols = 32, mode = "mxfp4", fit = "qstream" }
    assert.same(core.quantize_tensor(rounded, o), core.quantize_tensor(w, o))
    -- 0.25 + 2^-20 is a tie once it is rounded, and then goes down
    local tie = floats(block(function(i) return i == 0 and 0.25 + 0x1p-20 or 6 end))
    assert.equal("\x70", assert(core.quantize_tensor(tie, o)).weight:sub(1, 1))
  end)

  it("exist for mxfp4 only", function()
    for _, mode in ipairs { "affine", "mxfp8", "nvfp4", "fp8" } do
      local parts, message, code = core.quantize_tensor(unhex("00"):rep(256),
        { rows = 1, cols = 64, mode = mode, fit = "qstream" })
      assert.is_nil(parts)
      assert.equal("qstream's rule is for mxfp4, not " .. mode, message)
      assert.equal("unsupported", code)
    end
  end)
end)
