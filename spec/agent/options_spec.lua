-- What makes no agent.

local json = require "moonlet.json"
local moonlet = require "moonlet"
local scripted = require "spec.support.scripted"

local echo_tool = scripted.echo_tool
local open = scripted.open

describe("an agent", function()
  setup(scripted.begin)
  teardown(scripted.finish)

  it("raises what the caller got wrong", function()
    local texts = scripted.model
    local function raises(pattern, options)
      local ok, message = pcall(function()
        local agent = moonlet.agent(options)
        return agent
      end)
      assert.is_false(ok)
      assert.matches("^spec/agent/options_spec.lua:%d+: ", message)
      assert.matches(pattern, message)
    end
    raises("one of the options model, session and engine", {})
    raises("unknown option 'modle'", { modle = scripted.DIR })
    raises("goes with model", { engine = {}, replay = {} })
    raises("one of the options save and resume", { model = texts, save = "a", resume = "b" })
    raises("has its own", { model = texts, system = "a", resume = "b" })
    raises("max_steps': 1 or more", { model = texts, max_steps = 0 })
    raises("ctx': 1 or more", { model = texts, ctx = 0 })
    for _, seconds in ipairs { -1, 0, 0 / 0 } do
      raises("tool_seconds': a number above 0", { model = texts, tool_seconds = seconds })
    end
    raises("parallel': 1 or more", { model = texts, parallel = 0 })
    raises("parallel': boolean or integer expected, got string", { model = texts, parallel = "x" })
    local function refuses(pattern, ...)
      raises(pattern, { model = texts, replay = { "x" }, tools = { ... } })
    end
    refuses("tool 1: a name, or a table", 3)
    refuses("tool 1: name: a text expected, got nil$", {})
    refuses('tool 2: name: .* expected, got "a b"$', "read", echo_tool { name = "a b" })
    refuses("tool 1: name: ", echo_tool { name = "" })
    refuses("tool 1: name: ", echo_tool { name = ("x"):rep(129) })
    refuses("two of the name 'echo'", echo_tool(), echo_tool())
    refuses("two of the name 'read'", "read", echo_tool { name = "read" })
    refuses("tool 'f': run: function expected, got nil$", { name = "f" })
    refuses("tool 'echo': description: string expected", echo_tool { description = 3 })
    refuses("tool 'echo': seconds: a number above 0", echo_tool { seconds = 0 })
    local cycle = { properties = {} }
    cycle.properties.a = cycle
    for problem, parameters in pairs { ["table expected, got string"] = "object",
      ['parameters.type: one of "object" expected'] = { type = "string" },
      ["parameters: object expected"] = json.array { 1 },
      ["parameters.properties.a: object or boolean"] = { properties = { a = "string" } },
      ["parameters.required"] = { required = { 3 } },
      ["a JSON schema expected: cannot encode a function"] = { properties = { a = print } },
      ["a JSON schema expected: cannot encode .* %(a cycle%?%)$"] = cycle } do
      refuses("tool 'echo': .*" .. problem, echo_tool { parameters = parameters })
    end
    open({ "x" }, { tools = { echo_tool { parameters = { required = {} } }, "read" } }):close()
    local agent = open { "x" }
    assert.has_error(function() agent:run(3) end)
    assert.has_error(function() agent:run("\xFF") end)
    agent:close()
    agent:close()
    assert.has_error(function() agent:run("Go") end)
  end)

  it("is not opened where something is missing", function()
    local texts = scripted.model
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
