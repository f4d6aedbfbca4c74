-- The tokenizer.json that mlx-lm writes when it converts (transformers 5 spells it anew: an empty
-- TemplateProcessing, a vocabulary that may lack bytes). Ids are those of tokenizers 0.23.3.
local tokenizer = require "moonlet.tokenizer"

describe("a converted tokenizer", function()
  for _, dir in ipairs { "moe4/mlx", "moe4/mlx-nvfp4gs", "dense4/mlx" } do
    it("opens and encodes: " .. dir, function()
      local tok <close> = assert(tokenizer.open("spec/golden/mlx/" .. dir))
      assert.same({ 49, 78, 85, 85, 88, 9, 3, 9, 97 }, tok:encode("Hello <think> x"))
      assert.equal("xy", tok:decode { 97, 98 })
    end)
  end

  it("drops bytes that no entry stands for", function()
    local tok <close> = assert(tokenizer.open("spec/golden/mlx/moe4/mlx"))
    assert.same({ 74, 75, 76 }, tok:encode("a\1b\127c"))
    assert.same({}, tok:encode("\1"))
  end)
end)

it("every golden checkpoint opens whole", function()
  local moonlet = require "moonlet"
  for _, dir in ipairs { "mlx/moe4/mlx", "mlx/moe4/hf", "mlx/moe4/mlx-nvfp4gs", "mlx/dense4/mlx",
    "mlx/dense4/hf", "models/dense-text/hf", "models/dense-tied/hf", "models/moe-text/hf",
    "models/moe-wrapped/hf", "ct/model-mixed/checkpoint" } do
    local model <close> = assert(moonlet.open("spec/golden/" .. dir, { threads = 1 }))
    assert(model:forward { 1, 2, 3 })
  end
end)
