--- An agent: a model that calls tools until it has an answer.
---
---   local agent <close> = assert(moonlet.agent { model = model, tools = { "read", "grep" } })
---   print(assert(agent:run("What is in notes.txt?")).text)
---
--- Every run goes on with the conversation of those before it, and each token is evaluated once.
--- What tools do wrong is told to the model; what the user's hooks do wrong raises.

local calls = require "moonlet.agent.calls"
local conversation = require "moonlet.agent.conversation"
local engine = require "moonlet.engine"
local failure = require "moonlet.agent.failure"
local model = require "moonlet.model"
local options = require "moonlet.options"
local prompt = require "moonlet.prompt"
local replay = require "moonlet.replay"
local run = require "moonlet.agent.run"
local sched = require "moonlet.sched"
local toolset = require "moonlet.agent.toolset"

local check = failure.check

local agent = {}

local MAX_STEPS <const>, TOOL_SECONDS <const>, RESULT_BYTES <const> = 20, 120, 64 << 10
local MAX_PARALLEL <const> = 16

---@class moonlet.AgentOptions
---@field model? string|moonlet.Model directory, or a model (which stays open)
---@field session? moonlet.Session instead: runs on it, and goes on where it stands
---@field engine? moonlet.Engine instead: shares it; run() then belongs into a coroutine of its loop
---@field replay? string|table with `model`: a script of answers instead of weights (moonlet.replay)
---@field ctx? integer, kv? string  of the session to open; see Model:session
---@field system? string
---@field tools? (string|moonlet.Tool)[] own ones, and names of built-in ones (moonlet.tools)
---@field cwd? string directory of built-in tools (".")
---@field max_steps? integer turns of one run (20)
---@field max_tokens? integer of one turn
---@field token_budget? integer tokens that one run may generate
---@field generate? table options of Session:generate
---@field template? table variables of the chat template, such as enable_thinking
---@field parallel? boolean|integer calls that run at a time (16); false: one after the other
---@field tool_seconds? number until a tool is given up (120), where it does not say itself
---@field result_bytes? integer of a tool's result that the model sees (64 KiB, or half as many
---  as the context has tokens if that is less)
---@field save? string file to keep the conversation in, which must be new
---@field resume? string file of an earlier conversation to go on with
---@field on? fun(event: moonlet.AgentEvent)
---@field ask? fun(call: table, tool: moonlet.Tool): boolean?, string?  whether a call of a tool
---  with `ask` may run, and why not; without it all may
---@field before_tool? fun(call: table, tool: moonlet.Tool): false|moonlet.ToolResult|nil, string?
---  may change call.arguments; false and a reason refuse; a result takes the tool's place
---@field after_tool? fun(call: table, result: moonlet.ToolResult): moonlet.ToolResult?  may change
---@field stop? fun(turn: moonlet.AgentTurn): boolean?  after a turn's calls: true ends the run
---@field transform_context? fun(messages: table[]): table[]?  what the model sees of them

---@class moonlet.AgentEvent
---@field kind "note"|"reasoning"|"content"|"tool_call"|"tool_result"|"turn"|"usage"|"end"
---@field text? string with reasoning and content: a piece; with note: what the user should know
---@field id? string, name? string, arguments? table  of a call or of what is answered
---@field content? string, is_error? boolean  with tool_result
---@field step? integer, message? table, reason? string  with turn: what was said, why it ended
---@field usage? moonlet.AgentUsage with usage: of the turn
---@field result? moonlet.AgentResult with end

---@class moonlet.AgentUsage
---@field prompt integer tokens of prompts
---@field reused integer of them: needed no evaluation
---@field evaluated integer of them: were evaluated
---@field generated integer

---@class moonlet.AgentTurn
---@field step integer
---@field message table
---@field calls table[]
---@field results moonlet.ToolResult[]

---@class moonlet.AgentResult
---@field text string of the last answer, "" when there was none
---@field reason "stop"|"steps"|"tokens"|"length"|"context"|"hook"|"cancelled"
---@field steps integer turns
---@field usage moonlet.AgentUsage

local KNOWN <const> = { model = "any", session = "table", engine = "table", replay = "any",
  ctx = "integer", kv = "string", system = "string", tools = "table", cwd = "string",
  max_steps = "integer", max_tokens = "integer", token_budget = "integer", generate = "table",
  template = "table", parallel = "boolean|integer", tool_seconds = "number",
  result_bytes = "integer", save = "string", resume = "string", on = "function", ask = "function",
  before_tool = "function", after_tool = "function", stop = "function",
  transform_context = "function" }

