--- The messages of an agent, and the transcript that they are kept in.

local failure = require "moonlet.agent.failure"
local json = require "moonlet.json"
local transcript = require "moonlet.agent.transcript"

local check = failure.check

local conversation = {}

local ORDER <const> = { "role", "content", "reasoning_content", "tool_calls", "tool_call_id",
  "name" }

---@class moonlet.agent.Conversation
---@field messages table[]
---@field sampled moonlet.SampledTurn[] of the messages that were read
---@field transcript moonlet.Transcript?
---@field proposed table? the last message, while it is in the transcript not yet
local Conversation = {}
Conversation.__index = Conversation

---Adds a message; it is on the disk when this returns.
---@param fields table
---@param sampled moonlet.SampledTurn? what an assistant's was sampled as
---@return table message
function Conversation:add(fields, sampled)
  local message = json.object(fields, ORDER)
  self.messages[#self.messages + 1] = message
  if self.transcript then check(self.transcript:append(message, sampled)) end
  return message
end

---Adds a message that withdraw() takes back as long as confirm() has not put it on the disk: a task
---that cannot begin leaves the conversation as it was, however often it is tried.
---@param fields table
function Conversation:propose(fields)
  self.proposed = json.object(fields, ORDER)
  self.messages[#self.messages + 1] = self.proposed
end

function Conversation:confirm()
  if self.proposed and self.transcript then check(self.transcript:append(self.proposed)) end
  self.proposed = nil
end

function Conversation:withdraw()
  local messages = self.messages
  if self.proposed and messages[#messages] == self.proposed then messages[#messages] = nil end
  self.proposed = nil
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
      self:add { role = "tool", tool_call_id = id, name = open[id],
        content = "Error: the tool was interrupted" }
      open[id] = nil
    end
  end
end

---@return moonlet.agent.Conversation
function conversation.new()
  return setmetatable({ messages = json.array {}, sampled = {} }, Conversation)
end

---Begins, or goes on with what a transcript holds.
---@param o { save: string?, resume: string?, system: string? }
---@param model_name string
---@return string name of the model that it was kept with
function Conversation:open(o, model_name)
  local kept_with = model_name
  if o.resume then
    self.transcript = check(transcript.open(o.resume))
    local held = check(self.transcript:read())
    self.messages, self.sampled, kept_with = held.messages, held.sampled, held.model
    answer_open_calls(self)
  elseif o.save then
    self.transcript = check(transcript.create(o.save))
    check(self.transcript:begin(model_name))
  end
  if o.system then self:add { role = "system", content = o.system } end
  return kept_with
end

---Lets the transcript go.
function Conversation:close()
  if self.transcript then self.transcript:close() end
  self.transcript = nil
end

return conversation
