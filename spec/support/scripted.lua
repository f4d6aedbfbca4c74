-- Agents whose model plays a script, and what they tell of.

local models = require "moonlet.model"
local moonlet = require "moonlet"

local scripted = { DIR = "examples/demo-model" }

-- For setup and teardown: the model whose texts are played.
function scripted.begin() scripted.model = assert(models.open_texts(scripted.DIR)) end
function scripted.finish() scripted.model:close() end

function scripted.open(answers, options)
  local o = { model = scripted.model, replay = answers }
  for name, value in pairs(options or {}) do o[name] = value end
  return assert(moonlet.agent(o))
end

function scripted.echo_tool(more)
  local tool = { name = "echo", parameters = { type = "object",
    properties = { text = { type = "string" }, n = { type = "integer" } },
    required = { "text" } }, run = function(given) return given.text end }
  for name, value in pairs(more or {}) do tool[name] = value end
  return tool
end

-- What the model was told about one call.
function scripted.result_of(answer, options)
  local agent <close> = scripted.open({ answer, "Done." }, options)
  local result = assert(agent:run("Go"))
  assert(result.text == "Done." and agent.messages[3].role == "tool")
  return agent.messages[3].content, agent
end

-- What a tool does that waits until it is told that nobody does.
function scripted.wait_for_cancel(ctx)
  local told = ctx.loop:signal()
  ctx.on_cancel(function() told:notify() end)
  told:wait()
end

-- Events, and the function that takes them.
function scripted.collect()
  local events = {}
  return events, function(event) events[#events + 1] = event end
end

-- Their kinds, those in a row once.
function scripted.kinds(events)
  local list = {}
  for _, event in ipairs(events) do
    if event.kind ~= list[#list] then list[#list + 1] = event.kind end
  end
  return list
end

-- A field of those of a kind.
function scripted.of_kind(events, kind, field)
  local list = {}
  for _, event in ipairs(events) do
    if event.kind == kind then list[#list + 1] = event[field] end
  end
  return list
end

return scripted
