--- An HTTP server for one model: OpenAI's API with vLLM's additions, and Anthropic's.
---
---   local server <close> = assert(moonlet.serve { model = "dir", port = 8080 })
---   print(server.url)
---   server:run()                       -- until server:shutdown() or a signal
---
--- One thread; every request is a coroutine, the engine computes in the background.

local anthropic_messages = require "moonlet.server.anthropic_messages"
local encoder = require "moonlet.server.encoder"
local engine = require "moonlet.engine"
local hooks = require "moonlet.server.hooks"
local http = require "moonlet.server.http"
local info = require "moonlet.server.info"
local metrics = require "moonlet.server.metrics"
local model = require "moonlet.model"
local openai_chat = require "moonlet.server.openai_chat"
local openai_completions = require "moonlet.server.openai_completions"
local openai_embeddings = require "moonlet.server.openai_embeddings"
local openai_responses = require "moonlet.server.openai_responses"
local openai_tokens = require "moonlet.server.openai_tokens"
local openapi = require "moonlet.server.openapi"
local options = require "moonlet.options"
local page = require "moonlet.server.page"
local prompt = require "moonlet.prompt"
local replay = require "moonlet.replay"
local room = require "moonlet.server.room"
local sched = require "moonlet.sched"
local stored = require "moonlet.server.stored"
local sys = require "moonlet.sys"

local server = {}

-- Kept beneath the transport's own limit, so that the refusal is one that clients understand.
local LIMITS <const> = { body_bytes = 8 << 20, messages = 8192, tools = 1024, choices = 16,
  inputs = 256, decoded_bytes = 128 << 20 }

---@class moonlet.ServeOptions
---@field model string|moonlet.Model directory, or a model (which stays open)
---@field host? string 127.0.0.1
---@field port? integer 8080; 0 takes a free one
---@field api_keys? string[] requests must name one of them
---@field insecure_bind? boolean without keys, listen at other addresses than this machine's own
---@field allow_hosts? string[] further names by which browsers may call this server
---@field allow_origins? string[] pages and programs that may, by their "scheme://name"
---@field name? string of the model, without "@"; the directory's
---@field ctx? integer, kv? string, sessions? integer, queue? integer, cache_bytes? integer  see
---  moonlet.engine
---@field threads? integer, precision? string  see moonlet.open
---@field template_variables? table for every request
---@field stream_tool_args? boolean hand out calls as they grow; else they are held until complete
---@field reasoning_field? string "reasoning_content" or "reasoning"
---@field heartbeat? number seconds of silence in a stream, 10
---@field replay? string a script instead of the model's weights; see moonlet.replay
---@field hooks? moonlet.server.Hooks on_request, on_token, on_response
---@field policies? table<string, any> ways to choose tokens that requests name: options
---  of moonlet.sampler, a list of stages, or a function of the request that makes one of them
---@field limits? table body_bytes, messages, tools, choices, inputs, decoded_bytes, and
---  moonlet.sched.open's
---@field log? fun(text: string) takes what an operator should know
---@field on_served? fun(exchange, seconds: number) after each request

local KNOWN <const> = { model = "any", host = "string", port = "integer", api_keys = "table",
  insecure_bind = "boolean", allow_hosts = "table", allow_origins = "table",
  name = "string", ctx = "integer", kv = "string", sessions = "integer", queue = "integer",
  cache_bytes = "integer", threads = "integer", precision = "string", template_variables = "table",
  stream_tool_args = "boolean", reasoning_field = "string", heartbeat = "number",
  replay = "string", hooks = "table", policies = "table", limits = "table", log = "function",
  on_served = "function" }

---@class moonlet.Server
---@field url string
---@field port integer
---@field loop moonlet.Loop
---@field engine moonlet.Engine
---@field model moonlet.Model
---@field is_closing boolean
---@field dimensions? integer of embeddings; scripted answers have none
local Server = {}
Server.__index = Server

-- ---- routes ------------------------------------------------------------------------------------

-- A dialect's errors are in its shape, whatever finds them.
local function anthropic(post, queues)
  return { POST = post, queues = queues, error_body = anthropic_messages.error_body }
end