---@class moonlet.Agent
---@field messages table[] the conversation
---@field model moonlet.Model
---@field loop moonlet.Loop
---@field engine moonlet.Engine
local Agent = {}
Agent.__index = Agent

-- ---- opening -----------------------------------------------------------------------------------

local function check_options(o)
  local n = (o.model and 1 or 0) + (o.session and 1 or 0) + (o.engine and 1 or 0)
  if n ~= 1 then options.misuse("one of the options model, session and engine expected") end
  if o.replay and not o.model then options.misuse("option 'replay': goes with model") end
  if o.replay and type(o.replay) ~= "string" and type(o.replay) ~= "table" then
    options.misuse("option 'replay': a file, or a table of answers, expected")
  end
  if o.save and o.resume then options.misuse("give one of the options save and resume") end
  if o.resume and o.system then
    options.misuse("option 'system': a resumed conversation has its own")
  end
  for _, name in ipairs { "ctx", "max_steps", "max_tokens", "token_budget", "result_bytes",
    "parallel" } do
    if math.type(o[name]) and o[name] < 1 then
      options.misuse(("option '%s': 1 or more expected"):format(name))
    end
  end
  local seconds = o.tool_seconds or TOOL_SECONDS
  if seconds <= 0 or seconds ~= seconds then
    options.misuse("option 'tool_seconds': a number above 0 expected")
  end
end

local function open_model(self, o)
  local shared = o.engine or o.session
  local opened, owned, code = model.for_chat(shared and shared.model or o.model, nil,
    o.replay ~= nil)
  self.model = check(opened, owned, code)
  self.owns_model = owned
end

local function open_engine(self, o)
  if o.engine then
    self.engine, self.loop = o.engine, o.engine.loop
    return
  end
  self.loop, self.owns_loop = check(sched.open()), true
  if o.replay then
    self.engine = replay.open(self.model, self.loop, check(replay.answers(o.replay)),
      { ctx = o.ctx })
  elseif o.session then
    self.engine = check(engine.open(self.model, self.loop, { session = o.session }))
  else
    self.engine = check(engine.open(self.model, self.loop, { sessions = 1, ctx = o.ctx,
      kv = o.kv }))
  end
end

local function open_tools(self, o)
  local set = toolset.open(o.tools, o.cwd)
  self.tools_by_name, self.tool_names, self.variables = set.by_name, set.names, {}
  for name, value in pairs(o.template or {}) do self.variables[name] = value end
  self.variables.tools = set.declared
end

-- Whether this model's tokens say what a turn was sampled as: another model may have said it.
local function is_spelled(tokenizer, sampled)
  local pieces = {}
  for i, id in ipairs(sampled.ids) do
    pieces[i] = id >= 0 and id < tokenizer:n_vocab() and tokenizer:token_bytes(id) or "\0"
  end
  return table.concat(pieces) == sampled.text
end

local function open_conversation(self, o)
  local name = self.model.dir:match("([^/]+)/*$") or self.model.dir
  self.conversation = conversation.new()
  local kept = self.conversation:open(o, name)
  self.messages = self.conversation.messages
  if kept ~= name then
    self:emit { kind = "note", text = ("the conversation was kept with %s and goes on with %s: "
      .. "what %s has said is read again"):format(kept, name, kept) }
  end
  self.prompts = prompt.new(self.model)
  for _, sampled in ipairs(self.conversation.sampled) do
    if is_spelled(self.model.tokenizer, sampled) then
      self.prompts:recall(sampled, self.variables.tools)
    end
  end
end

local function open_all(self, o)
  open_model(self, o)
  open_engine(self, o)
  open_tools(self, o)
  -- A token spells some four bytes of English but one digit: the results of a turn take no more
  -- than half of the context.
  local half = self.engine.n_ctx // 2
  self.result_bytes = o.result_bytes or math.min(RESULT_BYTES, half)
  self.turn_bytes = math.max(self.result_bytes, half)
  open_conversation(self, o)
  return self
end

---@param given moonlet.AgentOptions
---@return moonlet.Agent? agent, string? message, string? code
function agent.open(given)
  local o = options.check(given, KNOWN)
  check_options(o)
  local self = setmetatable({ jobs = {}, abandoned = {}, notes = {},
    parallel = o.parallel == false and 1 or math.tointeger(o.parallel) or MAX_PARALLEL,
    max_steps = o.max_steps or MAX_STEPS, max_tokens = o.max_tokens,
    token_budget = o.token_budget, generate = o.generate or {},
    tool_seconds = o.tool_seconds or TOOL_SECONDS,
    on = o.on, ask = o.ask, before_tool = o.before_tool, after_tool = o.after_tool,
    stop_hook = o.stop, transform_context = o.transform_context }, Agent)
  local ok, opened, message, code = failure.returned(pcall(open_all, self, o))
  if opened == self then return self end
  self:close()
  if not ok then error(opened, 0) end
  return nil, message, code
