--- moonlet agent: a model at work in a directory, with a readable trace.
local json = require "moonlet.json"
local generate = require "moonlet.cli.generate"
local output = require "moonlet.cli.output"
local render = require "moonlet.cli.render"
local sys = require "moonlet.sys"

local agent = {}

local DEFAULT_TOOLS <const> = "read,write,edit,list,grep,bash"
local SHOWN_LINES <const>, SHOWN_BYTES <const> = 10, 800 -- of a tool's result
local SHOWN_LINE <const> = 220 -- bytes of a call, and of one of those lines

local function tool_names(text)
  local names, left = {}, {}
  for name in DEFAULT_TOOLS:gmatch("%a+") do left[name] = "free" end
  for name in text:gmatch("[^,%s]+") do
    if not left[name] then
      return nil, ("option '--tools': '%s' is none of %s"):format(name, DEFAULT_TOOLS)
    end
    if left[name] == "taken" then
      return nil, ("option '--tools': '%s' is named twice"):format(name)
    end
    names[#names + 1], left[name] = name, "taken"
  end
  if #names > 0 then return names end
  return nil, "option '--tools': must not be empty"
end

function agent.define(parser)
  local command = parser:command("agent", "Let a model work in a directory, with tools.")
  output.dir_argument(command)
  command:option("--task -p", "what to do; without it, lines from standard input"):argname("TEXT")
    :convert(output.some_text("--task"))
  command:option("--tools", "built-in tools, by default all: " .. DEFAULT_TOOLS)
    :argname("NAME,NAME"):convert(tool_names)
  command:option("--cwd", "directory to work in (default: the current one)"):argname("DIR")
    :convert(output.some_text("--cwd"))
  command:flag("--yes", "run tools that write or run commands without asking")
  command:option("--max-steps", "turns for one task (default 20)"):argname("N")
    :convert(output.integer("--max-steps", 1))
  command:option("--token-budget", "tokens to generate for one task"):argname("N")
    :convert(output.integer("--token-budget", 1))
  command:option("--save", "keep the conversation in a new file"):argname("F")
    :convert(output.some_text("--save"))
  command:option("--resume", "go on with a conversation that was kept, and keep it up")
    :argname("F"):convert(output.some_text("--resume"))
  command:option("--replay", "answers from a script (JSON Lines) instead of the model")
    :argname("F"):convert(output.some_text("--replay"))
  command:option("--system", "system message"):argname("TEXT")
  command:option("--set", "give the template a variable; the value is JSON or else text; may be "
    .. "repeated")
    :argname("NAME=VALUE"):count("*"):target("sets")
  generate.sampling_options(command, "most tokens of a turn (default: as many as fit)")
  command:flag("--json", "print the events, one JSON object per line")
end

-- ---- the trace ---------------------------------------------------------------------------------

-- A call in one line: its arguments as they would be written in JSON, without the braces.
local function shown_call(call)
  return output.visible_line(call.name .. " " .. json.encode(call.arguments):sub(2, -2))
end

local function shown_start(text)
  if #text <= SHOWN_LINE then return text end
  return text:sub(1, utf8.offset(text, 0, SHOWN_LINE) - 1) .. "..."
end

local function shown_result(content)
  local lines, bytes, n = {}, 0, 0
  for line in (content:gsub("\n$", "") .. "\n"):gmatch("([^\n]*)\n") do
    local shown = shown_start(output.visible((line:gsub("\r$", ""))))
    n = n + 1
    bytes = bytes + #shown
    if n <= SHOWN_LINES and bytes <= SHOWN_BYTES then lines[n] = "  | " .. shown end
  end
  if #lines < n then lines[#lines + 1] = ("  | (%d more lines)"):format(n - #lines) end
  return table.concat(lines, "\n")
end

local ENDINGS <const> = { steps = "the turns are used up (--max-steps)",
  tokens = "the tokens are used up (--token-budget)", length = "a turn was cut off (-n)",
  context = "the context is full (--ctx)", cancelled = "interrupted" }

-- Prints events as they come; text of the model as it grows.
local function new_trace()
  local open -- kind of the text that is being written
  local function close()
    if open then output.line("") end
    open = nil
  end
  local show = {}
  local function text(event)
    if open ~= event.kind then
      close()
      open = event.kind
      if open == "reasoning" then output.write("(thinking) ") end
    end
    output.write(output.visible(event.text))
  end
  show.reasoning, show.content = text, text
  function show.note(event)
    close()
    output.line(("(%s)"):format(output.visible_line(event.text)))
  end
  function show.tool_call(event)
    close()
    output.line("> " .. shown_start(shown_call(event)))
  end
  function show.tool_result(event)
    close()
    output.line(shown_result(event.content))
  end
  show["end"] = function(event)
    close()
    local r = event.result
    if ENDINGS[r.reason] then output.line(("(%s)"):format(ENDINGS[r.reason])) end
    output.line(("(%d turns, %d tokens generated, %d read, %d known)"):format(r.steps,
      r.usage.generated, r.usage.evaluated, r.usage.reused))
  end
  return function(event)
    if show[event.kind] then show[event.kind](event) end
    output.flush()
  end, close
end

-- ---- asking ------------------------------------------------------------------------------------

-- Questions go to the terminal, with all of the call that is asked for. Where there is none, only
-- --yes permits. Ctrl-C in the place of an answer calls on_interrupt.
local function new_ask(args, on_interrupt)
  if args.yes then return nil end
  if args.json or not sys.isatty(0) then
    return function() return false, "not permitted; the user has to start the agent with --yes" end
  end
  local always = {}
  return function(call, tool)
    if always[tool.name] then return true end
    output.write(("Run %s? [y]es, [n]o, [a]lways: "):format(shown_call(call)))
    output.flush()
    local answer = sys.wait_input(0) and io.read("l") or ""
    if sys.interrupted() then on_interrupt() end
    always[tool.name] = answer:find("^[aA]") ~= nil
    return always[tool.name] or answer:find("^[yY]") ~= nil
  end
end

-- ---- tasks -------------------------------------------------------------------------------------

local WATCH_SECONDS <const> = 0.1

-- One task. The first Ctrl-C ends it, the next one the process, as long as the task has not ended.
local function run_task(a, task)
  local running = true
  a.loop:spawn(function()
    while running do
      if sys.interrupted() then return a:cancel() end
      a.loop:sleep(WATCH_SECONDS)
    end
  end)
  local result, message, code = a:run(task)
  running = false
  return result, message, code
end

local function failed(result)
  if result.reason == "stop" then return nil end
  if result.reason == "cancelled" then return "interrupted", "cancelled" end
  return ENDINGS[result.reason], "limit"
end

-- Tasks line by line. At a terminal a task may end early and the next one follows.
local function converse(a)
  local terminal = sys.isatty(0)
  while true do
    if terminal then output.write("> ") end
    output.flush()
    local line = sys.wait_input(0) and io.read("l")
    if sys.interrupted() then return nil, "interrupted", "cancelled" end
    if not line or line == "/quit" then return true end
    if line:find("%S") then
      local result, message, code = run_task(a, line)
      if not result then return nil, message, code end
      message, code = failed(result)
      if message and not terminal then return nil, message, code end
      sys.catch_interrupt()
    end
  end
end

local function read_options(args, on_interrupt)
  local sampling = generate.sampling(args)
  sampling.max_tokens = nil
  return { model = output.dir(args.dir), ctx = args.ctx, kv = args.kv, system = args.system,
    cwd = args.cwd, tools = args.tools or tool_names(DEFAULT_TOOLS), max_steps = args.max_steps,
    max_tokens = args.max_tokens, token_budget = args.token_budget, save = args.save,
    resume = args.resume, replay = args.replay, generate = sampling,
    template = render.variables(args.sets), ask = new_ask(args, on_interrupt) }
end

function agent.run(args)
  if args.save and args.resume then output.misuse("give one of --save and --resume") end
  if args.resume and args.system then
    output.misuse("--system: a resumed conversation has its own")
  end
  local opened
  local o = read_options(args, function() opened:cancel() end)
  io.stdin:setvbuf("no") -- wait_input does not see what a buffer holds
  local model, message, code
  if not args.replay then
    model, message, code = output.open_model(args)
    if not model then return nil, message, code end
    o.model = model
  end
  local close = function() end
  if args.json then
    o.on = function(event)
      output.print_json(json.object(event, { "kind" }))
      output.flush()
    end
  else
    o.on, close = new_trace()
  end
  local a <close>, why, kind = require("moonlet").agent(o)
  if not a then return nil, why, kind end
  opened = a
  local ok
  if args.task then
    ok, message, code = run_task(a, args.task)
    if ok then message, code = failed(ok) end
    ok = ok and not message
  else
    ok, message, code = converse(a)
  end
  close()
  a:close()
  if model then model:close() end
  return ok or nil, message, code
end

return agent