local ROUTES <const> = {
  ["/"] = { GET = page.get, open = true },
  ["/openapi.json"] = { GET = openapi.get, open = true },
  ["/v1/chat/completions"] = { POST = openai_chat.post, queues = true },
  ["/v1/completions"] = { POST = openai_completions.post, queues = true },
  ["/v1/embeddings"] = { POST = openai_embeddings.post, queues = true },
  ["/v1/responses"] = { POST = openai_responses.post, queues = true },
  ["/v1/messages"] = anthropic(anthropic_messages.post, true),
  ["/v1/messages/count_tokens"] = anthropic(anthropic_messages.count_tokens),
  ["/tokenize"] = { POST = openai_tokens.tokenize },
  ["/detokenize"] = { POST = openai_tokens.detokenize },
  ["/v1/models"] = { GET = info.models },
  ["/v1/models/*"] = { GET = info.one_model },
  ["/health"] = { GET = info.health, open = true },
  ["/version"] = { GET = info.version },
  ["/metrics"] = { GET = info.metrics },
}

-- ---- opening -----------------------------------------------------------------------------------

local LOOPBACK <const> = { ["127.0.0.1"] = true, ["::1"] = true, localhost = true }

-- Who can reach the port can use the model: beyond this machine that takes a key or a decision.
local function check_address(self, o)
  local host = o.host or "127.0.0.1"
  if LOOPBACK[host] or host:find("^127%.%d+%.%d+%.%d+$") or self.has_keys() or o.insecure_bind then
    return true
  end
  return nil, ("listening at %s lets others use the model: give API keys (--api-key-file) or "
    .. "permit it (--insecure-bind)"):format(host), "unsupported"
end

local function open_model(self, o)
  local opened, owned, code = model.for_chat(o.model, { threads = o.threads,
    precision = o.precision }, o.replay ~= nil)
  if not opened then return nil, owned, code end
  self.model, self.owns_model = opened, owned
  return true
end

local function open_engine(self, o)
  local message, code
  if o.replay then
    local answers
    answers, message, code = replay.read(o.replay)
    if not answers then return nil, message, code end
    self.engine = replay.open(self.model, self.loop, answers, { ctx = o.ctx, queue = o.queue })
  else
    self.dimensions = self.model:info().config.hidden_size -- not to be had while it computes
    self.engine, message, code = engine.open(self.model, self.loop, { ctx = o.ctx, kv = o.kv,
      sessions = o.sessions, queue = o.queue, cache_bytes = o.cache_bytes })
  end
  return self.engine, message, code
end

local TRANSPORT <const> = { header_bytes = true, total_bytes = true, pending_bytes = true,
  connections = true, grace_seconds = true, idle_seconds = true, request_seconds = true,
  write_seconds = true }

local function split_limits(given)
  local own, transport = {}, {}
  for name, value in pairs(LIMITS) do own[name] = value end
  for name, value in pairs(given or {}) do
    if TRANSPORT[name] then
      transport[name] = value
    elseif math.type(value) == "integer" and LIMITS[name] then
      own[name] = value
    else
      options.misuse(("limit '%s': unknown, or no integer"):format(tostring(name)))
    end
  end
  transport.body_bytes = 2 * own.body_bytes
  return own, transport
end

local function listen(self, o)
  local host = o.host or "127.0.0.1"
  local message, code
  self.port, message, code = self.loop.net:listen(host, o.port or 8080)
  if not self.port then return nil, message, code end
  local shown = host:find(":", 1, true) and ("[%s]"):format(host) or host
  self.url = ("http://%s:%d"):format(shown, self.port)
  self.hosts, self.any_address = { [shown:lower()] = true }, host == "0.0.0.0" or host == "::"
  for _, name in ipairs(o.allow_hosts or {}) do self.hosts[name:lower()] = true end
  self.origins = {}
  for _, origin in ipairs(o.allow_origins or {}) do self.origins[origin] = true end
  return true
end

