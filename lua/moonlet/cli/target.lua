--- --target of plan and quantize: options of a recipe that bring it to a size.
local output = require "moonlet.cli.output"

local target = {}

---Options of both commands.
function target.define(command)
  command:option("--target", "size to keep to, 15.7GB, 14.6GiB or 3.6bpw; recipes moonlet and "
    .. "budget"):argname("SIZE"):convert(output.some_text("--target"))
  command:option("--sensitivity", "what an error does in recipe budget: error (by experience, "
    .. "default) or kld (measured)"):choices { "error", "kld" }
  command:option("--by", "parts that --sensitivity kld measures"):choices { "class", "tensor" }
  command:option("--chat", "dialogues for --sensitivity kld"):argname("DIALOGUES.jsonl")
  command:option("--dialogues", "only dialogues A to B"):argname("A-B")
    :convert(output.range("--dialogues"))
  command:option("--file", "text for --sensitivity kld"):argname("TEXT")
end

local function check(args, options)
  for _, name in ipairs { "level", "choice" } do
    if args.target and options[name] ~= nil then
      output.misuse(("--set %s is what --target finds out: give one of them"):format(name))
    end
  end
  if not args.target then
    for _, name in ipairs { "sensitivity", "by", "chat", "dialogues", "file" } do
      if args[name] then output.misuse(("--%s goes with --target"):format(name)) end
    end
    return
  end
  local measured = args.sensitivity == "kld"
  if measured and args.recipe ~= "budget" then
    output.misuse("--sensitivity kld goes with --recipe budget")
  end
  if measured and (args.file == nil) == (args.chat == nil) then
    output.misuse("--sensitivity kld needs one of --file and --chat")
  end
  if not measured and (args.by or args.chat or args.file or args.dialogues) then
    output.misuse("--by, --chat, --dialogues and --file go with --sensitivity kld")
  end
end

local function solve(args, source, options, model)
  return require("moonlet").budget.solve { source = source, target = args.target,
    sensitivity = args.sensitivity, by = args.by, mtp = options.mtp, model = model,
    chat = args.chat, dialogues = args.dialogues, file = args.file,
    on_progress = output.progress(args, "measuring", "tokens") }
end

---Adds to a recipe's options what brings it to --target.
---@param args table
---@param source string directory or config.json
---@param options table of the recipe; changed
---@return boolean? ok
---@return table|string|nil frontier_or_message  of recipe budget
---@return string? code
function target.apply(args, source, options)
  check(args, options)
  if not args.target then return true end
  local moonlet = require "moonlet"
  local goal, problem = moonlet.target.parse(args.target)
  if not goal then output.misuse("--target: " .. problem) end
  if args.recipe ~= "budget" then
    local found, message, code = moonlet.target.level(args.recipe, source, goal, options)
    if not found then return nil, message, code end
    options.level = found.level
    return true
  end
  local model, solved, message, code
  if args.sensitivity == "kld" then
    model, message, code = moonlet.open(source, { threads = args.threads, precision = "exact" })
    if not model then return nil, message, code end
  end
  solved, message, code = solve(args, source, options, model)
  if model then model:close() end
  if not solved then return nil, message, code end
  options.choice = solved.options.choice
  return true, solved.frontier
end

return target
