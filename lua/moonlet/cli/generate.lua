--- moonlet generate: one completion or one answer.
local json = require "moonlet.json"
local output = require "moonlet.cli.output"
local render = require "moonlet.cli.render"
local sampler = require "moonlet.sampler"
local sys = require "moonlet.sys"

local generate = {}

-- command-line name -> option of moonlet.sampler.from_options
local SAMPLING <const> = {
  { "temp", "temperature", "0 takes the best token" },
  { "top-k", "top_k", "keep the k most probable tokens" },
  { "top-p", "top_p", "keep the most probable tokens up to this mass" },
  { "min-p", "min_p", "drop tokens below this share of the best one" },
  { "typical-p", "typical_p", "locally typical sampling" },
  { "repetition-penalty", "repetition_penalty", "divide the logits of tokens seen so far" },
  { "presence-penalty", "presence_penalty", "subtract from tokens generated so far" },
  { "frequency-penalty", "frequency_penalty", "subtract for each time a token was generated" },
}

-- A converter that lets the sampler judge the number.
local function sampling_value(flag, name)
  return function(text)
    local value = tonumber(text)
    if not value then
      return nil, ("option '--%s': a number expected, got '%s'"):format(flag, text)
    end
    local ok, message = sampler.check_options { [name] = math.tointeger(value) or value }
    if ok then return math.tointeger(value) or value end
    return nil, ("option '--%s': %s"):format(flag, message:gsub("^[%w_]+: ", ""))
  end
end

---Options that every command with a sampler takes.
---@param command table
---@param limit string? what -n does, where it is not this
function generate.sampling_options(command, limit)
  for _, option in ipairs(SAMPLING) do
    command:option("--" .. option[1], option[3]):argname("X")
      :convert(sampling_value(option[1], option[2]))
  end
  command:option("--seed", "makes sampling reproducible"):argname("S")
    :convert(output.integer("--seed"))
  command:option("-n", limit or "most tokens to generate (default 512)"):argname("N")
    :convert(output.integer("-n", 1)):target("max_tokens")
  command:option("--stop", "text that ends the generation; may be repeated"):count("*")
    :argname("TEXT"):convert(output.some_text("--stop"))
  generate.session_options(command)
end

---Options that every command with sessions takes.
function generate.session_options(command)
  command:option("--ctx", "tokens of context to make room for"):argname("N")
    :convert(output.integer("--ctx", 1))
  command:option("--kv", "codec of the key/value cache"):choices { "f16", "f32" }
  output.precision_option(command, "fast")
  output.threads_option(command)
end

---What was given of them, as options of Session:generate.
function generate.sampling(args)
  local options = { seed = args.seed, max_tokens = args.max_tokens or 512, stop = args.stop }
  for _, option in ipairs(SAMPLING) do
    options[option[2]] = args[option[1]:gsub("-", "_")]
  end
  return options
end

function generate.define(parser)
  local command = parser:command("generate", "Continue a text or answer a message.")
  output.dir_argument(command)
  command:option("-p --prompt", "text to continue, as it is"):argname("TEXT")
    :convert(output.some_text("-p"))
  command:option("--chat", "a user's message, rendered by the chat template"):argname("TEXT")
  command:option("--file", "text to continue from a file; - is standard input"):argname("F")
    :convert(output.some_text("--file"))
  command:option("--system", "system message for --chat"):argname("TEXT")
  command:option("--tools", "JSON array of tools for --chat"):argname("F.json")
    :convert(output.some_text("--tools"))
  command:option("--set", "give the template a variable; the value is JSON or else text; may be "
    .. "repeated")
    :argname("NAME=VALUE"):count("*"):target("sets")
  generate.sampling_options(command)
  command:flag("--json", "print one JSON object instead of streaming text")
end

local function prompt_ids(model, args, variables)
  if not args.chat then
    if args.prompt then return model:encode(args.prompt) end
    local text, message, code = output.read_file(args.file)
    if not text then return nil, message, code end
    return model:encode(text)
  end
  if not model.template then return nil, model.dir .. " has no chat template", "unsupported" end
  if args.tools then
    local tools, message, code = render.read_list(args.tools, "tools")
    if not tools then return nil, message, code end
    variables.tools = tools
  end
  local messages = json.array {}
  if args.system then messages[1] = { role = "system", content = args.system } end
  messages[#messages + 1] = { role = "user", content = args.chat }
  local text, message, code = model:render(messages, variables)
  if not text then return nil, message, code end
  return model:encode(text)
end

local function report(result, stats, times)
  output.print_json(json.object({
    text = result.text,
    ids = json.array(result.ids),
    finish_reason = result.finish_reason,
    prompt_tokens = times.prompt_tokens,
    reused_tokens = times.reused,
    prefill_seconds = times.prefill,
    decode_seconds = times.decode,
    tokens_per_second = times.decode > 0 and #result.ids / times.decode or 0,
    kv = { codec = stats.codec, bytes = stats.kv_bytes },
    state_bytes = stats.state_bytes,
  }))
end

local function run_session(session, ids, args)
  local start = sys.seconds()
  local reused, message, code = session:sync(ids)
  if not reused then return nil, message, code end
  local times = { prompt_tokens = #ids, reused = reused, prefill = sys.seconds() - start }
  local options = generate.sampling(args)
  if not args.json then options.on_token = output.stream end
  start = sys.seconds()
  local result
  result, message, code = require("moonlet.generate").collect(session, options)
  if not result then return nil, message, code end
  times.decode = sys.seconds() - start
  local cancelled = result.finish_reason == "cancelled"
  if not args.json then
    output.line("")
  elseif not cancelled then
    report(result, session:stats(), times)
  end
  if cancelled then return nil, "interrupted", "cancelled" end
  return true
end

function generate.run(args)
  local given = (args.prompt and 1 or 0) + (args.chat and 1 or 0) + (args.file and 1 or 0)
  if given ~= 1 then output.misuse("give one of -p, --chat and --file") end
  if not args.chat and (args.system or args.tools or #args.sets > 0) then
    output.misuse("--system, --tools and --set go with --chat")
  end
  local variables = render.variables(args.sets)
  local model <close>, message, code = output.open_model(args)
  if not model then return nil, message, code end
  if not model.tokenizer then
    return nil, model.dir .. " has no tokenizer.json", "unsupported"
  end
  local ids
  ids, message, code = prompt_ids(model, args, variables)
  if not ids then return nil, message, code end
  if #ids == 0 then return nil, "the prompt is empty", "range" end
  local session <close>, why, kind = model:session { ctx = args.ctx, kv = args.kv }
  if not session then return nil, why, kind end
  return run_session(session, ids, args)
end

return generate
