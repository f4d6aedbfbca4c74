local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local json = require "moonlet.json"
local moonlet = require "moonlet"
local numbers = require "spec.support.numbers"
local plan = require "moonlet.plan"
local quantize = require "moonlet.quantize"
local sites = require "moonlet.sites"
local written = require "spec.support.written"

local MODEL = "spec/golden/models/moe-text/hf"

local function uniform(t)
  if t.part ~= "text" then return { drop = true } end
  if not t.matrix or t.class == "router" or t.class == "shared_gate" or t.cols % 32 ~= 0 then
    return { keep = "bf16" }
  end
  return { mode = "mxfp4" }
end

-- The sites of the model's matrices: name -> { cols, experts or false }.
local function model_sites()
  local found = {}
  for _, t in ipairs(assert(plan.inventory(MODEL)).source.tensors) do
    local bare = t.name:gsub("^model%.language_model%.", ""):gsub("^model%.", "")
    local site = t.matrix and sites.hessian((bare:gsub("%.weight$", "")))
    if site then found[site] = { t.cols, t.class == "expert_down" and t.shape[1] } end
  end
  return found
end

-- A file of Hessians for the sites: neighbours correlated at 0.9, 1000 inputs in each matrix.
-- `change(tensors)` has the last word.
local function write_hessians(path, list, change)
  local tensors = {}
  for site, size in pairs(list) do
    local cols, experts = table.unpack(size)
    local H, n = {}, experts or 1
    for i = 0, cols - 1 do
      for j = 0, cols - 1 do H[i * cols + j + 1] = 1000 * 0.9 ^ math.abs(i - j) end
    end
    tensors[site] = { dtype = "F32", shape = experts and { experts, cols, cols } or { cols, cols },
      data = numbers.pack(H):rep(n) }
    tensors[site .. ".counts"] = { dtype = "I64", shape = { n }, data = string.pack("<i8",
      1000):rep(n) }
  end
  if change then change(tensors) end
  checkpoint.write(path, tensors)
end

local function fed_by_choice(tensor)
  local decision = uniform(tensor)
  decision.gptq = decision.mode and true
  return decision
end

