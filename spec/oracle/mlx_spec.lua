-- Loads what moonlet.quantize writes in stock mlx-lm and compares logits with ours.
-- Needs $MOONLET_ORACLE/venv with mlx-lm 0.32.0 or later: up to 0.31.3 the epsilon of the delta
-- rule's key norm is 16 to 128 times as large, which shows on dense-tied (6e-4), though it loads.

local checkpoint = require "spec.support.checkpoint"
local logits = require "spec.support.logits"
local quantize = require "moonlet.quantize"

local VARIANTS = {
  { recipe = "unsloth", bits = 2 }, { recipe = "unsloth", bits = 3 },
  { recipe = "unsloth", bits = 4, mxfp = true }, { recipe = "unsloth", bits = 8, mxfp = true },
  { recipe = "unsloth", mode = "nvfp4" }, { recipe = "uniform", mode = "mxfp8",
    shard_bytes = 100000 }, { recipe = "keep_bf16" },
  { recipe = "qwen3_5" }, { recipe = "mixed_2_6" }, { recipe = "mixed_3_4" },
  { recipe = "mixed_3_6" }, { recipe = "mixed_4_6" }, { recipe = "config_i" },
  { recipe = "nvidia" }, { recipe = "unsloth_card_mxfp4" }, { recipe = "unsloth_fixed" },
  { recipe = "qstream_mxfp4" }, { recipe = "unsloth", bits = 4, mxfp = true, fit = "mse" },
  { recipe = "unsloth", mode = "nvfp4", fit = "mse" },
}
local SOURCES = { "examples/demo-model", "spec/golden/mlx/moe4/hf", "spec/golden/mlx/dense4/hf",
  "spec/golden/models/moe-wrapped/hf", "spec/golden/models/moe-text/hf",
  "spec/golden/models/dense-text/hf", "spec/golden/models/dense-tied/hf" }

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

describe("stock mlx-lm #oracle", function()
  for _, source in ipairs(SOURCES) do
    it("computes our logits from what we make of " .. source, function()
      local dir = checkpoint.directory()
      local outs = quantize_all(source, dir)
      logits.run("mlx_logits.py", outs)
      for i, out in ipairs(outs) do
        local o = VARIANTS[i]
        -- 5e-4 of the rms is what two float32 implementations need on random networks.
        local distance = logits.distance(out)
        assert.is_true(distance <= 5e-4, ("%s %s: %.3g"):format(o.recipe,
          o.mode or o.bits or "", distance))
      end
      checkpoint.remove(dir)
    end)
  end
end)
