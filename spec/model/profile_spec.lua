-- A profile of a session: what is counted, when, and that the bytes are those of the matrices as
-- the checkpoint holds them, the recurrent state in and out and the keys and values.
local moonlet = require "moonlet"

local MOE <const> = "spec/golden/models/moe-wrapped/hf"
local DENSE <const> = "spec/golden/models/dense-text/hf"

local function by_op(profile)
  local rows = {}
  for _, row in ipairs(profile) do rows[row.op] = row end
  return rows
end

-- Bytes of matrices that one token goes through: of the embedding a row, of stacks k experts.
local function active_bytes(model)
  local c, sum = model:info().config, 0
  for _, matrix in ipairs(assert(model:matrices())) do
    local share = 1
    if matrix.class == "embed" then share = 1 / c.vocab_size end
    if matrix.name:find(".experts.", 1, true) then share = c.num_experts_per_tok / c.num_experts end
    sum = sum + matrix.bytes * share
  end
  return sum
end

describe("profile", function()
  local model, session
  before_each(function()
    model = assert(moonlet.open(MOE, { threads = 2 }))
    session = assert(model:session { ctx = 32 })
  end)
  after_each(function()
    session:close()
    model:close()
  end)

  it("has the bytes of a decode step", function()
    assert(session:sync { 1, 2, 3, 4 })
    session:profile(true)
    assert(session:step(5))
    local profile, stats, sum = session:profile(), session:stats(), 0
    for _, row in ipairs(profile) do sum = sum + row.bytes end
    assert.equal(active_bytes(model) + 2 * stats.state_bytes + stats.kv_bytes, sum)
  end)

  it("counts what each layer does in each batch", function()
    local kinds = { linear_attention = 0, full_attention = 0 }
    for _, kind in ipairs(model:info().config.layer_types) do kinds[kind] = kinds[kind] + 1 end
    local long <close> = assert(model:session { ctx = 300 })
    local ids = {}
    for i = 1, 256 do ids[i] = i end
    long:profile(true)
    assert(long:sync(ids))
    for _, n in ipairs { 1, 8, 9 } do
      for i = #ids + 1, #ids + n do ids[i] = i end
      assert(long:sync(ids))
    end
    local profile = long:profile()
    local rows, n = by_op(profile), kinds.linear_attention + kinds.full_attention
    assert.same({ 4, 274 }, { profile.batches, profile.tokens })
    for op, calls in pairs { embed = 1, qkv_proj = kinds.full_attention, gate_up = n, down = n,
      attend = kinds.full_attention, conv = kinds.linear_attention,
      delta = kinds.linear_attention } do
      assert.equal(4 * calls, rows[op].calls, op)
    end
    assert.equal(4, rows.lm_head.calls)
    assert.equal(2, rows.save.calls) -- batches of up to eight tokens are not cancelled
    for _, row in ipairs(profile) do assert.is_true(row.seconds >= 0, row.op) end
  end)

  it("counts a dense FFN for each half of a batch of more than 256 tokens", function()
    local dense <close> = assert(moonlet.open(DENSE, { threads = 2 }))
    local long <close> = assert(dense:session { ctx = 512 })
    local ids, n = {}, #dense:info().config.layer_types
    long:profile(true)
    for _, size in ipairs { 255, 257 } do
      for i = #ids + 1, #ids + size do ids[i] = i % 100 end
      assert(long:sync(ids))
    end
    local rows = by_op(long:profile())
    for _, op in ipairs { "gate_up", "down" } do assert.equal(3 * n, rows[op].calls, op) end
    assert.equal(2 * n, rows.o_proj.calls + rows.out_proj.calls)
  end)

  it("counts while it is on, and starts over from zero", function()
    assert.equal(0, session:profile().tokens)
    assert(session:step(1))
    assert.equal(0, session:profile().tokens)
    session:profile(true)
    assert(session:step(2))
    session:profile(false)
    assert(session:step(3))
    assert.equal(1, session:profile().tokens)
    session:profile(true)
    assert.same({ batches = 0, tokens = 0 }, session:profile())
    assert.has_error(function() session:profile(1) end)
  end)

  it("counts a batch of several sessions for the first that is profiled", function()
    local sessions = { session }
    for i = 2, 3 do sessions[i] = assert(model:session { ctx = 8 }) end
    sessions[2]:profile(true)
    sessions[3]:profile(true)
    local parts = {}
    for i, each in ipairs(sessions) do parts[i] = { session = each, ids = { i, i } } end
    assert(model:eval(parts))
    assert.equal(0, session:profile().tokens)
    assert.equal(6, sessions[2]:profile().tokens)
    assert.equal(0, sessions[3]:profile().tokens)
    local state, kv = 0, 0
    for _, each in ipairs(sessions) do
      state = state + each:stats().state_bytes
      kv = kv + each:stats().kv_bytes
    end
    local rows = by_op(sessions[2]:profile())
    assert.equal(kv, rows.attend.bytes)
    assert.equal(2 * state, rows.conv.bytes + rows.delta.bytes)
    sessions[2]:close()
    sessions[3]:close()
    assert(session:step(1)) -- nothing points to what was closed
  end)

  it("does not count passes of others", function()
    session:profile(true)
    assert(session:step(1))
    local layers <close> = assert(model:layers { { 1, 2, 3 } })
    local done, total
    repeat done, total = assert(layers:step()) until done == total
    assert(layers:score(1, { 2, 3, -1 }))
    assert.equal(1, session:profile().tokens)
    assert.equal(1, by_op(session:profile()).lm_head.calls)
  end)
end)
