local checkpoint = require "spec.support.checkpoint"
local json = require "moonlet.json"
local quantize = require "moonlet.quantize"
local written = require "spec.support.written"

local MODELS = "spec/golden/models/"

local function config_of(dir) return assert(json.read(dir .. "/config.json")) end

-- bf16(1 + w), which is all that an MLX file keeps of a norm.
local function plain_norm(t)
  local out = {}
  for i, w in ipairs(checkpoint.values(t)) do out[i] = string.pack("<f", 1 + w) end
  return checkpoint.to_bf16(table.concat(out))
end

describe("bf16 output", function()
  it("copies a published checkpoint tensor by tensor", function()
    local source = MODELS .. "moe-wrapped/hf"
    written.quantized({ source = source, recipe = "keep_bf16", format = "bf16" }, function(out)
      written.assert_same_tensors(checkpoint.load(source), written.tensors(out))
      assert.is_true(json.encode(config_of(source)) == json.encode(config_of(out)))
    end)
    for _, name in ipairs { "dense-text", "dense-tied" } do
      source = ("%s%s/hf"):format(MODELS, name)
      written.quantized({ source = source, recipe = "keep_bf16", format = "bf16" }, function(out)
        written.assert_same_tensors(checkpoint.load(source), written.tensors(out))
      end)
    end
  end)

  it("fuses experts that lie one by one", function()
    local source = MODELS .. "moe-text/hf"
    written.quantized({ source = source, recipe = "keep_bf16", format = "bf16" }, function(out)
      local t, s = written.tensors(out), checkpoint.load(source)
      local stem = "model.layers.1.mlp.experts."
      local want = {}
      for e = 0, 7 do
        for _, p in ipairs { "gate", "up" } do
          want[#want + 1] = s[("%s%d.%s_proj.weight"):format(stem, e, p)].data
        end
      end
      assert.same({ 8, 2 * 32, 64 }, t[stem .. "gate_up_proj"].shape)
      assert.is_true(table.concat(want) == t[stem .. "gate_up_proj"].data)
      assert.same({ 8, 64, 32 }, t[stem .. "down_proj"].shape)
    end)
  end)

  it("gives back what an MLX checkpoint was made of", function()
    for _, name in ipairs { "moe-wrapped", "dense-tied" } do
      local source = ("%s%s/hf"):format(MODELS, name)
      written.quantized({ source = source, recipe = "keep_bf16" }, function(mlx)
        written.quantized({ source = mlx, recipe = "keep_bf16", format = "bf16" }, function(out)
          local t = written.tensors(out)
          for key, s in pairs(checkpoint.load(source)) do
            if name == "dense-tied" then key = key:gsub("^model%.", "model.language_model.") end
            assert.truthy(t[key], key)
            assert.same(s.shape, t[key].shape, key)
            if s.dtype ~= t[key].dtype then -- MLX files hold no other norm than bf16
              assert.matches("linear_attn%.norm", key)
            elseif key:find "norm" and #s.shape == 1 and not key:find "^mtp" then
              assert.is_true(plain_norm(s) == plain_norm(t[key]), key)
            else
              assert.is_true(s.data == t[key].data, key)
            end
          end
        end)
      end)
    end
  end)

  it("has no place for quantized tensors", function()
    written.with_out(function(out)
      local p, message, code = quantize { source = MODELS .. "dense-text/hf", out = out,
        recipe = "uniform", format = "bf16" }
      assert.is_nil(p)
      assert.matches("tensor model%.embed_tokens%.weight: affine 4 g64 has no place in a bf16",
        message)
      assert.equal("unsupported", code)
    end)
  end)
end)
