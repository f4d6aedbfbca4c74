-- Ask the demo model a question and stream the answer.
local moonlet = require "moonlet"

local model <close> = assert(moonlet.open(arg[1] or "examples/demo-model"))
local session <close> = assert(model:session { ctx = 2048 })
local question = { { role = "user", content = "What is the capital of France?" } }
assert(session:sync(model:encode(model:render(question))))
for tok in session:generate { temperature = 0, max_tokens = 60 } do
  io.write(tok.text)
end
print()
