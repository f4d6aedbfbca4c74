-- Dialogues of ten turns with a server that computes, and how much of them it evaluated.

local client = require "spec.support.client"
local json = require "moonlet.json"
local served = require "spec.support.served"

local dialogue = {}

local TURNS <const> = 10

-- A call that no template would spell so, nor a client send back so.
dialogue.CALL = "Well.\n\n\n<tool_call>\n<function=weather>\n<parameter=city>Paris</parameter>\n"
  .. "<parameter=days>\n3.0\n</parameter>\n</function>\n</tool_call>"

-- Plays it: each answer is sampled as `said`. Of the dialect: its path, a body that has what was
-- said so far, and hear(reply, i), which adds the answer and what comes after it and tells its
-- usage { prompt, cached, completion }.
local function play(model, said, options, dialect)
  local o = { ctx = 2048 }
  for name, value in pairs(options or {}) do o[name] = value end
  local server <close> = served.forced(model, { said }, o)
  local usages = {}
  for i = 1, TURNS do
    local reply = client.ask(server, "POST", dialect.path, dialect.body)
    assert(reply.status == 200, reply.body)
    usages[i] = dialect.hear(assert(json.decode(reply.body)), i)
  end
  return usages
end

-- Whether in each turn all that was evaluated and sampled before was found again, and how many
-- tokens at most were evaluated anew.
function dialogue.play(model, said, options, dialect)
  local usages, all_found, most_new = play(model, said, options, dialect), true, 0
  for i = 2, TURNS do
    local before = usages[i - 1].prompt + usages[i - 1].completion
    if usages[i].cached ~= before then all_found = false end
    most_new = math.max(most_new, usages[i].prompt - usages[i].cached)
  end
  return all_found, most_new
end

return dialogue
