--- An agent: a model that calls tools until it has an answer.
---
---   local agent <close> = assert(moonlet.agent { model = model, tools = { "read", "grep" } })
---   print(assert(agent:run("What is in notes.txt?")).text)
---
--- Every run goes on with the conversation of those before it, and each token is evaluated once.
--- What tools do wrong is told to the model; what the user's hooks do wrong raises.

local calls = require "moonlet.agent.calls"
local engine = require "moonlet.engine"
local json = require "moonlet.json"
local model = require "moonlet.model"
local options = require "moonlet.options"
local prompt = require "moonlet.prompt"
local replay = require "moonlet.replay"
local sched = require "moonlet.sched"
local tools = require "moonlet.tools"
local transcript = require "moonlet.agent.transcript"
local turn = require "moonlet.turn"

local agent = {}

local MAX_STEPS <const>, TOOL_SECONDS <const>, RESULT_BYTES <const> = 20, 120, 64 << 10
local UNFINISHED <const> = "Your tool call could not be read, and nothing was run. "
  .. "Write the whole call again."

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
---@field parallel? boolean false: one call after the other
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
  template = "table", parallel = "boolean", tool_seconds = "number", result_bytes = "integer",
  save = "string", resume = "string", on = "function", ask = "function",
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
  for _, name in ipairs { "max_steps", "max_tokens", "token_budget", "result_bytes" } do
    if o[name] and o[name] < 1 then
      options.misuse(("option '%s': 1 or more expected"):format(name))
    end
  end
end

local function open_model(self, o)
  if o.engine then
    self.model = o.engine.model
  elseif o.session then
    self.model = o.session.model
  elseif type(o.model) == "table" then
    self.model = o.model
  else
    local message, code
    local open = o.replay and model.open_texts or model.open
    self.model, message, code = open(o.model)
    if not self.model then return nil, message, code end
    self.owns_model = true
  end
  if self.model.tokenizer and self.model.template then return true end
  return nil, self.model.dir .. " has no tokenizer or no chat template", "unsupported"
end

local function open_engine(self, o)
  if o.engine then
    self.engine, self.loop = o.engine, o.engine.loop
    return true
  end
  local message, code
  self.loop, message, code = sched.open()
  if not self.loop then return nil, message, code end
  self.owns_loop = true
  if o.replay then
    local answers
    answers, message, code = replay.answers(o.replay)
    if not answers then return nil, message, code end
    self.engine = replay.open(self.model, self.loop, answers, { ctx = o.ctx })
  elseif o.session then
    self.engine, message, code = engine.open(self.model, self.loop, { session = o.session })
  else
    self.engine, message, code = engine.open(self.model, self.loop, { sessions = 1, ctx = o.ctx,
      kv = o.kv })
  end
  return self.engine, message, code
end

-- Own tools and built-in ones, in the order given; what the template is told of them.
local function open_tools(self, o)
  self.tools_by_name, self.tool_names = {}, {}
  local declared = json.array {}
  for i, tool in ipairs(o.tools or {}) do
    if type(tool) == "string" then
      local list, message, code = tools.list({ tool }, o.cwd)
      if not list then return nil, message, code end
      tool = list[1]
    end
    if type(tool) ~= "table" or type(tool.name) ~= "string" or type(tool.run) ~= "function" then
      options.misuse(("tool %d: a name, or a table with name and run expected"):format(i))
    end
    if tool.parameters ~= nil and type(tool.parameters) ~= "table" then
      options.misuse(("tool %d: parameters: a JSON schema expected"):format(i))
    end
    if self.tools_by_name[tool.name] then
      options.misuse(("tool %d: there are two of the name '%s'"):format(i, tool.name))
    end
    self.tools_by_name[tool.name], self.tool_names[i] = tool, tool.name
    declared[i] = json.object({ type = "function", ["function"] = json.object({ name = tool.name,
      description = tool.description, parameters = tool.parameters },
      { "name", "description", "parameters" }) }, { "type", "function" })
  end
  self.variables = {}
  for name, value in pairs(o.template or {}) do self.variables[name] = value end
  self.variables.tools = #declared > 0 and declared or nil
  return true
end

local function new_message(fields)
  return json.object(fields, { "role", "content", "reasoning_content", "tool_calls",
    "tool_call_id", "name" })
end

