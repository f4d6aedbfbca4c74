-- The agent loop: the demo model's tool tasks end to end, everything that may go wrong by replay.

local json = require "moonlet.json"
local models = require "moonlet.model"
local moonlet = require "moonlet"
local replay = require "moonlet.replay"
local call = require("spec.support.said").call
local sched = require "moonlet.sched"
local sys = require "moonlet.sys"
local workspace = require "spec.support.workspace"

local DIR <const> = "examples/demo-model"

-- Events of a kind, their field.
local function collect()
  local events = {}
  return events, function(event) events[#events + 1] = event end
end

local function kinds(events)
  local list = {}
  for _, event in ipairs(events) do
    if event.kind ~= list[#list] then list[#list + 1] = event.kind end
  end
  return list
end

local function of_kind(events, kind, field)
  local list = {}
  for _, event in ipairs(events) do
    if event.kind == kind then list[#list + 1] = event[field] end
  end
  return list
end

-- ---- the demo model ----------------------------------------------------------------------------

describe("an agent on the demo model", function()
  local model, place
  setup(function() model = assert(moonlet.open(DIR)) end)
  teardown(function() model:close() end)
  before_each(function()
    place = workspace.new {
      ["window.md"] = "Meet Leo at 5 o'clock.\nLeo likes the orange.",
      ["src/anchor.md"] = "The rocket is under the anchor.",
      ["jacket.txt"] = "There is an island here.",
      ["nickel.txt"] = ("line\n"):rep(62),
    }
  end)
  after_each(function() place.remove() end)

  local function ask(tools, text, options)
    local events, on = collect()
    local o = { model = model, tools = tools, cwd = place.dir, ctx = 1024, on = on,
      generate = { temperature = 0 } }
    for name, value in pairs(options or {}) do o[name] = value end
    local agent <close> = assert(moonlet.agent(o))
    local result = assert(agent:run(text))
    assert.equal("stop", result.reason)
    return result, events
  end

  it("reads a file and answers from it", function()
    local result = ask({ "read", "write" }, "What is the first line of window.md?")
    assert.equal("The first line is: Meet Leo at 5 o'clock.", result.text)
  end)

  it("copies a file in two steps and evaluates each token once", function()
    for _, thinking in ipairs { false, true } do
      local result, events = ask({ "read", "write" },
        "Copy the text of src/anchor.md into docs/pepper.md.",
        { template = { enable_thinking = thinking } })
      assert.equal("I copied src/anchor.md to docs/pepper.md.", result.text)
      assert.equal("The rocket is under the anchor.", place.read("docs/pepper.md"))
      assert.equal(thinking, #of_kind(events, "reasoning", "text") > 0)
      local usage = of_kind(events, "usage", "usage")
      assert.equal(3, #usage)
      for i, turn in ipairs(usage) do
        assert.equal(turn.prompt, turn.reused + turn.evaluated)
        local before = usage[i - 1]
        assert.equal(before and before.prompt + before.generated or 0, turn.reused)
      end
    end
  end)

  it("edits a file", function()
    local result = ask({ "read", "edit" }, "In jacket.txt, replace island with rocket.")
    assert.equal("I replaced island with rocket in jacket.txt.", result.text)
    assert.equal("There is an rocket here.", place.read("jacket.txt"))
  end)

  it("writes a file", function()
    local result = ask({ "write", "read" },
      "Make a file notes/silver.txt that says: Meet Iris at 5 o'clock.")
    assert.equal("I wrote notes/silver.txt.", result.text)
    assert.equal("Meet Iris at 5 o'clock.", place.read("notes/silver.txt"))
  end)

  it("runs commands", function()
    assert.equal("nickel.txt has 62 lines.",
      ask({ "bash", "read" }, "Count the lines of nickel.txt with wc.").text)
    assert.equal("The output is: garden", ask({ "bash" }, "Run echo garden").text)
    ask({ "bash", "read" }, "Make a directory called market.")
    assert.equal("market\n", place.run("ls -d market"))
  end)

  it("calls the user's own tools, two in one turn", function()
    local degrees = { Lima = -8, Zagreb = 34 }
    local weather = { name = "get_weather", description = "Get the weather of a city.",
      parameters = { type = "object", properties = { city = { type = "string" } },
        required = { "city" } },
      run = function(given)
        return json.object({ sky = "clear", temperature = degrees[given.city] },
          { "sky", "temperature" })
      end }
    local result, events = ask({ weather }, "What is the weather in Lima and in Zagreb?")
    assert.equal("In Lima it is clear and -8 degrees. In Zagreb it is clear and 34 degrees.",
      result.text)
    assert.equal(2, #of_kind(events, "tool_call", "id"))
    assert.equal(2, result.steps)
  end)

  it("calculates, tells the time, and uses tools it has never seen", function()
    local function tool(name, description, parameter, run)
      return { name = name, description = description, run = run,
        parameters = { type = "object", required = { parameter },
          properties = { [parameter] = { type = "string" } } } }
    end
    local asked = {}
    local result = ask({ tool("calculator", "Evaluate an arithmetic expression.", "expression",
      function(given)
        asked[#asked + 1] = given.expression
        return ("%d"):format(load("return " .. given.expression)())
      end) }, "Use the calculator: 540 * 737")
    assert.equal("540 * 737 = 397980", result.text)
    result = ask({ tool("get_time", "Get the time in a city.", "city", function(given)
      asked[#asked + 1] = given.city
      return "02:38"
    end) }, "What time is it in Brussels?")
    assert.equal("It is 02:38 in Brussels.", result.text)
    assert.same({ "540 * 737", "Brussels" }, asked)
  end)

  it("resumes a conversation whose tokens a session still holds, and reads only what is new",
    function()
      for _, thinking in ipairs { false, true } do
        local session <close> = assert(model:session { ctx = 1024 })
        local options = { session = session, tools = { "read", "write" }, cwd = place.dir,
          generate = { temperature = 0 }, template = { enable_thinking = thinking },
          save = place.path("talk" .. tostring(thinking)) }
        local first <close> = assert(moonlet.agent(options))
        assert(first:run("Copy the text of src/anchor.md into docs/pepper.md."))
        local held = session:n_past()
        first:close()

        local events
        events, options.on = collect()
        options.save, options.resume = nil, options.save
        local second <close> = assert(moonlet.agent(options))
        assert.same(json.encode(first.messages), json.encode(second.messages))
        assert(second:run("What is the first line of window.md?"))
        local turn = of_kind(events, "usage", "usage")[1]
        assert.equal(turn.prompt, turn.reused + turn.evaluated)
        -- The template leaves out thoughts of answers that are followed by another question.
        assert.equal(thinking and 0 or held, turn.reused)
        second:close()
      end
    end)

  it("runs on a session that the user has, and leaves it open", function()
    local session <close> = assert(model:session { ctx = 1024 })
    local function run_once()
      local agent <close> = assert(moonlet.agent { session = session, tools = { "read" },
        cwd = place.dir, generate = { temperature = 0 } })
      return assert(agent:run("What is the first line of window.md?"))
    end
    local first = run_once()
    assert.equal("The first line is: Meet Leo at 5 o'clock.", first.text)
    assert.is_true(session:n_past() > 0)
    assert.equal(first.text, run_once().text)
  end)
end)

-- ---- by replay ---------------------------------------------------------------------------------

describe("an agent", function()
  local texts
  setup(function() texts = assert(models.open_texts(DIR)) end)
  teardown(function() texts:close() end)

  local function open(answers, options)
    local o = { model = texts, replay = answers }
    for name, value in pairs(options or {}) do o[name] = value end
    return assert(moonlet.agent(o))
  end

  local function echo_tool(more)
    local tool = { name = "echo", parameters = { type = "object",
      properties = { text = { type = "string" }, n = { type = "integer" } },
      required = { "text" } }, run = function(given) return given.text end }
    for name, value in pairs(more or {}) do tool[name] = value end
    return tool
  end

  -- What the model was told about one call.
  local function result_of(answer, options)
    local agent <close> = open({ answer, "Done." }, options)
    local result = assert(agent:run("Go"))
    assert.equal("Done.", result.text)
    assert.equal("tool", agent.messages[3].role)
    return agent.messages[3].content, agent
  end

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
    assert.equal("a\u{FFFD}b", with(function() return "a\xFFb" end))
    assert.equal("3", with(function() return 3 end))
  end)

  -- What a tool does that waits until it is told that nobody does.
  local function wait_for_cancel(ctx)
    local told = ctx.loop:signal()
    ctx.on_cancel(function() told:notify() end)
    told:wait()
  end

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

  it("ends though a tool that nobody waits for goes on", function()
    -- The clock goes on by what is waited for, which takes no time.
    local core = require "moonlet.core"
    local seconds, now = core.seconds, 0
    local function hurry() now = now + 0.1; return now end
    core.seconds, sys.seconds = hurry, hurry -- luacheck: ignore 122
    finally(function() core.seconds, sys.seconds = seconds, seconds end) -- luacheck: ignore 122
    local ended = false
    local agent = open({ call("echo", { text = "hi" }), "Done." }, { tools = { echo_tool {
      run = function(_, ctx)
        ctx.loop:spawn(function()
          while not ended do ctx.loop:sleep(0) end
        end)
        ctx.loop:signal():wait()
      end } } })
    assert.equal("Done.", assert(agent:run("Go")).text)
    assert.equal("Error: the tool was given up after 120 s", agent.messages[3].content)
    ended = true
    agent:close()
  end)

  -- ---- hooks -----------------------------------------------------------------------------------

  it("runs what ask permits, and says what it does not", function()
    local ran, asked = 0, {}
    local careful = echo_tool { ask = true, run = function() ran = ran + 1 end }
    local answers = { { false }, { nil, "not on Sundays" }, { true } }
    local function with(i)
      return (result_of(call("echo", { text = "hi" }), { tools = { careful },
        ask = function(c, tool)
          asked[#asked + 1] = c.arguments.text .. tool.name
          return table.unpack(answers[i], 1, 2)
        end }))
    end
    assert.equal("Error: the user refused this call", with(1))
    assert.equal("Error: not on Sundays", with(2))
    assert.equal(0, ran)
    assert.equal("ok", with(3))
    assert.equal(1, ran)
    answers[4] = { "no" }
    assert.equal("Error: the user refused this call", with(4)) -- nothing but true permits
    assert.same({ "hiecho", "hiecho", "hiecho", "hiecho" }, asked)
    assert.equal("hi", (result_of(call("echo", { text = "hi" }), { tools = { echo_tool() },
      ask = function() return false end })), "a tool that does not ask")
  end)

  it("lets before_tool change, refuse or replace a call, and after_tool its result", function()
    local function with(before, after)
      return result_of(call("echo", { text = "hi" }), { tools = { echo_tool() },
        before_tool = before, after_tool = after })
    end
    local content, agent = with(function(c) c.arguments.text = "changed" end)
    assert.equal("changed", content)
    assert.equal("hi", agent.messages[2].tool_calls[1]["function"].arguments.text)
    assert.equal("Error: no", (with(function() return false, "no" end)))
    assert.equal("cached", (with(function() return { content = "cached", is_error = false } end)))
    assert.equal("hi!", (with(nil, function(_, result) result.content = result.content .. "!" end)))
    assert.equal("other", (with(nil, function() return { content = "other" } end)))
  end)

  it("shows the model what transform_context makes of the conversation", function()
    local seen
    local agent <close> = open({ "One.", "Two." }, { transform_context = function(messages)
      seen = #messages
      return { messages[#messages] }
    end })
    agent:run("First")
    local result = agent:run("Second")
    assert.equal(3, seen)
    assert.equal(4, #agent.messages)
    local alone <close> = open { "Two." }
    assert.equal(alone:run("Second").usage.prompt, result.usage.prompt)
  end)

  it("ends when the stop hook says so", function()
    local seen
    local agent <close> = open({ call("echo", { text = "hi" }), "never" },
      { tools = { echo_tool() }, stop = function(turn)
        seen = turn
        return true
      end })
    local result = assert(agent:run("Go"))
    assert.equal("hook", result.reason)
    assert.equal("hi", seen.results[1].content)
    assert.equal("echo", seen.calls[1].name)
    assert.equal("tool", agent.messages[#agent.messages].role)
  end)

  it("raises what hooks raise, with the conversation whole", function()
    for _, name in ipairs { "before_tool", "after_tool", "ask", "stop", "transform_context",
      "on" } do
      local broken = true
      local agent <close> = open({ call("echo", { text = "a" }) .. "\n"
        .. call("echo", { text = "b" }), "Done.", "Done." },
        { tools = { echo_tool { ask = true } }, [name] = function()
          if broken then error("bug in " .. name) end
          return name == "ask"
        end })
      local ok, message = pcall(agent.run, agent, "Go")
      assert.is_false(ok)
      assert.matches("bug in " .. name, message)
      broken = false
      -- Every call that is in the conversation has its result.
      local calls, results = 0, 0
      for _, m in ipairs(agent.messages) do
        calls = calls + #(m.tool_calls or {})
        results = results + (m.role == "tool" and 1 or 0)
      end
      assert.equal(calls, results, name)
      assert.is_truthy(agent:run("Again"), name)
    end
  end)

  it("takes only texts from hooks as reasons", function()
    for _, name in ipairs { "before_tool", "ask" } do
      local agent <close> = open({ call("echo", { text = "a" }), "Done." },
        { tools = { echo_tool { ask = true } }, [name] = function() return false, {} end })
      local ok, message = pcall(agent.run, agent, "Go")
      assert.is_false(ok)
      assert.matches("hook " .. name .. ": a text as reason expected", message)
    end
  end)

  it("interrupts the other calls when a hook raises", function()
    local told = false
    local waiting = { name = "wait", run = function(_, ctx)
      wait_for_cancel(ctx)
      told = true
    end }
    local agent <close> = open({ call("wait", {}) .. call("echo", { text = "a" }), "Done." },
      { tools = { waiting, echo_tool() }, after_tool = function(c)
        if c.name == "echo" then error("bug in the hook") end
      end })
    local ok, message = pcall(agent.run, agent, "Go")
    assert.is_false(ok)
    assert.matches("bug in the hook", message)
    assert.is_true(told)
    assert.equal("Error: the tool was interrupted", agent.messages[3].content)
    assert.equal("Error: a hook failed, and this call has no result", agent.messages[4].content)
    assert.equal("Done.", agent:run().text)
  end)

  it("takes only texts from hooks in the place of results", function()
    for name, bad in pairs { before_tool = { content = 7 }, after_tool = 5 } do
      local agent <close> = open({ call("echo", { text = "a" }), "Done." },
        { tools = { echo_tool() }, [name] = function() return bad end })
      local ok, message = pcall(agent.run, agent, "Go")
      assert.is_false(ok)
      assert.matches("hook " .. name .. ": a table with a text as content expected", message)
      assert.equal("tool", agent.messages[#agent.messages].role)
    end
  end)

  it("shows of one result no more than leaves room in the context", function()
    local agent <close> = open({ call("much", {}), "Done." },
      { ctx = 512, tools = { { name = "much", run = function() return ("7"):rep(90000) end } } })
    assert.equal("stop", assert(agent:run("Go")).reason)
    assert.is_true(#agent.messages[3].content < 400)
    assert.matches("left out", agent.messages[3].content)
  end)

  it("shares that room among the results of a turn", function()
    local agent <close> = open({ call("much", {}):rep(3, "\n"), "Done." },
      { ctx = 1024, tools = { { name = "much", run = function() return ("7"):rep(90000) end } } })
    assert.equal("stop", assert(agent:run("Go")).reason)
    for i = 3, 5 do
      assert.equal("tool", agent.messages[i].role)
      assert.is_true(#agent.messages[i].content < 300)
    end
  end)

  -- ---- turns and budgets -----------------------------------------------------------------------

  it("runs calls side by side and answers in their order", function()
    local log, gate = {}, nil
    local function tool(name, run, more)
      local made = { name = name, run = function(_, ctx)
        log[#log + 1] = name .. " begins"
        gate = gate or ctx.loop:signal()
        run()
        log[#log + 1] = name .. " ends"
        return name
      end }
      for key, value in pairs(more or {}) do made[key] = value end
      return made
    end
    local function waits() gate:wait() end
    local function opens() gate:notify() end
    local text = table.concat { call("first", {}), "\n", call("second", {}), "\n",
      call("alone", {}), "\n", call("last", {}) }
    local agent <close> = open({ text, "Done." }, { tools = { tool("first", waits),
      tool("second", opens), tool("alone", function() end, { parallel = false }),
      tool("last", function() end) } })
    assert.equal("stop", assert(agent:run("Go")).reason)
    assert.same({ "first begins", "second begins", "second ends", "first ends", "alone begins",
      "alone ends", "last begins", "last ends" }, log)
    local results = {}
    for _, message in ipairs(agent.messages) do
      if message.role == "tool" then results[#results + 1] = message.content end
    end
    assert.same({ "first", "second", "alone", "last" }, results)
  end)

  it("runs one call after the other when asked to", function()
    local log = {}
    local slow = { name = "slow", run = function(given, ctx)
      log[#log + 1] = given.n .. " begins"
      ctx.loop:sleep(0)
      log[#log + 1] = given.n .. " ends"
    end }
    local agent <close> = open({ call("slow", { n = "1" }) .. call("slow", { n = "2" }), "Done." },
      { tools = { slow }, parallel = false })
    assert(agent:run("Go"))
    assert.same({ "1 begins", "1 ends", "2 begins", "2 ends" }, log)
  end)

  it("runs no more calls at a time than it may", function()
    for limit, option in pairs { [16] = true, [3] = 3 } do
      local n, most = 0, 0
      local slow = { name = "slow", run = function(_, ctx)
        n = n + 1
        most = math.max(n, most)
        ctx.loop:sleep(0)
        n = n - 1
      end }
      local agent <close> = open({ call("slow", {}):rep(100), "Done." },
        { tools = { slow }, parallel = option })
      assert.equal("Done.", assert(agent:run("Go")).text)
      assert.equal(limit, most)
      assert.equal(103, #agent.messages)
    end
  end)

  it("ends after so many steps", function()
    local agent <close> = open({ call("echo", { text = "again" }) },
      { tools = { echo_tool() }, max_steps = 3 })
    local result = assert(agent:run("Go"))
    assert.equal("steps", result.reason)
    assert.equal(3, result.steps)
    assert.equal("tool", agent.messages[#agent.messages].role)
  end)

  it("ends after so many tokens, of a turn or of a run", function()
    local agent <close> = open({ ("word "):rep(50) }, { max_tokens = 5 })
    local result = assert(agent:run("Go"))
    assert.same({ "length", 5 }, { result.reason, result.usage.generated })
    local budget <close> = open({ ("word "):rep(50) }, { token_budget = 7 })
    result = assert(budget:run("Go"))
    assert.same({ "tokens", 7 }, { result.reason, result.usage.generated })
    local text = call("echo", { text = "again" })
    local n = #texts:encode(text)
    local looping <close> = open({ text }, { tools = { echo_tool() }, token_budget = 2 * n })
    result = assert(looping:run("Go"))
    assert.same({ "tokens", 2, 2 * n }, { result.reason, result.steps, result.usage.generated })
  end)

  it("ends where the context does", function()
    local agent <close> = open({ ("word "):rep(200) }, { ctx = 64 })
    assert.equal("length", assert(agent:run("Go")).reason)
    local result, message, code = agent:run("Go on")
    assert.is_nil(result)
    assert.matches("leaves no room in a context of 64", message)
    assert.equal("limit", code)
  end)

  it("asks for calls again that cannot be read", function()
    for _, cut in ipairs { "<tool_call>\n<function=echo>\n<parameter=text>\nhi",
      "<tool_call>\n<function=ec" } do
      local agent <close> = open({ cut, call("echo", { text = "hi" }), "Done." },
        { tools = { echo_tool() } })
      local result = assert(agent:run("Go"))
      assert.equal("Done.", result.text)
      assert.equal(3, result.steps)
      assert.equal("user", agent.messages[3].role)
      assert.matches("could not be read", agent.messages[3].content)
    end
  end)

  it("asks again for a call that was cut off behind whole ones", function()
    local cut = call("echo", { text = "one" }) .. "\n<tool_call>\n<function=echo>\n<parameter=te"
    for _, reason in ipairs { "stop", "length" } do
      local agent <close> = open({ { text = cut, finish_reason = reason }, "Done." },
        { tools = { echo_tool() } })
      assert.equal("Done.", assert(agent:run("Go")).text)
      assert.equal("one", agent.messages[3].content)
      assert.equal("user", agent.messages[4].role)
      assert.matches("last tool call could not be read, and it was not run",
        agent.messages[4].content)
    end
  end)

  it("does not ask again when the tokens are spent", function()
    local cut = "I look.\n<tool_call>\n<function=echo>\n<parameter=text>\nhi"
    local agent <close> = open({ cut, "Done." }, { tools = { echo_tool() },
      token_budget = #texts:encode(cut) })
    local result = assert(agent:run("Go"))
    assert.same({ "tokens", 1 }, { result.reason, result.steps })
    assert.matches("^I look", result.text)
    assert.equal("assistant", agent.messages[#agent.messages].role)
  end)

  it("reports a failing engine, and can go on", function()
    local agent <close> = open { { text = "It", finish_reason = "error", message = "no memory" },
      "Done." }
    local result, message = agent:run("Go")
    assert.is_nil(result)
    assert.equal("no memory", message)
    assert.equal(1, #agent.messages)
    assert.equal("Done.", agent:run().text)
  end)

  -- ---- cancelling ------------------------------------------------------------------------------

  it("is cancelled while the model speaks", function()
    local agent
    agent = open({ ("word "):rep(100), "Done." }, { on = function(event)
      if event.kind == "content" then agent:cancel() end
    end })
    local result = assert(agent:run("Go"))
    assert.equal("cancelled", result.reason)
    assert.is_true(result.usage.generated < 100)
    assert.equal(1, #agent.messages)
    agent:close()
  end)

  it("is cancelled while tools run, and every call has its result", function()
    local agent, stopped
    local waiting = { name = "wait", run = function(_, ctx)
      ctx.loop:spawn(function() agent:cancel() end)
      wait_for_cancel(ctx)
      stopped = ctx.is_cancelled()
    end }
    local never = { name = "never", parallel = false, run = function() error("was run") end }
    agent = open({ call("wait", {}) .. call("never", {}), "Done." }, { tools = { waiting, never } })
    assert.equal("cancelled", assert(agent:run("Go")).reason)
    assert.is_true(stopped)
    assert.equal("Error: the user interrupted the tool", agent.messages[3].content)
    assert.equal("Error: the user interrupted before this call", agent.messages[4].content)
    assert.equal("Done.", agent:run("Go on").text)
    agent:close()
  end)

  it("stops a command when it is cancelled, also one that does not want to", function()
    for _, command in ipairs { "echo $$ >pid; touch ready; exec sleep 1000",
      "trap '' TERM; echo $$ >pid; touch ready; yes" } do
      local place = workspace.new()
      local agent
      agent = open({ call("bash", { command = command }), "Done." },
        { tools = { "bash" }, cwd = place.dir })
      agent.loop:spawn(function()
        while not place.read("ready") do agent.loop:sleep(0.005) end
        agent:cancel()
      end)
      assert.equal("cancelled", assert(agent:run("Go")).reason)
      assert.is_nil(io.open("/proc/" .. place.read("pid"):match("%d+")), command)
      assert.equal("Error: the user interrupted the tool", agent.messages[3].content)
      assert.equal("Done.", agent:run("Go on").text)
      agent:close()
      place.remove()
    end
  end)

  -- ---- events as an iterator -------------------------------------------------------------------

  it("hands out events one by one", function()
    local agent <close> = open({ call("echo", { text = "hi" }), "It says hi." },
      { tools = { echo_tool() } })
    local events = {}
    for event in agent:events("Look") do events[#events + 1] = event end
    assert.same({ "tool_call", "usage", "turn", "tool_result", "content", "usage", "turn", "end" },
      kinds(events))
    assert.equal("It says hi.", events[#events].result.text)
  end)

  it("is cancelled by leaving the events early", function()
    local agent <close> = open({ ("word "):rep(100), "Done." })
    for event in agent:events("Look") do
      if event.kind == "content" then break end
    end
    assert.equal("Done.", agent:run("Again").text)
  end)

  it("tells of failures and mistakes while events are read", function()
    local agent <close> = open { { text = "It", finish_reason = "error", message = "no memory" } }
    local last
    for event in agent:events("Go") do last = event end
    assert.same({ "error", "no memory" }, { last.kind, last.message })
    local broken <close> = open({ "Hi." }, { stop = function() error("bug") end })
    assert.has_error(function()
      for event in broken:events("Go") do assert(event) end
    end)
  end)

  -- ---- sharing an engine -----------------------------------------------------------------------

  it("shares an engine with others, and can be a tool itself", function()
    local loop <close> = assert(sched.open())
    local engine = replay.open(texts, loop, assert(replay.answers {
      call("ask", { question = "Why?" }), "Because.", "It says: because." }))
    local outer, inner
    inner = assert(moonlet.agent { engine = engine })
    outer = assert(moonlet.agent { engine = engine, tools = { { name = "ask",
      run = function(given) return assert(inner:run(given.question)).text end } } })
    local result = assert(outer:run("Go"))
    assert.equal("It says: because.", result.text)
    assert.equal("Because.", outer.messages[3].content)
    assert.equal("Why?", inner.messages[1].content)
    outer:close()
    inner:close()
  end)

  -- ---- transcripts -----------------------------------------------------------------------------

  describe("with a transcript", function()
    local place
    before_each(function() place = workspace.new() end)
    after_each(function() place.remove() end)

    it("goes on where an earlier one ended", function()
      local path = place.path "talk.jsonl"
      local first <close> = open({ "I look.\n\n" .. call("echo", { text = "hi" }), "It is hi." },
        { tools = { echo_tool() }, system = "Be brief.", save = path })
      assert(first:run("Look"))
      first:close()
      local second <close> = open({ "As I said." }, { tools = { echo_tool() }, resume = path })
      assert.same(json.encode(first.messages), json.encode(second.messages))
      assert.equal("As I said.", second:run("Again").text)
      second:close()
      local third <close> = open({ "Yes." }, { tools = { echo_tool() }, resume = path })
      assert.equal(7, #third.messages)
    end)

    it("says when it goes on with another model", function()
      local path, notes = place.path "talk.jsonl", {}
      local function on(event)
        if event.kind == "note" then notes[#notes + 1] = event.text end
      end
      open({ "Hello." }, { save = path }):close()
      open({ "Hello." }, { resume = path, on = on }):close()
      assert.same({}, notes)
      local file = assert(io.open(path, "rb"))
      local text = file:read("a"):gsub("demo%-model", "other")
      file:close()
      file = assert(io.open(path, "wb"))
      file:write(text)
      file:close()
      open({ "Hello." }, { resume = path, on = on }):close()
      assert.equal(1, #notes)
      assert.matches("kept with other and goes on with demo%-model", notes[1])
    end)

    it("drops half a line, and answers calls that were not", function()
      local path = place.path "talk.jsonl"
      local first <close> = open({ call("echo", { text = "hi" }), "Done." },
        { tools = { echo_tool() }, save = path })
      assert(first:run("Look"))
      first:close()
      local lines = {}
      for line in place.read("talk.jsonl"):gmatch("[^\n]+") do lines[#lines + 1] = line end
      assert.equal(5, #lines) -- head, user, call, result, answer
      place.write("talk.jsonl", table.concat(lines, "\n", 1, 3) .. "\n" .. lines[4]:sub(1, 10))
      local second <close> = open({ "Done." }, { tools = { echo_tool() }, resume = path })
      assert.equal("tool", second.messages[3].role)
      assert.equal("Error: the tool was interrupted", second.messages[3].content)
      assert.equal("Done.", second:run().text)
    end)

    it("refuses files that are none, are there already, or are in use", function()
      local function fails(pattern, options)
        options.model, options.replay = texts, { "x" }
        local agent, message = moonlet.agent(options)
        assert.is_nil(agent)
        assert.matches(pattern, message)
      end
      place.write("other.jsonl", '{"role": "user"}\n')
      place.write("empty.jsonl", "")
      fails("other.jsonl:1: no transcript", { resume = place.path "other.jsonl" })
      fails("empty.jsonl: no transcript, not one line", { resume = place.path "empty.jsonl" })
      fails("none.jsonl", { resume = place.path "none.jsonl" })
      fails("other.jsonl", { save = place.path "other.jsonl" })
      local head = '{"moonlet_transcript": 1, "model": "x"}\n'
      local function said(more) return '{"role": "assistant", "content": "", ' .. more .. "}" end
      for _, line in ipairs { "{", "[]", "null", "", '{"role": "robot", "content": ""}',
        '{"role": "user"}', '{"role": "user", "content": 5}',
        '{"role": "tool", "content": ""}', '{"role": "tool", "content": "", "tool_call_id": null}',
        '{"role": "assistant", "content": "", "reasoning_content": 7}',
        said('"sampled": 3'), said('"sampled": {"text": "", "ids": ["a"]}'),
        said('"tool_calls": 5'), said('"tool_calls": null'), said('"tool_calls": [1]'),
        said('"tool_calls": [{"id": "a"}]'), said('"tool_calls": [{"id": "a", "function": 5}]'),
        said('"tool_calls": [{"function": {"name": "echo", "arguments": {}}}]'),
        said('"tool_calls": [{"id": 5, "function": {"name": "echo", "arguments": {}}}]'),
        said('"tool_calls": [{"id": "a", "function": {"name": "echo", "arguments": 1}}]') } do
        place.write("bad.jsonl", head .. line .. "\n")
        fails("bad.jsonl:2: ", { resume = place.path "bad.jsonl" })
        place.write("bad.jsonl", head .. '{"role": "user", "content": "Hi"}\n')
        open({ "x" }, { resume = place.path "bad.jsonl" }):close() -- nobody holds it
      end
      place.write("bad.jsonl", '{"moonlet_transcript": 2}\n')
      fails("another version", { resume = place.path "bad.jsonl" })
      local user <close> = open({ "x" }, { save = place.path "used.jsonl" })
      assert(user:run("Go"))
      fails("another process is writing it", { resume = place.path "used.jsonl" })
    end)

    it("takes no tokens that do not spell their turn, such as another model's", function()
      local first <close> = open({ "It is hi." }, { save = place.path "talk.jsonl" })
      assert(first:run("Look"))
      first:close()
      local function prompt_with(ids)
        local text, n = place.read("talk.jsonl"):gsub('"ids": ?%b[]', '"ids": ' .. ids)
        assert.equal(1, n)
        place.write("other.jsonl", text)
        local second <close> = open({ "As I said." }, { resume = place.path "other.jsonl" })
        return assert(second:run("Again")).usage.prompt
      end
      for _, ids in ipairs { "[1, 2, 3]", "[-1]", "[99999999]" } do
        assert.equal(prompt_with "[]", prompt_with(ids), ids)
      end
    end)
  end)

  -- ---- misuse ----------------------------------------------------------------------------------

  it("raises what the caller got wrong", function()
    local function raises(pattern, options)
      local ok, message = pcall(function()
        local agent = moonlet.agent(options)
        return agent
      end)
      assert.is_false(ok)
      assert.matches("^spec/agent_spec.lua:%d+: ", message)
      assert.matches(pattern, message)
    end
    raises("one of the options model, session and engine", {})
    raises("unknown option 'modle'", { modle = DIR })
    raises("goes with model", { engine = {}, replay = {} })
    raises("one of the options save and resume", { model = texts, save = "a", resume = "b" })
    raises("has its own", { model = texts, system = "a", resume = "b" })
    raises("max_steps': 1 or more", { model = texts, max_steps = 0 })
    raises("parallel': 1 or more", { model = texts, parallel = 0 })
    raises("parallel': boolean or integer expected, got string", { model = texts, parallel = "x" })
    raises("tool 1: a name, or a table", { model = texts, replay = { "x" }, tools = { {} } })
    raises("two of the name 'echo'", { model = texts, replay = { "x" },
      tools = { echo_tool(), echo_tool() } })
    local agent = open { "x" }
    assert.has_error(function() agent:run(3) end)
    assert.has_error(function() agent:run("\xFF") end)
    agent:close()
    agent:close()
    assert.has_error(function() agent:run("Go") end)
  end)

  it("is not opened where something is missing", function()
    local agent, message = moonlet.agent { model = texts, replay = { "x" }, tools = { "fly" } }
    assert.is_nil(agent)
    assert.matches("there is no tool 'fly'", message)
    agent, message = moonlet.agent { model = texts, replay = {} }
    assert.is_nil(agent)
    assert.matches("without answers", message)
    agent, message = moonlet.agent { model = "no/such/dir" }
    assert.is_nil(agent)
    assert.matches("no/such/dir", message)
  end)
end)
