--- What all dialects make of a conversation: messages as OpenAI's chat API has them, variables of
--- the template, and the prompt with what it takes to read its answer.

local json = require "moonlet.json"
local refusal = require "moonlet.server.refusal"

local conversation = {}

-- ---- messages ----------------------------------------------------------------------------------

---@class moonlet.server.Conversation
---@field messages table[] whose texts are lists of pieces until it is done
local Conversation = {}
Conversation.__index = Conversation

-- A message that may be added to: what is there already is a piece.
local function reopened(message)
  local copy = {}
  for name, value in pairs(message) do copy[name] = value end
  copy.content = { copy.content }
  copy.reasoning_content = copy.reasoning_content and { copy.reasoning_content }
  copy.tool_calls = copy.tool_calls and table.move(copy.tool_calls, 1, #copy.tool_calls, 1,
    json.array {})
  return copy
end

---@param earlier table[]? messages that it goes on with
---@return moonlet.server.Conversation
function conversation.new(earlier)
  local self = setmetatable({ messages = json.array {} }, Conversation)
  for i, message in ipairs(earlier or {}) do self.messages[i] = reopened(message) end
  return self
end

local function add(self, message)
  self.messages[#self.messages + 1] = message
  return message
end

-- An assistant's turn comes in pieces that belong together until somebody else speaks.
local function turn(self)
  local last = self.messages[#self.messages]
  if last and last.role == "assistant" then return last end
  return add(self, { role = "assistant", content = {} })
end

local SYSTEM <const> = { system = true, developer = true }

---What the system says before everything, in this request only.
---@param text string
function Conversation:instruct(text)
  table.insert(self.messages, 1, { role = "system", content = { text }, is_passing = true })
end

---What another than the assistant says; a user's messages in a row are one turn. Templates take
---what the system says at the beginning only; what it adds later is heard from the user, as moving
---it to the front would change all that was read before.
---@param role string system, developer or user
---@param text string
function Conversation:heard(role, text)
  local last = self.messages[#self.messages]
  if last and not SYSTEM[last.role] then role = "user" end
  if last and last.role == "user" then
    last.content[#last.content + 1] = text
  else
    add(self, { role = role, content = { text } })
  end
end

---@param text string
function Conversation:said(text)
  local message = turn(self)
  message.content[#message.content + 1] = text
end

---@param text string
function Conversation:thought(text)
  local message = turn(self)
  message.reasoning_content = message.reasoning_content or {}
  message.reasoning_content[#message.reasoning_content + 1] = text
end

---@param id string?
---@param name string
---@param arguments any an object, or JSON that may be broken
function Conversation:called(id, name, arguments)
  local message = turn(self)
  message.tool_calls = message.tool_calls or json.array {}
  message.tool_calls[#message.tool_calls + 1] = { id = id, type = "function",
    ["function"] = { name = name, arguments = arguments } }
end

---@param id string?
---@param text string
function Conversation:answered(id, text)
  add(self, { role = "tool", tool_call_id = id, content = { text } })
end

---The messages, when nothing more is said.
---@return table[]
function Conversation:done()
  for _, message in ipairs(self.messages) do
    local between = message.role == "assistant" and "" or "\n\n"
    message.content = table.concat(message.content, between)
    if message.reasoning_content then
      message.reasoning_content = table.concat(message.reasoning_content)
    end
  end
  return self.messages
end

---The messages without what was only said for this request, once it is done.
---@return table[]
function Conversation:lasting()
  local list = json.array {}
  for _, message in ipairs(self.messages) do
    if not message.is_passing then list[#list + 1] = message end
  end
  return list
end

---A tool as templates take it. What dialects add (cache_control, strict) says nothing to a model,
---and may change from one request to the next.
---@param name string
---@param description string?
---@param parameters table? JSON schema
---@return table
function conversation.tool(name, description, parameters)
  return json.object({ type = "function", ["function"] = json.object({ name = name,
    description = description, parameters = parameters },
    { "name", "description", "parameters" }) }, { "type", "function" })
end

-- ---- variables ---------------------------------------------------------------------------------

local EFFORTS <const> = { none = false, minimal = true, low = true, medium = true, high = true,
  xhigh = true, max = true }

---The server's own, to be added to.
---@param server moonlet.Server
---@return table
function conversation.variables(server)
  local variables = {}
  for name, value in pairs(server.template_variables) do variables[name] = value end
  return variables
end

---An effort of reasoning, and that there is to be any.
---@param f moonlet.server.Fields
---@param name string
---@param variables table
function conversation.read_effort(f, name, variables)
  local effort = f:string(name)
  if not effort then return end
  if EFFORTS[effort] == nil then
    f:refuse(name, "none, minimal, low, medium, high, xhigh or max expected")
  end
  variables.reasoning_effort, variables.enable_thinking = effort, EFFORTS[effort]
end

-- ---- constraints -------------------------------------------------------------------------------

-- What OpenAI's dialects wrap and name differently.
local function inner_of(value)
  if not json.is_object(value) then return {} end
  return json.is_object(value["function"]) and value["function"] or value
end

local function names_tool(tools, name)
  for _, tool in ipairs(tools) do
    if inner_of(tool).name == name then return true end
  end
  return false
end

---Whether calls are looked for, as OpenAI's dialects say it: whoever offers no tools wants text.
---@param f moonlet.server.Fields
---@param tools table?
---@return boolean
function conversation.read_tool_choice(f, tools)
  local choice, offered = f:get("tool_choice"), tools ~= nil and #tools > 0
  if choice == nil or choice == "auto" then return offered end
  if choice == "none" then return false end
  if not offered then f:refuse("tool_choice", "only with tools") end
  if choice == "required" then f:refuse_constraint("tool_choice", "'required'") end
  local named = inner_of(choice).name
  if type(named) ~= "string" then
    f:refuse("tool_choice", "auto, none, required or a function expected")
  end
  if not names_tool(tools, named) then
    f:refuse("tool_choice", ("there is no tool '%s'"):format(named))
  end
  return f:refuse_constraint("tool_choice", "a named tool")
end

local FORMATS <const> = { json_object = true, json_schema = true }

---Refuses forms of answers but text.
---@param f moonlet.server.Fields
---@param name string
function conversation.refuse_format(f, name)
  local given = f:object(name)
  if not given or given.type == "text" then return end
  if not FORMATS[given.type] then
    f:refuse(name, "type text, json_object or json_schema expected")
  end
  f:refuse_constraint(name, given.type)
end

-- What vLLM and llama.cpp have answers keep to.
local CONSTRAINTS <const> = { "structured_outputs", "guided_json", "guided_regex", "guided_choice",
  "guided_grammar", "grammar", "json_schema" }

---Refuses fields that change what is generated in ways that are not offered.
---@param f moonlet.server.Fields
function conversation.refuse_unserved(f)
  conversation.refuse_format(f, "response_format")
  for _, name in ipairs(CONSTRAINTS) do
    local given = f:get(name)
    if given ~= nil and given ~= "" then f:refuse_constraint(name, "this") end
  end
  if f:get("chat_template") then
    f:refuse("chat_template", "the checkpoint's own template is used")
  end
end

-- ---- prompts -----------------------------------------------------------------------------------

---What a template refuses is the fault of the request; where it lies is left out. A prompt that
---does not fit in the context comes without its ids.
---@param server moonlet.Server
---@param messages table
---@param variables table
---@param ending string? of moonlet.prompt
---@return moonlet.Prompt
function conversation.prompt(server, messages, variables, ending)
  local prompt, message, code = server.prompts:make(messages, variables, ending,
    server.engine.n_ctx)
  if not prompt and message:sub(1, #server.model.dir + 1) == server.model.dir .. "/" then
    message = message:sub(#server.model.dir + 2)
  end
  return (refusal.check(prompt, message, code))
end

---Sets the prompt of what is wanted, and how its answer is read: with the tools of the prompt
---unless the request knows of more.
---@param wanted moonlet.server.Wanted
---@param server moonlet.Server
---@param messages table
---@param variables table
---@param reading moonlet.turn.options what the request says of it
---@param ending string? of moonlet.prompt
function conversation.fill(wanted, server, messages, variables, reading, ending)
  local prompt = conversation.prompt(server, messages, variables, ending)
  reading.tools, reading.reasoning = reading.tools or prompt.tools, prompt.reasoning
  reading.stream_arguments = server.stream_arguments
  wanted.prompt, wanted.reading = prompt, reading
end

return conversation
