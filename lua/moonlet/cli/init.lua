--- The command line: parsing, dispatch, exit codes.
-- 0 success, 1 the work failed, 2 misuse. One line on stderr says what is wrong.
local argparse = require "argparse"
local output = require "moonlet.cli.output"
local sys = require "moonlet.sys"

local cli = {}

local COMMANDS <const> = { "inspect", "plan", "quantize", "tokenize", "render", "forward",
  "generate", "chat", "eval" }

local function build_parser()
  local parser = argparse("moonlet", "Run and quantize Qwen3.5 / Qwen3.6 models.")
    :epilog("DIR is a checkpoint directory; without it every command takes the demo model.")
  parser:command_target("command")
  parser:flag("--version", "print the version"):action(function()
    print("moonlet " .. require("moonlet")._VERSION)
    os.exit(0)
  end)
  for _, name in ipairs(COMMANDS) do require("moonlet.cli." .. name).define(parser) end
  return parser
end

local function complain(text)
  io.stderr:write("moonlet: ", text, "\n")
end

-- The text of a raised error without its position; what a library raised keeps its first line.
local function first_line(message)
  message = tostring(message):match("^[^\n]*")
  return (message:gsub("^[^%s:]*%.lua:%d+: ", ""))
end

---Runs one command.
---@param argv string[]
---@return integer exit_code
function cli.main(argv)
  local parser = build_parser()
  local ok, args = parser:pparse(argv)
  if not ok then
    complain(args)
    io.stderr:write("try: moonlet --help\n")
    return 2
  end
  sys.catch_interrupt()
  io.stdout:setvbuf("full")
  local ran, done, message, code = pcall(require("moonlet.cli." .. args.command).run, args)
  if not ran then
    if type(done) == "table" and done.misuse then
      complain(done.misuse)
      return 2
    end
    complain(first_line(done))
    return 1
  end
  if not done then
    output.end_progress()
    complain(code == "cancelled" and "interrupted" or first_line(message))
    return 1
  end
  return io.stdout:flush() and 0 or 1
end

return cli
