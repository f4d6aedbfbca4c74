-- An agent's hooks.

local call = require("spec.support.said").call
local scripted = require "spec.support.scripted"

local echo_tool = scripted.echo_tool
local open = scripted.open
local result_of = scripted.result_of
local wait_for_cancel = scripted.wait_for_cancel

describe("an agent", function()
  setup(scripted.begin)
  teardown(scripted.finish)

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
    -- what does not run need not fit
    assert.equal("Error: no", (with(function(c) c.arguments.text = nil; return false, "no" end)))
    assert.equal("cached", (with(function() return { content = "cached", is_error = false } end)))
    assert.equal("hi!", (with(nil, function(_, result) result.content = result.content .. "!" end)))
    assert.equal("other", (with(nil, function() return { content = "other" } end)))
    local function broken() return { content = "a\xFFb" } end
    assert.equal("a\u{FFFD}b", (with(broken)))
    assert.equal("a\u{FFFD}b", (with(nil, broken)))
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

  it("names the hook whose answer cannot be used, in one line", function()
    local function fails(expected, given)
      given.tools = { echo_tool { ask = true } }
      local said = call("echo", { text = "a" })
      local agent <close> = open({ said, said }, given)
      local ok, message = pcall(agent.run, agent, "Go")
      assert.is_false(ok)
      assert.equal("hook " .. expected, message)
      local events_ok, again = pcall(function() for _ in agent:events("Go") do end end)
      assert.same({ false, message }, { events_ok, again })
    end
    local function answers(...)
      local answer = table.pack(...)
      return function() return table.unpack(answer, 1, answer.n) end
    end
    fails("transform_context: a list of messages expected, got integer",
      { transform_context = answers(5) })
    fails("transform_context: a list of messages expected, got table",
      { transform_context = answers { role = "user", content = "x" } })
    fails("transform_context: messages: at least one message expected",
      { transform_context = answers {} })
    fails("transform_context: messages[0]: an object expected",
      { transform_context = answers { 5 } })
    fails("before_tool: a table with a text as content expected, got integer",
      { before_tool = answers(5) })
    fails("before_tool: a table with a text as content expected, got table",
      { before_tool = answers { content = 3 } })
    fails("before_tool: a text as reason expected, got table",
      { before_tool = answers(false, {}) })
    fails("before_tool: a table of JSON values as arguments expected, got nil",
      { before_tool = function(c) c.arguments = nil end })
    fails("before_tool: a table of JSON values as arguments expected, got table",
      { before_tool = function(c) c.arguments = { text = print } end })
    fails("ask: a table of JSON values as arguments expected, got table",
      { ask = function(c) c.arguments.text = 0 / 0; return true end })
    for _, name in ipairs { "before_tool", "ask" } do
      local function with(change)
        return { [name] = function(c)
          change(c.arguments)
          return true
        end }
      end
      fails(name .. ": arguments.n: integer expected, got \"many\"",
        with(function(a) a.n = "many" end))
      fails(name .. ": arguments.text: is missing", with(function(a) a.text = nil end))
    end
    fails("ask: a text as reason expected, got boolean", { ask = answers(false, true) })
    fails("after_tool: a table with a text as content expected, got table",
      { ask = answers(true), after_tool = function(_, result) result.content = nil end })
    for got, answer in pairs { integer = 5, string = "x", table = {}, ["function"] = print } do
      fails("stop: true or false expected, got " .. got, { stop = answers(answer) })
    end
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
end)
