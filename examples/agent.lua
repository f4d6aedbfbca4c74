-- An agent in one page: built-in tools in a directory, a tool of one's own, a hook, and events.
local moonlet = require "moonlet"

-- Something to work on.
local dir = os.tmpname()
os.remove(dir)
assert(os.execute("mkdir " .. dir))
local file = assert(io.open(dir .. "/ticket.txt", "w"))
file:write("The code is RED MOOSE 83.")
file:close()

local weather = {
  name = "get_weather",
  description = "Get the weather in a city.",
  parameters = { type = "object", required = { "city" },
    properties = { city = { type = "string", description = "the city" } } },
  run = function(arguments) -- a real one would ask a service, and wait with ctx.loop
    return { sky = "clear", temperature = 12 + #arguments.city }
  end,
}

local function show(event)
  if event.kind == "tool_call" then
    print("  calls " .. event.name .. " " .. moonlet.json.encode(event.arguments))
  elseif event.kind == "tool_result" then
    print("  gets  " .. event.content)
  end
end

local model <close> = assert(moonlet.open("examples/demo-model"))

local function ask(tools, text)
  local agent <close> = assert(moonlet.agent {
    model = model, ctx = 2048, generate = { temperature = 0 }, max_steps = 5,
    tools = tools, cwd = dir, on = show,
    before_tool = function(call)
      if call.name == "write" and not call.arguments.path:find("%.md$") then
        return false, "only .md files may be written"
      end
    end,
  })
  print(text)
  local result = assert(agent:run(text))
  print(("  %s  (%d turns, %d tokens evaluated, %d known)"):format(result.text, result.steps,
    result.usage.evaluated + result.usage.generated, result.usage.reused))
end

ask({ weather, "read" }, "What is the weather in Lima and in Zagreb?")
ask({ "read", "write" }, "Read ticket.txt and write its text to walnut.md.")
os.execute("cat " .. dir .. "/walnut.md; echo; rm -r " .. dir)
