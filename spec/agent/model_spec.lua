-- The demo model at its tool tasks, end to end.

local json = require "moonlet.json"
local moonlet = require "moonlet"
local scripted = require "spec.support.scripted"
local workspace = require "spec.support.workspace"

local collect = scripted.collect
local of_kind = scripted.of_kind

describe("an agent on the demo model", function()
  local model, place
  setup(function() model = assert(moonlet.open(scripted.DIR)) end)
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
