--- moonlet inspect: what a checkpoint is and how it is stored.
local output = require "moonlet.cli.output"

local inspect = {}

function inspect.define(parser)
  local command = parser:command("inspect", "Say what a checkpoint holds.")
  output.dir_argument(command)
  command:flag("--json", "print one JSON object")
end

function inspect.run(args)
  local model <close>, message, code = output.open_model(args)
  if not model then return nil, message, code end
  local info
  info, message, code = model:info()
  if not info then return nil, message, code end
  if args.json then
    output.print_json(info)
    return true
  end
  print(model.dir)
  output.print_table(info)
  return true
end

return inspect
