local moonlet = require "moonlet"
local prefix_cache = require "moonlet.prefix_cache"

describe("prefix cache", function()
  local model, session, probe
  setup(function() model = assert(moonlet.open("examples/demo-model", { threads = 2 })) end)
  teardown(function() model:close() end)
  before_each(function()
    session = assert(model:session { ctx = 512 })
    probe = assert(model:session { ctx = 512 })
  end)
  after_each(function()
    session:close()
    probe:close()
  end)

  local function ids_of(seed, n)
    local ids = {}
    for i = 1, n do ids[i] = (i * seed) % 300 end
    return ids
  end

  local STATE <const> = 860160 + 4 * 4160 -- bytes of this model's, and of its logits

  -- Evaluates ids and keeps where the session stands after each of `points`.
  local function read(cache, ids, points)
    session:reset()
    for _, n in ipairs(points) do
      assert(session:sync(table.move(ids, 1, n, 1, {})))
      assert.is_true(cache:put(session, ids, n))
    end
  end

  it("drops what saves least first, and counts anew what the rest saves", function()
    local long, short = ids_of(7, 400), ids_of(11, 50)
    local cache <close> = prefix_cache.open(model, 4 * STATE)
    assert.equal(STATE, session:stats().state_bytes + 4 * 4160)
    read(cache, long, { 100, 110, 400 })
    assert.same({ 3, 3 * STATE + 20 * 610 }, { cache.n, cache.bytes })
    read(cache, short, { 50 }) -- the rows of the long one are now the cache's alone
    assert.same({ 3, 3 * STATE + 20 * 550 }, { cache.n, cache.bytes })
    assert.equal(100, cache:restore(probe, table.move(long, 1, 110, 1, {})))
    assert.equal(400, cache:restore(probe, long))
    assert.equal(50, cache:restore(probe, short))
    -- 100 goes on from nothing, 400 from 100; without 100 it would save 100 more.
    local saved = {}
    for _, entry in pairs(cache.by_key) do
      saved[entry.n] = entry.n - (entry.parent and entry.parent.n or 0)
    end
    assert.same({ [50] = 50, [100] = 100, [400] = 300 }, saved)
    read(cache, long, { 200 })
    for _, entry in pairs(cache.by_key) do
      if entry.n == 400 then assert.equal(200, entry.parent.n) end
    end
  end)

  it("counts keys and values that no session holds", function()
    local long = ids_of(7, 400)
    local cache <close> = prefix_cache.open(model, STATE + (1 << 16))
    read(cache, long, { 400 })
    assert.equal(1, cache.n)
    assert.equal(cache.bytes, cache:used())
    assert.equal(400, cache:restore(session, long, 400))
    assert.equal(0, cache:restore(session, ids_of(11, 50))) -- gives up the rows, for which
    assert.equal(0, cache.n)                                -- there is no room
  end)

  it("lets sessions go on from what any of them has read, to the bit", function()
    local cache <close> = prefix_cache.open(model, 8 * STATE)
    local opts = { cache = cache, keep_at = { 30, 60 } }
    local one, other = ids_of(7, 100), ids_of(7, 70)
    for i = 61, 70 do other[i] = 5 end
    assert.same({ 0, 100 }, { session:sync(one, opts) })
    assert.same({ 60, 10 }, { probe:sync(other, opts) })
    local ids, logits = probe:logits():topk(20)
    probe:reset()
    assert.same({ 0, 70 }, { probe:sync(other) })
    assert.same({ ids, logits }, { probe:logits():topk(20) })
    assert(session:step(7))
    assert.same({ 70, 0 }, { session:sync(other, opts) })
    assert.same({ ids, logits }, { session:logits():topk(20) })
    one[101] = 7 -- what the session held has been kept
    assert.same({ 101, 0 }, { session:sync(one, opts) })
  end)

  it("leaves a session alone that holds as much", function()
    local long = ids_of(7, 120)
    local cache <close> = prefix_cache.open(model, 4 * STATE)
    read(cache, long, { 100 })
    assert(session:sync(table.move(long, 1, 110, 1, {})))
    assert.equal(110, cache:restore(session, long, 110))
    assert.equal(110, session:n_past())
    assert.equal(100, cache:restore(probe, long, 0))
    assert.same(table.move(long, 1, 100, 1, {}), probe:ids())
  end)

  it("goes on from no state that a cancelled prompt has left, as there are no logits", function()
    local long = ids_of(3, 600)
    local cut <close> = assert(model:session { ctx = 640 })
    local cache <close> = prefix_cache.open(model, 4 * STATE)
    -- Cancelled in its second batch, which looks are found by halves for.
    local function interrupt()
      local low, high = 1, 1 << 20
      repeat
        local look = (low + high) // 2
        cut:reset()
        local ok = cut.core:eval(long, look)
        if ok then high = look elseif cut:n_past() == 0 then low = look end
      until not ok and cut:n_past() == 512
    end
    interrupt()
    assert.is_false(cut:has_logits())
    local held = cut:ids()
    assert.same({ 0, 512 }, { cut:sync(held, { cache = cache }) })
    assert.is_true(cut:has_logits())
    interrupt()
    assert.equal(512, cache:restore(cut, held, 512))
    assert.is_true(cut:has_logits())
  end)
end)
