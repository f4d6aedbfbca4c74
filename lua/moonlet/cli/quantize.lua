--- moonlet quantize: write a checkpoint by a recipe.
local json = require "moonlet.json"
local output = require "moonlet.cli.output"
local plan = require "moonlet.cli.plan"
local recipe = require "moonlet.recipe"
local target = require "moonlet.cli.target"

local quantize = {}

function quantize.define(parser)
  local command = parser:command("quantize", "Write a quantized checkpoint.")
    :usage("Usage: moonlet quantize [DIR] OUT --recipe NAME [options]")
  command:argument("OUT", "DIR (default: the demo model) and OUT, a directory to create")
    :args("1-2"):argname { "[DIR]", "OUT" }:target("places")
  plan.recipe_options(command)
  target.define(command)
  command:flag("--resume", "go on where a run that was cut off had stopped")
  command:option("--format", "checkpoint format"):choices { "mlx", "compressed-tensors", "bf16" }
    :default("mlx")
  command:flag("--dry-run", "check everything, show the plan, estimate the time, write nothing")
  command:option("--fit", "how scales are chosen where the recipe does not say")
    :choices(recipe.FITS)
  command:option("--imatrix", "what the inputs of matrices look like; several are added up")
    :argname("FILE"):count("*"):convert(output.some_text("--imatrix"))
  command:option("--awq", "scales to fold into columns (needs --imatrix)")
    :choices(recipe.AWQ)
  command:option("--hessians", "encode with error feedback, by a file of 'moonlet imatrix "
    .. "--hessians'"):argname("F"):convert(output.some_text("--hessians"))
  output.threads_option(command)
  output.progress_option(command)
  command:flag("--json", "print one JSON object")
end

-- The command as a shell takes it.
local function command_line(argv)
  local words = { "moonlet" }
  for i, word in ipairs(argv) do
    local plain = word:find("^[%w%%+,%-./:=@_]+$")
    words[i + 1] = plain and word or "'" .. word:gsub("'", "'\\''") .. "'"
  end
  return table.concat(words, " ")
end

local function report(out, result)
  local dry = result.dry_run
  if dry then
    output.write(result:text())
    output.line(("%s: %s to write (%s free), about %s of work if the disk keeps up; dry run")
      :format(out, output.bytes(dry.needed_bytes), output.bytes(dry.free_bytes),
        output.duration(dry.seconds)))
  else
    output.line(("%s: %s, %.3f bits per weight"):format(out, output.bytes(result.total_bytes),
      result.bits_per_weight))
  end
  for _, note in ipairs(result.notes) do output.line("note: " .. note) end
  if result.frontier then
    output.write(require("moonlet").budget.frontier_text(result.frontier))
  end
end

-- Measuring, looking for scales, if that is asked for, and writing have a line each.
local function progress(args)
  local write = output.progress(args, "quantizing", "bytes")
  local fold, measure = output.progress(args, "looking for scales"), target.progress(args)
  return write and function(done, total, _, stage)
    if stage == "awq" then return fold(done, total) end
    return (stage and measure or write)(done, total, stage)
  end
end

local function check(args, out)
  if out == "" then output.misuse("OUT must not be empty") end
  if #args.imatrix > 0 then return end
  if args.awq and args.awq ~= "off" then output.misuse("--awq needs --imatrix") end
  if args.fit == "imatrix" then output.misuse("--fit imatrix needs --imatrix") end
end

function quantize.run(args)
  local out = args.places[#args.places]
  check(args, out)
  local source = output.dir(#args.places == 2 and args.places[1] or nil)
  local options = target.given(args, plan.options(args))
  options.source, options.out = source, out
  options.recipe, options.format, options.threads = args.recipe, args.format, args.threads
  options.resume, options.command = args.resume, command_line(args.argv)
  options.dry_run, options.fit, options.hessians = args.dry_run, args.fit, args.hessians
  options.imatrix, options.awq = #args.imatrix > 0 and args.imatrix or nil, args.awq
  options.on_progress = progress(args)
  local result, message, code = require("moonlet").quantize(options)
  if not result then return nil, message, code end
  if args.json then
    output.print_json(json.object(result))
  else
    report(out, result)
  end
  return true
end

return quantize
