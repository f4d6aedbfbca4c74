--- Messages as clients send them, made into messages as chat templates take them.
---
--- Templates are strict where clients are not: Qwen3.5's takes one system message, at the
--- beginning, knows no developer, wants arguments as objects and a user's question somewhere. All
--- of these were met in requests of real clients (OpenAI SDKs, Pi, qwen-code, opencode).

local json = require "moonlet.json"
local literal = require "moonlet.literal"
local trim = require "moonlet.trim"

local chat = {}

local ROLES = { system = "system", developer = "system", user = "user", assistant = "assistant",
  tool = "tool", ["function"] = "tool" }
local TEXT_PARTS <const> = { text = true, input_text = true, output_text = true }
local REASONING_FIELDS = { "reasoning_content", "reasoning", "reasoning_text" }

local function present(value)
  if value == json.null then return nil end
  return value
end

local function wrong(path, what)
  return nil, ("%s: %s"):format(path, what), "format"
end

---The text of a message's content: a string, null, or a list of parts that carry text.
---@param content any
---@param path string for messages: "messages[2].content"
---@return string? text
---@return string? message
---@return string? code "format", or "unsupported" for images and the like
function chat.text(content, path)
  content = present(content)
  if content == nil then return "" end
  if type(content) == "string" then return content end
  if not json.is_array(content) then return wrong(path, "a string or a list expected") end
  local texts = {}
  for i, part in ipairs(content) do
    local place = ("%s[%d]"):format(path, i - 1)
    if type(part) == "string" then
      texts[i] = part
    elseif not json.is_object(part) then
      return wrong(place, "an object expected")
    elseif type(part.text) == "string" then
      texts[i] = part.text
    elseif type(part.refusal) == "string" then
      texts[i] = part.refusal
    elseif TEXT_PARTS[part.type] then
      return wrong(place .. ".text", "a string expected")
    else
      return nil, ("%s: parts of type %s are not supported, only text"):format(place,
        json.encode(part.type == nil and json.null or part.type)), "unsupported"
    end
  end
  return table.concat(texts)
end