end

-- ---- running ----------------------------------------------------------------------------------

---Tells of an event of the run.
---@param event moonlet.AgentEvent
function Agent:emit(event)
  if self.queue then self.queue[#self.queue + 1] = event end
  if self.queue_changed then self.queue_changed() end
  if self.on then self.on(event) end
end

-- Frees what the agent has opened.
local function release(self)
  if self.conversation then self.conversation:close() end
  if self.owns_loop then
    if self.engine then self.engine:close() end
    self.loop:close()
  end
  if self.owns_model then self.model:close() end
  self.owns_loop, self.owns_model = false, false
end

-- Nothing of a run outlives it, however it ends.
local function guarded(self, text)
  local returned = table.pack(failure.returned(xpcall(run.go, debug.traceback, self, text)))
  if self.ticket then self.ticket:cancel() end
  calls.settle(self)
  self.conversation:withdraw()
  self.ticket, self.running = nil, false
  if self.closed and not self.owns_loop then release(self) end
  return returned
end

local function unpack_run(returned)
  if not returned[1] then error(returned[2], 0) end
  return table.unpack(returned, 2, returned.n)
end

local function begin(self, text)
  if self.closed then options.misuse("closed agent") end
  if self.running then options.misuse("the agent is running") end
  if text ~= nil and (type(text) ~= "string" or not utf8.len(text)) then
    options.misuse("a text in UTF-8 expected")
  end
  self.running, self.cancelled = true, false
end

-- In a coroutine of somebody's loop, or by driving the loop until `done`.
local function drives_loop(self)
  return self.owns_loop or not coroutine.isyieldable()
end

-- Whoever closes the agent from in there is inside of the loop.
local function leave_loop(driven)
  local self = driven.agent
  self.is_driven = false
  if self.closed then release(self) end
end

local function drive(self, done)
  if self.closed and not done() then options.misuse("closed agent") end
  self.is_driven = true
  local _ <close> = setmetatable({ agent = self }, { __close = leave_loop })
  while not done() do
    local ok, message = self.loop:run()
    if not ok then error(message, 0) end
  end
end

---Answers a message, or without one goes on where the conversation stands.
---@param text string?
---@return moonlet.AgentResult? result, string? message, string? code
function Agent:run(text)
  begin(self, text)
  if not drives_loop(self) then return unpack_run(guarded(self, text)) end
  local returned
  self.loop:spawn(function()
    returned = guarded(self, text)
    self.loop:stop()
  end)
  drive(self, function() return returned end)
  return unpack_run(returned)
end

---The same, as an iterator over the events. Leaving the loop early cancels the run. The last event
---is of kind "end", and what run() would return as nil, message, code is one of kind "error".
---@param text string?
---@return fun(): moonlet.AgentEvent?
function Agent:events(text)
  begin(self, text)
  local queue, returned = {}, nil
  local changed, drives = self.loop:signal(), drives_loop(self)
  self.queue = queue
  local function notify()
    changed:notify()
    if drives then self.loop:stop() end
  end
  self.queue_changed = notify
  self.loop:spawn(function()
    returned = guarded(self, text)
    self.queue, self.queue_changed = nil, nil
    if returned[1] and not returned[2] then
      queue[#queue + 1] = { kind = "error", message = returned[3], code = returned[4] }
    end
    notify()
  end)
  local function wait(ready)
    if drives then return drive(self, ready) end
    while not ready() do changed:wait() end
  end
  local function next_event()
    wait(function() return #queue > 0 or returned end)
    local event = table.remove(queue, 1)
    if event == nil and not returned[1] then error(returned[2], 0) end
    return event
  end
  local ending = setmetatable({}, { __close = function()
    if not (returned or self.closed) then
      self:cancel()
      wait(function() return returned end)
    end
  end })
  return next_event, nil, nil, ending
end

---Ends the current run; it returns with the reason "cancelled". What the model was saying is
---dropped, tools that run are stopped and answered for.
function Agent:cancel()
  if not self.running or self.cancelled then return end
  self.cancelled = true
  if self.ticket then self.ticket:cancel() end
  calls.wake(self)
end

---Frees what the agent has opened; from within a run, when that has ended.
function Agent:close()
  self.closed = true
  self:cancel()
  if self.is_driven or self.running and not self.owns_loop then return end
  release(self)
end

Agent.__close = Agent.close

return setmetatable(agent, { __call = function(_, given) return agent.open(given) end })
