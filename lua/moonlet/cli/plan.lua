--- moonlet plan: what a recipe would do, and what it would weigh, without reading weights.
local json = require "moonlet.json"
local output = require "moonlet.cli.output"
local render = require "moonlet.cli.render"
local target = require "moonlet.cli.target"

local plan = {}

-- Bits of a format are whole; means of a mixture are not, and have an option of their own.
local function bits(text)
  local n, message = output.integer("--bits", 1)(text)
  if not output.fraction(text) then return n, message end
  return nil, ("%s; --target %sbpw aims at a mean"):format(message, text)
end

---Options that recipes take.
function plan.base_options(command)
  command:option("--bits", "base bits, if the recipe takes them"):argname("N"):convert(bits)
  command:option("--group", "group size, if the recipe takes it"):argname("N")
    :convert(output.integer("--group", 1))
  command:flag("--mxfp", "promote 4- and 8-bit decisions to mxfp4 and mxfp8, if the recipe can")
  command:option("--mode", "base mode, if the recipe takes it"):argname("MODE")
    :convert(output.some_text("--mode"))
  command:option("--set", "any option of the recipe; the value is JSON or else text; may be "
    .. "repeated")
    :argname("NAME=VALUE"):count("*"):target("sets")
end

---A recipe and its options, shared with quantize.
function plan.recipe_options(command)
  command:option("--recipe", "a published recipe (`plan --recipe help` lists them) or a file.lua")
    :argname("NAME"):count(1):convert(output.some_text("--recipe"))
  plan.base_options(command)
end

---@return table options of the recipe
function plan.options(args)
  local options = render.assignments(args.sets)
  for _, name in ipairs { "bits", "group", "mxfp", "mode" } do
    if args[name] ~= nil and options[name] ~= nil then
      output.misuse(("give one of --%s and --set %s"):format(name, name))
    end
    if options[name] == nil then options[name] = args[name] end
  end
  for name, value in pairs(options) do
    if value == json.null or json.is_object(value) then
      output.misuse(("--set %s: a value or a list of values expected"):format(name))
    end
  end
  return options
end

function plan.define(parser)
  local command = parser:command("plan", "Price a recipe: every decision and its size.")
  command:argument("dir", "checkpoint directory or config.json (default: the demo model)")
    :args("?")
  plan.recipe_options(command)
  target.define(command)
  command:option("--imatrix", "what the inputs of matrices look like, for recipe budget; several "
    .. "are added up")
    :argname("FILE"):count("*"):convert(output.some_text("--imatrix"))
  output.threads_option(command)
  output.progress_option(command)
  command:flag("--json", "print one JSON object")
end

local function list_recipes(args)
  local list, message, code = require("moonlet").recipe.list()
  if not list then return nil, message, code end
  if args.json then
    for i, r in ipairs(list) do
      list[i] = json.object({ name = r.name, summary = r.summary }, { "name", "summary" })
    end
    output.print_json(json.array(list))
  else
    for _, r in ipairs(list) do output.line(("%-20s %s"):format(r.name, r.summary)) end
    output.line("(the options of a recipe are at the top of its file; see docs/recipes.md)")
  end
  return true
end

-- The options of the recipe, brought to --target, and the frontier, if that is what was looked at.
local function options_of(args, source)
  local options = plan.options(args)
  local given = target.given(args, options)
  local measures = args.target and args.recipe == "budget"
  if #args.imatrix > 0 and not measures then
    output.misuse("--imatrix goes with --target and --recipe budget")
  end
  if not args.target then return options end
  given.source, given.recipe, given.threads = source, args.recipe, args.threads
  given.imatrix = #args.imatrix > 0 and args.imatrix or nil
  given.on_progress = target.progress(args)
  return require("moonlet").budget.options(given)
end

function plan.run(args)
  if args.recipe == "help" then return list_recipes(args) end
  local source = output.dir(args.dir)
  local options, frontier, code = options_of(args, source)
  if not options then return nil, frontier, code end
  local result, message
  result, message, code = require("moonlet").plan(args.recipe, source, options)
  if not result then return nil, message, code end
  if args.json then
    result.frontier = frontier
    output.print_json(result)
  else
    output.write(result:text())
    if frontier then output.write("\n" .. require("moonlet").budget.frontier_text(frontier)) end
  end
  return true
end

return plan
