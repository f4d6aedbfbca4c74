--- What an operator adds to a server: hooks that see requests, tokens and answers, and policies
--- that requests choose by name.
---
---   moonlet.serve { model = "dir",
---     hooks = { on_request = function(request, path) request.temperature = 0 end },
---     policies = { careful = { temperature = 0.3, top_p = 0.9 } } }

local guard = require "moonlet.guard"
local json = require "moonlet.json"
local options = require "moonlet.options"
local refusal = require "moonlet.server.refusal"
local sampler = require "moonlet.sampler"
local sys = require "moonlet.sys"

local hooks = {}

local KNOWN <const> = { on_request = "function", on_token = "function",
  on_response = "function" }

---@class moonlet.server.Message
---@field content string?
---@field reasoning string?
---@field calls { id: string, name: string, arguments: table }[]
---@field finish_reason string

---@class moonlet.server.Hooks
---@field on_request? fun(request: table, path: string): table?, string?  the body of a request; may
---  change it or return another; nil and a sentence refuse
---@field on_token? fun(token: moonlet.Token, request: table): string?  "stop" ends the answer
---  in front of this token
---@field on_response? fun(message: moonlet.server.Message, request: table): table?, string?  a
---  whole answer; may change it or return another; nil and a sentence refuse
---@field log fun(text: string)
local Hooks = {}
Hooks.__index = Hooks

---@param given table? hooks by name
---@param log fun(text: string)
---@return moonlet.server.Hooks
function hooks.new(given, log)
  local self = { log = log }
  for name, fn in pairs(options.check(given, KNOWN)) do self[name] = fn end
  return setmetatable(self, Hooks)
end

local MAX_LEVELS <const>, MAX_VALUES <const> = 100, 1 << 20
local ARRAY <const>, OBJECT <const> = debug.getmetatable(json.array {}),
  debug.getmetatable(json.object {})

-- Whether the keys of a table are those of a list or an object.
local function has_keys(list, value)
  local n = 0
  for key in next, value do
    n = n + 1
    if list and not (math.type(key) == "integer" and key >= 1 and key <= rawlen(value))
      or not list and type(key) ~= "string" then
      return false
    end
  end
  return not list or n == rawlen(value)
end

-- Why a value is no JSON, or nothing. Runs nothing of the hook's: whoever reads the value would
-- not expect it to raise.
local function flaw(value, seen, level)
  local kind = type(value)
  seen.n = seen.n + 1
  if seen.n > MAX_VALUES then return ("more than %d values"):format(MAX_VALUES) end
  if kind == "number" then
    return (value ~= value or math.abs(value) == math.huge) and "a number that is not finite" or nil
  end
  if kind == "string" then return not utf8.len(value) and "a text that is not UTF-8" or nil end
  if kind == "boolean" or value == json.null then return nil end
  if kind ~= "table" then return "a " .. kind end
  local meta = debug.getmetatable(value)
  if meta and meta ~= ARRAY and meta ~= OBJECT then return "a table with a metatable" end
  if level > MAX_LEVELS then return ("more than %d levels (a cycle?)"):format(MAX_LEVELS) end
  if not has_keys(json.is_array(value), value) then return "a table with keys of several kinds" end
  for key, member in next, value do
    local problem = type(key) == "string" and not utf8.len(key) and "a key that is not UTF-8"
      or flaw(member, seen, level + 1)
    if problem then return problem end
  end
end

local function no_json(value)
  return flaw(value, { n = 0 }, 1)
end

local MAX_SHOWN <const> = 1000 -- bytes of a table that was raised

local function first_line(problem)
  if type(problem) == "table" and not no_json(problem) then
    return json.encode(problem):sub(1, MAX_SHOWN)
  end
  local ok, text = guard.call(tostring, problem)
  return ok and text:match("^[^\n]*") or ("an error that is a %s"):format(type(problem))
end

-- A hook that fails ends its request and nothing else. The client is at no fault, and trying again
-- would not help it: 422, which clients do not repeat. What was raised is the operator's to read.
local function fail(self, name, problem)
  self.log(("hook %s: %s"):format(name, first_line(problem)))
  refusal.raise(422, ("the server's hook %s failed"):format(name), { code = "hook_failed" })
