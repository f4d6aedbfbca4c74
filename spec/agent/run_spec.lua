-- Turns, budgets, ends and events of runs, by scripts.

local moonlet = require "moonlet"
local prompt = require "moonlet.prompt"
local replay = require "moonlet.replay"
local call = require("spec.support.said").call
local sched = require "moonlet.sched"
local scripted = require "spec.support.scripted"
local workspace = require "spec.support.workspace"

local echo_tool = scripted.echo_tool
local kinds = scripted.kinds
local open = scripted.open
local wait_for_cancel = scripted.wait_for_cancel

describe("an agent", function()
  setup(scripted.begin)
  teardown(scripted.finish)

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
    local n = #scripted.model:encode(text)
    local looping <close> = open({ text }, { tools = { echo_tool() }, token_budget = 2 * n })
    result = assert(looping:run("Go"))
    assert.same({ "tokens", 2, 2 * n }, { result.reason, result.steps, result.usage.generated })
  end)

  it("ends where the context does", function()
    local agent <close> = open({ ("word "):rep(200) }, { ctx = 64 })
    assert.equal("context", assert(agent:run("Go")).reason)
    local result, message, code = agent:run("Go on")
    assert.is_nil(result)
    assert.matches("leaves no room in a context of 64", message)
    assert.equal("limit", code)
  end)

  it("asks for calls again that cannot be read", function()
    for _, cut in ipairs { "<tool_call>\n<function=echo>\n<parameter=text>\nhi",
      "<tool_call>\n<function=ec", '<tool_call>\n{"name": "echo", "arguments": {"text": }}',
      "I look.\n<tool_call>\necho hi\n</tool_call>\n" } do
      local results = {}
      local agent <close> = open({ cut, call("echo", { text = "hi" }), "Done." },
        { tools = { echo_tool() }, on = function(event)
          if event.kind == "tool_result" then results[#results + 1] = event.is_error end
        end })
      local result = assert(agent:run("Go"))
      assert.equal("Done.", result.text)
      assert.equal(3, result.steps)
      assert.same({ true, false }, results)
      assert.equal("tool", agent.messages[3].role)
      assert.matches("^Error: .*could not be read", agent.messages[3].content)
    end
  end)

  it("takes a text about calls for an answer", function()
    for _, text in ipairs { "Write <tool_call> in front, </tool_call> behind.", "</tool_call>" } do
      local agent <close> = open { text }
      assert.same({ "stop", 1 }, { assert(agent:run("Go")).reason, 1 })
      assert.equal(2, #agent.messages)
    end
  end)

  it("keeps the thoughts of a turn whose call could not be read", function()
    local agent <close> = open({ "Hm.\n</think>\n\n<tool_call>\n<function=ec",
      "</think>\n\nDone." }, { tools = { echo_tool() }, template = { enable_thinking = true } })
    assert(agent:run("Go"))
    local p = assert(prompt.new(scripted.model):make(agent.messages, agent.variables))
    assert.matches("<think>\nHm.\n</think>", p.text, 1, true)
  end)

  it("asks again for a call that was cut off behind whole ones", function()
    local cut = call("echo", { text = "one" }) .. "\n<tool_call>\n<function=echo>\n<parameter=te"
    for _, reason in ipairs { "stop", "length" } do
      local agent <close> = open({ { text = cut, finish_reason = reason }, "Done." },
        { tools = { echo_tool() } })
      assert.equal("Done.", assert(agent:run("Go")).text)
      assert.equal("one", agent.messages[3].content)
      assert.equal("tool", agent.messages[4].role)
      assert.matches("last tool call could not be read, and it was not run",
        agent.messages[4].content)
    end
  end)

  it("does not ask again when the tokens are spent", function()
    local cut = "I look.\n<tool_call>\n<function=echo>\n<parameter=text>\nhi"
    local agent <close> = open({ cut, "Done." }, { tools = { echo_tool() },
      token_budget = #scripted.model:encode(cut) })
    local result = assert(agent:run("Go"))
    assert.same({ "tokens", 1 }, { result.reason, result.steps })
    assert.matches("^I look", result.text)
    assert.equal("assistant", agent.messages[#agent.messages].role)
  end)

  it("reports a failing engine, and can go on", function()
    local agent <close> = open { { text = "It", finish_reason = "error", message = "no memory" },
      "Done." }
    local result, message, code = agent:run("Go")
    assert.is_nil(result)
    assert.equal("no memory", message)
    assert.equal("io", code)
    assert.equal(1, #agent.messages)
    assert.equal("Done.", agent:run().text)
  end)

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

  it("ends when it is closed from within", function()
    local function closed_by(how, tool, on)
      local agent
      agent = open({ call("echo", { text = "hi" }), "Done." }, {
        tools = { echo_tool { run = tool } }, on = on and function() agent:close() end })
      assert.same({ n = 3, nil, "the agent was closed", "cancelled" },
        table.pack(agent:run("Go")), how)
      assert.has_error(function() agent:run("Go on") end, "closed agent")
      agent:close()
    end
    closed_by("at once", function(_, ctx) ctx.agent:close() end)
    closed_by("and waits", function(_, ctx)
      ctx.agent:close()
      wait_for_cancel(ctx)
    end)
    closed_by("an event", nil, true)
    local agent = open { ("word "):rep(100) }
    assert.has_error(function()
      for event in agent:events("Go") do
        assert(event)
        agent:close()
      end
    end, "closed agent")
  end)

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

  it("shares an engine with others, and can be a tool itself", function()
    local loop <close> = assert(sched.open())
    local engine = replay.open(scripted.model, loop, assert(replay.answers {
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
end)
