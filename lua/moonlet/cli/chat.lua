--- moonlet chat: a conversation on the terminal.
local generate = require "moonlet.cli.generate"
local json = require "moonlet.json"
local output = require "moonlet.cli.output"
local render = require "moonlet.cli.render"
local sys = require "moonlet.sys"

local chat = {}

function chat.define(parser)
  local command = parser:command("chat", "Talk to a model. /reset starts over, /quit ends.")
  output.dir_argument(command)
  command:option("--system", "system message"):argname("TEXT")
  command:option("--set", "give the template a variable; the value is JSON or else text")
    :argname("NAME=VALUE"):count("*"):target("sets")
  generate.sampling_options(command)
end

-- A line from the user: with editing where lua-readline is installed and a terminal listens.
local function line_reader()
  local found, readline = pcall(require, "readline")
  if found and sys.isatty(0) then return function() return readline.readline("> ") end end
  return function()
    if sys.isatty(0) then
      io.write("> ")
      io.flush()
    end
    return io.read("l")
  end
end

-- One answer to the conversation so far; false when it was interrupted.
local function answer(model, session, messages, variables, options)
  local text, message, code = model:render(messages, variables)
  if not text then return nil, message, code end
  local ids, reused, result
  ids, message, code = model:encode(text)
  if not ids then return nil, message, code end
  reused, message, code = session:sync(ids)
  if not reused then return nil, message, code end
  result, message, code = require("moonlet.generate").collect(session, options)
  print()
  if not result then return nil, message, code end
  return result.text
end

local function converse(model, session, args)
  local read = line_reader()
  local variables = render.variables(args.sets)
  local options = generate.sampling(args)
  options.on_token = function(tok)
    io.write(tok.text)
    io.flush()
  end
  local function fresh()
    return json.array { args.system and { role = "system", content = args.system } }
  end
  local messages = fresh()
  for line in read do
    if line == "/quit" then break end
    if line == "/reset" then
      messages = fresh()
    elseif line:find("%S") then
      messages[#messages + 1] = { role = "user", content = line }
      local text, message, code = answer(model, session, messages, variables, options)
      if text then
        messages[#messages + 1] = { role = "assistant", content = text }
      elseif code == "cancelled" then
        messages[#messages] = nil
        sys.catch_interrupt()
        print("(interrupted; the last message is forgotten)")
      else
        return nil, message, code
      end
    end
  end
  return true
end

function chat.run(args)
  local model <close>, message, code = output.open_model(args)
  if not model then return nil, message, code end
  if not model.tokenizer or not model.template then
    return nil, model.dir .. " has no tokenizer or no chat template", "unsupported"
  end
  local session <close>, why, kind = model:session { ctx = args.ctx, kv = args.kv }
  if not session then return nil, why, kind end
  return converse(model, session, args)
end

return chat