end

local function call(self, name, ...)
  local returned = table.pack(guard.call(self[name], ...))
  if returned[1] then return returned[2], returned[3] end
  fail(self, name, returned[2])
end

local function refuse_kind(self, name, wanted, value)
  fail(self, name, ("%s expected, got %s"):format(wanted, type(value)))
end

-- What a hook made of a table: it, changed; another; or a refusal.
local function changed(self, name, value, ...)
  local other, message = call(self, name, value, ...)
  if other == nil and message ~= nil then
    if type(message) ~= "string" then refuse_kind(self, name, "a text as reason", message) end
    refusal.raise(400, message)
  end
  if other == nil then return value end
  if type(other) ~= "table" then refuse_kind(self, name, "a table", other) end
  return other
end

---@param body table
---@param path string of the endpoint
---@return table body
function Hooks:request(body, path)
  if not self.on_request then return body end
  local made = changed(self, "on_request", body, path)
  local problem = no_json(made)
  if problem then fail(self, "on_request", "what it makes of a request is no JSON: " .. problem) end
  return made
end

---@return boolean ends whether the answer ends in front of this token
function Hooks:ends(token, request)
  if not self.on_token then return false end
  local shown = { id = token.id, text = token.text, logprob = token.logprob } -- it may change it
  local answer = call(self, "on_token", shown, request)
  if answer and answer ~= "stop" then
    refuse_kind(self, "on_token", '"stop" or nothing', answer)
  end
  return answer == "stop"
end

-- What keeps a value from being a call or a message, as "content: a text expected"; nil if nothing.
local function flaw_of_call(one)
  if type(one) ~= "table" then return ": a table expected" end
  for _, name in ipairs { "id", "name" } do
    if type(one[name]) ~= "string" then return (".%s: a text expected"):format(name) end
  end
  if not json.is_object(one.arguments) then return ".arguments: a table by names expected" end
end

local function flaw_of_message(message)
  for _, name in ipairs { "content", "reasoning" } do
    if message[name] ~= nil and type(message[name]) ~= "string" then
      return name .. ": a text expected"
    end
  end
  local calls = message.calls
  if calls == nil then return nil end
  if type(calls) ~= "table" or next(calls) ~= nil and not json.is_array(calls) then
    return "calls: a list expected"
  end
  for i, one in ipairs(calls) do
    local problem = flaw_of_call(one)
    if problem then return ("calls[%d]%s"):format(i, problem) end
  end
end

---@param message moonlet.server.Message
---@return moonlet.server.Message
function Hooks:response(message, request)
  message = changed(self, "on_response", message, request)
  local problem = no_json(message) or flaw_of_message(message)
  if problem then
    fail(self, "on_response", "no message is like what it returned: " .. problem)
  end
  return message
end

-- ---- policies ----------------------------------------------------------------------------------

-- A policy is options of moonlet.sampler, a list of stages, or a function that makes one of them.
local function check_policy(spec)
  if type(spec) == "function" then return true end
  if type(spec) ~= "table" then return nil, "options, stages or a function expected" end
  if #spec == 0 then return sampler.check_options(spec) end
  local ok, message = pcall(sampler, spec)
  return ok or nil, message
end

---@param given table<string, table|function>?
---@return table<string, table|function>
function hooks.policies(given)
  for name, spec in pairs(given or {}) do
    if type(name) ~= "string" or not name:find("^[%w_.-]+$") then
      options.misuse("policies: names of letters, digits, _, . and - expected")
    end
    local ok, message = check_policy(spec)
    if not ok then options.misuse(("policy '%s': %s"):format(name, message)) end
  end
  return given or {}
end

