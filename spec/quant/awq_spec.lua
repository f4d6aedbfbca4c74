-- Scales of columns and of norms, from their formulas.

local core = require "moonlet.core"
local numbers = require "spec.support.numbers"

local pack, unpack = numbers.pack, numbers.unpack

local function scales(importance, o)
  local s = o.span or { 1, 1, #importance }
  return unpack(core.awq_scales(pack(importance), s[1], s[2], s[3], o.alpha, o.gain or 1,
    o.share or 0, o.least or 0))
end

local function near(want, got)
  assert.equal(#want, #got)
  for i, x in ipairs(want) do
    assert.is_true(math.abs(got[i] / x - 1) < 1e-5, got[i] .. " " .. x)
  end
end

local function bf16(x)
  local u = string.unpack("<I4", string.pack("<f", x))
  return (string.unpack("<f", string.pack("<I4", (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000)))
end

local function f32(x) return (string.unpack("<f", string.pack("<f", x))) end

describe("awq scales", function()
  it("are powers of the root mean square around 1", function()
    near({ 0.5, 1, 2 }, scales({ 1, 4, 16 }, { alpha = 1 })) -- rms 1 2 4, divided by sqrt(1 * 4)
    near({ 0.5 ^ 0.5, 1, 2 ^ 0.5 }, scales({ 1, 4, 16 }, { alpha = 0.5 }))
    near({ 3, 3, 3 }, scales({ 1, 4, 16 }, { alpha = 0, gain = 3 }))
  end)

  it("average what shares a scale", function()
    -- [outer 2][repeat 2][inner 2]: mean squares 1 and 4, then 16 and 9
    near({ 0.5, 1, 2, 1.5 }, scales({ 0.5, 3, 1.5, 5, 30, 9, 2, 9 },
      { alpha = 1, span = { 2, 2, 2 } }))
    assert.same({ 1, 2, 1, 2, 3, 4, 3, 4 }, unpack(core.awq_spread(pack { 1, 2, 3, 4 }, 2, 2, 2)))
  end)

  it("take quiet inputs for louder ones, as far as asked", function()
    near({ 0.1, 10 }, scales({ 0, 1 }, { alpha = 1, least = 1e-4 }))
    near({ 0.1 ^ 0.5, 10 ^ 0.5 }, scales({ 0, 2 }, { alpha = 1, share = 0.02 }))
  end)

  it("are finite and positive whatever is asked", function()
    for _, importance in ipairs { { 0, 0, 0 }, { 0, 1e38, 1 }, { 1e-38, 1e-45, 1e38 } } do
      for _, alpha in ipairs { 0.125, 1, 3 } do
        for _, x in ipairs(scales(importance, { alpha = alpha })) do
          assert.is_true(x > 0 and x < math.huge)
        end
      end
    end
  end)
end)

describe("awq folds norms", function()
  local norm, s = {}, {}
  for i = 1, 200 do norm[i], s[i] = 1 + math.sin(i) * 0.9, math.exp(2 * math.cos(3 * i)) end
  norm[7] = 0
  norm, s = unpack(pack(norm)), unpack(pack(s))

  -- What is written, and read by a loader that adds what was subtracted.
  local function read_back(i, scale, dtype, subtract)
    local x = f32(f32(norm[i] * scale) - subtract)
    return f32((dtype == "bf16" and bf16(x) or x) + subtract)
  end

  for _, case in ipairs { { "bf16", 0 }, { "bf16", 1 }, { "f32", 0 }, { "f32", 1 } } do
    local dtype, subtract = table.unpack(case)
    it(("in %s, stored less %d, so that readers undo exactly what is written"):format(dtype,
      subtract), function()
      local of_norm, of_readers = core.awq_fold_norm(pack(norm), pack(s), dtype, subtract)
      of_norm, of_readers = unpack(of_norm), unpack(of_readers)
      for i = 1, #norm do
        local product = read_back(i, of_norm[i], dtype, subtract) * of_readers[i]
        assert.is_true(math.abs(product - norm[i]) <= 1e-7 * math.abs(norm[i]), i)
        if norm[i] ~= 0 and dtype == "f32" then
          assert.is_true(math.abs(of_readers[i] / s[i] - 1) < 1e-5)
        end
      end
    end)
  end

  it("and keeps a channel that rounding would lose", function()
    -- 0.01 / 64 - 1 is -1 in bf16: read back, 0.
    local of_norm, of_readers = core.awq_fold_norm(pack { 0.01 }, pack { 64 }, "bf16", 1)
    assert.equal(1, unpack(of_norm)[1])
    assert.is_true(math.abs(unpack(of_readers)[1] - 1) < 0.2)
  end)
end)

describe("what errors count under awq", function()
  it("is the importance of inputs divided by the scales", function()
    assert.same({ 4, 1 }, unpack(core.awq_weights(pack { 16, 1 }, pack { 2, 1 })))
    assert.same({ 8, 0.5 }, unpack(core.awq_weights(pack { 16, 1 }, nil, 0.5)))
  end)

  it("is tempered before it is divided", function()
    near({ 40 ^ 0.5, 10 ^ 0.5 }, unpack(core.awq_weights(pack { 8, 2 }, nil, 1, 0.5)))
    near({ 10 ^ 0.5, 10 ^ 0.5 },
      unpack(core.awq_weights(pack { 8, 2 }, pack { 2 ^ 0.5, 1 }, 1, 0.5)))
    assert.same({ 0, 0 }, unpack(core.awq_weights(pack { 0, 0 }, nil, 1, 0.5)))
  end)
end)
