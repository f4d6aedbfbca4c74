-- Recipe keep: from one form of checkpoint to another without loss.
local checkpoint = require "spec.support.checkpoint"
local quantize = require "moonlet.quantize"
local recipes = require "moonlet.recipe"
local rules = require "spec.support.rules"
local written = require "spec.support.written"

local WRAPPED = "spec/golden/models/moe-wrapped/hf"
local CT = "spec/golden/ct/model-mixed/checkpoint"

-- As rules.only, without the MTP block, whose experts compressed-tensors files hold one by one.
local function only(decision)
  local rule = rules.only(decision)
  return function(t) return t.part == "mtp" and { drop = true } or rule(t) end
end

-- Keeps `source` in another form; fn(directory, plan).
local function kept(source, format, fn)
  written.quantized({ source = source, recipe = "keep", format = format }, fn)
end

local function refused(source, format, pattern)
  written.with_out(function(out)
    local p, message, code = quantize { source = source, out = out, recipe = "keep",
      format = format }
    assert.is_nil(p)
    assert.matches(pattern, message)
    assert.truthy(code == "unsupported" or code == "range", code)
  end)
end

local function assert_same_values(before, after)
  local got = written.modules(after)
  for name, m in pairs(written.modules(before)) do
    if m.values ~= got[name].values or m.mode ~= got[name].mode then error(name .. " differs") end
  end
end

