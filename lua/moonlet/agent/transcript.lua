--- Conversations on the disk: one message per line, an assistant's with the tokens it was sampled
--- as, so that the prompt of whoever goes on begins with the same tokens.

local json = require "moonlet.json"
local sys = require "moonlet.sys"
local validate = require "moonlet.validate"

local transcript = {}

local VERSION <const> = 1
local ORDER <const> = { "role", "content", "reasoning_content", "tool_calls", "tool_call_id",
  "name", "sampled" }

---@class moonlet.Transcript
local Transcript = {}
Transcript.__index = Transcript

local function wrap(path, journal, message, code)
  if not journal then return nil, message, code end
  return setmetatable({ path = path, journal = journal }, Transcript)
end

---A new file.
---@param path string
---@return moonlet.Transcript? transcript, string? message, string? code
function transcript.create(path)
  return wrap(path, sys.journal_create(path))
end

---A file that is there.
---@param path string
---@return moonlet.Transcript? transcript, string? message, string? code
function transcript.open(path)
  return wrap(path, sys.journal_open(path))
end

---Writes the first line of a new one.
---@param model_name string
---@return true? ok, string? message, string? code
function Transcript:begin(model_name)
  return self.journal:append(json.encode(json.object({ moonlet_transcript = VERSION,
    model = model_name }, { "moonlet_transcript", "model" })))
end

local TEXT <const> = { type = "string" }

-- A message, as far as something here relies on it.
local MESSAGE <const> = {
  type = "object", required = { "role", "content" },
  properties = {
    role = { enum = { "system", "user", "assistant", "tool" } },
    content = TEXT, reasoning_content = TEXT, tool_call_id = TEXT, name = TEXT,
    tool_calls = { type = "array", items = {
      type = "object", required = { "id", "function" },
      properties = { id = TEXT, ["function"] = {
        type = "object", required = { "name", "arguments" },
        properties = { name = TEXT, arguments = { type = "object" } },
      } },
    } },
    sampled = {
      type = "object", required = { "ids", "text" },
      properties = { text = TEXT, ids = { type = "array", items = { type = "integer" } } },
    },
  },
}

local function read_line(line, place, is_head)
  local value, message, code = json.decode(line, { name = place })
  if value == nil then return nil, message, code end
  if is_head then
    if json.is_object(value) and value.moonlet_transcript == VERSION then return value end
    return nil, place .. ": no transcript, or one of another version", "format"
  end
  local ok, problem = validate.check(value, MESSAGE, "message")
  if ok and value.role == "tool" and not value.tool_call_id then
    ok, problem = false, "message.tool_call_id: is missing"
  end
  if not ok then return nil, ("%s: %s"):format(place, problem), "format" end
  return value
end

---What is in one that was there.
---@return { model: string, messages: table[], sampled: moonlet.SampledTurn[] }? held
---@return string? message, string? code
function Transcript:read()
  local held, n = { messages = json.array {}, sampled = {} }, 0
  for line in self.journal:text():gmatch("([^\n]*)\n") do
    n = n + 1
    local value, message, code = read_line(line, ("%s:%d"):format(self.path, n), n == 1)
    if not value then return nil, message, code end
    if n == 1 then
      held.model = type(value.model) == "string" and value.model or "another model"
    else
      held.sampled[#held.sampled + 1], value.sampled = value.sampled, nil
      held.messages[n - 1] = value
    end
  end
  if n == 0 then return nil, self.path .. ": no transcript, not one line is whole", "format" end
  return held
end

---Adds a message; it is on the disk when this returns.
---@param message table
---@param sampled moonlet.SampledTurn?
---@return true? ok, string? message, string? code
function Transcript:append(message, sampled)
  local line = {}
  for name, value in pairs(message) do line[name] = value end
  if sampled then
    line.sampled = json.object({ ids = json.array(sampled.ids), text = sampled.text },
      { "ids", "text" })
  end
  return self.journal:append(json.encode(json.object(line, ORDER)))
end

---Lets the file go.
function Transcript:close()
  self.journal:close()
end

return transcript
