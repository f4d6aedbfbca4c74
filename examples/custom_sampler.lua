-- Stages of a sampling policy are native (named) or Lua functions, freely mixed. This policy is
-- greedy while the model is sure and samples when it is not.
local moonlet = require "moonlet"

local model <close> = assert(moonlet.open(arg[1] or "examples/demo-model"))
local session <close> = assert(model:session { ctx = 2048 })
assert(session:sync(model:encode("Once upon a time")))

local policy = moonlet.sampler {
  { "temperature", 0.9 },
  { "top_k", 40 },
  function(candidates)
    if candidates:p(1) > 0.6 then candidates:keep(1) end
  end,
  seed = 7,
}
for tok in session:generate { sampler = policy, max_tokens = 80 } do
  io.write(tok.text)
end
print()