describe("keep", function()
  for _, mode in ipairs { "mxfp4", "mxfp8", "nvfp4" } do
    it("renames " .. mode .. " from MLX to compressed-tensors and back", function()
      local source = { source = WRAPPED, recipe = only { mode = mode } }
      written.quantized(source, function(mlx)
        kept(mlx, "compressed-tensors", function(ct, p)
          assert.same({}, written.notes(p))
          local theirs, ours = written.tensors(mlx), written.tensors(ct)
          local stack = "language_model.model.layers.1.mlp.switch_mlp.up_proj"
          local codes, scales = {}, {}
          for e = 0, 7 do
            local module = ("model.language_model.layers.1.mlp.experts.%d.up_proj."):format(e)
            codes[e + 1] = (ours[module .. "weight_packed"] or ours[module .. "weight"]).data
            scales[e + 1] = ours[module .. "weight_scale"].data
          end
          assert.is_true(theirs[stack .. ".weight"].data == table.concat(codes))
          assert.is_true(theirs[stack .. ".scales"].data == table.concat(scales))
          kept(ct, "mlx", function(back)
            written.assert_same_tensors(theirs, written.tensors(back))
            assert.equal(checkpoint.slurp(mlx .. "/config.json"),
              checkpoint.slurp(back .. "/config.json"))
          end)
        end)
      end)
    end)
  end

  it("keeps every format of a mixed checkpoint", function()
    kept(CT, "compressed-tensors", function(first)
      assert_same_values(CT, first)
      kept(first, "compressed-tensors", function(second)
        written.assert_same_tensors(written.tensors(first), written.tensors(second))
        assert.equal(checkpoint.slurp(first .. "/config.json"),
          checkpoint.slurp(second .. "/config.json"))
      end)
    end)
    written.quantized({ source = WRAPPED, recipe = rules.every_format,
      format = "compressed-tensors" }, function(first)
      kept(first, "compressed-tensors", function(second)
        written.assert_same_tensors(written.tensors(first), written.tensors(second))
      end)
    end)
  end)

  it("keeps MLX checkpoints of stock converters", function()
    for _, dir in ipairs { "spec/golden/mlx/moe4/mlx", "spec/golden/mlx/dense4/mlx" } do
      kept(dir, "mlx", function(out)
        written.assert_same_tensors(checkpoint.load(dir), written.tensors(out))
      end)
    end
  end)

  it("keeps floats of other types", function()
    local name = "model.layers.1.mlp.up_proj.weight"
    local source = checkpoint.edited("spec/golden/models/dense-tied/hf", function(tensors)
      local t = tensors[name]
      t.dtype, t.data = "F32", checkpoint.widen(t.data)
    end)
    for format, key in pairs { bf16 = name, ["compressed-tensors"] = name,
        mlx = "language_model." .. name } do
      kept(source, format, function(out)
        assert.same(checkpoint.load(source)[name], written.tensors(out)[key])
      end)
    end
    checkpoint.remove(source)
  end)

  -- An affine MLX checkpoint whose biases are minus `n` scales.
  local function with_biases(n, fn, recipe)
    recipe = recipe or only { mode = "affine", bits = 4, group = 32 }
    written.quantized({ source = WRAPPED, recipe = recipe }, function(mlx)
      local dir = checkpoint.edited(mlx, function(tensors)
        for name, t in pairs(tensors) do
          local stem = name:match("^(.*)%.biases$")
          if stem then
            local values = {}
            for i, v in ipairs(checkpoint.values(tensors[stem .. ".scales"])) do
              values[i] = string.pack("<f", -n * v)
            end
            t.data = checkpoint.to_bf16(table.concat(values))
          end
        end
      end)
      fn(dir)
      checkpoint.remove(dir)
    end)
  end

  it("takes affine weights whose biases are whole zero points, and back", function()
    with_biases(8, function(mlx)
      kept(mlx, "compressed-tensors", function(ct)
        assert_same_values(mlx, ct)
        kept(ct, "mlx", function(back)
          local theirs = written.tensors(mlx)
          for name, t in pairs(written.tensors(back)) do
            assert.is_true(t.data == theirs[name].data, name)
          end
        end)
      end)
    end)
  end)

  it("keeps what the stock library could not unpack, and says so", function()
    local function gate(t)
      return t.class == "shared_gate" and { mode = "affine", bits = 4, group = 32 }
        or { keep = "bf16" }
    end
    with_biases(8, function(mlx)
      kept(mlx, "compressed-tensors", function(ct, p)
        assert.same({ "compressed-tensors 0.20 cannot unpack the zero points of a 4-bit matrix of "
          .. "at most 8 rows: 4 matrices keep them all the same" }, written.notes(p))
        assert_same_values(mlx, ct)
      end)
    end, gate)
  end)

  it("refuses affine weights whose biases are not", function()
    for _, n in ipairs { 7.5, 16, -1 } do
      with_biases(n, function(mlx)
        refused(mlx, "compressed-tensors", "tensor [%w_.]+ row 0 column 0: the group's bias cannot "
          .. "be kept as a whole zero point %(%-%-set 'undo=%[\"affine\"%]' writes matrices in "
          .. "affine as BF16%)$")
      end)
    end
  end)

  it("undoes the modes it is told to, and keeps the others", function()
    written.quantized({ source = WRAPPED, recipe = function(t)
      if t.class == "router" then return { mode = "affine", bits = 8, group = 64 } end
      return only { mode = "mxfp4" }(t)
    end }, function(mlx)
      refused(mlx, "compressed-tensors", "mlp.gate row 0 column 0: the group's bias")
      written.quantized({ source = mlx, recipe = "keep", format = "compressed-tensors",
        recipe_options = { undo = { "affine" } } }, function(ct)
          local before, after = written.modules(mlx), written.modules(ct)
          for name, m in pairs(before) do
            assert.equal(m.mode == "affine" and "bf16" or m.mode, after[name].mode, name)
            if m.mode ~= "affine" then assert.is_true(m.values == after[name].values, name) end
          end
        end)
    end)
    local rule, message = recipes.load("keep", { undo = { "q4_k" } })
    assert.is_nil(rule)
    assert.matches("undo: there is no mode q4_k", message)
  end)

  it("refuses what the other form does not have, naming the tensor", function()
    refused(CT, "mlx", "tensor model%.layers%.0%.linear_attn%.in_proj_qkv%.weight: MLX has no fp8"
      .. ".*%(%-%-set 'undo=%[\"fp8\"%]' writes matrices in fp8 as BF16%)$")
    refused(CT, "bf16", "tensor .* has no place in a bf16 checkpoint")
    local attention = function(t)
      return t.class == "q_proj" and { mode = "nvfp4" } or { keep = "bf16" }
    end
    written.quantized({ source = WRAPPED, recipe = attention, format = "compressed-tensors" },
      function(ct)
        refused(ct, "mlx", "q_proj%.weight: nvfp4 under a scale of the whole matrix"
          .. ".*%(%-%-set 'undo=%[\"nvfp4\"%]' writes matrices in nvfp4 as BF16%)$")
      end)
  end)

  it("refuses what no decision says", function()
    local tiled = checkpoint.edited(CT, function(tensors)
      local scale = tensors["model.layers.0.linear_attn.in_proj_qkv.weight_scale"]
      scale.shape, scale.data = { 1, 1 }, scale.data:sub(1, 2)
    end)
    refused(tiled, "compressed-tensors", "recipe keep: .*in_proj_qkv%.weight .*: cannot be kept as "
      .. "it is stored: it is fp8 in tiles of 128 x 64 %(%-%-set 'undo=%[\"fp8\"%]' writes")
    written.quantized({ source = tiled, recipe = "keep", format = "compressed-tensors",
      recipe_options = { undo = { "fp8" } } }, function(out)
        local modules = written.modules(out)
        assert.equal("bf16", modules["layers.0.linear_attn.in_proj_qkv"].mode)
      end)
    checkpoint.remove(tiled)
    local function by_expert(t)
      return t.class == "expert_up" and { mode = "mxfp4" } or { keep = "bf16" }
    end
    written.quantized({ source = WRAPPED, recipe = by_expert, format = "compressed-tensors" },
      function(ct)
        local plain = written.tensors(ct)
        local module = "model.language_model.layers.1.mlp.experts.3."
        local mixed = checkpoint.edited(ct, function(tensors)
          for _, last in ipairs { "weight_packed", "weight_scale" } do
            tensors[module .. "up_proj." .. last] = nil
          end
          tensors[module .. "up_proj.weight"] = plain[module .. "gate_proj.weight"]
        end)
        refused(mixed, "compressed-tensors", "experts%.up_proj%.weight .*several formats")
        checkpoint.remove(mixed)
      end)
  end)
end)