local function open_parts(self, o, transport)
  local ok, message, code = check_address(self, o)
  if not ok then return nil, message, code end
  ok, message, code = open_model(self, o)
  if not ok then return nil, message, code end
  ok, message, code = hooks.check_ids(self.policies, self.model.tokenizer:n_vocab())
  if not ok then return nil, message, code end
  self.name = o.name or self.model.dir:match("([^/]+)/*$") or self.model.dir
  self.loop, message, code = sched.open(transport)
  if not self.loop then return nil, message, code end
  ok, message, code = self.loop.net:set_error_form("application/json", http.error_form())
  if not ok then return nil, message, code end
  self.room = room.new(self.loop, self.limits.decoded_bytes)
  self.encode = encoder.new(self.model, self.loop)
  self.prompts = prompt.new(self.model, self.encode, function(...)
    return self.loop:gently(...)
  end)
  ok, message, code = listen(self, o)
  if not ok then return nil, message, code end
  return open_engine(self, o)
end

local function no_log() end

---Opens a server; it accepts connections from then on and answers them while run() runs.
---@param given moonlet.ServeOptions
---@return moonlet.Server? server, string? message, string? code
function server.open(given)
  local o = options.check(given, KNOWN)
  if not o.model then options.misuse("option 'model': a directory or a model expected") end
  -- Behind "@" clients name a policy.
  if o.name and not o.name:find("^[^@]+$") then
    options.misuse("option 'name': a text without '@' expected")
  end
  if o.heartbeat and (o.heartbeat <= 0 or o.heartbeat ~= o.heartbeat) then
    options.misuse("option 'heartbeat': seconds above 0 expected")
  end
  local own, transport = split_limits(o.limits)
  local keys = o.api_keys or {}
  local self = setmetatable({
    limits = own, exchanges = {}, metrics = metrics.new(), routes = ROUTES, is_closing = false,
    hooks = hooks.new(o.hooks, o.log or no_log), policies = hooks.policies(o.policies),
    stored = stored.new(), started = os.time(), log = o.log or no_log,
    on_served = o.on_served or no_log,
    heartbeat = o.heartbeat or 10, reasoning_field = o.reasoning_field or "reasoning_content",
    stream_arguments = o.stream_tool_args or false,
    template_variables = o.template_variables or {},
    has_keys = function() return #keys > 0 end, is_key = http.key_check(keys),
  }, Server)
  local ok, message, code = open_parts(self, o, transport)
  if not ok then
    self:close()
    return nil, message, code
  end
  self.loop.on_request = function(request) http.serve(self, request) end
  self.loop.on_gone = function(request)
    if self.exchanges[request] then self.exchanges[request]:gone() end
  end
  self.loop.on_half = function(request)
    if self.exchanges[request] then self.exchanges[request]:probe() end
  end
  self.loop.on_signal = function()
    if self.is_closing then self.loop:stop() else self:shutdown() end
  end
  return self
end

-- ---- life --------------------------------------------------------------------------------------

---Ctrl-C, SIGTERM and SIGHUP shut the server down; a second one ends the process. Fails when one
---has come since sys.catch_interrupt().
---@return boolean? ok, string? message, string? code
function Server:catch_signals()
  for _, name in ipairs { "INT", "TERM", "HUP" } do
    local ok, message, code = self.loop.net:catch_signal(name)
    if not ok then return nil, message, code end
  end
  if sys.interrupted() then return nil, "interrupted", "cancelled" end
  return true
end

---Serves until shutdown() has done its work.
---@return boolean? ok, string? message, string? code
function Server:run()
  return self.loop:run()
end

---Accepts no more, lets what was begun come to its end, then lets run() return. To be called in a
---coroutine of the loop.
function Server:shutdown()
  if self.is_closing then return end
  self.is_closing = true
  self.loop.net:stop_listening()
  while next(self.exchanges) do self.loop:sleep(0.02) end
  self.engine:drain()
  -- Of an answer that is given the end may still be on its way.
  while self.loop.net:unsent() > 0 do self.loop:sleep(0.02) end
  self.loop:stop()
end

---Ends everything at once.
function Server:close()
  if self.engine then self.engine:close() end
  if self.loop then self.loop:close() end
  if self.owns_model then self.model:close() end
  self.engine, self.loop, self.owns_model = nil, nil, false
end

Server.__close = Server.close

return setmetatable(server, { __call = function(_, given) return server.open(given) end })
