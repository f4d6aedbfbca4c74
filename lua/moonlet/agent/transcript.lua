--- Conversations on the disk: one message per line, an assistant's with the tokens it was sampled
--- as, so that the prompt of whoever goes on begins with the same tokens.

local json = require "moonlet.json"
local sys = require "moonlet.sys"

local transcript = {}

local VERSION <const> = 1
local ROLES <const> = { system = true, user = true, assistant = true, tool = true }
local ORDER <const> = { "role", "content", "reasoning_content", "tool_calls", "tool_call_id",
  "name", "sampled" }

---@class moonlet.Transcript
local Transcript = {}
Transcript.__index = Transcript

---Begins a file, which must be new.
---@param path string
---@param model_name string
---@return moonlet.Transcript? transcript, string? message, string? code
function transcript.create(path, model_name)
  local journal, message, code = sys.journal_create(path)
  if not journal then return nil, message, code end
  local self = setmetatable({ journal = journal, messages = {} }, Transcript)
  local ok
  ok, message, code = journal:append(json.encode(json.object({ moonlet_transcript = VERSION,
    model = model_name }, { "moonlet_transcript", "model" })))
  if not ok then
    self:close()
    return nil, message, code
  end
  return self
end

local function read_sampled(sampled)
  if sampled == nil then return true end
  if not json.is_object(sampled) or type(sampled.text) ~= "string"
    or not json.is_array(sampled.ids) then
    return false
  end
  for _, id in ipairs(sampled.ids) do
    if math.type(id) ~= "integer" then return false end
  end
  return true
end

local function read_line(line, place, is_head)
  local value, message, code = json.decode(line, { name = place })
  if value == nil then return nil, message, code end
  if not json.is_object(value) then return nil, place .. ": an object expected", "format" end
  if is_head then
    if value.moonlet_transcript == VERSION then return value end
    return nil, place .. ": no transcript, or one of another version", "format"
  end
  if not ROLES[value.role] or not read_sampled(value.sampled) then
    return nil, place .. ": no message of a transcript", "format"
  end
  return value
end

---Opens a file to go on; its messages are in `messages`, without what `sampled` holds.
---@param path string
---@return moonlet.Transcript? transcript, string? message, string? code
function transcript.open(path)
  local journal, message, code = sys.journal_open(path)
  if not journal then return nil, message, code end
  local self = setmetatable({ journal = journal, messages = {}, sampled = {} }, Transcript)
  local n = 0
  for line in journal:text():gmatch("([^\n]*)\n") do
    n = n + 1
    local value
    value, message, code = read_line(line, ("%s:%d"):format(path, n), n == 1)
    if not value then
      self:close()
      return nil, message, code
    end
    if n == 1 then
      self.model = type(value.model) == "string" and value.model or "another model"
    else
      self.sampled[#self.sampled + 1], value.sampled = value.sampled, nil
      self.messages[n - 1] = value
    end
  end
  if n > 0 then return self end
  self:close()
  return nil, path .. ": no transcript, not one line is whole", "format"
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
