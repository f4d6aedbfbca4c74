-- Handles of calibration and quantizing after their end: close is for good and may be repeated,
-- every other call raises, and the collector does what close does.

local calibration = require "spec.support.calibration"
local checkpoint = require "spec.support.checkpoint"
local core = require "moonlet.core"
local imatrix = require "moonlet.imatrix"
local model = require "moonlet.model"
local numbers = require "spec.support.numbers"
local plan = require "moonlet.plan"

local TINY = "spec/golden/models/moe-wrapped/hf"

-- Every method of a handle but close, called with what it would take.
local function raises(handle, calls, message)
  for method, arguments in pairs(calls) do
    assert.error_matches(function() handle[method](handle, table.unpack(arguments)) end, message,
      nil, nil, method)
  end
end

-- Of a class, so that none is forgotten here.
local function methods(handle)
  local names = {}
  for name in pairs(getmetatable(handle).__index) do
    if not name:find("^__") and name ~= "close" then names[name] = true end
  end
  return names
end

local function keys(calls)
  local names = {}
  for name in pairs(calls) do names[name] = true end
  return names
end

describe("a quantizer that is closed", function()
  local scope, put
  before_each(function()
    scope = checkpoint.scope()
    checkpoint.write(scope.path .. "/in.safetensors",
      { w = { dtype = "F32", shape = { 2, 32 }, data = numbers.pack(numbers.rng(1).floats(64)) } })
    put = { op = "encode", mode = "mxfp4", bits = 4, group = 32, part_rows = 2, cols = 32,
      entry = 1, parts = { { name = "w", first_row = 0 } } }
  end)
  after_each(function() checkpoint.remove(scope.path) end)

  local function open() return assert(core.quant_open(scope.path .. "/in.safetensors", 1)) end

  local function create(q)
    return assert(q:create(scope.path .. "/out", { { name = "a", dtype = "U8", shape = { 2, 16 } },
      { name = "b", dtype = "U8", shape = { 2, 1 } } }, "pt"))
  end

  it("does nothing any more", function()
    local q = open()
    local calls = { create = { scope.path .. "/out", {}, "pt" }, put = { put },
      put_data = { 1, "x" }, try = { put, 1 }, largest = { put }, values = { put },
      damage = { put, 1 }, hessians = { scope.path .. "/in.safetensors" }, sync = {},
      finish = {} }
    assert.same(methods(q), keys(calls))
    q:close()
    q:close()
    raises(q, calls, "quantizer is closed")
    assert.is_nil(core.list_dir(scope.path).out)
  end)

  it("leaves a file it was writing to be gone on with, also when it is collected", function()
    for _, drop in ipairs { function(q) q:close() end, function(q) getmetatable(q).__close(q) end,
      function(q) getmetatable(q).__gc(q) end } do
      local q = open()
      create(q)
      assert(q:put(put))
      drop(q)
      assert.error_matches(function() q:put(put) end, "quantizer is closed")
      local files = core.list_dir(scope.path)
      assert.is_nil(files.out)
      assert.is_true(files["out.partial"])
      os.remove(scope.path .. "/out.partial")
    end
  end)

  it("is not between two files", function()
    local q <close> = open()
    raises(q, { put = { put }, put_data = { 1, "x" }, sync = {}, finish = {} },
      "no file is being written")
    create(q)
    assert.error_matches(function() create(q) end, "a file is being written already")
    assert(q:put(put))
    assert(q:finish())
    raises(q, { put = { put }, finish = {} }, "no file is being written")
  end)
end)

describe("an imatrix that is closed", function()
  it("tells nothing any more", function()
    local scope <close> = checkpoint.scope()
    local inventory = assert(plan.inventory(TINY))
    local read = calibration.loud_imatrix(inventory, scope.path .. "/i.gguf")
    read:close()
    read:close()
    assert.error_matches(function() read:importance("layers.0.mlp.gate") end, "imatrix is closed")
    assert.error_matches(function() read:tokens("layers.0.mlp.gate") end, "imatrix is closed")
    local again <close> = assert(imatrix.read(scope.path .. "/i.gguf", inventory.numbers))
    assert.is_string(again:importance("layers.0.mlp.gate"))
  end)
end)

describe("a calibration that is closed", function()
  it("takes no steps", function()
    local scope <close> = checkpoint.scope()
    local opened <close> = assert(model.open(TINY, { threads = 1 }))
    local c = assert(opened.core:calibrate({ { 1, 2, 3 } }, { hessians = scope.path .. "/h",
      hessian_cols = 64, meta = {} }))
    local calls = { step = {}, sites = {}, sums = { 1 }, keep = {}, finish = {} }
    assert.same(methods(c), keys(calls))
    assert(c:step())
    c:close()
    c:close()
    raises(c, calls, "closed calibration")
    assert.same({}, core.list_dir(scope.path))
  end)
end)
