--- From a request of the event loop to a handler and back: who may ask, routes, bodies, replies,
--- and the shape of refusals.

local events = require "moonlet.server.events"
local json = require "moonlet.json"
local longer = require "moonlet.server.longer"
local options = require "moonlet.options"
local outflow = require "moonlet.server.outflow"
local refusal = require "moonlet.server.refusal"
local sys = require "moonlet.sys"
local trim = require "moonlet.trim"

local http = {}

local MAX_DEPTH <const> = 100 -- of JSON; schemas of tools are the deepest thing sent
-- Of JSON: twice the ids of the longest prompt. Each takes up to a kilobyte while it is worked on,
-- and all of them a tenth of a second in each of two steps.
local MAX_VALUES <const> = 1 << 19
local MAX_KEY_BYTES <const> = 4096
local MAX_KEY_FILE_BYTES <const> = 1 << 20
local ALONE_BYTES <const> = 1 << 17 -- of a body that is read while no other of the kind is
local POUR_BYTES <const> = 1 << 16 -- of a long reply that are made at once

---@class moonlet.server.Exchange
---@field server moonlet.Server
---@field request userdata
---@field method string
---@field path string decoded, without the query
---@field authority string? that the target names
---@field rest string? what stands for the "*" of the route
---@field on_gone fun()? called when the client has left
---@field end_stream fun(body: table, r: moonlet.server.Refusal)? ends a stream that fails, where a
---  dialect has its own way
---@field room_taken integer bytes of the body's values, and of what is answered
---@field status integer? of the reply, once there is one
---@field is_cut boolean? the client has left, or could not be written to, before it had all
local Exchange = {}
Exchange.__index = Exchange

-- ---- refusals ----------------------------------------------------------------------------------

-- OpenAI's names; what they have none for is vLLM's.
local TYPES <const> = { [401] = "authentication_error", [403] = "permission_error",
  [404] = "not_found_error", [429] = "rate_limit_error" }

---@param r moonlet.server.Refusal
---@return table body of the reply
function http.openai_error(r)
  local kind = TYPES[r.status] or r.status < 500 and "invalid_request_error" or "server_error"
  return { error = json.object({ message = r.message, type = kind, param = r.param or json.null,
    code = r.code or json.null }, { "message", "type", "param", "code" }) }
end

---What the event loop puts around a sentence where it answers itself, before it is known which
---dialect a client speaks: all find in it what they look for.
---@return string before, string after, string after_failure behind a status of 500 and more
function http.error_form()
  local before, after = {}, {}
  for i, status in ipairs { 400, 503 } do
    local text = json.encode(json.object({ type = "error",
      error = http.openai_error({ status = status, message = "\0" }).error }, { "type", "error" }))
    before[i], after[i] = text:match("^(.*)\\u0000(.*)$")
  end
  return before[1], after[1], after[2]
end

---Answers with an error, in a stream that has begun as its last event.
---@param r moonlet.server.Refusal
function Exchange:refuse(r)
  if self:is_gone() then return end
  local body = (self.route and self.route.error_body or http.openai_error)(r)
  if not self.stream then return self:reply(r.status, body, r.fields) end
  if self.end_stream then
    self.end_stream(body, r)
  else
    self.stream:data(body)
    self.stream:data("[DONE]")
  end
  self.stream:finish()
end

-- ---- replies -----------------------------------------------------------------------------------

local function all_fields(self, fields)
  local all = { Connection = self.server.is_closing and "close" or nil }
  for _, set in ipairs { self.fields, fields or {} } do
    for name, value in pairs(set) do all[name] = value end
  end
  return all
end

---@param status integer
---@param body table|string a table is sent as JSON
---@param fields table<string, string>? a Content-Type is set unless it is among these
function Exchange:reply(status, body, fields)
  local all = all_fields(self, fields)
  if body ~= "" then all["Content-Type"] = all["Content-Type"] or "application/json" end
  local text = type(body) == "string" and body or self.server.loop:gently(json.encode, body)
  self.status = self.status or status
  self.request:reply(status, all, text)
end

