-- moonlet.imatrix { ... }: texts in, files out. What is summed is compared with other programs in
-- spec/quant/calib_spec.lua; here it is followed into the files and back.
local checkpoint = require "spec.support.checkpoint"
local gguf_names = require "moonlet.gguf_names"
local golden = require "spec.support.golden"
local imatrix = require "moonlet.imatrix"
local moonlet = require "moonlet"
local numbers = require "spec.support.numbers"
local safetensors = require "moonlet.safetensors"
local sequences = require "moonlet.sequences"
local sites = require "moonlet.sites"

local DEMO <const> = "examples/demo-model"
local CHAT <const> = DEMO .. "/eval.jsonl"
local TEXT <const> = ("Call me Ishmael. Some years ago, never mind how long precisely. "):rep(8)

local dir

local function path(name)
  return dir .. "/" .. name
end

local function names_in(place)
  local pipe <close> = assert(io.popen("ls -A " .. place))
  return pipe:read("a")
end

local function floats(bytes)
  return numbers.unpack(bytes)
end

-- Site name -> { sums2, counts, n_in } of sequences, from the C module.
local function sums_of(model, list)
  local ids, all = {}, {}
  for i, sequence in ipairs(list) do ids[i] = sequence.ids end
  local calibration <close> = assert(model.core:calibrate(ids))
  local done, total = 0, 1
  while done < total do done, total = calibration:step() end
  for i, site in ipairs(calibration:sites()) do
    local sums2, _, counts = calibration:sums(i)
    all[site.name] = { sums2 = floats(sums2), counts = floats(counts), n_in = site.n_in }
  end
  return all
end

