--- moonlet serve: a model for clients of OpenAI's and Anthropic's APIs.
local generate = require "moonlet.cli.generate"
local output = require "moonlet.cli.output"
local render = require "moonlet.cli.render"
local sys = require "moonlet.sys"

local serve = {}

-- As browsers name it, without a scheme or a port.
local function host_name(text)
  if text:find("^[%w._-]+$") or text:find("^%[[%x:.]+%]$") then return text end
  return nil, "option '--allow-host': the name of a host expected, without scheme and port"
end

local function origin(text)
  if require("moonlet.server.http").is_origin(text) then return text end
  return nil, "option '--allow-origin': an origin as app://obsidian.md expected"
end

-- Behind "@" clients name a policy.
local function model_name(text)
  if text:find("^[^@]+$") then return text end
  return nil, "option '--name': a text without '@' expected"
end

function serve.define(parser)
  local command = parser:command("serve", "Serve a model over HTTP (APIs of OpenAI and Anthropic).")
  output.dir_argument(command)
  command:option("--host", "address to listen at (default 127.0.0.1)"):argname("H")
    :convert(output.some_text("--host"))
  command:option("--port", "port (default 8080; 0 takes a free one)"):argname("P")
    :convert(output.integer("--port", 0, 65535))
  command:option("--api-key-file",
    "requests must name one of the keys in it, one per line (lines of # are comments)")
    :argname("F"):convert(output.some_text("--api-key-file"))
  command:flag("--insecure-bind", "listen at any address without keys")
  command:option("--allow-host", "name by which browsers may call; may be repeated"):count("*")
    :argname("NAME"):convert(host_name)
  command:option("--allow-origin", "origin of pages or programs that may call; may be repeated")
    :count("*"):argname("ORIGIN"):convert(origin)
  command:option("--name", "what the model is called (default: its directory)"):argname("NAME")
    :convert(model_name)
  command:option("--sessions", "sequences at once (default 4)"):argname("N")
    :convert(output.integer("--sessions", 1, 256))
  command:option("--queue", "requests that may wait for one (default 64)"):argname("N")
    :convert(output.integer("--queue", 0, 100000))
  command:option("--cache-ram", "memory for kept states and cached keys and values, as 512M or 4G "
    .. "(default 1G)")
    :argname("SIZE"):convert(output.size("--cache-ram", 0))
  command:option("--set", "give the template a variable; the value is JSON or else text; may be "
    .. "repeated")
    :argname("NAME=VALUE"):count("*"):target("sets")
  command:flag("--stream-tool-args", "send tool calls while they grow, not when complete")
  command:option("--reasoning-field", "name of reasoning in replies")
    :choices { "reasoning_content", "reasoning" }
  command:option("--heartbeat", "seconds of silence in a stream (default 10)"):argname("S")
    :convert(output.integer("--heartbeat", 1, 3600))
  command:option("--replay", "answer from a script (JSON Lines) instead of the model"):argname("F")
    :convert(output.some_text("--replay"))
  command:option("--hooks", "Lua file of hooks and sampling policies"):argname("F.lua")
    :convert(output.some_text("--hooks"))
  command:flag("--verbose", "a line on stderr for each request")
  generate.session_options(command)
end

local function log(text)
  io.stderr:write("moonlet: ", text, "\n")
end

local function log_request(exchange, seconds)
  local status = not exchange.is_cut and exchange.status or "left"
  log(("%s %s %s %.3f s"):format(exchange.method, exchange.path, status, seconds))
end

local function read_options(args)
  local o = { model = output.dir(args.dir), host = args.host, port = args.port,
    insecure_bind = args.insecure_bind, allow_hosts = args.allow_host,
    allow_origins = args.allow_origin, name = args.name, ctx = args.ctx,
    kv = args.kv, sessions = args.sessions, queue = args.queue,
    cache_bytes = args.cache_ram, threads = args.threads, precision = args.precision,
    template_variables = render.variables(args.sets), stream_tool_args = args.stream_tool_args,
    reasoning_field = args.reasoning_field, heartbeat = args.heartbeat, replay = args.replay,
    log = log, on_served = args.verbose and log_request or nil }
  if args.api_key_file then
    local message, code
    o.api_keys, message, code = require("moonlet.server.http").read_keys(args.api_key_file)
    if not o.api_keys then return nil, message, code end
  end
  if args.hooks then
    local given, policies, code = require("moonlet.server.hooks").read(args.hooks)
    if not given then return nil, policies, code end
    o.hooks, o.policies = given, policies
  end
  return o
end

-- The process is the server's own, and is to run for weeks: memory that requests leave behind goes
-- back to the system, and the collector works in small steps. (Lua's own program sets it to
-- generations, each of which it looks through without a break.)
local function settle()
  sys.keep_little_heap()
  collectgarbage("incremental")
end

function serve.run(args)
  settle()
  local o, message, code = read_options(args)
  if not o then return nil, message, code end
  local server <close>, why, kind = require("moonlet").serve(o)
  if not server then return nil, why, kind end
  local ok
  ok, message, code = server:catch_signals()
  if not ok then return nil, message, code end
  output.line(("%s serves %s"):format(server.url, server.name))
  output.flush()
  return server:run()
end

return serve
