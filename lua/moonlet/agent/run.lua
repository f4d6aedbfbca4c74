--- One run of an agent: turns of the model and what follows from each, until there is an answer.

local calls = require "moonlet.agent.calls"
local failure = require "moonlet.agent.failure"
local hooks = require "moonlet.agent.hooks"
local json = require "moonlet.json"
local trim = require "moonlet.trim"
local turn = require "moonlet.turn"

local check = failure.check

local UNREAD <const> = "Error: the last tool call could not be read, and it was not run; "
  .. "write the whole call again"

---@class moonlet.agent.Run
---@field agent moonlet.Agent
---@field steps integer
---@field text string
---@field usage moonlet.AgentUsage
local Run = {}
Run.__index = Run

-- ---- one turn ----------------------------------------------------------------------------------

-- Tokens that an answer may have.
function Run:room(p)
  return self.agent.engine.n_ctx - #p.ids
end

function Run:options_of_turn(p)
  local agent, room, o = self.agent, self:room(p), {}
  for name, value in pairs(agent.generate) do o[name] = value end
  o.max_tokens = math.min(agent.max_tokens or room, o.max_tokens or room, room)
  if agent.token_budget then
    o.max_tokens = math.min(o.max_tokens, agent.token_budget - self.usage.generated)
  end
  return o
end

-- Parts of the turn, to events and into what the message is made of.
local function take(agent, said, parts)
  for _, part in ipairs(parts) do
    if part.kind == "call" then
      said.calls[#said.calls + 1] = part
      agent:emit { kind = "tool_call", id = part.id, name = part.name,
        arguments = part.arguments }
    else
      if part.kind == "unfinished" then said.unfinished = true end
      local kind = part.kind == "reasoning" and "reasoning" or "content"
      said[kind] = (said[kind] or "") .. part.text
      agent:emit { kind = kind, text = part.text }
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
  return { role = "assistant", content = said.content or "", reasoning_content = said.reasoning,
    tool_calls = list }
end

function Run:count(ticket, n_prompt, n)
  local usage = { prompt = n_prompt, reused = ticket.reused or 0, evaluated = ticket.evaluated,
    generated = n }
  for name, value in pairs(usage) do self.usage[name] = self.usage[name] + value end
  self.agent:emit { kind = "usage", usage = usage }
end

function Run:make_prompt()
  local agent = self.agent
  local list, changed = hooks.transform_context(agent)
  local p, message, code = agent.prompts:make(list, agent.variables)
  if not p and changed then failure.misuse("hook transform_context: " .. message) end
  return check(p, message, code)
end

-- Whether a turn has something in it that was meant as a call.
local function is_unread(said, reader)
  if said.unfinished or reader.n_broken > 0 then return true end
  local text = trim.right(said.content or "")
  return text:find("<tool_call>", 1, true) and text:find("</tool_call>", -#"</tool_call>", true)
end

-- What the user can do about a conversation that has grown too long.
local function explain_limit(message, code)
  if code ~= "limit" then return message, code end
  return message .. ": give it a larger one (ctx, --ctx) or fewer messages (transform_context)",
    code
end

-- The turn begins: from here on the message that it answers is part of the conversation.
function Run:submit(p)
  local agent = self.agent
  local ticket, message, code = agent.engine:submit { ids = p.ids, keep_at = p.keep_at,
    options = self:options_of_turn(p) }
  if not ticket then check(nil, explain_limit(message, code)) end
  agent.ticket = ticket
  agent.conversation:confirm()
  return ticket
end

-- Samples a turn: { fields, calls, reason, sampled, unread }; nothing when it was cancelled.
-- `unread` is an id for a call that could not be read.
function Run:take_turn()
  local agent, p = self.agent, self:make_prompt()
  local ticket = self:submit(p)
  local reader = turn.reader { tools = p.tools, reasoning = p.reasoning }
  local said, ids, pieces = { calls = {} }, {}, {}
  for token in ticket:tokens() do
    if agent.cancelled then break end
    if token.id then ids[#ids + 1] = token.id end
    pieces[#pieces + 1] = token.text
    take(agent, said, reader:feed(token.text))
  end
  agent.ticket = nil
  self:count(ticket, #p.ids, #ids)
  if agent.cancelled then return nil end
  local reason = ticket.finish_reason
  if reason == "error" or reason == "cancelled" then
    -- A scripted failure has no code; only who has closed the engine has interrupted the run.
    check(nil, ticket.message or "the generation was ended",
      reason == "cancelled" and reason or ticket.code or "io")
  end
  take(agent, said, reader:finish(reason))
  if reason == "length" and #ids == self:room(p) then reason = "context" end
  return { fields = message_of(said), calls = said.calls, reason = reason,
    sampled = agent.prompts:remember(p, ids, table.concat(pieces)),
    unread = is_unread(said, reader) and reader.new_id() or nil }
end

-- ---- what follows ------------------------------------------------------------------------------

function Run:answer_calls(list)
  local agent = self.agent
  local results, problem = calls.run(agent, list, function(part, result)
    agent:emit { kind = "tool_result", id = part.id, name = part.name,
      content = result.content, is_error = result.is_error }
  end)
  for i, part in ipairs(list) do
    agent.conversation:add { role = "tool", tool_call_id = part.id, name = part.name,
      content = results[i].content }
  end
  if problem then error(problem, 0) end
  return results
end

-- As the result of a call, not as a user's question, before which templates drop thoughts.
function Run:refuse_unread(id)
  self.agent:emit { kind = "tool_result", id = id, content = UNREAD, is_error = true }
  self.agent.conversation:add { role = "tool", tool_call_id = id, content = UNREAD }
end

function Run:is_spent()
  local budget = self.agent.token_budget
  return budget and self.usage.generated >= budget
end

-- One turn and what follows from it: the reason to end, or nothing to go on.
function Run:take_step()
  local agent = self.agent
  self.steps = self.steps + 1
  local said = self:take_turn()
  if not said then return "cancelled" end
  local message = agent.conversation:add(said.fields, said.sampled)
  self.text = message.content
  agent:emit { kind = "turn", step = self.steps, message = message, reason = said.reason }
  local results = self:answer_calls(said.calls)
  if agent.cancelled then return "cancelled" end
  if hooks.stop(agent, { step = self.steps, message = message, calls = said.calls,
    results = results }) then
    return "hook"
  end
  local asks_again = said.unread and (said.reason == "stop" or #said.calls > 0)
  local goes_on = asks_again or #said.calls > 0
  if self:is_spent() and (goes_on or said.reason == "length") then return "tokens" end
  if said.reason == "context" or not goes_on then return said.reason end
  if asks_again then self:refuse_unread(said.unread) end
end

-- What went wrong beside the run.
function Run:tell_notes()
  local notes = self.agent.notes
  while notes[1] do self.agent:emit { kind = "note", text = table.remove(notes, 1) } end
end

local run = {}

---Answers a message, or without one goes on where the conversation stands.
---@param agent moonlet.Agent
---@param text string?
---@return moonlet.AgentResult
function run.go(agent, text)
  local self = setmetatable({ agent = agent, steps = 0, text = "",
    usage = { prompt = 0, reused = 0, evaluated = 0, generated = 0 } }, Run)
  if text then agent.conversation:propose { role = "user", content = text } end
  local reason
  repeat
    reason = self.steps == agent.max_steps and "steps" or self:take_step()
    self:tell_notes()
  until reason
  if agent.closed and reason == "cancelled" then check(nil, "the agent was closed", reason) end
  local result = { text = self.text, reason = reason, steps = self.steps, usage = self.usage }
  agent:emit { kind = "end", result = result }
  return result
end

return run
