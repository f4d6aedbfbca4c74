--- --target of plan and quantize: options of a recipe that bring it to a size.
local output = require "moonlet.cli.output"

local target = {}

---Options of both commands.
function target.define(command)
  command:option("--target", "size to keep to, 15.7GB, 14.6GiB or 3.6bpw; recipes moonlet and "
    .. "budget"):argname("SIZE"):convert(output.some_text("--target"))
  command:option("--sensitivity", "what an error of a class does in recipe budget: error (by "
    .. "experience, default) or kld (measured)"):choices { "error", "kld" }
  command:option("--by", "parts that --sensitivity kld measures"):choices { "class", "tensor" }
  command:option("--chat", "dialogues for --sensitivity kld"):argname("DIALOGUES.jsonl")
    :convert(output.some_text("--chat"))
  command:option("--dialogues", "only dialogues A to B"):argname("A-B")
    :convert(output.range("--dialogues"))
  command:option("--file", "text for --sensitivity kld"):argname("TEXT")
    :convert(output.some_text("--file"))
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
  local goal, problem = require("moonlet").target.parse(args.target)
  if not goal then output.misuse("--target: " .. problem) end
  local measured = args.sensitivity == "kld"
  if measured and args.recipe ~= "budget" then
    output.misuse("--sensitivity kld goes with --recipe budget")
  end
  if measured and (args.file == nil) == (args.chat == nil) then
    output.misuse("--sensitivity kld needs one of --file and --chat")
  end
  if measured and args.dialogues and not args.chat then
    output.misuse("--dialogues belongs to --chat")
  end
  if not measured and (args.by or args.chat or args.file or args.dialogues) then
    output.misuse("--by, --chat, --dialogues and --file go with --sensitivity kld")
  end
end

---Options of moonlet.quantize and moonlet.budget.options by what was given, once that is checked.
---@param args table
---@param options table of the recipe
---@return table
function target.given(args, options)
  check(args, options)
  return { target = args.target, sensitivity = args.sensitivity, by = args.by, chat = args.chat,
    dialogues = args.dialogues, file = args.file, recipe_options = options }
end

---A function (done, total, stage) that shows how far measuring is; nil when nobody watches.
function target.progress(args)
  local lines = { kld = output.progress(args, "measuring", "tokens"),
    errors = output.progress(args, "measuring errors") }
  return lines.kld and function(done, total, stage) return lines[stage](done, total) end
end

return target
