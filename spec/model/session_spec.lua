-- Sessions: limits, rewinding, handles.
local core = require "moonlet.core"

local DIR <const> = "spec/golden/models/moe-wrapped/hf"

local function values_of(ses)
  local _, values = ses:logits():topk(320)
  return values
end

describe("session", function()
  local model
  before_each(function() model = assert(core.model_open(DIR, { threads = 2 })) end)
  after_each(function() model:close() end)

  it("refuses ids out of range and changes nothing", function()
    local ses <close> = assert(model:session { ctx = 8, kv = "f32" })
    assert(ses:eval { 1, 2 })
    for _, bad in ipairs { -1, 320, 2147483647 } do
      local ok, message, code = ses:eval { 3, bad }
      assert.is_nil(ok)
      assert.equal("range", code)
      assert.matches("token id " .. bad, message, 1, true)
    end
    assert.equal(2, ses:n_past())
    assert.error(function() ses:eval { 1.5 } end)
    assert.error(function() ses:eval { 1 << 40 } end)
  end)

  it("stops at its context and keeps what it has", function()
    local ses <close> = assert(model:session { ctx = 4, kv = "f16" })
    assert(ses:eval { 1, 2, 3 })
    local ok, message, code = ses:eval { 4, 5 }
    assert.is_nil(ok)
    assert.equal("limit", code)
    assert.matches("room for 4", message)
    assert.equal(3, ses:n_past())
    assert(ses:eval { 4 })
  end)

  it("does not open beyond what the model takes", function()
    local ses, message, code = model:session { ctx = 513 }
    assert.is_nil(ses)
    assert.equal("limit", code)
    assert.matches("1 to 512", message)
  end)

  it("names a cache codec that is not built", function()
    local ses, message, code = model:session { ctx = 8, kv = "turbo4" }
    assert.is_nil(ses)
    assert.equal("unsupported", code)
    assert.matches("turbo4", message)
  end)

  it("returns to a snapshot exactly", function()
    local ses <close> = assert(model:session { ctx = 64, kv = "f16" })
    assert(ses:eval { 5, 6, 7, 8 })
    local snap <close> = assert(ses:snapshot())
    assert(ses:eval { 9, 10 })
    local there = values_of(ses)
    assert(ses:eval { 100, 101, 102 })
    assert(ses:restore(snap))
    assert.equal(4, ses:n_past())
    assert.same({ 5, 6, 7, 8 }, ses:ids())
    assert(ses:eval { 9, 10 })
    assert.same(there, values_of(ses))
  end)

  it("takes the rows of multi-token prediction into a snapshot", function()
    local final = assert(model:forward({ 5, 6, 7 }, { "hidden" })).final:bytes()
    local row = #final // 3
    local ses <close> = assert(model:session { ctx = 8, kv = "f16" })
    assert(ses:eval { 5, 6, 7 })
    assert(ses:mtp(0, final:sub(1, 2 * row), { 6, 7 }))
    local snap <close> = assert(ses:snapshot())
    local _, there = assert(ses:mtp(2, final:sub(2 * row + 1), { 8 }))
    local other <close> = assert(model:session { ctx = 8, kv = "f16" })
    assert(other:restore(snap))
    local _, here = assert(other:mtp(2, final:sub(2 * row + 1), { 8 }))
    assert.equal(there:bytes(), here:bytes())
    local fresh <close> = assert(model:session { ctx = 8, kv = "f16" })
    assert.is_nil(fresh:mtp(2, final:sub(2 * row + 1), { 8 }))
  end)

  local function ids_from(first, n)
    local ids = {}
    for i = 1, n do ids[i] = (first * 7 + i * 13) % 320 end
    return ids
  end

  local function fresh_values(ids, codec)
    local ses <close> = assert(model:session { ctx = 256, kv = codec })
    assert(ses:eval(ids))
    return values_of(ses)
  end

  it("diverges from a snapshot in the middle of a page without touching it", function()
    for _, codec in ipairs { "f32", "f16" } do
      local trunk = ids_from(1, 77)
      local a <close> = assert(model:session { ctx = 256, kv = codec })
      local b <close> = assert(model:session { ctx = 256, kv = codec })
      assert(a:eval(trunk))
      local snap <close> = assert(a:snapshot())
      assert(b:restore(snap))
      for i = 1, 3 do -- both write behind the same rows, more than a page
        local more = ids_from(10 + i, 45)
        assert(a:eval(more))
        assert(b:restore(snap))
        assert(b:eval(ids_from(20 + i, 45)))
        local whole = table.move(more, 1, #more, #trunk + 1, table.move(trunk, 1, #trunk, 1, {}))
        assert.same(fresh_values(whole, codec), values_of(a))
        whole = table.move(ids_from(20 + i, 45), 1, 45, #trunk + 1,
          table.move(trunk, 1, #trunk, 1, {}))
        assert.same(fresh_values(whole, codec), values_of(b))
        assert(a:restore(snap))
      end
    end
  end)

  it("shares the rows of a snapshot until somebody writes", function()
    local ses <close> = assert(model:session { ctx = 256, kv = "f16" })
    assert(ses:eval(ids_from(1, 128)))
    local one = model:kv_bytes()
    local snaps = {}
    for i = 1, 20 do snaps[i] = assert(ses:snapshot()) end
    assert.same({ one, 0 }, { model:kv_bytes() })
    assert(ses:eval(ids_from(2, 1)))
    assert.equal(one + one // 4, model:kv_bytes()) -- 128 rows are four pages; a fifth begins
    ses:reset()
    assert.same({ one, one }, { model:kv_bytes() }) -- only the snapshots hold them
    assert(ses:restore(snaps[20]))
    assert.same({ one, 0 }, { model:kv_bytes() })
    for _, snap in ipairs(snaps) do snap:close() end
    assert.equal(one, model:kv_bytes())
    assert(ses:eval(ids_from(3, 128)))
    ses:close()
    assert.equal(0, model:kv_bytes())
  end)

  it("keeps a snapshot alive without its session", function()
    local ses = assert(model:session { ctx = 64, kv = "f16" })
    assert(ses:eval(ids_from(1, 40)))
    local expected = values_of(ses)
    local snap <close> = assert(ses:snapshot())
    ses:close()
    local other <close> = assert(model:session { ctx = 256, kv = "f16" })
    assert(other:restore(snap))
    assert.same(expected, values_of(other))
    assert(other:eval(ids_from(2, 40)))
    local whole = table.move(ids_from(2, 40), 1, 40, 41, ids_from(1, 40))
    assert.same(fresh_values(whole, "f16"), values_of(other))
  end)

  it("refuses a snapshot of another model or codec", function()
    local ses <close> = assert(model:session { ctx = 8, kv = "f16" })
    assert(ses:eval { 1 })
    local snap <close> = assert(ses:snapshot())
    local other <close> = assert(model:session { ctx = 8, kv = "f32" })
    assert.is_nil(other:restore(snap))
    local model2 <close> = assert(core.model_open(DIR, { threads = 1 }))
    local ses2 <close> = assert(model2:session { ctx = 8, kv = "f16" })
    assert.is_nil(ses2:restore(snap))
  end)

  describe("in a batch with others", function()
    local function open(n, codec)
      local list = setmetatable({}, { __close = function(self)
        for _, ses in ipairs(self) do ses:close() end
      end })
      for i = 1, n do list[i] = assert(model:session { ctx = 256, kv = codec or "f16" }) end
      return list
    end

    it("comes out as alone, prompts and single tokens mixed", function()
      for _, codec in ipairs { "f32", "f16" } do
        local sessions <close>, whole = open(6, codec), {}
        for step = 1, 5 do
          local parts = {}
          for i, ses in ipairs(sessions) do
            -- Lengths 1, 2, 3 are shorter than the convolution, 40 crosses a page.
            local n = ({ 1, 2, 3, 40, 1, 17 })[(i + step) % 6 + 1]
            local ids = ids_from(i * 31 + step, n)
            parts[i] = { session = ses, ids = ids }
            whole[i] = table.move(ids, 1, n, #(whole[i] or {}) + 1, whole[i] or {})
          end
          assert(model:eval_parts(parts))
        end
        for i, ses in ipairs(sessions) do
          assert.equal(#whole[i], ses:n_past())
          assert.same(whole[i], ses:ids())
          assert.same(fresh_values(whole[i], codec), values_of(ses))
        end
      end
    end)

    it("comes out as alone where one has a long past and others none", function()
      local long <close> = assert(model:session { ctx = 512, kv = "f16" })
      local past, more, first = ids_from(3, 500), ids_from(4, 11), ids_from(5, 9)
      assert(long:eval(past))
      local snap <close> = assert(long:snapshot())
      assert(long:eval(more))
      local there = values_of(long)
      assert(long:restore(snap))
      local sessions <close> = open(2)
      assert(model:eval_parts { { session = sessions[1], ids = first },
        { session = long, ids = more }, { session = sessions[2], ids = { 7 } } })
      assert.same(there, values_of(long))
      assert.same(fresh_values(first, "f16"), values_of(sessions[1]))
      assert.same(fresh_values({ 7 }, "f16"), values_of(sessions[2]))
    end)

    it("takes more sessions than lm_head takes rows at once", function()
      local sessions <close>, parts = open(20), {}
      for i, ses in ipairs(sessions) do parts[i] = { session = ses, ids = ids_from(i, 1) } end
      assert(model:eval_parts(parts))
      for i, ses in ipairs(sessions) do
        assert.same(fresh_values(ids_from(i, 1), "f16"), values_of(ses))
      end
      assert(model:eval_parts {})
    end)

    it("refuses a part without effect on any", function()
      local sessions <close> = open(3)
      local a, b, c = sessions[1], sessions[2], sessions[3]
      assert(a:eval { 1 })
      for expected, parts in pairs {
        ["part 1: token id 999 at position 0 is not below 320"] = { { a, { 2 } }, { b, { 999 } } },
        ["parts 0 and 1 are one session"] = { { a, { 2 } }, { a, { 3 } } },
        ["part 1 has no tokens"] = { { a, { 2 } }, { b, {} } },
        ["more than 512 tokens in a batch"] = { { a, ids_from(1, 200) },
          { b, ids_from(2, 200) }, { c, ids_from(3, 113) } },
        ["part 1: context is full: 0 tokens past, 257 more, room for 256"] =
          { { a, { 2 } }, { b, ids_from(2, 257) } },
      } do
        for i, part in ipairs(parts) do parts[i] = { session = part[1], ids = part[2] } end
        local ok, message = model:eval_parts(parts)
        assert.is_nil(ok)
        assert.equal(expected, message)
        assert.same({ 1, 0, 0 }, { a:n_past(), b:n_past(), c:n_past() })
      end
    end)
  end)

  it("marks views of its logits as stale", function()
    local ses <close> = assert(model:session { ctx = 8 })
    assert.error_matches(function() ses:logits() end, "no logits")
    assert(ses:eval { 1 })
    local view = ses:logits()
    view:argmax()
    assert(ses:eval { 2 })
    assert.error_matches(function() view:argmax() end, "stale")
  end)

  it("raises when used after close, in any order of closing", function()
    local ses = assert(model:session { ctx = 8 })
    assert(ses:eval { 1 })
    local view = ses:logits()
    ses:close()
    ses:close()
    assert.error_matches(function() ses:eval { 1 } end, "closed session")
    assert.error_matches(function() view:argmax() end, "stale")
    local orphan = assert(model:session { ctx = 8 })
    model:close()
    assert.error_matches(function() orphan:eval { 1 } end, "closed model")
    assert.error_matches(function() model:info() end, "closed model")
    orphan:close()
  end)

  it("is what it was before the batch that an interrupt cut off", function()
    local demo <close> = assert(core.model_open("examples/demo-model", { threads = 2 }))
    local ids = {}
    for i = 1, 4000 do ids[i] = i * 37 % 4096 end
    local stat <close> = assert(io.open("/proc/self/stat"))
    local pid = stat:read("a"):match("^%d+")
    local ses <close> = assert(demo:session { ctx = 4096 })
    assert(ses:eval { 1, 2, 3 })
    local before = values_of(ses)
    local ok, message, code
    repeat -- a fast machine may be done before the signal comes
      core.catch_interrupt()
      ses:reset()
      assert(ses:eval { 1, 2, 3 })
      local sender = assert(io.popen("sleep 0.1; kill -INT " .. pid)) -- os.execute ignores signals
      ok, message, code = ses:eval(ids)
      sender:close()
    until not ok
    assert.equal("cancelled", code)
    assert.matches("of 4000 tokens", message)
    core.catch_interrupt()
    local n = ses:n_past()
    assert.equal(3, n % 512)
    if n == 3 then
      assert.same(before, values_of(ses))
    else
      assert.error_matches(function() ses:logits() end, "no logits")
    end
    assert(ses:eval(table.move(ids, n - 2, n + 300, 1, {})))
    local fresh <close> = assert(demo:session { ctx = 4096 })
    assert(fresh:eval { 1, 2, 3 })
    assert(fresh:eval(table.move(ids, 1, n + 300, 1, {})))
    assert.same(values_of(fresh), values_of(ses))
  end)

  it("counts what it holds", function()
    local ses <close> = assert(model:session { ctx = 16, kv = "f16" })
    assert(ses:eval { 1, 2, 3 })
    local stats = ses:stats()
    assert.equal("f16", stats.codec)
    assert.equal(3, stats.n_past)
    assert.equal(3 * 1 * 2 * 2 * 32 * 2, stats.kv_bytes) -- rows, layers, k+v, heads, dims, bytes
    assert.equal(3 * (4 * 16 * 16 + 3 * 128) * 4, stats.state_bytes)
  end)
end)
