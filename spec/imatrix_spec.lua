-- moonlet.imatrix: llama.cpp's files as what moonlet calls things. Golden data: files written by
-- the gguf package and by struct, expected means by numpy (spec/golden/imatrix/make.py).

local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local gguf = require "spec.support.gguf"
local golden = require "spec.support.golden"
local imatrix = require "moonlet.imatrix"
local names = require "moonlet.gguf_names"

local DIR = "spec/golden/imatrix/"

local function numbers_of(name)
  return assert(core.model_config(checkpoint.slurp(DIR .. name .. ".config.json")))
end

local MOE, DENSE = numbers_of("moe"), numbers_of("dense")
local expected = golden.open(DIR .. "expected.safetensors")

-- Every expected matrix of a run, against what was read: experts one by one, and as one (.pooled).
local function assert_means(run, read)
  local n = 0
  for key, want in pairs(expected) do
    if key:sub(1, #run + 1) == run .. "/" and not key:find(":shape$") then
      local name, is_pooled = key:sub(#run + 2):gsub("%.pooled$", "")
      local n_mat, n_in = table.unpack(expected[key .. ":shape"])
      for m = 0, n_mat - 1 do
        local bytes = assert(read:importance(name, is_pooled == 0 and m or nil), key)
        local got = golden.unpack(bytes, "F32")
        assert.equal(n_in, #got, key)
        for i, x in ipairs(got) do
          local w = want[m * n_in + i]
          assert.is_true(math.abs(x - w) <= 2e-6 * w, ("%s %d %d: %g %g"):format(key, m, i, x, w))
        end
        n = n + 1
      end
    end
  end
  assert.is_true(n >= 24)
end

local function refused(path, numbers, message)
  local read, got, code = imatrix.read(path, numbers)
  assert.is_nil(read)
  assert.equal(message, (got:gsub(DIR:gsub("%p", "%%%0"), "")))
  assert.equal("format", code)
end

local function floats(...)
  local parts = {}
  for i, x in ipairs { ... } do parts[i] = string.pack("<f", x) end
  return table.concat(parts)
end

describe("imatrix", function()
  describe("reads", function()
    it("GGUF of a dense model", function()
      local read <close> = assert(imatrix.read(DIR .. "dense.gguf", DENSE))
      assert_means("dense", read)
      assert.same({}, read.notes)
      assert.same({ "text.txt" }, read.datasets)
      assert.equal(4, read.chunk_count)
      assert.equal(32, read.chunk_size)
    end)

    it("GGUF with experts, value heads grouped again", function()
      local read <close> = assert(imatrix.read(DIR .. "moe.gguf", MOE))
      assert_means("moe", read)
    end)

    it("experts that no token reached as the mean of their neighbours, and says how many",
      function()
        local read <close> = assert(imatrix.read(DIR .. "moe.gguf", MOE))
        assert.equal(3, read.never_met)
        assert.same({ DIR .. "moe.gguf: no token reached 3 of 18 expert matrices; they get the "
          .. "mean of their layer's others" }, read.notes)
        local _, tokens = read:importance("layers.0.mlp.experts.up_proj", 1)
        assert.equal(0, tokens)
        _, tokens = read:importance("layers.0.mlp.experts.up_proj", 2)
        assert.equal(19, tokens)
      end)

    it("several files as their sum", function()
      local read <close> = assert(imatrix.read({ DIR .. "moe.gguf", DIR .. "more.gguf" }, MOE))
      assert_means("moe+more", read)
      assert.same({ "text.txt", "more.txt" }, read.datasets)
      assert.equal(7, read.chunk_count)
    end)

    it("a fused expert tensor, and one count for all experts", function()
      local read <close> = assert(imatrix.read(DIR .. "fused-one-count.gguf", MOE))
      assert_means("even", read)
    end)

    it("the older .dat form, with and without a trailer", function()
      local dense <close> = assert(imatrix.read(DIR .. "dense.dat", DENSE))
      assert_means("dense", dense)
      local moe <close> = assert(imatrix.read(DIR .. "moe.dat", MOE))
      assert_means("moe.dat", moe)
      assert.equal(3, moe.never_met)
      assert.same({ "text.txt" }, moe.datasets)
    end)

    it("names in every spelling", function()
      local read <close> = assert(imatrix.read(DIR .. "moe.gguf", MOE))
      local want = read:importance("layers.1.mlp.experts.gate_proj", 2)
      for _, name in ipairs { "model.language_model.layers.1.mlp.experts.2.gate_proj.weight",
        "language_model.model.layers.1.mlp.experts.2.gate_proj",
        "model.layers.1.mlp.experts.2.gate_proj.weight", "layers.1.mlp.experts.2.gate_proj" } do
        assert.equal(want, read:importance(name))
      end
      assert.equal(want,
        read:importance("language_model.model.layers.1.mlp.switch_mlp.gate_proj.weight", 2))
    end)

    it("nothing about embeddings and a head that was not calibrated", function()
      local read <close> = assert(imatrix.read(DIR .. "moe.gguf", MOE))
      assert.is_nil(read:importance("lm_head"))
      assert.is_nil(read:importance("model.embed_tokens.weight"))
      assert.error_matches(function() read:importance("layers.7.mlp.gate") end,
        "the model has no matrix layers.7.mlp.gate")
      assert.error_matches(function() read:importance("layers.1.mlp.experts.up_proj", 3) end,
        "has no expert 3")
    end)
  end)

  describe("refuses an imatrix of another model", function()
    it("with other sizes", function()
      local other = numbers_of("dense")
      other.intermediate_size = 13
      refused(DIR .. "dense.gguf", other, "dense.gguf: blk.0.ffn_down.weight has 1 x 12 numbers, "
        .. "layers.0.mlp.down_proj of this model 1 x 13")
      refused(DIR .. "dense.dat", other, "dense.dat: blk.0.ffn_down.weight has 12 numbers, "
        .. "layers.0.mlp.down_proj of this model 1 x 13")
      other = numbers_of("moe")
      other.num_experts = 4
      refused(DIR .. "moe.gguf", other, "moe.gguf: blk.0.ffn_down_exps.weight has 3 x 4 numbers, "
        .. "layers.0.mlp.experts.down_proj of this model 4 x 4")
    end)

    it("with more layers or fewer", function()
      local other = numbers_of("dense")
      other.num_hidden_layers, other.layer_types = 1, { "linear_attention" }
      refused(DIR .. "dense.gguf", other,
        "dense.gguf: blk.1.attn_k.weight: this model has 1 layers")
      other.num_hidden_layers = 3
      other.layer_types = { "linear_attention", "full_attention", "linear_attention" }
      refused(DIR .. "dense.gguf", other, "dense.gguf: no entry for layer 2 (blk.2) of 3")
    end)

    it("of another kind", function()
      refused(DIR .. "dense.gguf", MOE,
        "dense.gguf: blk.0.ffn_down.weight: this model has no layers.0.mlp.down_proj")
    end)

    it("with nothing that fits", function()
      local path = os.tmpname()
      assert(core.imatrix_write(path, { { name = "v.blk.0.x.weight", n_in = 1, n_mat = 1,
        sums2 = floats(1), counts = floats(1) } }, { datasets = {} }))
      local read, message = imatrix.read(path, MOE)
      assert.is_nil(read)
      assert.equal(path .. ": no entry is of a tensor of this model", message)
      os.remove(path)
    end)
  end)

  describe("lacking some entries", function()
    -- moe.gguf without the entries that `drop` names, written again.
    local function without(drop, fn)
      local set <close> = assert(core.imatrix_open { DIR .. "more.gguf" })
      local path, list = os.tmpname(), {}
      for _, name in ipairs(set:names()) do
        local hf = names.from_gguf(name)
        if not drop[hf] then
          local n_mat = name:find("_exps%.") and 3 or 1
          local sums2 = {}
          for m = 0, n_mat - 1 do sums2[m + 1] = set:mean_squares(name, n_mat, m) end
          list[#list + 1] = { name = name, n_in = #sums2[1] // 4, n_mat = n_mat,
            sums2 = table.concat(sums2), counts = floats(1, 1, 1):sub(1, 4 * n_mat) }
        end
      end
      assert(core.imatrix_write(path, list, { datasets = {} }))
      local read <close> = assert(imatrix.read(path, MOE))
      fn(read, path)
      os.remove(path)
    end

    it("takes those of matrices with the same inputs", function()
      without({ ["layers.1.self_attn.q_proj"] = true, ["layers.1.self_attn.k_proj"] = true,
        ["layers.0.linear_attn.in_proj_qkv"] = true }, function(read)
        assert.same({}, read.notes)
        assert.equal(read:importance("layers.1.self_attn.v_proj"),
          read:importance("layers.1.self_attn.q_proj"))
        assert.equal(read:importance("layers.0.linear_attn.in_proj_z"),
          read:importance("layers.0.linear_attn.in_proj_qkv"))
      end)
    end)

    it("says whose inputs are unknown", function()
      without({ ["layers.1.mlp.experts.down_proj"] = true, ["layers.1.self_attn.o_proj"] = true },
        function(read, path)
          assert.same({ path .. ": nothing about the inputs of layers.1.mlp.experts.down_proj and "
            .. "1 more; all count the same there" }, read.notes)
          assert.is_nil(read:importance("layers.1.self_attn.o_proj"))
        end)
    end)
  end)

  describe("writes", function()
    it("the bytes that llama.cpp writes", function()
      -- Everything that the golden file holds, under our names and in our order.
      local want = checkpoint.slurp(DIR .. "moe.gguf")
      local entries = {}
      for name, e in pairs(gguf.read(DIR .. "moe.gguf")) do
        local hf = names.from_gguf(name)
        local function ours(bytes)
          if not hf:find("out_proj") then return bytes end
          return core.imatrix_order_heads(bytes, 2, 3, 4, false)
        end
        entries[#entries + 1] = { name = "model." .. hf .. ".weight", n_in = e.dims[1],
          n_mat = e.dims[2] or 1, sums2 = ours(e.in_sum2), sums = ours(e.in_sum),
          counts = e.counts }
      end
      local path = os.tmpname()
      assert(imatrix.write(path, entries, { numbers = MOE, datasets = { "text.txt" },
        chunk_count = 4, chunk_size = 32 }))
      assert.is_true(want == checkpoint.slurp(path))
      os.remove(path)
    end)

    it("one entry under several names", function()
      local path, entries = os.tmpname(), {}
      for i = 0, 1 do
        local layer = ("layers.%d."):format(i)
        entries[#entries + 1] = { name = { layer .. "mlp.gate_proj", layer .. "mlp.up_proj" },
          n_in = 8, n_mat = 1, sums2 = floats(1, 2, 3, 4, 5, 6, 7, 8), counts = floats(2) }
      end
      assert(imatrix.write(path, entries, { numbers = DENSE }))
      local read <close> = assert(imatrix.read(path, DENSE))
      local half = floats(0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4)
      assert.equal(half, read:importance("layers.1.mlp.up_proj"))
      assert.equal(half, read:importance("layers.0.mlp.gate_proj"))
      os.remove(path)
    end)

    it("no name or number that would not be read again", function()
      local path = os.tmpname()
      for _, bad in ipairs { { name = "a\nb" }, { name = ("n"):rep(300) }, { name = "" },
          { sums2 = floats(1, -1) }, { counts = floats(0.5) }, { counts = floats(-1) } } do
        local entry = { name = bad.name or "a", n_in = 2, n_mat = 1,
          sums2 = bad.sums2 or floats(1, 2), counts = bad.counts or floats(1) }
        local ok, _, code = core.imatrix_write(path, { entry }, { datasets = {} })
        assert.is_nil(ok)
        assert.equal("range", code)
      end
      os.remove(path)
    end)

    it("nothing when a number is not finite, and leaves the old file", function()
      local path = os.tmpname()
      checkpoint.spit(path, "old")
      local ok, message, code = imatrix.write(path, { { name = "lm_head", n_in = 1, n_mat = 1,
        sums2 = floats(0 / 0), counts = floats(1) } }, { numbers = DENSE })
      assert.is_nil(ok)
      assert.equal(path .. ": entry output.weight has numbers that are not finite", message)
      assert.equal("range", code)
      assert.equal("old", checkpoint.slurp(path))
      os.remove(path)
    end)
  end)

  it("maps names both ways", function()
    for _, numbers in ipairs { MOE, DENSE } do
      for _, t in ipairs(require("moonlet.layout").tensors(numbers)) do
        local theirs = names.to_gguf(t.name)
        assert.equal(t.matrix, theirs ~= nil, t.name)
        if theirs then assert.equal(names.bare(t.name), (names.from_gguf(theirs))) end
        assert.equal(theirs, names.to_gguf(t.output))
      end
    end
    assert.equal("blk.3.ffn_gate_exps.weight", names.to_gguf("layers.3.mlp.experts.7.gate_proj"))
    assert.is_nil(names.from_gguf("blk.3.attn_q_norm.weight"))
  end)
end)