-- The client cannot be written to: its connection ends with the request.
local function cut(self, message)
  self.is_cut = true
  self.server.log(("%s %s: the reply is cut: %s"):format(self.method, self.path, message))
  self:gone()
end

local function check_client(self)
  if self:is_gone() then refusal.raise(499, "the client has left") end
end

---Answers with JSON that may be long: no more of it is there at once than a client is about to
---take. What can be refused has to be before.
---@param produce fun(send: fun(text: string))
function Exchange:pour(produce)
  local held, n, is_begun = {}, 0, false
  local function flush()
    if not is_begun then
      self.status, is_begun = 200, true
      self.request:start(200, all_fields(self, { ["Content-Type"] = "application/json" }))
    end
    check_client(self)
    local ok, message = outflow.write(self.server.loop, self.request, table.concat(held))
    if not ok then
      cut(self, message)
      refusal.raise(499, message)
    end
    held, n = {}, 0
    self.server.loop:sleep(0)
    check_client(self)
  end
  self.server.loop:gently(produce, function(text)
    held[#held + 1], n = text, n + #text
    if n >= POUR_BYTES then flush() end
  end)
  if not is_begun then return self:reply(200, table.concat(held)) end
  flush()
  self.request:finish()
end

---Answers with JSON some lists of which are made while they are written.
---@param value any for moonlet.server.longer
function Exchange:reply_longer(value)
  self:pour(function(send) longer.write(send, value) end)
end

---Begins a stream of events.
---@return moonlet.server.Events
function Exchange:events()
  self.status = 200
  self.stream = events.start(self.request, all_fields(self), function(message)
    cut(self, message)
  end, self.server.loop)
  return self.stream
end

---The client has left, or there is no more to do for it.
function Exchange:gone()
  self.is_cut = self.is_cut or self:is_gone()
  if self.on_gone then self.on_gone() end
end

-- Seconds between probes: two tell of a client that has closed its connection, a later one of one
-- behind a tunnel. Some clients take no more than five interim replies.
local PROBES <const> = { 0.03, 0.05, 0.5, 5, 30 }

---The client sends no more. Most have left then, but one that has only closed its side reads on
---(RFC 9112, 9.6), and what can tell them apart is to write.
function Exchange:probe()
  for _, seconds in ipairs(PROBES) do
    if self.server.exchanges[self.request] ~= self or self:is_gone() then return end
    if self.stream then self.stream:comment() else self.request:probe() end
    self.server.loop:sleep(seconds)
  end
end

---@return boolean whether the client has
function Exchange:is_gone()
  return self.request:is_over()
end

-- ---- bodies ------------------------------------------------------------------------------------

---The body as a JSON object, and what the operator's hook makes of it.
---@return table
function Exchange:body()
  local kind = self.request:header("Content-Type")
  if kind and not kind:lower():find("^%s*application/[%w.+-]*json%s*%f[;\0]") then
    refusal.raise(415, "Content-Type: application/json expected")
  end
  local coding = self.request:header("Content-Encoding") or ""
  if coding ~= "" and coding:lower() ~= "identity" then
    refusal.raise(415, "Content-Encoding: bodies are taken as they are, not compressed",
      { fields = { ["Accept-Encoding"] = "identity" } })
  end
  local n, most = self.request:body_bytes(), self.server.limits.body_bytes
  if n > most then
    refusal.raise(413, ("the body has %d bytes, more than %d"):format(n, most))
  end
  if n >= ALONE_BYTES then
    self.server.room:enter_alone()
    self.is_alone = true
    check_client(self)
  end
  local text = self.request:body() or ""
  self.request:drop_body()
  local bytes, body, message = self.server.room:decode(text, { name = "body",
    max_depth = MAX_DEPTH, max_values = MAX_VALUES, finite = true }, self.is_alone)
  self.room_taken = bytes
  if body == nil then refusal.raise(400, message) end
  if not json.is_object(body) then refusal.raise(400, "body: an object expected") end
  return self.server.hooks:request(body, self.path)
end

---Memory for the answer, until it is given.
---@param bytes integer
function Exchange:take(bytes)
  self.room_taken = self.room_taken + self.server.room:take(bytes, self.room_taken)
end

---Memory of the answer that is given already.
---@param bytes integer
function Exchange:let_go(bytes)
  self.room_taken = self.room_taken - bytes
  self.server.room:leave(bytes)
end

---What the request says has become what is to be computed: other large ones may be read.
function Exchange:is_read()
  if self.is_alone then self.server.room:leave_alone() end
  self.is_alone = false
end

-- ---- who may ask -------------------------------------------------------------------------------

-- "host", "host:port" and "[::1]:port" without the port; "" for anything else.
local function host_of(authority)
  local host, port = authority:match("^(%[[%x:.]+%])(.*)$")
  if not host then host, port = authority:match("^([%w._-]+)(.*)$") end
  return host and port:find("^:?%d*$") and host:lower() or ""
end

local LOCAL <const> = { localhost = true, ["127.0.0.1"] = true, ["[::1]"] = true }

local function is_known_host(server, host)
  return LOCAL[host] or host:find("%.localhost$") or server.hosts[host]
    or server.any_address and (host:find("^%d+%.%d+%.%d+%.%d+$") or host:find("^%["))
end

---Whether a text is an origin as browsers send it, of whatever scheme. Not "null", which pages in
---sandboxes of any site are.
---@param text string
---@return boolean
function http.is_origin(text)
  return text:find("^%a[%w+.-]*://[^%s/]*$") ~= nil
end

-- A page of some site may have its name point to this machine (DNS rebinding) or send requests
-- across origins that need no preflight. Browsers name the site in both cases. Who knows the key
-- is no such page.
local function check_site(self)
  local server, request = self.server, self.request
  local origin = request:header("Origin")
  if server.has_keys() then
    if origin then self.fields["Access-Control-Allow-Origin"] = "*" end
    return
  end
  for _, host in ipairs { request:header("Host") or "localhost", self.authority } do
    if not is_known_host(server, host_of(host)) then
      refusal.raise(403, ("host '%s' is not served here; --allow-host permits it"):format(host))
    end
  end
  if not origin then return end
  local authority = origin:match("^https?://([^/]+)$")
  if not server.origins[origin] and not (authority and is_known_host(server, host_of(authority)))
  then
    refusal.raise(403, ("origin '%s' may not use this server; %s"):format(origin, authority
      and "--allow-host permits a host" or http.is_origin(origin) and "--allow-origin permits it"
      or "a page without an origin of its own needs an API key"))
  end
  self.fields["Access-Control-Allow-Origin"] = origin
  self.fields["Vary"] = "Origin"
end

-- The key that a request names, "" without one.
local function given_key(request)
  local line = request:header("Authorization")
  if line and #line > #"Bearer " + MAX_KEY_BYTES then return "" end
  local key = line and line:match("^[Bb]earer%s(.*)$")
  return key and trim.both(key) or request:header("X-Api-Key") or ""
end

local function check_key(self)
  if not self.server.has_keys() or self.route and self.route.open then return end
  if not self.server.is_key(given_key(self.request)) then
    refusal.raise(401, "a valid API key is needed: Authorization: Bearer KEY",
      { code = "invalid_api_key", fields = { ["WWW-Authenticate"] = "Bearer" } })
  end
end

-- ---- routes ------------------------------------------------------------------------------------

---@class moonlet.server.Route
---@field GET? fun(exchange: moonlet.server.Exchange)
---@field POST? fun(exchange: moonlet.server.Exchange)
---@field open? boolean needs no key
---@field queues? boolean is refused unread while the engine's queue is full
---@field error_body? fun(refusal): table another dialect's errors

-- A path that ends in "/*" takes everything below it.
local function find_route(routes, path)
  if routes[path] then return routes[path] end
  for pattern, route in pairs(routes) do
    local head = pattern:match("^(.*/)%*$")
    if head and #path > #head and path:sub(1, #head) == head then
      return route, path:sub(#head + 1)
    end
  end
end

local function methods_of(route)
  local list = { "OPTIONS" }
  for _, method in ipairs { "GET", "POST" } do
    if route[method] then list[#list + 1] = method end
  end
  if route.GET then list[#list + 1] = "HEAD" end
  return table.concat(list, ", ")
end

local function preflight(self)
  self.fields["Access-Control-Allow-Methods"] = methods_of(self.route)
  self.fields["Access-Control-Allow-Headers"] =
    self.request:header("Access-Control-Request-Headers") or "Authorization, Content-Type"
  self.fields["Access-Control-Max-Age"] = "600"
  self:reply(204, "")
end

local function handle(self)
  self.route, self.rest = find_route(self.server.routes, self.path)
  check_site(self)
  if self.route and self.method == "OPTIONS" then return preflight(self) end
  check_key(self)
  if not self.route then refusal.raise(404, "there is no " .. self.path) end
  local handler = self.route[self.method == "HEAD" and "GET" or self.method]
  if not handler then
    refusal.raise(405, ("%s does not take %s"):format(self.path, self.method),
      { fields = { Allow = methods_of(self.route) } })
  end
  local server = self.server
  if server.is_closing and self.method == "POST" then
    refusal.raise(503, "the server is shutting down")
  end
  if self.route.queues and server.engine:is_full() then
    refusal.raise_busy("too many requests wait; try again")
  end
  handler(self)
end

local function unescape(text)
  return (text:gsub("%%(%x%x)", function(digits) return string.char(tonumber(digits, 16)) end))
end

-- What went wrong, with the place unless it is an answer.
local function explain(problem)
  if refusal.is(problem) then return problem end
  return debug.traceback(tostring(problem), 2)
end

local function answer_failure(self, problem)
  if not refusal.is(problem) then
    self.server.log(problem)
    problem = { status = 500, message = "internal error; the server's log says more" }
  end
  self:refuse(problem)
end

-- The path of a target, and the authority where it is a whole URI, which servers have to take
-- (RFC 9112, 3.2.2).
local function read_target(target)
  local authority, rest = target:match("^[Hh][Tt][Tt][Pp][Ss]?://([^/?#]*)(.*)$")
  local path = unescape((rest or target):match("^[^?#]*"))
  if #path > 1 then path = path:gsub("/$", "") end
  return path == "" and "/" or path, authority
end

---Serves one request, in a coroutine of its own.
---@param server moonlet.Server
---@param request userdata
function http.serve(server, request)
  local path, authority = read_target(request:target() or "/")
  local self = setmetatable({ server = server, request = request, method = request:method() or "",
    path = path, authority = authority, fields = {}, room_taken = 0 }, Exchange)
  local start = sys.seconds()
  server.exchanges[request] = self
  local ok, problem = xpcall(handle, explain, self)
  if not ok then
    self:gone() -- ends what was begun for it
    ok, problem = xpcall(answer_failure, explain, self, problem)
  end
  if not ok then server.log(problem) end
  server.exchanges[request] = nil
  self:is_read()
  server.room:leave(self.room_taken)
  server.on_served(self, sys.seconds() - start)
  request:close()
end

---Reads the lines of a file of keys; those that begin with "#" are comments.
---@param path string
---@return string[]? keys, string? message, string? code
function http.read_keys(path)
  local text, message, code = sys.read_file(path, MAX_KEY_FILE_BYTES)
  if not text then return nil, message, code end
  local keys = {}
  for line in text:gmatch("[^\r\n]+") do
    line = trim.both(line)
    if #line > MAX_KEY_BYTES then
      return nil, ("%s: a key of more than %d bytes"):format(path, MAX_KEY_BYTES), "format"
    end
    if line ~= "" and line:sub(1, 1) ~= "#" then keys[#keys + 1] = line end
  end
  if #keys == 0 then return nil, path .. ": no key in it", "format" end
  return keys
end

---@param keys string[]
---@return fun(given: string): boolean takes as long for any key of one length
function http.key_check(keys)
  for _, key in ipairs(keys) do
    if type(key) ~= "string" or key == "" or #key > MAX_KEY_BYTES then
      options.misuse(("option 'api_keys': texts of 1 to %d bytes expected"):format(MAX_KEY_BYTES))
    end
  end
  return function(given)
    local found = false
    if #given > MAX_KEY_BYTES then return false end
    for _, key in ipairs(keys) do found = sys.same_secret(key, given) or found end
    return found
  end
end

return http
