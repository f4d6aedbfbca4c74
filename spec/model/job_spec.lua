-- Evaluation in the background.
local core = require "moonlet.core"

local DIR <const> = "spec/golden/models/moe-wrapped/hf"

local function values_of(ses)
  local _, values = ses:logits():topk(320)
  return values
end

local function ids_from(first, n)
  local ids = {}
  for i = 1, n do ids[i] = (first * 7 + i * 13) % 320 end
  return ids
end

describe("a job", function()
  local model, ses
  before_each(function()
    model = assert(core.model_open(DIR, { threads = 2 }))
    ses = assert(model:session { ctx = 300 })
  end)
  after_each(function()
    ses:close()
    model:close()
  end)

  it("evaluates as the foreground does, and its descriptor tells when", function()
    local other <close> = assert(model:session { ctx = 300 })
    assert(other:eval(ids_from(1, 200)))
    local expected = values_of(other)
    local net <close> = assert(core.net_open {})
    local job = assert(model:start_parts { { session = ses, ids = ids_from(1, 200) } })
    assert(net:watch(job:fd()))
    local kind, fd = net:wait(10)
    assert.same({ "ready", job:fd() }, { kind, fd })
    net:unwatch(fd)
    assert.is_true(job:is_done())
    assert.is_true(job:result())
    assert.same(expected, values_of(ses))
    assert.error_matches(function() job:fd() end, "the job has ended")
  end)

  it("keeps everything else off the model until its end has been seen", function()
    local job = assert(model:start_parts { { session = ses, ids = ids_from(1, 200) } })
    for _, use in ipairs {
      function() ses:eval { 1 } end, function() ses:logits() end, function() ses:snapshot() end,
      function() model:session { ctx = 8 } end, function() model:forward({ 1 }, { "logits" }) end,
      function() model:start_parts { { session = ses, ids = { 1 } } } end,
    } do
      assert.error_matches(use, "the model is computing")
    end
    assert.is_true(job:result())
    assert(ses:eval { 1 })
  end)

  it("keeps passes by layers off it, too, and closing one of them ends it", function()
    for _, kind in ipairs { "layers", "calibrate" } do
      local pass = assert(model[kind](model, { ids_from(1, 40) }))
      local net <close> = assert(core.net_open {})
      local job = assert(model:start_parts { { session = ses, ids = ids_from(1, 200) } })
      assert(net:watch(job:fd()))
      assert.error_matches(function() pass:step() end, "the model is computing")
      pass:close()
      assert.equal("ready", (net:wait(10))) -- whoever waits for the job hears of its end
      assert.is_true(job:is_done())
      assert.is_nil(net:wait(0))
      ses:reset()
    end
  end)

  it("fails as the foreground does", function()
    local job = assert(model:start_parts { { session = ses, ids = { 1, 999 } } })
    local ok, message, code = job:result()
    assert.is_nil(ok)
    assert.equal("range", code)
    assert.matches("token id 999", message, 1, true)
    assert.equal(0, ses:n_past())
  end)

  it("leaves its sessions as they were when it is cancelled in time", function()
    local job = assert(model:start_parts { { session = ses, ids = ids_from(1, 256) } })
    job:cancel()
    local ok, _, code = job:result()
    assert.is_true(ok or code == "cancelled")
    assert.equal(ok and 256 or 0, ses:n_past())
    ses:reset()
    assert(ses:eval(ids_from(1, 5)))
  end)

  it("is ended by closing what it works on, in any order, or by forgetting it", function()
    for _, what in ipairs { "session", "model", "job", "nothing" } do
      local m = assert(core.model_open(DIR, { threads = 2 }))
      local s = assert(m:session { ctx = 300 })
      local job = assert(m:start_parts { { session = s, ids = ids_from(1, 256) } })
      if what ~= "nothing" then ({ session = s, model = m, job = job })[what]:close() end
      job, s, m = nil, nil, nil -- luacheck: ignore
      collectgarbage()
      collectgarbage()
    end
  end)

  it("refuses parts of another model", function()
    local m <close> = assert(core.model_open(DIR, { threads = 1 }))
    local stranger <close> = assert(m:session { ctx = 8 })
    for _, method in ipairs { "start_parts", "eval_parts" } do
      assert.error_matches(function()
        model[method](model, { { session = ses, ids = { 1 } },
          { session = stranger, ids = { 1 } } })
      end, "part 1 is of another model")
    end
  end)
end)
