--- moonlet plan: what a recipe would do, and what it would weigh, without reading weights.
local output = require "moonlet.cli.output"

local plan = {}

---Options that recipes take.
function plan.base_options(command)
  command:option("--bits", "base bits, if the recipe takes them"):argname("N")
    :convert(output.integer("--bits", 1))
  command:option("--group", "group size, if the recipe takes it"):argname("N")
    :convert(output.integer("--group", 1))
  command:flag("--mxfp", "promote 4- and 8-bit decisions to mxfp4 and mxfp8, if the recipe can")
  command:option("--mode", "base mode, if the recipe takes it"):argname("MODE")
end

---A recipe and its options, shared with quantize.
function plan.recipe_options(command)
  command:option("--recipe", "unsloth, uniform, keep_bf16 or a file.lua"):argname("NAME")
    :count(1):convert(output.some_text("--recipe"))
  plan.base_options(command)
end

---@return table options for moonlet.plan and moonlet.quantize
function plan.options(args)
  return { bits = args.bits, group = args.group, mxfp = args.mxfp, mode = args.mode }
end

function plan.define(parser)
  local command = parser:command("plan", "Price a recipe: every decision and its size.")
  command:argument("dir", "checkpoint directory or config.json (default: the demo model)")
    :args("?")
  plan.recipe_options(command)
  command:flag("--json", "print one JSON object")
end

function plan.run(args)
  local result, message, code = require("moonlet").plan(args.recipe, output.dir(args.dir),
    plan.options(args))
  if not result then return nil, message, code end
  if args.json then
    output.print_json(result)
  else
    output.write(result:text())
  end
  return true
end

return plan