-- Adds to the conversation.
local function add(self, message, sampled)
  self.messages[#self.messages + 1] = message
  if not self.transcript then return true end
  return self.transcript:append(message, sampled)
end

-- Calls without a result, of a process that was killed meanwhile.
local function answer_open_calls(self)
  local open, order = {}, {}
  for _, message in ipairs(self.messages) do
    for _, call in ipairs(message.tool_calls or {}) do
      open[call.id], order[#order + 1] = call["function"].name, call.id
    end
    if message.tool_call_id then open[message.tool_call_id] = nil end
  end
  for _, id in ipairs(order) do
    if open[id] then
      local ok, message, code = add(self, new_message { role = "tool", tool_call_id = id,
        name = open[id], content = "Error: the tool was interrupted" })
      if not ok then return nil, message, code end
    end
  end
  return true
end

local function model_name(self)
  return self.model.dir:match("([^/]+)/*$") or self.model.dir
end

local function open_transcript(self, o)
  local message, code
  if o.resume then
    self.transcript, message, code = transcript.open(o.resume)
    if not self.transcript then return nil, message, code end
    self.messages = json.array(self.transcript.messages)
    local name, kept = model_name(self), self.transcript.model
    if kept ~= name and self.on then
      self.on { kind = "note", text = ("the conversation was kept with %s and goes on with %s: "
        .. "what %s has said is read again"):format(kept, name, kept) }
    end
    for _, sampled in pairs(self.transcript.sampled) do
      self.prompts:recall(sampled, self.variables.tools)
    end
    return answer_open_calls(self)
  end
  if o.save then
    self.transcript, message, code = transcript.create(o.save, model_name(self))
    if not self.transcript then return nil, message, code end
  end
  if not o.system then return true end
  return add(self, new_message { role = "system", content = o.system })
end

---@param given moonlet.AgentOptions
---@return moonlet.Agent? agent, string? message, string? code
function agent.open(given)
  local o = options.check(given, KNOWN)
  check_options(o)
  local self = setmetatable({ messages = json.array {}, jobs = {}, parallel = o.parallel ~= false,
    max_steps = o.max_steps or MAX_STEPS, max_tokens = o.max_tokens,
    token_budget = o.token_budget, generate = o.generate or {},
    tool_seconds = o.tool_seconds or TOOL_SECONDS, result_bytes = o.result_bytes,
    on = o.on, ask = o.ask, before_tool = o.before_tool, after_tool = o.after_tool,
    stop_hook = o.stop, transform_context = o.transform_context }, Agent)
  for _, step in ipairs { open_model, open_engine, open_tools } do
    local ok, message, code = step(self, o)
    if not ok then
      self:close()
      return nil, message, code
    end
  end
  -- A token spells some four bytes of English but one digit: the results of a turn take no more
  -- than half of the context.
  local half = self.engine.n_ctx // 2
  self.result_bytes = self.result_bytes or math.min(RESULT_BYTES, half)
  self.turn_bytes = math.max(self.result_bytes, half)
  self.prompts = prompt.new(self.model)
  local ok, message, code = open_transcript(self, o)
  if not ok then
    self:close()
    return nil, message, code
  end
  return self
end

-- ---- one turn ----------------------------------------------------------------------------------

local function emit(self, event)
  if self.queue then self.queue[#self.queue + 1] = event end
  if self.queue_changed then self.queue_changed() end
  if self.on then self.on(event) end
end

local function options_of_turn(self, p, run)
  local room = self.engine.n_ctx - #p.ids
  local o = {}
  for name, value in pairs(self.generate) do o[name] = value end
  o.max_tokens = math.min(self.max_tokens or room, o.max_tokens or room, room)
  if self.token_budget then
    o.max_tokens = math.min(o.max_tokens, self.token_budget - run.usage.generated)
  end
  return o
end

-- Parts of the turn, to events and into what the message is made of.
local function take(self, said, parts)
  for _, part in ipairs(parts) do
    if part.kind == "call" then
      said.calls[#said.calls + 1] = part
      emit(self, { kind = "tool_call", id = part.id, name = part.name,
        arguments = part.arguments })
    else
      if part.kind == "unfinished" then said.unfinished = true end
      local kind = part.kind == "reasoning" and "reasoning" or "content"
      said[kind] = (said[kind] or "") .. part.text
      emit(self, { kind = kind, text = part.text })
    end
  end
end

local function message_of(said)
  local list
  for i, part in ipairs(said.calls) do
    list = list or json.array {}
    list[i] = json.object({ id = part.id, type = "function",
      ["function"] = json.object({ name = part.name, arguments = part.arguments },
        { "name", "arguments" }) }, { "id", "type", "function" })
  end
  return new_message { role = "assistant", content = said.content or "",
    reasoning_content = said.reasoning, tool_calls = list }
end

local function count(run, ticket, n_prompt, n)
  local usage = { prompt = n_prompt, reused = ticket.reused or 0, evaluated = ticket.evaluated,
    generated = n }
  for name, value in pairs(usage) do run.usage[name] = run.usage[name] + value end
  return usage
end

-- Samples a turn: { message, calls, reason, sampled, unfinished }.
local function take_turn(self, run)
  local list = self.messages
  if self.transform_context then list = self.transform_context(list) or list end
  local p, message, code = self.prompts:make(list, self.variables)
  if not p then return nil, message, code end
  local ticket
  ticket, message, code = self.engine:submit { ids = p.ids, keep_at = p.keep_at,
    options = options_of_turn(self, p, run) }
  if not ticket then return nil, message, code end
  self.ticket = ticket
  local reader = turn.reader { tools = p.tools, reasoning = p.reasoning }
  local said, ids, pieces = { calls = {} }, {}, {}
  for token in ticket:tokens() do
    if self.cancelled then break end
    if token.id then ids[#ids + 1] = token.id end
    pieces[#pieces + 1] = token.text
    take(self, said, reader:feed(token.text))
  end
  self.ticket = nil
  emit(self, { kind = "usage", usage = count(run, ticket, #p.ids, #ids) })
  if self.cancelled then return { reason = "cancelled" } end
  local reason = ticket.finish_reason
  if reason == "error" or reason == "cancelled" then
    return nil, ticket.message or "the generation was ended", ticket.code or "cancelled"
  end
  take(self, said, reader:finish(reason == "context" and "length" or reason))
  return { message = message_of(said), calls = said.calls, reason = reason,
    sampled = self.prompts:remember(p, ids, table.concat(pieces)), unfinished = said.unfinished }
end

-- ---- a run -------------------------------------------------------------------------------------

local function answer_calls(self, said)
  local results, problem = calls.run(self, said.calls, function(part, result)
    emit(self, { kind = "tool_result", id = part.id, name = part.name,
      content = result.content, is_error = result.is_error })
  end)
  for i, part in ipairs(said.calls) do
    local ok, message, code = add(self, new_message { role = "tool", tool_call_id = part.id,
      name = part.name, content = results[i].content })
    if not ok then return nil, message, code end
  end
  if problem then error(problem, 0) end
  return results
end

local function is_spent(self, run)
  return self.token_budget and run.usage.generated >= self.token_budget
end

-- One turn and what follows from it: the reason to end, or true to go on, or nil and a message.
local function take_step(self, run)
  local said, message, code = take_turn(self, run)
  if not said then return nil, message, code end
  if said.reason == "cancelled" then return "cancelled" end
  local ok
  ok, message, code = add(self, said.message, said.sampled)
  if not ok then return nil, message, code end
  run.text = said.message.content
  emit(self, { kind = "turn", step = run.steps, message = said.message, reason = said.reason })
  local results = {}
  if #said.calls > 0 then
    results, message, code = answer_calls(self, said)
    if not results then return nil, message, code end
  elseif said.unfinished and said.reason == "stop" then
    ok, message, code = add(self, new_message { role = "user", content = UNFINISHED })
    if not ok then return nil, message, code end
  end
  if self.cancelled then return "cancelled" end
  if self.stop_hook and self.stop_hook { step = run.steps, message = said.message,
    calls = said.calls, results = results } then
    return "hook"
  end
  if is_spent(self, run) and (said.reason == "length" or #said.calls > 0) then return "tokens" end
  if said.reason == "context" then return "context" end
  if #said.calls > 0 or said.unfinished and said.reason == "stop" then return true end
  return said.reason
end

local function run_steps(self, text)
  local run = { steps = 0, text = "",
    usage = { prompt = 0, reused = 0, evaluated = 0, generated = 0 } }
  local reason, message, code = true, nil, nil
  if text then
    local ok
    ok, message, code = add(self, new_message { role = "user", content = text })
    if not ok then return nil, message, code end
  end
  while reason == true do
    if run.steps == self.max_steps then
      reason = "steps"
    else
      run.steps = run.steps + 1
      reason, message, code = take_step(self, run)
    end
  end
  if not reason then return nil, message, code end
  local result = { text = run.text, reason = reason, steps = run.steps, usage = run.usage }
  emit(self, { kind = "end", result = result })
  return result
end

-- Nothing of a run outlives it, however it ends.
local function guarded(self, text)
  local returned = table.pack(xpcall(run_steps, debug.traceback, self, text))
  if self.ticket then self.ticket:cancel() end
  self.ticket, self.running = nil, false
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

local function drive(self, done)
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
    if not returned then
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
  for job in pairs(self.jobs) do job.changed:notify() end
end

---Frees what the agent has opened.
function Agent:close()
  self.closed = true
  if self.transcript then self.transcript:close() end
  if self.owns_loop then
    if self.engine then self.engine:close() end
    self.loop:close()
  end
  if self.owns_model then self.model:close() end
  self.transcript, self.owns_loop, self.owns_model = nil, false, false
end

Agent.__close = Agent.close

return setmetatable(agent, { __call = function(_, given) return agent.open(given) end })
