local core = require "moonlet.core"
local sched = require "moonlet.sched"

describe("sched", function()
  local loop
  before_each(function() loop = assert(sched.open()) end)
  after_each(function() loop:close() end)

  -- Runs the loop; whatever is spawned before begins at one and the same time.
  local function run_from_now()
    local seconds = core.seconds
    local now = seconds()
    finally(function() core.seconds = seconds end)
    function core.seconds() return now end -- luacheck: ignore 122
    loop:spawn(function() core.seconds = seconds end)
    assert(loop:run())
  end

  it("runs coroutines in turn and timers by their time", function()
    local said = {}
    local function say(text) said[#said + 1] = text end
    for _, ms in ipairs { 30, 10, 20, 0, 40, 5 } do
      loop:spawn(function()
        loop:sleep(ms / 1000)
        say(ms)
        if ms == 40 then loop:stop() end
      end)
    end
    loop:spawn(function() say("first") end)
    run_from_now()
    assert.same({ "first", 0, 5, 10, 20, 30, 40 }, said)
  end)

  it("lets others have turns while something runs gently, and only then", function()
    local turns, at_begin, at_end = 0, nil, nil
    loop.turn_seconds = 0 -- whenever it could give way, it does
    local function compute(n, fail)
      local sum, set = 0, {}
      for i = 1, n do
        set[i % 10] = select(2, pcall(function() return i end))
        sum = sum + set[i % 10]
      end
      table.sort(set, function(a, b) return a < b end) -- nothing can give way in here
      if fail then error(fail, 0) end
      return sum, nil, "end"
    end
    local results
    loop:spawn(function()
      compute(10000)
      at_begin = turns
      results = table.pack(loop:gently(loop.gently, loop, compute, 10000))
      at_end = turns
      local refusal = {}
      results.problem = select(2, pcall(loop.gently, loop, compute, 10, refusal))
      results.text = select(2, pcall(loop.gently, loop, compute, 10, "broken"))
      assert.equal(refusal, results.problem)
      local before = turns
      compute(10000)
      assert.equal(before, turns)
      loop:stop()
    end)
    loop:spawn(function()
      while true do
        turns = turns + 1
        loop:sleep(0)
      end
    end)
    assert(loop:run())
    assert.equal(0, at_begin)
    assert.is_true(at_end > 100, tostring(at_end))
    assert.same({ 50005000, nil, "end" }, { results[1], results[2], results[3] })
    assert.matches("^broken\nstack traceback", results.text)
  end)

  it("goes on gently behind a wait that is refused", function()
    local turns, is_done, at_end = 0, false, nil
    loop.turn_seconds = 0
    loop:spawn(function()
      loop:gently(function()
        assert.is_false((pcall(loop.sleep, loop, "x")))
        assert.is_false((pcall(loop.ready, loop, -1)))
        local before = turns
        for _ = 1, 10000 do select("#") end
        at_end = turns - before
      end)
      is_done = true
    end)
    loop:spawn(function()
      while not is_done do
        turns = turns + 1
        loop:sleep(0)
      end
      loop:stop()
    end)
    assert(loop:run())
    assert.is_true(at_end > 10, tostring(at_end))
  end)

  -- A coroutine that computes gently gives way every so many instructions (TURN_STEP in
  -- csrc/lua/lturn.c). With each number of them before it, what it then calls gives way at each of
  -- its own, if it does. Turns are counted: no case waits for a time, also one that goes wrong.
  describe("changes in one piece, where a coroutine that computes gently may give way,", function()
    local STEPS <const> = 256
    local FOR_EVER <const> = 1e6

    before_each(function() loop.turn_seconds = 0 end)

    local function gently_after(n, fn)
      loop:gently(function()
        for _ = 1, n do end
        fn()
      end)
    end

    local function spawn_each(fn)
      for n = 0, STEPS - 1 do
        loop:spawn(gently_after, n, function() fn(n) end)
      end
    end

    -- Runs so many turns of the loop, calling fn in each.
    local function run_turns(n, fn)
      local function turn()
        if n == 0 then return loop:stop() end
        n = n - 1
        if fn then fn() end
        loop:spawn(turn)
      end
      turn()
      assert(loop:run())
    end

    it("what it waits for", function()
      local signal, n_woken = loop:signal(), 0
      spawn_each(function()
        if signal:wait(FOR_EVER) then n_woken = n_woken + 1 end
      end)
      run_turns(20, function() signal:notify() end)
      assert.same({ STEPS, {} }, { n_woken, loop.timers })
    end)

    it("whom it wakes", function()
      local n_woken = 0
      for n = 0, STEPS - 1 do
        local signal = loop:signal()
        loop:spawn(function()
          if signal:wait(FOR_EVER) then n_woken = n_woken + 1 end
        end)
        loop:spawn(gently_after, n, function() signal:notify() end)
      end
      run_turns(20)
      assert.same({ STEPS, {} }, { n_woken, loop.timers })
    end)

    it("until when it sleeps", function()
      spawn_each(function() loop:sleep(FOR_EVER) end)
      run_turns(20)
      assert.equal(STEPS, #loop.timers)
      for i, waiter in ipairs(loop.timers) do assert.equal(i, waiter.index) end
    end)

    it("what it spawns", function()
      local n_spawned = 0
      spawn_each(function()
        loop:spawn(function() n_spawned = n_spawned + 1 end)
      end)
      run_turns(20)
      assert.equal(STEPS, n_spawned)
    end)

    it("which descriptor it waits for", function()
      local ended <close>, n_ready = assert(core.process_open({ "true" }, "/")), 0
      loop.net:watch(ended:fd())
      assert.equal("ready", (loop.net:wait()))
      loop.net:unwatch(ended:fd())
      loop:spawn(function()
        for n = 0, STEPS - 1 do
          gently_after(n, function()
            if loop:ready(ended:fd(), FOR_EVER) then n_ready = n_ready + 1 end
          end)
        end
      end)
      run_turns(20 * STEPS)
      assert.same({ STEPS, {}, {} }, { n_ready, loop.timers, loop.readers })
    end)
  end)

  it("calls gently what is no coroutine of a loop", function()
    assert.equal(3, loop:gently(function(a, b)
      for _ = 1, 10000 do a = a + 0 end
      return a + b
    end, 1, 2))
  end)

  it("hands arguments to what it spawns, also nil", function()
    local got
    loop:spawn(function(...)
      got = table.pack(...)
      loop:stop()
    end, 1, nil, 3, nil)
    loop:run()
    assert.same({ 1, nil, 3, nil, n = 4 }, got)
  end)

  it("wakes everybody who waits for a signal, and nobody twice", function()
    local signal, woken, n_ended = loop:signal(), {}, 0
    for i = 1, 3 do
      loop:spawn(function()
        woken[i] = signal:wait()
        woken[i + 3] = signal:wait(0.02)
        n_ended = n_ended + 1
        if n_ended == 3 then loop:stop() end
      end)
    end
    loop:spawn(function()
      signal:notify()
      signal:notify() -- nobody waits any more
    end)
    loop:run()
    assert.same({ true, true, true, false, false, false }, woken)
  end)

  it("does not wake a waiter whose time was over for another reason later", function()
    local signal, count = loop:signal(), 0
    loop:spawn(function()
      assert.is_false(signal:wait(0.01))
      count = count + 1
      loop:sleep(0.05)
      count = count + 1
      loop:stop()
    end)
    loop:spawn(function()
      loop:sleep(0.03)
      signal:notify()
    end)
    loop:run()
    assert.equal(2, count)
  end)

  it("raises what a coroutine raises, or tells on_error and goes on", function()
    loop:spawn(function() error("broken") end)
    assert.error_matches(function() loop:run() end, "broken")
    local told
    loop.on_error = function(text) told = text end
    loop:spawn(function() error({}) end)
    loop:spawn(function() loop:stop() end)
    loop:run()
    assert.matches("table: ", told)
  end)

  it("waits for seconds only, and for nothing else than a number of them", function()
    local messages, n_ended = {}, 0
    loop:spawn(function()
      for _, wait in ipairs { function() loop:sleep(0 / 0) end, function() loop:sleep() end,
        function() loop:sleep("x") end, function() loop:signal():wait(-(0 / 0)) end,
        function() loop:ready(0, 0 / 0) end } do
        messages[#messages + 1] = select(2, pcall(wait)):match("^spec.-: (seconds expected.*)$")
      end
    end)
    for _ = 1, 3 do
      loop:spawn(function()
        loop:sleep(0)
        n_ended = n_ended + 1
        if n_ended == 3 then loop:stop() end
      end)
    end
    assert(loop:run())
    local nan = tostring(0 / 0)
    assert.same({ "seconds expected, got " .. nan, "seconds expected, got nil",
      "seconds expected, got x", "seconds expected, got " .. tostring(-(0 / 0)),
      "seconds expected, got " .. nan }, messages)
    assert.same({ {}, {} }, { loop.timers, loop.readers })
  end)

  it("keeps no timers of those who were woken before, and the others in order", function()
    local signal, order, n_woken = loop:signal(), {}, 0
    for i = 1, 200 do
      local place = i * 37 % 200
      loop:spawn(function()
        if i % 3 > 0 then
          assert.is_true(signal:wait(place / 4000))
          n_woken = n_woken + 1
        else
          loop:sleep(place / 4000)
          order[#order + 1] = place
          if #order == 66 then loop:stop() end
        end
      end)
    end
    loop:spawn(function()
      assert.equal(200, #loop.timers)
      signal:notify()
      assert.equal(66, #loop.timers)
    end)
    run_from_now()
    assert.equal(134, n_woken)
    for i = 2, 66 do assert.is_true(order[i - 1] < order[i]) end
  end)

  it("stays fair with many timers", function()
    local order = {}
    for i = 1, 200 do
      loop:spawn(function()
        loop:sleep((i * 37 % 200) / 4000)
        order[#order + 1] = i * 37 % 200
        if #order == 200 then loop:stop() end
      end)
    end
    run_from_now()
    for i = 2, 200 do assert.is_true(order[i - 1] <= order[i]) end
  end)
end)
