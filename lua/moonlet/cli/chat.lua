--- moonlet chat: a conversation on the terminal.
local generate = require "moonlet.cli.generate"
local json = require "moonlet.json"
local output = require "moonlet.cli.output"
local prefix_cache = require "moonlet.prefix_cache"
local prompt = require "moonlet.prompt"
local render = require "moonlet.cli.render"
local sys = require "moonlet.sys"
local turn = require "moonlet.turn"

local chat = {}

local CACHE_BYTES <const> = 1 << 30 -- for states to go on from

function chat.define(parser)
  local command = parser:command("chat", "Talk to a model.")
  output.dir_argument(command)
  command:option("--system", "system message"):argname("TEXT")
  command:option("--set", "give the template a variable; the value is JSON or else text; may be "
    .. "repeated")
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

-- One answer to the conversation so far, as a message.
local function answer(talk, messages)
  local p, message, code = talk.prompts:make(messages, talk.variables)
  if not p then return nil, message, code end
  local reused, result
  reused, message, code = talk.session:sync(p.ids, { cache = talk.cache, keep_at = p.keep_at })
  if not reused then return nil, message, code end
  result, message, code = require("moonlet.generate").collect(talk.session, talk.options)
  output.line("")
  if not result then return nil, message, code end
  if result.finish_reason == "cancelled" then return nil, "interrupted", "cancelled" end
  local text = result.text -- what a stop string cut is not what was sampled
  if not result.stop then
    text = talk.model:decode(result.ids)
    talk.prompts:remember(p, result.ids, text)
  end
  local said = turn.read(text, { reasoning = p.reasoning, calls = false })
  return { role = "assistant", content = said.content or "", reasoning_content = said.reasoning }
end

local COMMANDS <const> = "/reset starts over, /quit ends"

-- A failure ends a conversation that is read from a file; at a terminal the user may go on.
local function converse(talk, system)
  local terminal = sys.isatty(0)
  local function fresh()
    return json.array { system and { role = "system", content = system } }
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
      local said, message, code = answer(talk, messages)
      if said then
        messages[#messages + 1] = said
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
  local cache <close> = prefix_cache.open(model, CACHE_BYTES)
  local options = generate.sampling(args)
  options.on_token = output.stream
  return converse({ model = model, session = session, cache = cache, options = options,
    variables = variables, prompts = prompt.new(model) }, args.system)
end

return chat