-- Tokens that a policy's options or stages name.
local function biases_of(spec)
  local list = { spec.logit_bias }
  for _, stage in ipairs(spec) do
    if type(stage) == "table" and stage[1] == "logit_bias" then list[#list + 1] = stage[2] end
  end
  return list
end

---@param policies table<string, table|function> as from hooks.policies
---@param n_vocab integer
---@return boolean? ok, string? message, string? code
function hooks.check_ids(policies, n_vocab)
  for name, spec in pairs(policies) do
    for _, bias in ipairs(type(spec) == "table" and biases_of(spec) or {}) do
      for id in pairs(bias) do
        if id >= n_vocab then
          return nil, ("policy '%s': logit_bias: %d is not a token id (0 to %d)"):format(name, id,
            n_vocab - 1), "range"
        end
      end
    end
  end
  return true
end

-- A policy as it is to be used: its stages are the operator's.
local function guarded(spec)
  if #spec == 0 then return spec end
  local made = { seed = spec.seed }
  for i, stage in ipairs(spec) do made[i] = guard.stage(stage) end
  return made
end

-- As it is to be used, or nil and what is wrong with it.
local function check_made(made)
  if type(made) == "table" and debug.getmetatable(made) then
    return nil, "a plain table expected"
  end
  local ok, message = check_policy(type(made) == "table" and made)
  if not ok then return nil, message end
  return guarded(made)
end

local function no_policy(server, name)
  local names = {}
  for known in pairs(server.policies) do names[#names + 1] = known end
  table.sort(names)
  local there = #names == 0 and "the server has none" or "there are " .. table.concat(names, ", ")
  refusal.raise(400, ("policy: there is no %s here; %s"):format(name, there), { param = "policy" })
end

---A policy failed with a problem, which is logged: what the client is told.
---@param server moonlet.Server
---@param name string
---@param problem any
---@return string message
---@return string code
function hooks.explain_policy(server, name, problem)
  server.log(("policy '%s': %s"):format(name, first_line(problem)))
  return ("the server's policy '%s' failed"):format(name), "hook_failed"
end

---Whether functions of the operator's may look at a request after it was read.
---@param server moonlet.Server
---@return boolean
function hooks.see_requests(server)
  local given = server.hooks
  return (given.on_token or given.on_response or next(server.policies)) ~= nil
end

---The policy that a request asks for: by its field "policy", or behind "@" in its model's name.
---@param server moonlet.Server
---@param request table
---@return table? spec options or stages
---@return string? name
function hooks.find_policy(server, request)
  local name = request.policy
  if name == nil or name == json.null then
    -- Names of models may hold an "@", where there are no policies to be meant.
    if type(request.model) ~= "string" or request.model == server.name
      or not next(server.policies) then
      return nil
    end
    name = request.model:match("@(.*)$")
    if not name then return nil end
  end
  local spec = server.policies[name]
  if not spec then no_policy(server, json.encode(name)) end
  if type(spec) ~= "function" then return guarded(spec), name end
  local ok, made = guard.call(spec, request)
  local message = made
  if ok then ok, made, message = guard.call(check_made, made) end
  if ok and made then return made, name end
  if not ok then message = made end
  local code
  message, code = hooks.explain_policy(server, name, message)
  return refusal.raise(422, message, { code = code })
end

-- One line that names the file, and the place in it where Lua does.
local function at(path, problem)
  local message = first_line(problem)
  if not message:find(path, 1, true) then message = path .. ": " .. message end
  return "hooks: " .. message
end

---Hooks and policies of a Lua file, which returns a table of both.
---@param path string
---@return table? hooks, table|string policies_or_message, string? code
function hooks.read(path)
  local chunk, message = loadfile(path, "t")
  if not chunk then return nil, at(path, message), "format" end
  local ok, made = guard.load(chunk)
  if not ok and sys.interrupted() then return nil, "interrupted", "cancelled" end
  if not ok then return nil, at(path, made), "format" end
  if type(made) ~= "table" then return nil, at(path, "does not return a table"), "format" end
  local given = {}
  for name, value in pairs(made) do given[name] = value end
  local policies = given.policies
  given.policies = nil
  ok, message = pcall(options.check, given, KNOWN)
  if ok and policies ~= nil and type(policies) ~= "table" then
    ok, message = false, "policies: a table expected"
  end
  if ok then ok, message = pcall(hooks.policies, policies) end
  if not ok then return nil, at(path, (message:gsub("^.-:%d+: ", ""))), "format" end
  return given, policies or {}
end

return hooks
