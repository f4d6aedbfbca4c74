-- A recipe is a function: tensor description in, decision out. This one gives the routed experts
-- three bits, everything else that the format can hold eight, and prints the price.
local moonlet = require "moonlet"

local function recipe(tensor)
  if tensor.class:find("^expert_") then return { mode = "affine", bits = 3, group = 64 } end
  if tensor.matrix then return { mode = "affine", bits = 8, group = 64 } end
  return { keep = "bf16" }
end

local plan = assert(moonlet.plan(recipe, arg[1] or "examples/demo-model"))
print(("%.3f bits per weight, %.1f MB"):format(plan.bits_per_weight, plan.total_bytes / 1e6))
