-- moonlet.bench: which rows come out and how their numbers hang together. How fast anything is
-- depends on the machine and is not looked at.
local bench = require "moonlet.bench"
local moonlet = require "moonlet"

local MOE <const> = "spec/golden/models/moe-wrapped/hf"
local PROBE <const> = 1 << 22

local function run(model, opts)
  opts.probe = PROBE
  return assert(bench.run(model, opts))
end

-- What of a row does not depend on the clock.
local function shape(row)
  return { row.kind, row.depth, row.tokens, row.rounds }
end

describe("bench", function()
  local model
  setup(function() model = assert(moonlet.open(MOE, { threads = 2 })) end)
  teardown(function() model:close() end)

  it("has a row for each kind and depth", function()
    local report = run(model, { prompt = 6, gen = 3, depths = { 9, 0 }, rounds = 2 })
    local shapes = {}
    for i, row in ipairs(report.rows) do shapes[i] = shape(row) end
    assert.same({ { "prefill", 0, 6, 2 }, { "decode", 0, 3, 2 }, { "prefill", 9, 6, 2 },
      { "decode", 9, 3, 2 } }, shapes)
    assert.equal(2, report.threads)
    assert.equal("f16", report.kv)
    assert.is_true(report.machine.processors >= 1 and report.bandwidth_bytes_per_second > 0)
  end)

  it("leaves out a kind of which there are no tokens", function()
    local report = run(model, { prompt = 0, gen = 2, rounds = 1 })
    assert.equal(1, #report.rows)
    assert.same({ "decode", 0, 2, 1 }, shape(report.rows[1]))
    report = run(model, { prompt = 2, gen = 0, rounds = 1 })
    assert.equal(1, #report.rows)
    assert.same({ "prefill", 0, 2, 1 }, shape(report.rows[1]))
  end)

  it("counts the bytes of a decoded token: matrices, state in and out, cache", function()
    local c, weights = model:info().config, 0
    for _, matrix in ipairs(assert(model:matrices())) do
      local share = matrix.class == "embed" and 1 / c.vocab_size
        or matrix.name:find(".experts.", 1, true) and c.num_experts_per_tok / c.num_experts or 1
      weights = weights + matrix.bytes * share
    end
    local session <close> = assert(model:session { ctx = 8 })
    assert(session:step(1))
    local state, row = session:stats().state_bytes, session:stats().kv_bytes
    local report = run(model, { prompt = 0, gen = 1, depths = { 0, 5 }, rounds = 1 })
    -- one token goes ahead of a measurement
    assert.equal(weights + 2 * state + 2 * row, report.rows[1].bytes_per_token)
    assert.equal(weights + 2 * state + 7 * row, report.rows[2].bytes_per_token)
  end)

  it("reports one measurement as a whole", function()
    for _, row in ipairs(run(model, { prompt = 6, gen = 3, rounds = 3 }).rows) do
      local bytes, seconds, shares = 0, 0, 0
      for _, op in ipairs(row.operations) do
        bytes, seconds, shares = bytes + op.bytes, seconds + op.seconds, shares + op.time_share
        assert.near(op.bandwidth_share, op.bytes / op.seconds / row.bandwidth_bytes_per_second,
          1e-9 * op.bandwidth_share)
      end
      assert.near(row.bytes_per_token, bytes / row.tokens, 1e-6)
      assert.is_true(seconds <= row.seconds and shares <= 1)
      assert.is_true(row.fastest_seconds <= row.seconds and row.seconds <= row.slowest_seconds)
      assert.near(row.tokens, row.tokens_per_second * row.seconds, 1e-6)
      assert.near(row.bytes_per_token * row.tokens_per_second,
        row.bandwidth_share * row.bandwidth_bytes_per_second, 1)
      assert.is_true(row.unsteady_rounds >= 0 and row.unsteady_rounds <= row.rounds)
    end
  end)

  it("says what a token takes beside the forward pass", function()
    local report = run(model, { prompt = 0, gen = 5, depths = { 0, 3 }, rounds = 1 })
    local beside, decode = report.beside, report.rows[1]
    assert.is_true(beside.seconds > 0)
    assert.near(beside.share,
      beside.seconds / (beside.seconds + decode.seconds / decode.tokens), 1e-12)
    assert.is_nil(run(model, { prompt = 2, gen = 0, rounds = 1 }).beside)
  end)

  it("says what memory holds beside checkpoint, cache and state", function()
    local session <close> = assert(model:session { ctx = 8 })
    assert(session:sync { 1, 2, 3, 4 })
    local stats = session:stats()
    local memory = run(model, { prompt = 0, gen = 2, rounds = 1, depths = { 0, 4 } }).memory
    -- as at the greatest depth, whose rows the process holds whichever was measured last
    assert.equal(stats.state_bytes + stats.kv_bytes, memory.cache)
    local checkpoint = 0
    for _, bytes in pairs(model:info().bytes_by_mode) do checkpoint = checkpoint + bytes end
    assert.equal(checkpoint, memory.checkpoint)
    assert.near(memory.own - memory.cache,
      memory.excess * (memory.checkpoint + memory.cache), 1)
  end)

  it("counts the arithmetic of a prompt", function()
    local c, active, full, linear = model:info().config, 0, 0, 0
    for _, tensor in ipairs(assert(model:tensors())) do
      if tensor.matrix and tensor.class ~= "embed" and tensor.class ~= "lm_head" then
        local used = tensor.name:find(".experts.", 1, true) and
          c.num_experts_per_tok / c.num_experts or 1
        active = active + tensor.rows * tensor.cols * used
      end
    end
    for _, kind in ipairs(c.layer_types) do
      if kind == "full_attention" then full = full + 1 else linear = linear + 1 end
    end
    local delta = 7 * linear * c.linear_num_value_heads * c.linear_key_head_dim
      * c.linear_value_head_dim
    local row = run(model, { prompt = 3, gen = 0, depths = { 10 }, rounds = 1 }).rows[1]
    local positions = 11 + 12 + 13
    local attention = 4 * full * c.num_attention_heads * c.head_dim * positions
    assert.near(3 * (2 * active + delta) + attention,
      row.arithmetic_per_second * row.seconds, 1)
  end)

  it("says how far it is", function()
    local last, all, calls = 0, nil, 0
    local function on_progress(done, total)
      assert.is_true(done > last and done <= total)
      last, all, calls = done, total, calls + 1
    end
    run(model, { prompt = 4, gen = 2, depths = { 3 }, rounds = 2, on_progress = on_progress })
    assert.equal(3 + 4 + 2 * (4 + 2) + 2, all) -- filling, the first pass, rounds, generating
    assert.equal(all, last)
    assert.equal(7, calls)
  end)

  it("fails and raises as everything else", function()
    local report, message, code = bench.run(model, { depths = { 1 << 40 }, probe = PROBE })
    assert.is_nil(report)
    assert.equal("limit", code)
    assert.matches("context of", message)
    -- before anything is evaluated, and before memory is touched
    report, message, code = bench.run(model, { probe = 1 << 50, on_progress = error })
    assert.is_nil(report)
    assert.equal("memory", code)
    assert.matches("^probe of 1048576.0 GiB: [%d.]+ GiB of memory are available$", message)
    for _, bad in ipairs { { prompt = -1 }, { gen = -1 }, { rounds = 0 }, { prompt = 0, gen = 0 },
      { depths = {} }, { depths = { -1 } }, { depths = { 1.5 } }, { probe = 0 }, { speed = 1 } } do
      assert.has_error(function() bench.run(model, bad) end)
    end
  end)
end)

describe("a probe of the bandwidth", function()
  local core = require "moonlet.core"

  it("has a number for each pass, for any number of threads and bytes", function()
    for _, threads in ipairs { 1, 2, 5 } do
      for _, bytes in ipairs { 1, PROBE, PROBE + 1 } do
        local passes = assert(core.bandwidth(threads, { bytes = bytes, passes = 3 }))
        assert.equal(3, #passes)
        for _, speed in ipairs(passes) do assert.is_true(speed > 0) end
      end
    end
    assert.is_true(assert(bench.bandwidth(1, PROBE)) > 0)
  end)

  it("refuses what cannot be", function()
    local passes, message, code = core.bandwidth(1, { bytes = 0 })
    assert.is_nil(passes)
    assert.equal("range", code)
    assert.matches("0 bytes", message)
    assert.has_error(function() core.bandwidth(0) end)
    assert.has_error(function() core.bandwidth(1, { passes = 0 }) end)
    assert.has_error(function() core.bandwidth(1, { size = 1 }) end)
    assert.is_nil((core.bandwidth(1, { bytes = math.maxinteger })))
    assert.equal("memory", select(3, core.bandwidth(1, { bytes = 1 << 60 })))
  end)
end)
