--- An agent's hooks, and what they may answer. Anything else ends the run with one line that names
--- the hook.

local failure = require "moonlet.agent.failure"
local json = require "moonlet.json"
local validate = require "moonlet.validate"

local hooks = {}

local function wrong(name, expected, value)
  failure.misuse(("hook %s: %s expected, got %s"):format(name, expected,
    math.type(value) or type(value)))
end

-- What takes a result's place is the model's next reading.
local function check_result(name, result)
  if type(result) == "table" and type(result.content) == "string" then return result end
  return wrong(name, "a table with a text as content", result)
end

local function check_reason(name, reason, otherwise)
  if reason == nil then return otherwise end
  if type(reason) ~= "string" then wrong(name, "a text as reason", reason) end
  return reason
end

-- A tool's arguments are what JSON has, whoever has written them.
local function check_arguments(name, arguments)
  if type(arguments) == "table" and pcall(json.encode, arguments) then return end
  wrong(name, "a table of JSON values as arguments", arguments)
end

-- Those that a tool is about to be run with fit its schema. They are read as JSON, as plain Lua has
-- no mark for lists.
local function check_schema(name, arguments, tool)
  local ok, message = validate.check(json.decode(json.encode(arguments)), tool.parameters or true,
    "arguments")
  if not ok then failure.misuse(("hook %s: %s"):format(name, message)) end
end

---What the model sees of the conversation.
---@param agent moonlet.Agent
---@return table[] messages
---@return boolean changed
function hooks.transform_context(agent)
  local messages = agent.messages
  local list = agent.transform_context and agent.transform_context(messages)
  if not list then return messages, false end
  -- An empty table is either; that no message is in it is found where messages are read.
  if type(list) ~= "table" or next(list) and not json.is_array(list) then
    wrong("transform_context", "a list of messages", list)
  end
  return next(list) and list or json.array {}, true
end

---What is to happen with a call of a tool that there is: nothing, so that it runs, or its result,
---or why it is refused.
---@param agent moonlet.Agent
---@param call table
---@param tool moonlet.Tool
---@return moonlet.ToolResult? result, string? reason
function hooks.before_tool(agent, call, tool)
  if not agent.before_tool then return nil end
  local answer, reason = agent.before_tool(call, tool)
  check_arguments("before_tool", call.arguments)
  if answer == nil or answer == true then
    check_schema("before_tool", call.arguments, tool)
    return nil
  end
  if answer then return check_result("before_tool", answer) end
  return nil, check_reason("before_tool", reason, "the call was refused")
end

---@param agent moonlet.Agent
---@param call table
---@param tool moonlet.Tool
---@return string? reason why the call is refused
function hooks.ask(agent, call, tool)
  if not (tool.ask and agent.ask) then return nil end
  local allowed, reason = agent.ask(call, tool)
  check_arguments("ask", call.arguments)
  if allowed == true then
    check_schema("ask", call.arguments, tool)
    return nil
  end
  return check_reason("ask", reason, "the user refused this call")
end

---@param agent moonlet.Agent
---@param call table
---@param result moonlet.ToolResult
---@return moonlet.ToolResult
function hooks.after_tool(agent, call, result)
  if not agent.after_tool then return result end
  return check_result("after_tool", agent.after_tool(call, result) or result)
end

---@param agent moonlet.Agent
---@param turn moonlet.AgentTurn
---@return boolean ends the run
function hooks.stop(agent, turn)
  local answer = agent.stop_hook and agent.stop_hook(turn) or false
  if type(answer) ~= "boolean" then wrong("stop", "true or false", answer) end
  return answer
end

return hooks
