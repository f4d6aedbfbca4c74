--- moonlet chat: a conversation on the terminal.
local generate = require "moonlet.cli.generate"
local json = require "moonlet.json"
local output = require "moonlet.cli.output"
local render = require "moonlet.cli.render"
local sys = require "moonlet.sys"

local chat = {}

function chat.define(parser)
  local command = parser:command("chat", "Talk to a model.")
  output.dir_argument(command)
  command:option("--system", "system message"):argname("TEXT")
  command:option("--set", "give the template a variable; the value is JSON or else text")
    :argname("NAME=VALUE"):count("*"):target("sets")
  generate.sampling_options(command)
end

-- The next line from the user; nil at the end and after an interrupt. lua-readline is of no use
-- here: it goes on waiting after an interrupt (rlwrap adds editing from outside).
local function read_line(terminal)
  if terminal then output.write("> ") end
  output.flush()
  return sys.wait_input(0) and io.read("l") or nil
end

-- One answer to the conversation so far.
local function answer(model, session, messages, variables, options)
  local text, message, code = model:render(messages, variables)
  if not text then return nil, message, code end
  local ids, reused, result
  ids, message, code = model:encode(text)
  if not ids then return nil, message, code end
  reused, message, code = session:sync(ids)
  if not reused then return nil, message, code end
  result, message, code = require("moonlet.generate").collect(session, options)
  output.line("")
  if not result then return nil, message, code end
  if result.finish_reason == "cancelled" then return nil, "interrupted", "cancelled" end
  return result.text
end

local COMMANDS <const> = "/reset starts over, /quit ends"

-- A failure ends a conversation that is read from a file; at a terminal the user may go on.
local function converse(model, session, args, variables)
  local terminal = sys.isatty(0)
  local options = generate.sampling(args)
  options.on_token = output.stream
  local function fresh()
    return json.array { args.system and { role = "system", content = args.system } }
  end
  local messages = fresh()
  if terminal then output.line(COMMANDS) end
  io.stdin:setvbuf("no") -- wait_input does not see what a buffer holds
  for line in read_line, terminal do
    if line == "/quit" then return true end
    if line == "/reset" then
      messages = fresh()
    elseif line:find("^/%a*$") then
      output.line(COMMANDS)
    elseif line:find("%S") then
      messages[#messages + 1] = { role = "user", content = line }
      local text, message, code = answer(model, session, messages, variables, options)
      if text then
        messages[#messages + 1] = { role = "assistant", content = text }
      elseif terminal then
        messages[#messages] = nil
        sys.catch_interrupt()
        output.line(("(%s; the last message is forgotten)"):format(message))
      else
        return nil, message, code
      end
    end
  end
  if sys.interrupted() then return nil, "interrupted", "cancelled" end
  return true
end

function chat.run(args)
  local variables = render.variables(args.sets)
  local model <close>, message, code = output.open_model(args)
  if not model then return nil, message, code end
  if not model.tokenizer or not model.template then
    return nil, model.dir .. " has no tokenizer or no chat template", "unsupported"
  end
  local session <close>, why, kind = model:session { ctx = args.ctx, kv = args.kv }
  if not session then return nil, why, kind end
  return converse(model, session, args, variables)
end

return chat
