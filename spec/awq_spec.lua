-- Folding scales into a model changes nothing but rounding: a folded copy in float32, scales of
-- every group far from 1, gives the same logits. Which scales are best is measured elsewhere.

local awq = require "moonlet.awq"
local calibration = require "spec.support.calibration"
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local golden = require "spec.support.golden"
local hf = require "moonlet.hf"
local imatrix = require "moonlet.imatrix"
local journals = require "spec.support.journal"
local json = require "moonlet.json"
local mlx = require "moonlet.mlx"
local names = require "moonlet.gguf_names"
local plan = require "moonlet.plan"
local quantize = require "moonlet.quantize"
local shards = require "moonlet.shards"
local source = require "moonlet.source"
local written = require "spec.support.written"

local MODELS = "spec/golden/models/"

-- A bit of everything: quantized in several formats, and readers that stay.
local function mixed(t)
  if not t.matrix then return { keep = "bf16" } end
  if t.class == "router" or t.class == "in_proj_a" or t.class == "k_proj" then
    return { keep = "bf16" }
  end
  if t.class == "expert_down" or t.class == "down_proj" then return { mode = "mxfp4" } end
  if t.class == "out_proj" or t.class == "expert_up" then return { mode = "nvfp4" } end
  return { mode = "affine", bits = 4, group = 32 }
end

local function decide_all(tensors)
  local decided = {}
  for i, t in ipairs(tensors) do
    decided[i] = { tensor = t, decision = t.matrix and { mode = "mxfp8", bits = 8, group = 32 }
      or { keep = t.stored or "bf16" } }
  end
  return decided
end

-- A checkpoint of this form, all in float32 but the norms that scales are folded into: their
-- rounding is to cost nothing.
local function write_f32(form, writer, inventory, decided, out)
  local kept = {}
  for i, d in ipairs(decided) do
    kept[i] = { tensor = d.tensor, decision = d.tensor.part == "text"
      and { keep = d.tensor.stored or "bf16" } or { drop = true } }
  end
  local sets = assert(form.items(kept, inventory.source))
  local file, entries = shards.files(sets, shards.LIMIT)[1], {}
  for i, item in ipairs(file.items) do
    entries[i] = item.entries[1]
    local is_norm = not item.tensor.matrix and item.put.parts[1].col_scale
    if item.put.op == "bf16" and not is_norm then item.put.op, entries[i].dtype = "f32", "F32" end
  end
  assert(writer:create(out .. "/model.safetensors", entries, "mlx"))
  for i, item in ipairs(file.items) do
    item.put.entry = i
    assert(writer:put(item.put))
  end
  assert(writer:finish())
  checkpoint.spit(out .. "/config.json", assert(form.config(inventory, kept)))
end

local function logits(dir, ids)
  local model = assert(core.model_open(dir, { threads = 1 }))
  local values = golden.floats(assert(model:forward(ids, { "logits" })).logits)
  model:close()
  return values
end

-- Calls fn with logits of the model and of a copy with scales folded in; edit may spoil the scales.
local function folded(dir, o, fn, edit)
  local out = checkpoint.directory()
  local inventory, form = assert(plan.inventory(dir)), o.form or mlx
  if form.adapt then form.adapt(inventory.source) end
  source.by_expert(inventory.source.tensors)
  local decided = decide_all(inventory.source.tensors)
  local read <close> = calibration.loud_imatrix(inventory, out .. "/imatrix.gguf")
  local writer <close> = assert(core.quant_open(dir, 1))
  local results = assert(awq.fold { how = o.how, numbers = inventory.numbers, decided = decided,
    zero_centred = inventory.source.zero_centred, imatrix = read, writer = writer, form = form })
  local by_name = {}
  for _, d in ipairs(decided) do by_name[names.bare(d.tensor.name)] = d.tensor end
  if edit then edit(by_name) end
  write_f32(form, writer, inventory, decided, out)
  local ids = {}
  for i = 1, 40 do ids[i] = (i * 7919) % inventory.numbers.vocab_size end
  fn(logits(dir, ids), logits(out, ids), results, by_name)
  checkpoint.remove(out)
end

local function count(results)
  local n = {}
  for _, r in ipairs(results) do
    local path = r.name:gsub("^layers%.%d+%.", "")
    n[path] = (n[path] or 0) + 1
  end
  return n
end

