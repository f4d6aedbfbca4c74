-- Servers for specs: the demo model's tokenizer and template with scripted answers, or all of it.

local moonlet = require "moonlet"
local json = require "moonlet.json"
local sampler = require "moonlet.sampler"

local served = {}

served.DIR = "examples/demo-model"

-- A server that gives `answers` in turn: tables as moonlet.replay has them, or texts.
function served.replay(answers, options)
  local path = os.tmpname()
  local file = assert(io.open(path, "wb"))
  for _, answer in ipairs(answers) do
    file:write(json.encode(type(answer) == "string" and { text = answer } or answer), "\n")
  end
  file:close()
  local o = { model = served.DIR, port = 0, ctx = 4096, replay = path }
  for name, value in pairs(options or {}) do o[name] = value end
  local server = assert(moonlet.serve(o))
  os.remove(path)
  return server
end

-- A server that computes, on a model that stays open.
function served.model(model, options)
  local o = { model = model, port = 0, ctx = 1024 }
  for name, value in pairs(options or {}) do o[name] = value end
  return assert(moonlet.serve(o))
end

-- The texts of the prompts that a server makes from now on.
function served.prompts(server)
  local make, list = server.prompts.make, {}
  function server.prompts.make(...)
    local p, message, code = make(...)
    list[#list + 1] = p and p.text
    return p, message, code
  end
  return list
end

-- One that computes but samples what it is told, answer by answer, so that the engine's states are
-- those of real dialogues.
function served.forced(model, answers, options)
  local server, n = served.model(model, options), 0
  local submit = server.engine.submit
  function server.engine.submit(engine, given)
    n = n % #answers + 1
    local ids, at = model:encode(answers[n]), 1
    ids[#ids + 1] = model.stop_ids[1]
    given.options.sampler = sampler.from_options({ temperature = 0 }, { {
      apply = function(_, c)
        c:bias { [ids[at]] = 1e30 }
        c:keep(1)
      end,
      accept = function() at = at + 1 end,
    } })
    return submit(engine, given)
  end
  return server
end

return served
