-- Statistics of activations against those of hooks on transformers' modules (spec/golden/calib),
-- and what a file of Hessians holds.
local core = require "moonlet.core"
local checkpoint = require "spec.support.checkpoint"
local golden = require "spec.support.golden"
local numbers = require "spec.support.numbers"
local safetensors = require "moonlet.safetensors"
local sites = require "moonlet.sites"

local MODELS <const> = "spec/golden/models/"

local function run(calibration)
  local done, total = 0, 1
  while done < total do
    done, total = calibration:step()
    assert(done, total)
  end
end

-- Site name -> { sums2 =, sums =, counts =, n_in =, n_mat = } with byte strings.
local function read_sites(calibration)
  local all = {}
  for i, site in ipairs(calibration:sites()) do
    site.sums2, site.sums, site.counts = calibration:sums(i)
    all[site.name] = site
  end
  return all
end

local function collect(dir, sequences, options, threads)
  local model <close> = assert(core.model_open(dir, { threads = threads or 2 }))
  local calibration <close> = assert(model:calibrate(sequences, options))
  run(calibration)
  local all = read_sites(calibration)
  assert(calibration:finish())
  return all
end

-- Largest difference, as a share of the largest value.
local function assert_close(want, got, what)
  assert.equal(#want, #got, what)
  local worst, largest = 0, 0
  for i, v in ipairs(want) do
    worst = math.max(worst, math.abs(v - got[i]))
    largest = math.max(largest, math.abs(v))
    assert(got[i] == got[i], what)
  end
  assert(worst <= 1e-5 * largest, ("%s is off by %g of %g"):format(what, worst, largest))
end

local function sequences_of(name)
  local g = golden.open(MODELS .. name .. "/golden.safetensors")
  return { g["short.ids"], g["long.ids"] }
end

describe("calibration", function()
  for _, name in ipairs { "dense-text", "moe-text", "moe-wrapped" } do
    it("sums what transformers' modules are given: " .. name, function()
      local path = os.tmpname()
      local got = collect(MODELS .. name .. "/hf", sequences_of(name), { hessians = path })
      local want = golden.open("spec/golden/calib/" .. name .. ".safetensors")
      local hessians = golden.read_any(path)
      os.remove(path)
      local n_sums, n_squares, seen = 0, 0, {}
      for key, values in pairs(want) do
        local matrix, what = key:match("^(.+)%.(%w+)$")
        local site = matrix and got[sites.of(matrix)]
        if what == "sums" or what == "sums2" then
          seen[site.name] = true
          assert_close(values, numbers.unpack(site[what]), key)
          n_sums = n_sums + 1
        elseif what == "counts" then
          assert.same(values, numbers.unpack(site.counts), key)
        elseif what == "squares" then
          local own = hessians[sites.hessian(matrix)]
          assert.same(want[key .. ":shape"], own.shape)
          assert_close(values, own.values, key)
          n_squares = n_squares + 1
        end
      end
      assert.is_true(n_sums > 60)
      assert.equal(name == "moe-text", n_squares == 0)
      for site in pairs(got) do assert(seen[site], "nothing to compare with: " .. site) end
    end)
  end

  it("gives the same bytes for one thread and for three", function()
    local dir, list = MODELS .. "moe-wrapped/hf", sequences_of("moe-wrapped")
    local paths, sums = {}, {}
    for i, threads in ipairs { 1, 3 } do
      paths[i] = os.tmpname()
      sums[i] = collect(dir, list, { hessians = paths[i] }, threads)
    end
    assert.same(sums[1], sums[2])
    assert.is_true(checkpoint.slurp(paths[1]) == checkpoint.slurp(paths[2]))
    for _, path in ipairs(paths) do os.remove(path) end
  end)

  it("adds up sequences of any lengths", function()
    local dir, path = MODELS .. "moe-wrapped/hf", os.tmpname()
    local rng, list, total = numbers.rng(3), {}, 0
    for i = 1, 40 do
      list[i] = {}
      for t = 1, 1 + i * 37 % 29 do list[i][t] = math.floor(rng.uniform() * 320) end
      total = total + #list[i]
    end
    local got = collect(dir, list, { hessians = path })
    local hessians = golden.read_any(path)
    os.remove(path)
    for name, site in pairs(got) do
      local n_mat, n_in = site.n_mat, site.n_in
      local counts, sums2 = numbers.unpack(site.counts), numbers.unpack(site.sums2)
      local met = 0
      for _, n in ipairs(counts) do met = met + n end
      assert.equal(n_mat > 1 and 2 * total or total, met)
      local h = hessians[name]
      if name:find("experts_in") then
        assert.is_nil(h)
      else
        assert.same(counts, hessians[name .. ".counts"].values)
        local diagonal = {}
        for i = 0, n_mat * n_in - 1 do
          local mat, k = i // n_in, i % n_in
          diagonal[i + 1] = h.values[mat * n_in * n_in + k * n_in + k + 1]
          local mirrored = h.values[mat * n_in * n_in + k + 1]
          assert.equal(mirrored, h.values[mat * n_in * n_in + k * n_in + 1])
        end
        assert_close(sums2, diagonal, name)
      end
    end
  end)

  it("counts experts that no token reached", function()
    local got = collect(MODELS .. "moe-wrapped/hf", { { 5 } })
    for layer = 0, 3 do
      local site = got[("layers.%d.experts_down"):format(layer)]
      local counts, sums2 = numbers.unpack(site.counts), numbers.unpack(site.sums2)
      local n_met = 0
      for mat, n in ipairs(counts) do
        n_met = n_met + n
        for k = 1, site.n_in do
          local v = sums2[(mat - 1) * site.n_in + k]
          assert.is_true(v >= 0 and (n > 0 or v == 0))
        end
      end
      assert.equal(2, n_met)
    end
  end)

  it("leaves out Hessians of sites that are too wide, and says so", function()
    local path = os.tmpname()
    local got = collect(MODELS .. "dense-text/hf", { { 1, 2, 3 } },
      { hessians = path, hessian_cols = 128, meta = { "model", "m", "tokens", "3" } })
    local hessians = golden.read_any(path)
    local file <close> = assert(safetensors.open(path))
    assert.equal("m", file:metadata("model"))
    assert.equal("3", file:metadata("tokens"))
    os.remove(path)
    assert.is_false(got["layers.0.ffn_down"].hessian)
    assert.is_nil(hessians["layers.0.ffn_down"])
    assert.equal(128, got["layers.0.ffn_in"].hessian)
    assert.same({ 128, 128 }, hessians["layers.0.ffn_in"].shape)
  end)

  it("cuts the Hessian of a site that is too wide into blocks of its diagonal", function()
    local paths, read, ids = { os.tmpname(), os.tmpname() }, {}, {}
    for i = 1, 300 do ids[i] = 100 + i * 37 % 400 end
    for i, most in ipairs { 512, 256 } do
      local got = collect("examples/demo-model", { ids }, { hessians = paths[i],
        hessian_cols = most })
      assert.equal(most, got["layers.0.mixer_out"].hessian)
      read[i] = golden.read_any(paths[i])
      os.remove(paths[i])
    end
    local whole, blocks = read[1]["layers.0.mixer_out"], read[2]["layers.0.mixer_out"]
    assert.same({ 2, 256, 256 }, blocks.shape)
    assert.same({ 300, 300 }, read[2]["layers.0.mixer_out.counts"].values)
    local diagonal = {}
    for b = 0, 1 do
      for i = 0, 255 do
        local at = (b * 256 + i) * 512 + b * 256 + 1
        table.move(whole.values, at, at + 255, #diagonal + 1, diagonal)
      end
    end
    assert_close(diagonal, blocks.values, "blocks")
    assert.same(read[1]["layers.0.mixer_in"], read[2]["layers.0.mixer_in"])
  end)

  it("leaves no file unless it was finished", function()
    local dir = checkpoint.directory()
    local path = dir .. "/h.safetensors"
    do
      local model <close> = assert(core.model_open(MODELS .. "moe-wrapped/hf"))
      local calibration <close> = assert(model:calibrate({ { 1, 2 } }, { hessians = path }))
      assert(calibration:step())
      assert.error_matches(function() calibration:finish() end, "steps are left")
    end
    local pipe <close> = assert(io.popen("ls -A " .. dir))
    assert.equal("", pipe:read("a"))
    checkpoint.remove(dir)
  end)

  it("keeps only between layers, and only where there is a place for it", function()
    local dir = checkpoint.directory()
    local model <close> = assert(core.model_open(MODELS .. "moe-wrapped/hf"))
    local list = { { 1, 2 }, { 3 } }
    do
      local calibration <close> = assert(model:calibrate(list, { dir = dir }))
      assert(calibration:step())
      local layers, message, code = calibration:keep()
      assert.same({ nil, "range" }, { layers, code })
      assert.matches("middle of a layer", message)
      assert(calibration:step())
      assert.same({ 1, 0 }, { assert(calibration:keep()) })
      assert(calibration:step())
      assert(calibration:step())
      assert.same({ 2, 1 }, { assert(calibration:keep()) })
    end
    local calibration, message, code = model:calibrate({ { 1, 2 } }, { dir = dir, layers = 2 })
    assert.same({ nil, "format" }, { calibration, code })
    assert.matches("/stream%-0: has not the %d+ bytes", message)
    calibration, message, code = model:calibrate(list, { dir = dir, layers = 6, kept = 1 })
    assert.same({ nil, "range" }, { calibration, code })
    assert.matches("no layer 6", message)
    checkpoint.remove(dir)
    calibration, message, code = model:calibrate(list, { dir = dir, layers = 2 })
    assert.same({ nil, "io" }, { calibration, code })
    assert.matches(dir .. "/stream%-0: No such file", message)
    local without <close> = assert(model:calibrate({ { 1 } }))
    assert(without:step())
    assert.matches("no files", select(2, without:keep()))
  end)

  it("names the site where numbers stop being finite", function()
    local dir = checkpoint.directory()
    local tensors = checkpoint.load(MODELS .. "dense-tied/hf")
    local name = "model.layers.2.mlp.up_proj.weight"
    local t = assert(tensors[name])
    t.data = t.data:sub(1, -3) .. "\x80\x7f"
    checkpoint.write(dir .. "/model.safetensors", tensors)
    os.execute("cp " .. MODELS .. "dense-tied/hf/config.json " .. dir)
    local model <close> = assert(core.model_open(dir))
    local calibration <close> = assert(model:calibrate { { 1, 2, 3 } })
    local done, message, code
    repeat done, message, code = calibration:step() until not done
    assert.equal("range", code)
    assert.matches("layers%.2%.ffn_down: input %d+ is not finite", message)
    checkpoint.remove(dir)
  end)

  it("refuses what no session takes, and a path that cannot be written", function()
    local model <close> = assert(core.model_open(MODELS .. "moe-wrapped/hf"))
    local calibration, message, code = model:calibrate { { 1, 320 } }
    assert.is_nil(calibration)
    assert.equal("range", code)
    assert.matches("token id 320", message)
    calibration, message, code = model:calibrate({ { 1 } }, { hessians = "/nonexistent/h" })
    assert.is_nil(calibration)
    assert.equal("io", code)
    assert.matches("/nonexistent/h", message)
    assert.error_matches(function() model:calibrate({ { 1 } }, { chunk = 1 }) end, "unknown option")
  end)
end)

describe("sites", function()
  it("are found for every matrix, whatever the expert", function()
    assert.equal("layers.3.mixer_in", sites.of("layers.3.linear_attn.in_proj_a"))
    assert.equal("layers.12.experts_in", sites.of("layers.12.mlp.experts.7.up_proj"))
    assert.equal("layers.12.ffn_in", sites.hessian("layers.12.mlp.experts.up_proj"))
    assert.equal("layers.12.experts_down", sites.hessian("layers.12.mlp.experts.255.down_proj"))
    assert.equal("head_in", sites.of("lm_head"))
    assert.is_nil(sites.of("embed_tokens"))
    assert.is_nil(sites.hessian("mtp.fc"))
    assert.is_nil(sites.of("layers.3.linear_attn.conv1d"))
  end)
end)