describe("awq", function()
  local cases = {
    ["dense-text"] = { input_layernorm = 4, post_attention_layernorm = 4,
      ["self_attn.v_proj"] = 1, ["linear_attn.norm"] = 3, ["mlp.up_proj"] = 4 },
    ["moe-text"] = { input_layernorm = 8, post_attention_layernorm = 8, ["self_attn.v_proj"] = 2,
      ["linear_attn.norm"] = 6, ["mlp.shared_expert.up_proj"] = 8, ["mlp.experts.up_proj"] = 64 },
    ["moe-wrapped"] = { input_layernorm = 4, post_attention_layernorm = 4,
      ["self_attn.v_proj"] = 1, ["linear_attn.norm"] = 3, ["mlp.shared_expert.up_proj"] = 4,
      ["mlp.experts.up_proj"] = 32 },
  }
  for name, groups in pairs(cases) do
    it("folded into every group changes no logits of " .. name, function()
      local how = { alpha = 1, gain = 4 }
      folded(MODELS .. name .. "/hf", { how = how }, function(want, got, results)
        assert.same(groups, count(results))
        local d = golden.distance(got, want)
        assert.is_true(d < 1e-4, name .. " is off by " .. d)
      end)
    end)
  end

  for _, name in ipairs { "dense-text", "moe-wrapped" } do
    it("suits norms that are stored as w - 1, in the form of Hugging Face: " .. name, function()
      folded(MODELS .. name .. "/hf", { how = { alpha = 1, gain = 4 }, form = hf },
        function(want, got)
          local d = golden.distance(got, want)
          assert.is_true(d < 1e-4, "off by " .. d)
        end)
    end)
  end

  it("folded into every group changes no logits of the demo model", function()
    folded("examples/demo-model", { how = { alpha = 1 } }, function(want, got)
      local d = golden.distance(got, want)
      assert.is_true(d < 1e-4, "off by " .. d)
    end)
  end)

  it("misses no reader: with any of them unscaled, logits change", function()
    local readers = { "layers.0.linear_attn.in_proj_qkv", "layers.0.linear_attn.in_proj_z",
      "layers.0.linear_attn.in_proj_a", "layers.0.linear_attn.in_proj_b",
      "layers.0.linear_attn.out_proj", "layers.3.self_attn.q_proj", "layers.3.self_attn.k_proj",
      "layers.3.self_attn.v_proj", "layers.3.self_attn.o_proj", "layers.1.mlp.gate",
      "layers.1.mlp.shared_expert_gate", "layers.1.mlp.shared_expert.gate_proj",
      "layers.1.mlp.shared_expert.up_proj", "layers.1.mlp.shared_expert.down_proj",
      "layers.1.mlp.experts.gate_proj", "layers.1.mlp.experts.up_proj",
      "layers.1.mlp.experts.down_proj" }
    for _, reader in ipairs(readers) do
      folded(MODELS .. "moe-wrapped/hf", { how = { alpha = 1 } }, function(want, got)
        local d = golden.distance(got, want)
        assert.is_true(d > 1e-2, reader .. " does not matter: " .. d)
      end, function(tensors)
        for _, part in ipairs(tensors[reader].parts) do part.col_scale = nil end
      end)
    end
  end)

  -- Calls fn(run, dir): run(options) quantizes into a new directory and returns it and the plan.
  local function quantizing(dir, fn)
    local place, n = checkpoint.directory(), 0
    local inventory = assert(plan.inventory(dir))
    calibration.loud_imatrix(inventory, place .. "/imatrix.gguf"):close()
    fn(function(o)
      n = n + 1
      o.source, o.out, o.recipe = dir, place .. "/" .. n, o.recipe or mixed
      o.imatrix, o.threads = place .. "/imatrix.gguf", o.threads or 1
      return o.out, assert(quantize(o))
    end, place)
    checkpoint.remove(place)
  end

  describe("in a run of quantize", function()
    local MOE = MODELS .. "moe-wrapped/hf"

    for _, format in ipairs { "mlx", "compressed-tensors" } do
      it("lowers weighted errors and says so: " .. format, function()
        quantizing(MOE, function(run)
          local out, result = run { awq = "search", format = format }
          local n, of, left = result.notes[#result.notes]:match(
            "^awq: scales folded into (%d+) of (%d+) groups; weighted errors are ([%d.]+) of what")
          assert.is_true(tonumber(n) > 10 and tonumber(of) == 48 and tonumber(left) < 0.99)
          local ids = { 1, 2, 3, 4, 5, 6, 7, 8 }
          local want = logits(MOE, ids)
          assert.is_true(golden.distance(logits(out, ids), want) < 3 * golden.rms(want))
        end)
      end)
    end

    it("gives the same bytes for every number of threads", function()
      quantizing(MOE, function(run)
        local one, two = run { awq = "search" }, run { awq = "search", threads = 3 }
        assert.is_true(checkpoint.slurp(one .. "/model.safetensors")
          == checkpoint.slurp(two .. "/model.safetensors"))
      end)
    end)

    it("is told as it goes, can be stopped, and goes on with what it has found", function()
      quantizing(MOE, function(run, place)
        local o = { source = MOE, out = place .. "/out", recipe = mixed, awq = "search",
          imatrix = place .. "/imatrix.gguf", threads = 1, resume = true }
        local function stop_at(group)
          local seen
          o.on_progress = function(done, total, name, stage)
            seen = { done, total, name, stage }
            return done < group
          end
          local result, message, code = quantize(o)
          assert.is_nil(result)
          assert.matches("^stopped; .*to be resumed", message)
          assert.equal("cancelled", code)
          return seen
        end
        assert.same({ 3, 20, "layers.0.post_attention_layernorm", "awq" }, stop_at(3))
        assert.same({ 9, 20, "layers.1.mlp.shared_expert.up_proj", "awq" }, stop_at(9))
        local journal = checkpoint.slurp(place .. "/out.partial/journal")
        assert.equal(9, select(2, journal:gsub("\n%x+ awq ", "")))
        assert.is_nil(core.list_dir(place .. "/out"))

        o.on_progress = nil
        local whole, first = run { awq = "search" }
        local resumed = assert(quantize(o))
        assert.same(first.notes, resumed.notes)
        local file = "/model.safetensors"
        assert.is_true(checkpoint.slurp(whole .. file) == checkpoint.slurp(o.out .. file))

        -- What is written down is not searched for again.
        o.out = place .. "/other"
        stop_at(9)
        journals.edit(o.out .. ".partial/journal", function(line)
          return (line:gsub('"alpha": [%d.]+', '"alpha": 0.7'))
        end)
        o.on_progress = nil
        assert(quantize(o))
        assert.is_false(checkpoint.slurp(whole .. file) == checkpoint.slurp(o.out .. file))
      end)
    end)

    it("writes mlx-node's scales when asked", function()
      quantizing(MODELS .. "dense-text/hf", function(run, place)
        local out = run { awq = "mlx-node" }
        local got = checkpoint.load(out)["language_model.model.layers.3.input_layernorm.weight"]
        local raw = checkpoint.load(MODELS .. "dense-text/hf")
        raw = checkpoint.values(raw["model.layers.3.input_layernorm.weight"])
        local read <close> = assert(imatrix.read(place .. "/imatrix.gguf",
          assert(plan.inventory(MODELS .. "dense-text/hf")).numbers))
        local rms, low, high = {}, math.huge, 0
        for i, x in ipairs(golden.unpack((read:importance("layers.3.self_attn.q_proj")), "F32")) do
          rms[i] = math.sqrt(x)
          low, high = math.min(low, rms[i]), math.max(high, rms[i])
        end
        for i, w in ipairs(checkpoint.values(got)) do
          local want = (1 + raw[i]) / (rms[i] / math.sqrt(low * high))
          assert.is_true(math.abs(w - want) <= 2 ^ -8 * math.abs(want))
        end
      end)
    end)

    it("leaves alone what is copied or has no quantized reader", function()
      quantizing(MOE, function(run)
        local kept = checkpoint.load((run { recipe = "keep_bf16", awq = "search" }))
        local plain = checkpoint.load((run { recipe = "keep_bf16" }))
        for name, t in pairs(plain) do assert.is_true(t.data == kept[name].data, name) end
      end)
    end)

    it("is rehearsed without the search, with what the columns meet", function()
      quantizing(MOE, function(_, place)
        local p = assert(quantize { source = MOE, out = place .. "/out", recipe = mixed,
          awq = "search", fit = "imatrix", imatrix = place .. "/imatrix.gguf", dry_run = true })
        assert.is_true(p.dry_run.seconds > 0)
        assert.matches("search for scales %(awq%) is not in the estimate", p.notes[#p.notes])
        assert.is_nil(core.list_dir(place .. "/out.partial"))
      end)
    end)

    it("is missed where an imatrix is given and nothing asks for it", function()
      quantizing(MOE, function(run)
        local function notes(o) return table.concat(select(2, run(o)).notes, "\n") end
        local idle = "imatrix changes nothing: neither fit nor awq asks for it"
        assert.matches(idle, notes {})
        assert.matches(idle, notes { fit = "mse" })
        for _, o in ipairs { { awq = "mlx-node" }, { fit = "best" } } do
          assert.not_matches(idle, notes(o))
        end
      end)
    end)

    it("leaves fits that do not ask for it as they are", function()
      quantizing(MOE, function(run, place)
        local weighed = checkpoint.load((run { fit = "mse" }))
        assert(quantize { source = MOE, out = place .. "/plain", recipe = mixed, fit = "mse" })
        for name, t in pairs(checkpoint.load(place .. "/plain")) do
          assert.is_true(t.data == weighed[name].data, name)
        end
      end)
    end)

    it("needs an imatrix", function()
      assert.error_matches(function()
        quantize { source = MOE, out = "/tmp/never", recipe = mixed, awq = "search" }
      end, "option 'awq': search needs an imatrix")
    end)

    it("is left out, with a note, where only the recipe asks for it", function()
      local scope <close> = checkpoint.scope()
      local rule = scope.path .. "/rule.lua"
      checkpoint.spit(rule, [[return function(_, kit)
        local decide, base = kit.recipe "uniform"
        return decide, base, { awq = "search" }
      end]])
      local p = assert(quantize { source = MOE, out = scope.path .. "/out", recipe = rule })
      assert.same({ "the recipe's awq = search is left out: it needs an imatrix" },
        written.notes(p))
      local said = assert(json.read(scope.path .. "/out/moonlet.json"))
      assert.equal("off", said.settings.awq)
    end)
  end)
end)