describe("moonlet.imatrix", function()
  local model
  setup(function()
    dir = checkpoint.directory()
    model = assert(moonlet.open(DEMO, { threads = 2 }))
  end)
  teardown(function()
    model:close()
    checkpoint.remove(dir)
  end)

  it("writes what every matrix was given, experts apart and heads in order", function()
    local seen, last = {}, 0
    local result = assert(moonlet.imatrix { model = model, text = TEXT, chunk = 50, chunks = 2,
      chat = CHAT, dialogues = { 3, 5 }, out = path("a.gguf"), hessians = path("a.safetensors"),
      on_progress = function(done, total)
        assert.is_true(done > last and done <= total)
        seen[#seen + 1], last = done / total, done
      end })
    assert.equal(1, seen[#seen])

    local list = assert(sequences.read(model, { text = TEXT, window = 50, windows = { 1, 2 } }))
    for _, s in ipairs(assert(sequences.read(model, { chat = CHAT, dialogues = { 3, 5 } }))) do
      list[#list + 1] = s
    end
    local _, n_tokens = sequences.lengths(list)
    local want, met = sums_of(model, list), 0
    assert.same({ matrices = 103, tokens = n_tokens, chunks = #list, experts = 128,
      never_met = result.never_met, hessians = 41, notes = {} }, result)

    local inventory = assert(moonlet.plan.inventory(DEMO))
    local read <close> = assert(imatrix.read(path("a.gguf"), inventory.numbers))
    local n = 0
    for _, t in ipairs(inventory.source.tensors) do
      local site = t.part == "text" and t.matrix and sites.of((gguf_names.bare(t.name)))
      local w = site and want[site]
      for mat = 0, site and #w.counts - 1 or -1 do
        local bytes, tokens = read:importance(t.name, #w.counts > 1 and mat or nil)
        assert.equal(w.counts[mat + 1], tokens, t.name)
        if tokens == 0 then goto next end
        for k, v in ipairs(floats(bytes)) do
          local mean = w.sums2[mat * w.n_in + k] / tokens
          assert(math.abs(v - mean) <= 1e-6 * mean, t.name)
        end
        n = n + 1
        ::next::
      end
    end
    assert.is_true(n > 300)
    for name, w in pairs(want) do
      for _, c in ipairs(w.counts) do
        if name:find("experts_down") and c == 0 then met = met + 1 end
      end
    end
    assert.equal(met, result.never_met)
    assert.same({ "text", CHAT }, read.datasets)
    assert.equal(50, read.chunk_size)
    assert.equal(#list, read.chunk_count)
  end)

  it("sums the squares that make the logits, as the forward pass hands them out", function()
    assert(moonlet.imatrix { model = model, text = TEXT, chunk = 4096, out = path("b.gguf") })
    local ids = assert(model:encode(TEXT, { special = false }))
    local final = golden.floats(assert(model:forward(ids, { want = { "hidden" } })).final)
    local H, sums = #final // #ids, {}
    for i, v in ipairs(final) do
      local k = (i - 1) % H + 1
      sums[k] = (sums[k] or 0) + v * v
    end
    local read <close> = assert(imatrix.read(path("b.gguf"), model:info().config))
    for k, v in ipairs(floats(read:importance("lm_head"))) do
      assert.near(sums[k] / #ids, v, 1e-5 * v)
    end
  end)

  it("writes Hessians alone, says which it cut or left out, and names the model", function()
    local result = assert(moonlet.imatrix { model = DEMO, threads = 1, text = TEXT, chunks = 1,
      hessians = path("c.safetensors"), hessian_cols = 256 })
    assert.same({ "the Hessian of layers.0.mixer_out, which has 512 inputs, is of blocks of 256, "
      .. "and 7 more" }, result.notes)
    local file <close> = assert(safetensors.open(path("c.safetensors")))
    assert.equal(41, result.hessians)
    assert.equal(82, #file:names())
    assert.equal(DEMO, file:metadata("model"))
    assert.equal(tostring(result.tokens), file:metadata("tokens"))
    assert.same({ 16, 64, 64 }, file:info("layers.7.experts_down").shape)
    assert.same({ 2, 256, 256 }, file:info("layers.7.mixer_out").shape)
    result = assert(moonlet.imatrix { model = DEMO, threads = 1, text = TEXT, chunks = 1,
      hessians = path("c.safetensors"), hessian_cols = 100 })
    assert.same({ "no Hessian of layers.0.mixer_in, which has 256 inputs, and 24 more" },
      result.notes)
    assert.equal(16, result.hessians)
  end)

  it("knows before it runs that it cannot write", function()
    local never = function() error("it ran") end
    for _, opts in ipairs { { out = "/nosuch/x" }, { hessians = "/nosuch/x" } } do
      opts.model, opts.text, opts.on_progress = model, TEXT, never
      local result, message, code = moonlet.imatrix(opts)
      assert.is_nil(result)
      assert.equal("io", code)
      assert.matches("/nosuch/x", message)
    end
  end)

  it("leaves nothing behind when it fails or is stopped", function()
    local before = names_in(dir)
    local stopped, message, code = moonlet.imatrix { model = model, text = TEXT, chunk = 50,
      out = path("d.gguf"), hessians = path("d.safetensors"),
      on_progress = function() return false end }
    assert.same({ "stopped", "cancelled" }, { message, code })
    assert.is_nil(stopped)
    local result = moonlet.imatrix { model = model, text = "x", out = path("d.gguf"),
      hessians = path("d.safetensors") }
    assert.is_nil(result)
    assert.error(function()
      moonlet.imatrix { model = model, text = TEXT, out = path("d.gguf"),
        hessians = path("d.safetensors"), on_progress = function() error("stop") end }
    end)
    assert.equal(before, names_in(dir))
  end)

  it("raises on misuse", function()
    local function raises(text, opts)
      opts.model = opts.model or model
      assert.error_matches(function() moonlet.imatrix(opts) end, text)
    end
    raises("texts to calibrate with", { out = "x" })
    raises("one of file and text", { file = "a", text = "b", out = "x" })
    raises("'out' or 'hessians'", { text = "a" })
    raises("are one file", { text = "a", out = "./x", hessians = "x" })
    raises("option 'chunk': 2 or more", { text = "a", out = "x", chunk = 1 })
    raises("option 'chunks': 1 or more", { text = "a", out = "x", chunks = 0 })
    raises("unknown option 'window'", { text = "a", out = "x", window = 9 })
    assert.error_matches(function() moonlet.imatrix { text = "a", out = "x" } end,
      "option 'model' is missing")
  end)
end)
