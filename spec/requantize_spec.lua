-- Sources that are quantized already.
local core = require "moonlet.core"
local checkpoint = require "spec.support.checkpoint"
local json = require "moonlet.json"
local plan = require "moonlet.plan"
local rules = require "spec.support.rules"
local written = require "spec.support.written"

local quantized = written.quantized
local MOE = "spec/golden/mlx/moe4/"
local CT = "spec/golden/ct/model-mixed/checkpoint"

-- Quantizes a source by each recipe in turn; fn(directories).
local function chain(source, steps, fn)
  local dirs = {}
  local function run(i, from)
    if i > #steps then return fn(table.unpack(dirs)) end
    local o = { source = from }
    for k, v in pairs(steps[i]) do o[k] = v end
    quantized(o, function(out, p)
      dirs[i] = out
      assert.equal(i > 1 or source ~= MOE .. "hf", p.notes[1] ~= nil)
      if p.notes[1] then assert.matches("^the source is quantized already", p.notes[1]) end
      run(i + 1, out)
    end)
  end
  run(1, source)
end

-- The same vectors; norms within the rounding of w and w - 1 to bf16 where the form changes.
local function assert_same_vectors(before, after, rounded)
  local want = assert(core.model_layout(before, { values = true })).vectors
  local got = assert(core.model_layout(after, { values = true })).vectors
  for name, v in pairs(want) do
    assert.truthy(got[name], name)
    assert.equal(#v, #got[name])
    for i = 1, rounded and #v or 0, 4 do
      local x, y = string.unpack("<f", v, i), string.unpack("<f", got[name], i)
      assert.is_true(math.abs(x - y) <= 2 ^ -8 * math.abs(x), name)
    end
    assert.is_true(rounded and name:find("norm") ~= nil or v == got[name], name)
  end
end

-- A plain checkpoint with the values of a quantized MLX one, as float32.
local function unpacked(dir)
  local copy = checkpoint.directory()
  local tensors = written.tensors(dir)
  for name in pairs(tensors) do
    local module = name:match("^(.*)%.scales$")
    if module then
      for _, part in ipairs { ".weight", ".scales", ".biases" } do tensors[module .. part] = nil end
    end
  end
  for name, m in pairs(written.modules(dir)) do
    local prefix = name == "lm_head" and "language_model." or "language_model.model."
    tensors[prefix .. name .. ".weight"] = { dtype = "F32", shape = { m.rows, m.cols },
      data = m.values }
  end
  checkpoint.write(copy .. "/model.safetensors", tensors)
  local config = assert(json.read(dir .. "/config.json"))
  config.quantization, config.quantization_config = nil, nil
  checkpoint.spit(copy .. "/config.json", json.encode(config))
  return copy
end

describe("quantizing a quantized checkpoint", function()
  it("encodes what the first format holds", function()
    local eight = { recipe = "uniform", bits = 8 }
    local four = { recipe = "uniform", bits = 4 }
    chain(MOE .. "hf", { eight, four }, function(first, second)
      local dir = unpacked(first)
      quantized({ source = dir, recipe = "uniform", bits = 4 }, function(want)
        want = written.tensors(want)
        for name, t in pairs(written.tensors(second)) do
          -- routers and gates have 8 bits in both, and keep their codes
          local kept = name:find("mlp%.gate%.") or name:find("shared_expert_gate%.")
          assert.is_true(kept ~= nil or t.data == want[name].data, name)
        end
      end)
      checkpoint.remove(dir)
      assert_same_vectors(first, second)
    end)
  end)

  it("gives what the codes stand for when it is undone", function()
    local only = rules.only { mode = "mxfp4" }
    for _, format in ipairs { "mlx", "bf16" } do
      chain(MOE .. "hf", { { recipe = only }, { recipe = "keep_bf16", format = format } },
        function(packed, plain)
          local before, after = written.modules(packed), written.modules(plain)
          for name, m in pairs(before) do
            assert.equal("bf16", after[name].mode)
            assert.is_true(m.values == after[name].values, name)
          end
          assert_same_vectors(packed, plain)
          local config = assert(json.read(plain .. "/config.json"))
          assert.is_nil(config.quantization)
          assert.is_nil(config.quantization_config)
        end)
    end
  end)

  it("takes codes over where the format stays", function()
    for _, format in ipairs { "mlx", "compressed-tensors" } do
      local recipe = format == "mlx" and "unsloth" or rules.every_format
      chain(MOE .. "hf", { { recipe = recipe, format = format },
        { recipe = recipe, format = format, mx_rule = "nearest" } }, function(first, second)
        if format == "mlx" then
          written.assert_same_tensors(written.tensors(first), written.tensors(second))
        end
        local after = written.modules(second)
        for name, m in pairs(written.modules(first)) do
          assert.equal(m.mode, after[name].mode)
          if m.mode ~= "nvfp4" then assert.is_true(m.values == after[name].values, name) end
        end
      end)
    end
  end)

  it("takes mxfp4 from one form of checkpoint to the other and back", function()
    local only = rules.only { mode = "mxfp4" }
    chain(MOE .. "hf", { { recipe = only }, { recipe = only, format = "compressed-tensors" },
      { recipe = only } }, function(first, _, third)
      written.assert_same_tensors(written.tensors(first), written.tensors(third))
      assert.equal(checkpoint.slurp(first .. "/config.json"),
        checkpoint.slurp(third .. "/config.json"))
    end)
  end)

  it("reads what stock converters wrote", function()
    for _, source in ipairs { MOE .. "mlx", "spec/golden/mlx/dense4/mlx", CT } do
      quantized({ source = source, recipe = "keep_bf16" }, function(out)
        local after = written.modules(out)
        for name, m in pairs(written.modules(source)) do
          local got = after[name].values
          for i = 1, #got, 4 * 97 do
            local want, value = string.unpack("<f", m.values, i), string.unpack("<f", got, i)
            assert.is_true(math.abs(want - value) <= 2 ^ -8 * math.abs(want), name) -- to bf16
          end
        end
        assert_same_vectors(source, out, source == CT)
      end)
    end
  end)

  it("has the price of a plain one", function()
    local function price(dir) return assert(plan("unsloth", dir, { bits = 4 })) end
    assert.same(price(MOE .. "hf").classes, price(MOE .. "mlx").classes)
  end)
end)
