-- What encoding loses of what a matrix puts out, by its definition: from the bytes of
-- quantize_tensor, the mean squares of an imatrix and the tokens that each expert met.

local calibration = require "spec.support.calibration"
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local damage = require "moonlet.damage"
local numbers = require "spec.support.numbers"
local plan = require "moonlet.plan"

local MOE = "spec/golden/models/moe-wrapped/hf"
local FORMATS = { { mode = "mxfp4", bits = 4, group = 32 },
  { mode = "nvfp4", bits = 4, group = 16 }, { mode = "mxfp8", bits = 8, group = 32 } }

local dir, measure, calibrated, tensors

setup(function()
  dir = checkpoint.directory()
  local inventory = assert(plan.inventory(MOE))
  local path = dir .. "/imatrix.gguf"
  calibrated = calibration.loud_imatrix(inventory, path, function(e) return 1 + e % 5 end)
  measure = assert(damage.open(MOE, path, inventory, 1))
  tensors = {}
  for _, t in ipairs(inventory.source.tensors) do tensors[t.class] = tensors[t.class] or t end
end)

teardown(function()
  measure:close()
  calibrated:close()
  checkpoint.remove(dir)
end)

-- Error and size of rows of weights (F32) whose columns meet `importance` (nil: all the same).
local function lost(weights, cols, format, importance)
  local o = { rows = #weights // 4 // cols, cols = cols, dtype = "f32", mode = format.mode,
    bits = format.bits, group = format.group }
  o.fit, o.importance = importance and "imatrix" or "mse", importance
  local parts = assert(core.quantize_tensor(weights, o))
  o.fit, o.importance = nil, nil
  local back = assert(core.dequantize_tensor(parts, o))
  local given, got = numbers.unpack(weights), numbers.unpack(back)
  local k = importance and numbers.unpack(importance)
  local error, size = 0, 0
  for i, w in ipairs(given) do
    local weight = k and k[(i - 1) % cols + 1] or 1
    error, size = error + weight * (got[i] - w) ^ 2, size + weight * w ^ 2
  end
  return error, size
end

local function near(want, got)
  assert.is_true(math.abs(got / want - 1) < 1e-5, got .. " " .. want)
end

-- BF16 as F32.
local function widened(bytes) return (bytes:gsub("..", "\0\0%0")) end

describe("the damage of a decision", function()
  it("is what its matrix loses for inputs as they are", function()
    local t = tensors.q_proj
    local weights = widened(checkpoint.load(MOE)[t.name].data)
    local errors = assert(measure:errors(t, FORMATS))
    for i, format in ipairs(FORMATS) do
      local error, size = lost(weights, t.cols, format, (calibrated:importance(t.name)))
      near(error / size, errors[i])
    end
  end)

  it("counts an expert as often as tokens met it", function()
    local t = tensors.expert_down
    local stored = widened(checkpoint.load(MOE)[t.parts[1].name].data)
    local bytes = #stored // t.shape[1]
    local errors = assert(measure:errors(t, FORMATS))
    for i, format in ipairs(FORMATS) do
      local error, size = 0, 0
      for e = 0, t.shape[1] - 1 do
        local importance, tokens = calibrated:importance(t.name, e)
        local x, y = lost(stored:sub(e * bytes + 1, (e + 1) * bytes), t.cols, format, importance)
        error, size = error + tokens * x, size + tokens * y
      end
      near(error / size, errors[i])
    end
  end)

  it("is that of all inputs alike where none are known", function()
    local t = tensors.embed
    local weights = widened(checkpoint.load(MOE)[t.name].data)
    local errors = assert(measure:errors(t, FORMATS))
    for i, format in ipairs(FORMATS) do
      local error, size = lost(weights, t.cols, format)
      near(error / size, errors[i])
    end
  end)

  it("needs weights, an imatrix of their model, and to be open", function()
    local config = "spec/golden/configs/qwen3.6-35b-a3b.json"
    local got, message = damage.open(config, dir .. "/imatrix.gguf",
      assert(plan.inventory(config)))
    assert.is_nil(got)
    assert.matches("qwen3.6%-35b%-a3b.json: there are no weights in it to measure", message)
    local demo = "examples/demo-model"
    got, message = damage.open(demo, dir .. "/imatrix.gguf", assert(plan.inventory(demo)))
    assert.is_nil(got)
    assert.matches("imatrix.gguf: blk.* numbers, .* of this model", message)
    local other = assert(damage.open(MOE, dir .. "/imatrix.gguf",
      assert(plan.inventory(MOE)), 1))
    other:close()
    other:close()
    assert.error_matches(function() other:errors(tensors.q_proj, FORMATS) end, "is closed")
  end)
end)
