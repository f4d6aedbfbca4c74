-- Has stock compressed-tensors decompress what moonlet.quantize writes, and stock transformers load
-- it. Needs $MOONLET_ORACLE/venv.
--
-- transformers 5.23 decompresses one scheme for the dense layers and one for the experts, whatever
-- the groups say, and neither mxfp8 nor zero points of experts: hence the recipes below.

local checkpoint = require "spec.support.checkpoint"
local logits = require "spec.support.logits"
local oracle = require "spec.support.oracle"
local quantize = require "moonlet.quantize"
local rules = require "spec.support.rules"
local written = require "spec.support.written"

local SOURCES = { "examples/demo-model", "spec/golden/models/moe-wrapped/hf",
  "spec/golden/models/moe-text/hf", "spec/golden/models/dense-text/hf",
  "spec/golden/models/dense-tied/hf", "spec/golden/mlx/moe4/hf" }

-- The widths and groups of integers that rules.every_format leaves out.
local function other_integers(t)
  local settings = { in_proj_qkv = { 8, 64 }, in_proj_z = { 2, 64 }, out_proj = { 3, 32 },
    q_proj = { 6, 64 }, k_proj = { 5, 64 }, v_proj = { 4, 64 }, o_proj = { 8, 32 },
    in_proj_a = { 3, 32 }, in_proj_b = { 8, 32 }, expert_gate = { 3, 32 }, expert_up = { 6, 32 },
    expert_down = { 4, 32 }, gate_proj = { 4, 64 }, up_proj = { 5, 32 }, down_proj = { 3, 32 },
    router = { 8, 64 }, lm_head = { 6, 64 }, embed = { 4, 32 } }
  local s = settings[t.class]
  return s and { mode = "affine", bits = s[1], group = s[2] } or { keep = "bf16" }
end

local function everything(mode)
  return function(t) return t.matrix and { mode = mode } or { keep = "bf16" } end
end

local RECIPES = { { recipe = rules.every_format }, { recipe = rules.every_format, fit = "mse" },
  { recipe = other_integers },
  { recipe = everything "mxfp4" }, { recipe = everything "nvfp4", shard_bytes = 100000 },
  { recipe = everything "fp8" }, { recipe = "unsloth", bits = 4, mxfp = true },
  { recipe = "unsloth_fixed", mode = "nvfp4" }, { recipe = "mixed_3_6" },
  { recipe = "config_i" }, { recipe = "uniform", bits = 4 } }

local function write(source, dir, variants, format)
  local outs = {}
  for i, o in ipairs(variants) do
    outs[i] = ("%s/%d"):format(dir, i)
    local given = { source = source, out = outs[i], format = format }
    for k, v in pairs(o) do given[k] = v end
    assert(quantize(given))
  end
  return outs
end

-- Every value of ours is the library's, to the bit; returns how many matrices were compared.
local function compare(out)
  local theirs, n = checkpoint.read(out .. ".safetensors"), 0
  local ours = written.modules(out)
  for name, t in pairs(theirs) do
    local what, module = name:match("^(%l+)%.(.*)$")
    local m = ours[module:gsub("^model%.language_model%.", ""):gsub("^model%.", "")]
    local values = what == "exact" and m.values or checkpoint.to_bf16(m.values)
    assert.is_true(values == t.data, ("%s: %s"):format(out, name))
    n = n + 1
  end
  return n
end

describe("stock compressed-tensors #oracle", function()
  for _, source in ipairs(SOURCES) do
    it("decompresses to our values what we make of " .. source, function()
      local dir <close> = checkpoint.scope()
      local outs = write(source, dir.path, RECIPES, "compressed-tensors")
      oracle.run("ct_values.py", outs)
      for _, out in ipairs(outs) do assert.is_true(compare(out) > 10) end
    end)
  end
end)

describe("stock transformers #oracle", function()
  local function agrees(outs)
    logits.run("hf_logits.py", outs)
    for _, out in ipairs(outs) do
      local distance = logits.distance(out)
      assert.is_true(distance <= 5e-4, ("%s: %.3g"):format(out, distance))
    end
  end

  for _, source in ipairs(SOURCES) do
    it("computes our logits from what we make of " .. source, function()
      local plain <close> = checkpoint.scope()
      local packed <close> = checkpoint.scope()
      agrees(write(source, plain.path, { { recipe = "keep_bf16" } }, "bf16"))
      agrees(write(source, packed.path, { { recipe = rules.only { mode = "mxfp4" } },
        { recipe = "qstream_mxfp4" } }, "compressed-tensors"))
    end)
  end

  for _, source in ipairs { "spec/golden/models/moe-wrapped/hf",
      "spec/golden/models/dense-tied/hf" } do
    it("computes our logits from MLX files of " .. source .. " in other forms", function()
      local mlx <close> = checkpoint.scope()
      local plain <close> = checkpoint.scope()
      local packed <close> = checkpoint.scope()
      local from = write(source, mlx.path, { { recipe = rules.only { mode = "mxfp4" } } }, "mlx")[1]
      agrees(write(from, plain.path, { { recipe = "keep_bf16" } }, "bf16"))
      agrees(write(from, packed.path, { { recipe = "keep" } }, "compressed-tensors"))
    end)
  end
end)
