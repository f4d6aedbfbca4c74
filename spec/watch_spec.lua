-- Lua that is ended, whatever it does. Each case would come to an end by itself, some million
-- instructions later: what is not ended is seen to have escaped.

local watch = require "moonlet.watch"

describe("Lua that is looked at", function()
  local STEPS <const>, LOOKS <const> = 100, 100
  local MOST_LOOKS <const> = 1000 -- at what is over already
  local escaped

  before_each(function() escaped = 0 end)

  local function long()
    for _ = 1, 1000000 do end
    escaped = escaped + 1
  end

  local function closing(fn) return setmetatable({}, { __close = fn }) end
  local function holding(value, fn)
    local held <close> = value
    fn(held)
  end

  -- Runs fn in a coroutine: what watch.pcall returns, and whether its time was over before.
  local function run(fn)
    local n, returned = 0, nil
    local thread = coroutine.create(function()
      returned = table.pack(watch.pcall(STEPS, function()
        n = n + 1
        return n > LOOKS
      end, fn))
    end)
    assert(watch.resume(thread))
    assert.equal("dead", coroutine.status(thread))
    assert.equal(0, escaped)
    assert.is_true(n < LOOKS + MOST_LOOKS)
    return returned, n > LOOKS
  end

  local function ends(fn)
    local _, is_over = run(fn)
    assert.is_true(is_over)
  end

  it("returns and raises as in pcall, and waits", function()
    assert.same({ true, 1, nil, 3, n = 4 }, (run(function() return 1, nil, 3 end)))
    local problem = {}
    assert.same({ false, problem, n = 2 }, (run(function() error(problem) end)))
    local got
    local thread = coroutine.create(function()
      got = table.pack(watch.pcall(STEPS, function() return false end, function(a)
        return a, coroutine.yield("wait")
      end, 1))
      long()
    end)
    assert.same({ true, "wait" }, { watch.resume(thread) })
    assert.same({ true }, { watch.resume(thread, 2) })
    assert.same({ true, 1, 2, n = 3 }, got)
    assert.equal(1, escaped)
  end)

  it("is looked at no more when it was ended", function()
    local thread = coroutine.create(function()
      watch.pcall(STEPS, function() return true end, long)
      long()
    end)
    assert(watch.resume(thread))
    assert.equal(1, escaped)
  end)

  it("ends in pcalls, and loops around them", function()
    ends(long)
    ends(function() for _ = 1, 20 do pcall(long) end end)
    local function hold(n)
      for _ = 1, 2 do pcall(n == 0 and long or hold, n - 1) end
    end
    ends(function() hold(10) end)
    ends(function() for _ = 1, 20 do string.gsub("ab", ".", function() pcall(long) end) end end)
  end)

  it("ends in handlers", function()
    ends(function() xpcall(long, long) end)
    ends(function() for _ = 1, 20 do xpcall(long, long) end end)
    ends(function() xpcall(error, long) end)
    ends(function() xpcall(long, function() xpcall(long, long) end) end)
  end)

  it("ends where no further C function may be called", function()
    local xpcall <const> = xpcall -- busted finds globals by a function, which has to be called
    local function deep(n)
      if n == 0 then return long() end
      xpcall(deep, long, n - 1)
    end
    for n = 1, 210 do run(function() deep(n) end) end -- of 200 (LUAI_MAXCCALLS)
    local function deeper() return string.gsub("a", "a", deeper) end
    ends(function() xpcall(deeper, long) end)
  end)

  it("ends where metamethods are called", function()
    ends(function() tostring(setmetatable({}, { __tostring = long })) end)
    ends(function() return setmetatable({}, { __index = long }).x end)
    ends(function() table.sort({ 1, 2, 3 }, long) end)
  end)

  it("ends in what it closes, which has its turn", function()
    local closed = {}
    local function close() closed[#closed + 1] = true end
    ends(function()
      holding(closing(close), function() holding(closing(close), long) end)
    end)
    ends(function()
      holding(closing(close), function() for _ = 1, 20 do pcall(long) end end)
    end)
    assert.equal(3, #closed)
    ends(function() holding(closing(long), function() holding(closing(long), long) end) end)
    ends(function() holding(closing(function() for _ = 1, 20 do pcall(long) end end), long) end)
    ends(function() holding(closing(function() xpcall(long, long) end), error) end)
    ends(function() holding(closing(long), function() end) end)
    ends(function() pcall(holding, closing(long), long) end)
  end)

  it("ends in coroutines, of which it hears no more", function()
    local heard
    ends(function()
      heard = coroutine.wrap(long)()
      escaped = escaped + 1
    end)
    ends(function()
      heard = coroutine.resume(coroutine.create(long))
      escaped = escaped + 1
    end)
    assert.is_nil(heard)
    ends(function() for _ = 1, 20 do pcall(coroutine.wrap(function() pcall(long) end)) end end)
    ends(function() coroutine.wrap(function() coroutine.wrap(long)() end)() end)
    ends(function() coroutine.wrap(function() xpcall(long, long) end)() end)
    ends(function() coroutine.wrap(function() table.sort({ 1, 2, 3 }, long) end)() end)
    ends(function() table.sort({ 1, 2, 3 }, coroutine.wrap(long)) end)
    ends(function()
      local again = coroutine.create(long)
      for _ = 1, 20 do coroutine.resume(again) end
    end)
  end)

  it("ends in what coroutines close, and in coroutines that close something", function()
    local function held() holding(closing(long), long) end
    ends(function() coroutine.wrap(held)() end)
    ends(function() coroutine.wrap(function() coroutine.wrap(held)() end)() end)
    ends(function() coroutine.wrap(function() holding(closing(long), error) end)() end)
    ends(function() holding(closing(function() coroutine.wrap(long)() end), long) end)
    ends(function() holding(closing(coroutine.wrap(held)), long) end)
    ends(function()
      local waits = coroutine.create(function() holding(closing(long), coroutine.yield) end)
      coroutine.resume(waits)
      coroutine.close(waits)
      long()
    end)
    ends(function()
      local ended = coroutine.create(held)
      local function close() coroutine.close(ended) end
      holding(closing(close), function() coroutine.resume(ended) end)
    end)
  end)
end)
