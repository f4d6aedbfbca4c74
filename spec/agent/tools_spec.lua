-- What may go wrong with tools and calls, by scripts.

local call = require("spec.support.said").call
local sys = require "moonlet.sys"
local scripted = require "spec.support.scripted"

local collect = scripted.collect
local echo_tool = scripted.echo_tool
local kinds = scripted.kinds
local of_kind = scripted.of_kind
local open = scripted.open
local result_of = scripted.result_of
local wait_for_cancel = scripted.wait_for_cancel

describe("an agent", function()
  setup(scripted.begin)
  teardown(scripted.finish)

  it("hands out what happens, in order", function()
    local events, on = collect()
    local agent <close> = open({ "I look.\n\n" .. call("echo", { text = "hi" }), "It says hi." },
      { tools = { echo_tool() }, on = on, system = "Be brief." })
    local result = assert(agent:run("Look"))
    assert.same({ "content", "tool_call", "usage", "turn", "tool_result", "content", "usage",
      "turn", "end" }, kinds(events))
    assert.equal("It says hi.", result.text)
    assert.equal("stop", result.reason)
    assert.equal(2, result.steps)
    assert.same({ "hi" }, of_kind(events, "tool_result", "content"))
    local roles = {}
    for i, message in ipairs(agent.messages) do roles[i] = message.role end
    assert.same({ "system", "user", "assistant", "tool", "assistant" }, roles)
  end)

  it("goes on with the conversation in the next run", function()
    local agent <close> = open { "One.", "Two." }
    assert.equal("One.", agent:run("First").text)
    assert.equal("Two.", agent:run("Second").text)
    assert.equal(4, #agent.messages)
  end)

  it("tells the model of a tool that does not exist", function()
    assert.equal("Error: there is no tool 'eco'; there are echo",
      (result_of(call("eco", { text = "hi" }), { tools = { echo_tool() } })))
  end)

  it("tells the model of arguments that do not fit", function()
    assert.equal("Error: arguments.text: is missing",
      (result_of(call("echo", { n = 3 }), { tools = { echo_tool() } })))
    assert.equal('Error: arguments.n: integer expected, got "many"',
      (result_of(call("echo", { text = "x", n = "many" }), { tools = { echo_tool() } })))
  end)

  it("tells the model of a tool that raises, fails, or answers nothing readable", function()
    local function with(run)
      return (result_of(call("echo", { text = "hi" }), { tools = { echo_tool { run = run } } }))
    end
    assert.matches("^Error: the tool failed: .*boom$", with(function() error("boom") end))
    assert.equal("Error: no luck", with(function() return nil, "no luck" end))
    assert.equal("ok", with(function() end))
    assert.equal("Error: the tool's result is no JSON value",
      with(function() return { f = print } end))
    for _, value in ipairs { print, 0 / 0 } do
      assert.equal("Error: the tool's result is no JSON value", with(function() return value end))
    end
    assert.equal("Error: the tool failed: (error object is a table value)",
      with(function() error({}) end))
    assert.equal("Error: (error object is a table value)", with(function() return nil, {} end))
    local mute = setmetatable({}, { __tostring = function() error("bug") end })
    assert.equal("Error: the tool failed: (error object is a table value)",
      with(function() error(mute) end))
    assert.equal("true", with(function() return true end))
    assert.equal("a\u{FFFD}b", with(function() return "a\xFFb" end))
    assert.equal("3", with(function() return 3 end))
  end)

  it("gives up a tool that waits for ever, and one that computes for ever", function()
    local cancelled
    local function with(run)
      assert.equal("Error: the tool was given up after 0.01 s",
        (result_of(call("echo", { text = "hi" }),
          { tools = { echo_tool { seconds = 0.01, run = run } } })))
    end
    with(function(_, ctx)
      wait_for_cancel(ctx)
      cancelled = ctx.is_cancelled()
    end)
    assert.is_true(cancelled)
    with(function() while true do end end)
    local closed = 0
    with(function()
      local closing <close> = setmetatable({}, { __close = function() closed = closed + 1 end })
      while closing do pcall(function() while true do end end) end
    end)
    assert.equal(1, closed)
    with(function() coroutine.wrap(function() while true do end end)() end)
    with(function()
      local function numbers() while true do pcall(function() repeat until false end) end end
      while true do pcall(coroutine.wrap(numbers)) end
    end)
  end)

  -- What goes on for long, if nothing stops it; and the clock, by the second at each look at it.
  local escaped
  local function long()
    for _ = 1, 3000000 do end
    escaped = escaped + 1
  end

  local function count_looks()
    local seconds, now = sys.seconds, 0
    escaped = 0
    sys.seconds = function() now = now + 1; return now end -- luacheck: ignore 122
    finally(function() sys.seconds = seconds end) -- luacheck: ignore 122
  end

  it("gives up a tool whatever it does when its time is over", function()
    count_looks()
    local function closing() return setmetatable({}, { __close = long }) end
    local function hold()
      local held <close> = closing()
      long(held)
    end
    for how, run in pairs {
      ["a handler"] = function() xpcall(long, long) end,
      ["handlers again and again"] = function() for _ = 1, 20 do xpcall(long, long) end end,
      ["closing"] = hold,
      ["closing in a coroutine"] = function() coroutine.wrap(hold)() end,
      ["a coroutine that is closed by one"] = function()
        local held <close> = setmetatable({}, { __close = coroutine.wrap(hold) })
        hold(held)
      end,
      ["an error that cannot be told"] = function()
        error(setmetatable({}, { __tostring = long }))
      end,
      ["a reason that cannot be told"] = function()
        return nil, setmetatable({}, { __tostring = long })
      end,
    } do
      assert.equal("Error: the tool was given up after 5 s",
        (result_of(call("echo", { text = "hi" }),
          { tools = { echo_tool { seconds = 5, run = run } } })), how)
      assert.equal(0, escaped, how)
    end
  end)

  it("takes what fails in what a tool spawns for its call's failure, and goes on", function()
    local is_told = false
    local content = result_of(call("echo", { text = "hi" }), { tools = { echo_tool {
      run = function(given, ctx)
        ctx.loop:spawn(function(text, ...)
          assert(select("#", ...) == 2)
          error(text .. " there", 0)
        end, given.text, nil, nil)
        wait_for_cancel(ctx)
        is_told = ctx.is_cancelled()
        return "late"
      end } } })
    assert.equal("Error: the tool failed: hi there", content)
    assert.is_true(is_told)
    assert.equal("hi", (result_of(call("echo", { text = "hi" }), { tools = { echo_tool {
      run = function(given, ctx)
        local said = ctx.loop:signal()
        ctx.loop:spawn(function() said:notify() end)
        said:wait()
        return given.text
      end } } })))
  end)

  it("notes what fails of what a tool has left running", function()
    local events, note = collect()
    local resumed
    local agent <close> = open({ call("echo", { text = "hi" }), "Done.", "Again." }, {
      on = function(event)
        note(event)
        if event.kind == "note" then error("bug in on") end
      end,
      stop = function() resumed:notify() end,
      tools = { echo_tool { run = function(given, ctx)
        resumed = ctx.loop:signal()
        ctx.loop:spawn(function()
          resumed:wait()
          error("too late", 0)
        end)
        ctx.loop:sleep(0)
        return given.text
      end } } })
    assert.error_matches(function() agent:run("Go") end, "bug in on")
    assert.equal("hi", agent.messages[3].content)
    assert.equal("Again.", assert(agent:run("Again")).text)
    assert.same({ "what the tool echo has left running failed: too late" },
      of_kind(events, "note", "text"))
  end)

  it("stops what computes for ever in what a tool spawns", function()
    count_looks()
    assert.equal("Error: the tool was given up after 5 s",
      (result_of(call("echo", { text = "hi" }), { tools = { echo_tool { seconds = 5,
        run = function(_, ctx)
          ctx.loop:spawn(long)
          wait_for_cancel(ctx)
        end } } })))
    assert.equal(0, escaped)
  end)

  it("stops what a tool told on_cancel, too", function()
    count_looks()
    local others = 0
    for _, fn in ipairs { long, function() xpcall(long, long) end,
      function() error(setmetatable({}, { __tostring = long })) end } do
      local content = result_of(call("echo", { text = "hi" }), { tools = { echo_tool { seconds = 5,
        run = function(_, ctx)
          ctx.on_cancel(fn)
          ctx.on_cancel(function() others = others + 1 end)
          long()
        end } } })
      assert.equal("Error: the tool cannot be stopped: what it told on_cancel takes too long",
        content)
    end
    assert.same({ 0, 3 }, { escaped, others })
  end)

  it("tells a tool all that it wanted to know of its end, also late and after a mistake", function()
    local told = {}
    local content = result_of(call("echo", { text = "hi" }), { tools = { echo_tool {
      seconds = 0.01, run = function(_, ctx)
        ctx.on_cancel(function() error("no way") end)
        wait_for_cancel(ctx)
        told[1] = ctx.is_cancelled()
        ctx.on_cancel(function() told[2] = true end)
      end } } })
    assert.matches("^Error: the tool cannot be stopped: .*no way$", content)
    assert.same({ true, true }, told)
  end)

  it("tells a tool that on_cancel takes functions", function()
    local content = result_of(call("echo", { text = "hi" }), { tools = { echo_tool {
      run = function(_, ctx) ctx.on_cancel(5) end } } })
    assert.matches("^Error: the tool failed: .*on_cancel: a function expected, got number$",
      content)
  end)

  it("ends though a tool that nobody waits for goes on, and what it told on_cancel", function()
    -- The clock goes on by being looked at, which somebody has to go on with.
    local core = require "moonlet.core"
    local seconds, now = core.seconds, 0
    local function hurry() now = now + 0.1; return now end
    core.seconds, sys.seconds = hurry, hurry -- luacheck: ignore 122
    finally(function() core.seconds, sys.seconds = seconds, seconds end) -- luacheck: ignore 122
    local ended, told, n_turns = false, 0, 0
    local agent = open({ call("echo", { text = "hi" }), "Done." }, { tools = { echo_tool {
      run = function(_, ctx)
        ctx.loop:spawn(function()
          while not ended do
            n_turns = n_turns + 1
            assert(n_turns < 100000, "the run waits for ever")
            ctx.loop:sleep(0)
          end
        end)
        ctx.on_cancel(function() ctx.loop:signal():wait() end)
        ctx.on_cancel(function() told = told + 1 end)
        ctx.loop:signal():wait()
      end } } })
    assert.equal("Done.", assert(agent:run("Go")).text)
    assert.equal("Error: the tool was given up after 120 s", agent.messages[3].content)
    assert.equal(1, told)
    ended = true
    agent:close()
  end)
end)
