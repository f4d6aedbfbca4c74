-- Kernels are chosen by a measurement, once for a processor.

local core = require "moonlet.core"
local json = require "moonlet.json"
local tune = require "moonlet.tune"
local workspace = require "spec.support.workspace"

describe("the fastest kernels", function()
  it("are those with the least time over all products", function()
    local name, times = tune.fastest({ "a", "b", "c" },
      { a = { 4, 4 }, b = { 1, 1 }, c = { 2, 8 } })
    assert.equal("b", name)
    assert.near(4, times.a, 1e-12)
    assert.equal(1, times.b)
    assert.near(4, times.c, 1e-12)
  end)

  it("are the last ones where others are faster by mere noise", function()
    local name, times = tune.fastest({ "a", "b" }, { a = { 0.97, 1 }, b = { 1, 1 } })
    assert.equal("b", name)
    assert.is_true(times.a < 1)
  end)

  it("come from a time for every product", function()
    local names = {}
    for _, variant in ipairs(core.kernels()) do names[#names + 1] = variant.name end
    local best = names[#names]
    local seconds = tune.measure({ best })
    assert.equal(6, #seconds[best])
    for _, s in ipairs(seconds[best]) do assert.is_true(s > 0) end
  end)
end)

describe("the choice of kernels", function()
  local place, others = nil, {}
  for _, variant in ipairs(core.kernels()) do
    if variant.name ~= "scalar" then others[#others + 1] = variant.name end
  end

  -- A measurement after which the first kernels are the fastest.
  local SCRIPT <const> = [[
    local measured = 0
    local choice = require("moonlet.tune").kernels(function(names)
      measured = measured + 1
      local seconds = {}
      for i, name in ipairs(names) do seconds[name] = { i, i, i, i, i } end
      return seconds
    end)
    print(choice.kernels, choice.by, measured)]]

  local function run(script, settings)
    return place.run(("cd '%s' && env -u MOONLET_CPU LUA_PATH=%q LUA_CPATH=%q %s lua5.4 -e %q")
      :format(assert(core.real_path(".")), package.path, package.cpath, settings, script))
  end

  local function choose(settings) return run(SCRIPT, settings) end

  before_each(function() place = workspace.new() end)
  after_each(function() place.remove() end)

  it("is measured once, and kept in a file", function()
    if #others < 2 then return pending("there are no kernels to choose from here") end
    local cache = "XDG_CACHE_HOME=" .. place.dir
    assert.equal(others[1] .. "\tmeasurement\t1\n", choose(cache))
    assert.equal(others[1] .. "\tmeasurement\t0\n", choose(cache))
    local home = "XDG_CACHE_HOME= HOME=" .. place.dir
    assert.equal(others[1] .. "\tmeasurement\t1\n", choose(home))
    assert.equal(others[1] .. "\tmeasurement\t0\n", choose(home))
    assert.equal(place.read("moonlet/cpu.json"), place.read(".cache/moonlet/cpu.json"))
  end)

  it("is measured again where the file is damaged or another version's", function()
    if #others < 2 then return pending("there are no kernels to choose from here") end
    local cache = "XDG_CACHE_HOME=" .. place.dir
    choose(cache)
    local good = place.read("moonlet/cpu.json")
    for _, bad in ipairs { "", good:sub(1, -20), "[]", '{"version": "0.1.0", "processors": []}',
      good:gsub('"version": "[^"]*"', '"version": "0.0.0"'),
      good:gsub('"kernels": "[^"]*"', '"kernels": "sse9"'),
      good:gsub('"kernels": "[^"]*"', '"kernels": 7'),
      (good:gsub('"times": {[^}]*}', '"times": {}')) } do
      place.write("moonlet/cpu.json", bad)
      assert.equal(others[1] .. "\tmeasurement\t1\n", choose(cache), bad)
      assert.equal(good, place.read("moonlet/cpu.json"))
    end
  end)

  it("stands where it cannot be kept", function()
    if #others < 2 then return pending("there are no kernels to choose from here") end
    for _, nowhere in ipairs { "XDG_CACHE_HOME=/dev/null", "XDG_CACHE_HOME= HOME=",
      "XDG_CACHE_HOME=relative HOME=/dev/null" } do
      assert.equal(others[1] .. "\tmeasurement\t1\n", choose(nowhere))
    end
  end)

  it("is left whole by processes that start at once", function()
    if #others < 2 then return pending("there are no kernels to choose from here") end
    place.write("choose.lua", SCRIPT)
    place.run(("cd '%s'; for i in 1 2 3 4 5 6; do env -u MOONLET_CPU LUA_PATH=%q LUA_CPATH=%q "
      .. "XDG_CACHE_HOME=%s lua5.4 %s/choose.lua & done; wait"):format(
      assert(core.real_path(".")), package.path, package.cpath, place.dir, place.dir))
    assert.equal("cpu.json\n", place.run("ls moonlet"))
    local kept = assert(json.decode(place.read("moonlet/cpu.json")))
    local _, entry = next(kept.processors)
    assert.equal(others[1], entry.kernels)
  end)

  it("is left to MOONLET_CPU", function()
    local best = core.kernels()[#core.kernels()].name
    for _, name in ipairs { "scalar", best } do
      assert.equal(name .. "\tenvironment\t0\n",
        choose(("XDG_CACHE_HOME=%s MOONLET_CPU=%s"):format(place.dir, name)))
    end
    assert.is_nil(place.read("moonlet/cpu.json"))
  end)

  it("is what models compute with", function()
    if #others < 2 then return pending("there are no kernels to choose from here") end
    local cache = "XDG_CACHE_HOME=" .. place.dir
    choose(cache)
    assert.equal(others[1] .. "\tmeasurement\n", run([[
      local model <close> = assert(require("moonlet").open("examples/demo-model"))
      print(model:info().kernels, model:info().kernels_by)]], cache))
  end)
end)
