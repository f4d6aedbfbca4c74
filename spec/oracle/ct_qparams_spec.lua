-- Integer groups of compressed-tensors: scale, zero point and codes are those that the stock
-- library chooses. Needs $MOONLET_ORACLE/venv.
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local numbers = require "spec.support.numbers"
local oracle = require "spec.support.oracle"

local ROWS, COLS = 24, 256

-- Codes of one row that are packed as a bit stream, one per byte.
local function spread(bytes, n, bits)
  local out = {}
  for i = 0, n - 1 do
    local at = i * bits
    local window = bytes:byte(at // 8 + 1) | (bytes:byte(at // 8 + 2) or 0) << 8
    out[i + 1] = string.char(window >> at % 8 & (1 << bits) - 1)
  end
  return table.concat(out)
end

local function weights()
  local rng, w = numbers.rng(31), {}
  for row = 1, ROWS do
    local size, centre = 10 ^ (row % 6 - 4), row % 4 == 0 and 0.7 or row % 4 == 1 and -2 or 0
    for _ = 1, COLS do
      w[#w + 1] = size * (rng.uniform() + rng.uniform() + rng.uniform() - 1.5 + centre)
    end
  end
  return numbers.pack(w)
end

describe("integer groups #oracle", function()
  it("are those of stock compressed-tensors", function()
    local dir <close> = checkpoint.scope()
    local bytes, cases = weights(), {}
    for _, bits in ipairs { 2, 3, 4, 5, 6, 8 } do
      for _, group in ipairs { 32, 128 } do
        for _, kind in ipairs { "symmetric", "asymmetric" } do
          cases[#cases + 1] = { bits, group, kind, ("%d:%d:%s"):format(bits, group, kind) }
        end
      end
    end
    checkpoint.write(dir.path .. "/in.safetensors",
      { w = { dtype = "F32", shape = { ROWS, COLS }, data = bytes } })
    local arguments = { dir.path .. "/in.safetensors", dir.path .. "/out.safetensors" }
    for _, case in ipairs(cases) do arguments[#arguments + 1] = case[4] end
    oracle.run("ct_qparams.py", arguments)
    local theirs = checkpoint.read(dir.path .. "/out.safetensors")
    for _, case in ipairs(cases) do
      local bits, group, kind, name = table.unpack(case)
      local parts = assert(core.quantize_tensor(bytes, { rows = ROWS, cols = COLS, mode = "affine",
        bits = bits, group = group, zero_point = kind == "symmetric" and kind or true }))
      assert.is_nil(numbers.difference(theirs[name .. ".scales"].data, parts.scales), name)
      local scales, biases = numbers.unpack(parts.scales), numbers.unpack(parts.biases)
      local zeros, codes = {}, {}
      for i, scale in ipairs(scales) do
        zeros[i] = string.char(math.floor(-biases[i] / scale + 0.5))
      end
      for row = 0, ROWS - 1 do
        local size = COLS * bits // 8
        codes[row + 1] = spread(parts.weight:sub(row * size + 1, (row + 1) * size), COLS, bits)
      end
      assert.is_true(theirs[name .. ".zeros"].data == table.concat(zeros), name .. " zero points")
      assert.is_true(theirs[name .. ".codes"].data == table.concat(codes), name .. " codes")
    end
  end)
end)
