--- The command line: parsing, dispatch, exit codes.
-- 0 success, 1 the work failed, 2 misuse. One line on stderr says what is wrong.
local argparse = require "argparse"
local output = require "moonlet.cli.output"
local sys = require "moonlet.sys"

local cli = {}

local COMMANDS <const> = { "inspect", "plan", "quantize", "tokenize", "render", "forward",
  "generate", "chat", "agent", "serve", "eval", "imatrix", "bench" }

-- What is given twice says two things, of which the last would win: refused, where an option does
-- not collect its values.
local function refuse_repeats(parser)
  local option, command = parser.option, parser.command
  function parser.option(self, ...)
    return option(self, ...):overwrite(false)
  end
  function parser.command(self, ...)
    return refuse_repeats(command(self, ...))
  end
  return parser
end

local function build_parser()
  local parser = refuse_repeats(argparse("moonlet",
    "Run and quantize Qwen3.5 / Qwen3.6 models."))
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
  return (message:gsub("^[^\n:]*%.lua:%d+: ", ""))
end

-- argparse takes every word with a dash for an option. Behind an option, a number or a text with
-- blanks ("-1", "- one\n- two") is its value, as getopt has it.
local function join_values(argv)
  local joined, i = {}, 1
  while argv[i] do
    local word, value = argv[i], argv[i + 1] or ""
    local is_value = value:find("^%-[^%-%a]") or value:find("^%-.*%s")
    if is_value and word:find("^%-%-%a[%w-]*$") then
      word, i = word .. "=" .. value, i + 1
    elseif is_value and word:find("^%-%a$") then
      word, i = word .. value, i + 1
    end
    joined[#joined + 1] = word
    i = i + 1
  end
  return joined
end

-- What the parser says, in one line.
local function complain_usage(argv, message)
  local command = "moonlet"
  for _, name in ipairs(COMMANDS) do
    if argv[1] == name then command = "moonlet " .. name end
  end
  for _, measure in ipairs { "ppl", "kld", "report" } do
    if argv[1] == "eval" and argv[2] == measure then command = command .. " " .. measure end
  end
  complain(("%s (try: %s --help)"):format(message:gsub("%s*\n", "; "), command))
end

---Runs one command.
---@param argv string[]
---@return integer exit_code
function cli.main(argv)
  sys.catch_interrupt()
  local parser = build_parser()
  local ok, args = parser:pparse(join_values(argv))
  if not ok then
    complain_usage(argv, args)
    return 2
  end
  io.stdout:setvbuf("full")
  args.argv = argv
  local ran, done, message, code = pcall(require("moonlet.cli." .. args.command).run, args)
  if not ran and type(done) == "table" and done.misuse then
    complain_usage(argv, done.misuse)
    return 2
  end
  if not ran then
    complain(first_line(done))
    return 1
  end
  local flushed, problem = io.stdout:flush()
  if not done then
    output.end_progress()
    if code == "cancelled" and not message:find("^interrupted") then message = "interrupted" end
    complain(first_line(message))
    return 1
  end
  if not flushed then complain("standard output: " .. problem) end
  return flushed and 0 or 1
end

return cli
