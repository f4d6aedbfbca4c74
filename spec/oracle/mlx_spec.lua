-- Loads what moonlet.quantize writes in stock mlx-lm and compares logits with ours.
-- Needs $MOONLET_ORACLE/venv with mlx-lm 0.32.0 or later: up to 0.31.3 the epsilon of the delta
-- rule's key norm is 16 to 128 times as large, which shows on dense-tied (6e-4), though it loads.

local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local oracle = require "spec.support.oracle"
local quantize = require "moonlet.quantize"

local VARIANTS = {
  { recipe = "unsloth", bits = 2 }, { recipe = "unsloth", bits = 3 },
  { recipe = "unsloth", bits = 4, mxfp = true }, { recipe = "unsloth", bits = 8, mxfp = true },
  { recipe = "unsloth", mode = "nvfp4" }, { recipe = "uniform", mode = "mxfp8",
    shard_bytes = 100000 }, { recipe = "keep_bf16" },
}
local SOURCES = { "examples/demo-model", "spec/golden/mlx/moe4/hf", "spec/golden/mlx/dense4/hf",
  "spec/golden/models/moe-wrapped/hf", "spec/golden/models/moe-text/hf",
  "spec/golden/models/dense-text/hf", "spec/golden/models/dense-tied/hf" }

local ids = {}
for i = 1, 40 do ids[i] = (i * 7919 + i * i * 31) % 256 end

-- Writes every variant of a source below `dir`; the directories, in order.
local function quantize_all(source, dir)
  local outs = {}
  for i, o in ipairs(VARIANTS) do
    outs[i] = ("%s/%d"):format(dir, i)
    local given = { source = source, out = outs[i] }
    for k, v in pairs(o) do given[k] = v end
    assert(quantize(given))
  end
  return outs
end

local function run_mlx(outs)
  local p = assert(io.popen(("%s spec/oracle/mlx_logits.py %s %s 2>&1"):format(
    oracle.python(), table.concat(ids, ","), table.concat(outs, " "))))
  local said = p:read("a")
  assert(p:close(), said)
end

-- Largest distance between our logits and theirs, in units of their rms.
local function distance(dir)
  local theirs = checkpoint.read(dir .. ".safetensors").logits
  local model = assert(core.model_open(dir, {}))
  local bytes = assert(model:forward(ids, { "logits" })).logits:bytes()
  model:close()
  assert.equal(#theirs.data, #bytes)
  local squares, worst = 0.0, 0.0
  for i = 1, #bytes, 4 do
    local a, b = string.unpack("<f", bytes, i), string.unpack("<f", theirs.data, i)
    squares = squares + b * b
    worst = math.max(worst, a == a and math.abs(a - b) or math.huge)
  end
  return worst / math.sqrt(squares / (#bytes // 4))
end

describe("stock mlx-lm #oracle", function()
  for _, source in ipairs(SOURCES) do
    it("computes our logits from what we make of " .. source, function()
      local dir = checkpoint.directory()
      local outs = quantize_all(source, dir)
      run_mlx(outs)
      for i, out in ipairs(outs) do
        local o = VARIANTS[i]
        -- 5e-4 of the rms is what two float32 implementations need on random networks.
        assert.is_true(distance(out) <= 5e-4, ("%s %s: %.3g"):format(o.recipe,
          o.mode or o.bits or "", distance(out)))
      end
      checkpoint.remove(dir)
    end)
  end
end)