describe("a file of Hessians", function()
  local all = model_sites()
  local dir, path

  before_each(function()
    dir = checkpoint.directory()
    path = dir .. "/h.safetensors"
  end)
  after_each(function() checkpoint.remove(dir) end)

  local function run(o)
    local given = { source = MODEL, out = dir .. "/out", recipe = uniform, hessians = path,
      threads = 1 }
    for k, v in pairs(o or {}) do given[k] = v end
    given.hessians = given.hessians or nil
    local result, message, code = quantize(given)
    if not result then return nil, message, code end
    local tensors = written.tensors(given.out)
    local provenance = assert(json.read(given.out .. "/moonlet.json"))
    checkpoint.remove(given.out)
    return tensors, result, provenance
  end

  local function plain()
    local tensors
    written.quantized({ source = MODEL, recipe = uniform, threads = 1 },
      function(out) tensors = written.tensors(out) end)
    return tensors
  end

  it("changes every matrix that has inputs, and nothing else", function()
    write_hessians(path, all)
    local fed, result, provenance = run()
    assert.same({}, written.notes(result))
    assert.equal("h.safetensors", provenance.settings.hessians.name)
    assert.equal(core.sha256_file(path), provenance.settings.hessians.sha256)
    for name, t in pairs(plain()) do
      local module = name:match("^(.*)%.weight$")
      local coded = module and fed[module .. ".scales"] and not module:find("embed_tokens")
      if not name:find("%.scales$") then
        assert.equal(not coded, t.data == fed[name].data, name)
      end
    end
  end)

  it("may be of blocks, which groups have to fit", function()
    write_hessians(path, all)
    local name = "language_model.model.layers.0.mlp.shared_expert.down_proj.weight"
    local site = "layers.0.ffn_down"
    local cols = all[site][1]
    local fed, before = run(), plain()
    for _, n in ipairs { 2, 4 } do
      local side = cols // n
      write_hessians(path, all, function(tensors)
        local one = {}
        for i = 0, side - 1 do
          for j = 0, side - 1 do one[i * side + j + 1] = 1000 * 0.9 ^ math.abs(i - j) end
        end
        tensors[site] = { dtype = "F32", shape = { n, side, side },
          data = numbers.pack(one):rep(n) }
        tensors[site .. ".counts"] = { dtype = "I64", shape = { n },
          data = string.pack("<i8", 1000):rep(n) }
      end)
      local got, result = run()
      local fits = side % 32 == 0
      assert.equal(fits and 0 or 1, #written.notes(result))
      assert.equal(fits, got[name].data ~= before[name].data)
      assert.not_equal(fed[name].data, got[name].data)
    end
  end)

  it("leaves to decisions and options who is served", function()
    write_hessians(path, all)
    written.assert_same_tensors(plain(), (run { gptq = false }))
    local fed = run { gptq = false, recipe = function(t)
      local d = uniform(t)
      if t.class == "o_proj" then d.gptq = true end
      return d
    end }
    for name, t in pairs(plain()) do
      if name:find("weight$") then
        assert.equal(name:find("o_proj") == nil, t.data == fed[name].data, name)
      end
    end
    assert.error_matches(function()
      quantize { source = MODEL, out = dir .. "/out", recipe = uniform, gptq = true }
    end, "option 'gptq' needs 'hessians'")
  end)

  it("goes without for what it does not know, and says so", function()
    write_hessians(path, all, function(tensors)
      tensors["layers.1.mixer_in"], tensors["layers.1.mixer_in.counts"] = nil, nil
      for _, layer in ipairs { 0, 2 } do
        local counts = tensors[("layers.%d.experts_down.counts"):format(layer)]
        counts.data = string.pack("<i8", 0) .. counts.data:sub(9)
      end
    end)
    local fed, result = run()
    assert.equal(2, #written.notes(result))
    assert.matches("^no Hessian for language_model%.model%.layers%.1%.[%w_.]+ and [13] more: "
      .. "encoded without error feedback$", written.notes(result)[1])
    assert.equal("2 experts were given nothing while the Hessians were made: encoded without error "
      .. "feedback in language_model.model.layers.0.mlp.switch_mlp.down_proj.weight and 1 more",
      written.notes(result)[2])
    local name = "language_model.model.layers.0.mlp.switch_mlp.down_proj.weight"
    -- the expert without inputs still has the scales of least error
    for expert = 0, 1 do
      local t = checkpoint.load(MODEL)[("model.layers.0.mlp.experts.%d.down_proj.weight")
        :format(expert)]
      local alone = assert(core.quantize_tensor(t.data, { rows = t.shape[1], cols = t.shape[2],
        dtype = "bf16", mode = "mxfp4", fit = "mse" })).weight
      local got = fed[name].data:sub(expert * #alone + 1, (expert + 1) * #alone)
      assert.equal(expert == 0, got == alone)
    end
  end)

  it("goes without what cannot be factored and says so, in a resumed run, too", function()
    write_hessians(path, all, function(tensors)
      for _, site in ipairs { "layers.0.ffn_down", "layers.1.experts_down" } do
        local t = tensors[site]
        local cols = t.shape[#t.shape]
        local spoilt = string.pack("<f", 1e6) -- between two columns of 1000 each
        t.data = t.data:sub(1, 4) .. spoilt .. t.data:sub(9, 4 * cols) .. spoilt
          .. t.data:sub(4 * cols + 5)
      end
      local t = tensors["layers.1.ffn_down"] -- of 1000 inputs that were 0
      t.data = ("\0"):rep(#t.data)
    end)
    local fed, result, provenance = run()
    local note = "^3 Hessians cannot be factored, however damped: encoded without error feedback in"
      .. " language_model%.model%.layers%.0%.mlp%.shared_expert%.down_proj%.weight and 2 more$"
    assert.matches(note, written.notes(result)[1])
    assert.same(result.notes, provenance.notes)
    local _, _, code = run { threads = 2,
      on_progress = function(_, _, name) return not name:find "layers.2" end }
    assert.equal("cancelled", code)
    local again, resumed = run { resume = true }
    assert.same(result.notes, resumed.notes)
    written.assert_same_tensors(fed, again)
  end)

  it("says where none were given to what asks for them, and where none asks", function()
    local result = select(2, run { hessians = false, recipe = fed_by_choice })
    assert.same({ "no Hessians given: encoded without error feedback" }, written.notes(result))
    assert(quantize { source = MODEL, out = dir .. "/packed", recipe = uniform })
    write_hessians(path, all)
    result = select(2, run { source = dir .. "/packed", recipe = "keep" })
    assert.same({ "the Hessians change nothing: no matrix is encoded with error feedback" },
      written.notes(result))
    result = select(2, run { gptq = false })
    assert.same({ "the Hessians change nothing: no matrix is encoded with error feedback" },
      written.notes(result))
  end)

  it("serves the experts of compressed-tensors one by one", function()
    write_hessians(path, all)
    local stacked = run()
    local split = run { format = "compressed-tensors" }
    local weight = stacked["language_model.model.layers.1.mlp.switch_mlp.down_proj.weight"]
    local size = #weight.data // weight.shape[1]
    for e = 0, weight.shape[1] - 1 do
      local found
      for name, t in pairs(split) do
        if name:find(("layers.1.mlp.experts.%d.down_proj.weight_packed"):format(e), 1, true) then
          found = t
        end
      end
      assert.is_true(weight.data:sub(e * size + 1, (e + 1) * size) == found.data)
    end
  end)

  it("of blocks serves all experts, stacked and one by one", function()
    local site, expert = "layers.1.ffn_in", "layers.1.mlp.experts.%d.gate_proj.weight_packed"
    local side = all[site][1] // 2
    write_hessians(path, all, function(tensors)
      local one = {}
      for i = 0, side - 1 do
        for j = 0, side - 1 do one[i * side + j + 1] = 1000 * 0.9 ^ math.abs(i - j) end
      end
      tensors[site] = { dtype = "F32", shape = { 2, side, side }, data = numbers.pack(one):rep(2) }
      tensors[site .. ".counts"] = { dtype = "I64", shape = { 2 },
        data = string.pack("<i8", 1000):rep(2) }
    end)
    local stacked, result = run()
    assert.same({}, written.notes(result))
    local split = run { format = "compressed-tensors" }
    local name = "language_model.model.layers.1.mlp.switch_mlp.gate_proj.weight"
    local weight, n_experts = stacked[name], stacked[name].shape[1]
    assert.is_true(n_experts > 2)
    assert.not_equal(plain()[name].data, weight.data)
    local size = #weight.data // n_experts
    for e = 0, n_experts - 1 do
      local found
      for of, t in pairs(split) do
        if of:find(expert:format(e), 1, true) then found = t end
      end
      assert.is_true(weight.data:sub(e * size + 1, (e + 1) * size) == found.data)
    end
  end)

  it("that a calibration cut into blocks serves a mixture of experts", function()
    local demo = "examples/demo-model"
    assert(moonlet.imatrix { model = demo, text = ("Call me Ishmael. "):rep(20), chunk = 64,
      hessian_cols = 128, hessians = path, threads = 2 })
    local _, result = run { source = demo, recipe = "uniform", bits = 3, threads = 2 }
    for _, note in ipairs(written.notes(result)) do assert.not_matches("experts_in", note) end
  end)

  it("of another model, or none at all, stops the run before it begins", function()
    local function failure()
      local got, message, code = run()
      assert.falsy(got and "a checkpoint")
      assert.same({ ["h.safetensors"] = true }, core.list_dir(dir))
      return code .. ": " .. message
    end
    write_hessians(path, { ["layers.0.mixer_in"] = { 96, false } })
    assert.matches("^range: .*/h.safetensors: tensor layers.0.mixer_in is 96 x 96, of another "
      .. "model: model.*layers%.0.* is %d+ x %d+$", failure())
    write_hessians(path, { ["layers.0.experts_down"] = { all["layers.0.experts_down"][1], 2 } })
    assert.matches("^range: .*tensor layers.0.experts_down is 2 x ", failure())
    checkpoint.write(path, { w = { dtype = "F32", shape = { 1 }, data = ("\0"):rep(4) } })
    assert.matches("^format: .*/h.safetensors: there are no Hessians in it$", failure())
    for at, x in pairs { [5] = 0 / 0, [9] = 700, [1] = 0 } do -- on one side of the diagonal, on it
      write_hessians(path, all, function(tensors)
        local t = tensors["layers.1.mixer_in"]
        t.data = t.data:sub(1, at - 1) .. string.pack("<f", x) .. t.data:sub(at + 4)
      end)
      assert.matches("^format: .*tensor layers.1.mixer_in, matrix 0: numbers that no inputs give$",
        failure())
    end
    for said, change in pairs {
      ["F64 %[1%]"] = function(counts) counts.dtype = "F64" end,
      ["I64 %[0%]"] = function(counts) counts.shape, counts.data = { 0 }, "" end,
      ["I64 %[1 x 1%]"] = function(counts) counts.shape = { 1, 1 } end,
      ["I64 %[1100000%]"] = function(counts)
        counts.shape, counts.data = { 1100000 }, counts.data:rep(1100000)
      end,
    } do
      write_hessians(path, all, function(tensors) change(tensors["head_in.counts"]) end)
      assert.matches("^format: .*tensor head_in.counts is " .. said .. ", not I64 %[1%]$",
        failure())
    end
  end)

  it("of another model of the same shapes is told by names", function()
    local list, entries = { ["layers.9.mixer_in"] = { 8, false } }, {}
    for site, size in pairs(all) do list[site] = size end
    write_hessians(path, list)
    for name, t in pairs(checkpoint.read(path)) do
      entries[#entries + 1] = { name = name, dtype = t.dtype, shape = t.shape, data = t.data }
    end
    for model, said in pairs { ["/else/where/other/"] = "other", ["./elsewhere/hf"] = false,
        ["."] = false } do
      assert(core.st_write(path, entries, { model = model }))
      local notes = written.notes(assert(quantize { source = MODEL, out = dir .. "/out",
        recipe = uniform, hessians = path, dry_run = true }))
      assert.equal("1 Hessian is of layers that this model has not: the file was made with a "
        .. "larger one", notes[1])
      assert.equal(said and ("the Hessians were made with %s, this is hf"):format(said) or nil,
        notes[2])
    end
  end)

  it("is part of what a resumed run must find unchanged", function()
    write_hessians(path, all)
    local _, _, code = run { on_progress = function(done) return done == 0 end }
    assert.equal("cancelled", code)
    write_hessians(path, all, function(tensors)
      tensors["head_in.counts"].data = string.pack("<i8", 999)
    end)
    local _, message = run { resume = true }
    assert.matches("choice of options", message)
  end)
end)