-- Arguments as an object. Clients send back what they were given: broken JSON of a call that was
-- cut off must not end the session, so it is shown to the model as it is.
local function arguments_of(arguments)
  arguments = present(arguments)
  if arguments == nil or arguments == "" then return json.object {} end
  if type(arguments) == "string" then
    local ok, value = literal.read(arguments)
    if ok and type(value) == "string" then ok, value = literal.read(value) end
    if ok and (json.is_object(value) or json.is_array(value) and #value == 0) then
      return json.is_object(value) and value or json.object {}
    end
    return json.object { _raw = arguments }
  end
  if json.is_object(arguments) then return arguments end
  return json.object { _raw = json.encode(arguments) }
end

local function tool_calls_of(message, path)
  local list = present(message.tool_calls)
  local legacy = present(message.function_call)
  if list == nil and legacy == nil then return nil end
  list = list or json.array { { ["function"] = legacy } }
  if not json.is_array(list) then return nil, path .. ".tool_calls: a list expected", "format" end
  local calls = json.array {}
  for i, given in ipairs(list) do
    local place = ("%s.tool_calls[%d]"):format(path, i - 1)
    if not json.is_object(given) then return wrong(place, "an object expected") end
    local f = json.is_object(given["function"]) and given["function"] or given
    if type(f.name) ~= "string" then return wrong(place, "a function name expected") end
    calls[i] = json.object({ id = present(given.id), type = "function",
      ["function"] = json.object({ name = f.name, arguments = arguments_of(f.arguments) },
        { "name", "arguments" }) }, { "id", "type", "function" })
  end
  if #calls == 0 then return nil end
  return calls
end

-- Thoughts that a text begins with, as servers without a parser leave them there: in a think block,
-- whose first tag the template may have written. Templates look for them, too, but take any tag
-- that an answer mentions for the end of its thoughts.
local function split_thoughts(text)
  local first, last = text:find("</think>", 1, true)
  if not first then return nil, text end
  local before = text:sub(1, first - 1)
  local thoughts = before:match("^%s*<think>(.*)$")
  if not thoughts and not before:find("<think>", 1, true) then
    local _, space = trim.split(before)
    thoughts = space:find("\n", 1, true) and before
  end
  if not thoughts then return nil, text end
  return thoughts, text:sub(last + 1)
end

local function reasoning_of(given)
  for _, field in ipairs(REASONING_FIELDS) do
    if type(given[field]) == "string" then return given[field] end
  end
end

local function message_of(given, path)
  if not json.is_object(given) then return wrong(path, "an object expected") end
  local role = ROLES[given.role]
  if not role then
    return wrong(path .. ".role", "system, developer, user, assistant or tool expected")
  end
  local text, message, code = chat.text(given.content, path .. ".content")
  if not text then return nil, message, code end
  local made = json.object({ role = role, content = text }, { "role", "content" })
  if role == "assistant" then
    made.reasoning_content = reasoning_of(given)
    if not made.reasoning_content then
      made.reasoning_content, made.content = split_thoughts(text)
    end
    made.tool_calls, message, code = tool_calls_of(given, path)
    if message then return nil, message, code end
  elseif role == "tool" then
    made.tool_call_id = present(given.tool_call_id)
    made.name = present(given.name)
  end
  return made
end

-- Templates look for the question that is being answered; a history that was compacted to calls and
-- results has none, and gets an empty one.
local function with_question(list, system)
  for _, made in ipairs(list) do
    if made.role == "user" then return list end
  end
  table.insert(list, system and 2 or 1, json.object({ role = "user", content = "" },
    { "role", "content" }))
  return list
end

---Messages for a template: one system message at the beginning (all given ones, in order), text as
---strings, reasoning as reasoning_content, arguments as objects, and a user's turn.
---@param messages table array of objects as OpenAI's API has them
---@return table? list of new objects; the given ones are left alone but for shared arguments
---@return string? message naming the place, "messages[1].role: ..."
---@return string? code
function chat.messages(messages)
  if not json.is_array(messages) then return wrong("messages", "a list expected") end
  if #messages == 0 then return wrong("messages", "at least one message expected") end
  local list, system = json.array {}, {}
  for i, given in ipairs(messages) do
    local made, message, code = message_of(given, ("messages[%d]"):format(i - 1))
    if not made then return nil, message, code end
    if made.role == "system" then
      if made.content ~= "" then system[#system + 1] = made.content end
    else
      list[#list + 1] = made
    end
  end
  if #system > 0 then
    table.insert(list, 1, json.object({ role = "system",
      content = table.concat(system, "\n\n") }, { "role", "content" }))
  end
  return with_question(list, #system > 0)
end

---Tools for a template and for reading calls: {type, function = {name, description, parameters}}.
---@param tools any array of tools, wrapped as OpenAI's chat API does or bare; nil and {} are none
---@return table? list nil when there are none
---@return string? message
---@return string? code
function chat.tools(tools)
  tools = present(tools)
  if tools == nil then return nil end
  if not json.is_array(tools) then return wrong("tools", "a list expected") end
  local list = json.array {}
  for i, given in ipairs(tools) do
    local place = ("tools[%d]"):format(i - 1)
    if not json.is_object(given) then return wrong(place, "an object expected") end
    local f = json.is_object(given["function"]) and given["function"] or given
    if type(f.name) ~= "string" or f.name == "" then
      return wrong(place, "a function name expected")
    end
    local parameters = present(f.parameters)
    if parameters ~= nil and not json.is_object(parameters) then
      return wrong(place .. ".parameters", "an object expected")
    end
    if given["function"] == f then
      list[i] = given
    else
      list[i] = json.object({ type = "function", ["function"] = given }, { "type", "function" })
    end
  end
  if #list == 0 then return nil end
  return list
end

return chat
