-- Weights that are NaN or infinite: not looked for when opening, named when they show.
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"

local NAN <const>, INF <const> = "\xc0\x7f", "\x80\xff" -- bf16, little-endian

local function poisoned(name, row, column, bytes)
  return checkpoint.edited("spec/golden/models/moe-wrapped/hf", function(tensors)
    local t = tensors[name]
    local cols = t.shape[#t.shape]
    local at = (row * cols + column) * 2
    t.data = t.data:sub(1, at) .. bytes .. t.data:sub(at + 3)
  end)
end

local function verdict(dir)
  local model <close> = assert(core.model_open(dir, { threads = 1 }))
  return model:check_finite()
end

describe("check_finite", function()
  it("finds nothing in a sound checkpoint", function()
    assert.is_true(verdict("spec/golden/models/moe-wrapped/hf"))
    assert.is_true(verdict("spec/golden/mlx/moe4/mlx"))
  end)

  it("names matrix, row and column", function()
    for _, bytes in ipairs { NAN, INF } do
      local dir = poisoned("model.language_model.layers.3.self_attn.o_proj.weight", 2, 9, bytes)
      local ok, message, code = verdict(dir)
      assert.is_nil(ok)
      assert.equal("format", code)
      assert.matches("layers.3.self_attn.o_proj is .+ at row 2, column 9$", message)
      checkpoint.remove(dir)
    end
  end)

  it("looks at every expert", function()
    local dir = poisoned("model.language_model.layers.1.mlp.experts.down_proj", 5 * 64 + 7, 3, NAN)
    local _, message = verdict(dir)
    assert.matches("layers.1.mlp.experts.5.down_proj is nan at row 7, column 3", message)
    checkpoint.remove(dir)
  end)
end)
