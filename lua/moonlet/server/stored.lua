--- Answers that requests go on from by their ids: the conversations that they end, for a while.

local stored = {}

local MAX_ANSWERS <const> = 1024
local MAX_BYTES <const> = 64 << 20 -- of messages; what several answers share counts each time

---@class moonlet.server.Stored
local Stored = {}
Stored.__index = Stored

---@return moonlet.server.Stored
function stored.new()
  return setmetatable({ by_id = {}, order = {}, bytes = 0 }, Stored)
end

local function size_of(value)
  if type(value) == "string" then return #value end
  if type(value) ~= "table" then return 8 end
  local bytes = 64
  for key, child in next, value do bytes = bytes + size_of(key) + size_of(child) end
  return bytes
end

local function drop_oldest(self)
  local id = table.remove(self.order, 1)
  self.bytes = self.bytes - self.by_id[id].bytes
  self.by_id[id] = nil
end

---Keeps a conversation until there are too many that are newer.
---@param id string
---@param messages table[] must not change any more
function Stored:put(id, messages)
  local bytes = size_of(messages)
  if bytes > MAX_BYTES then return end
  self.by_id[id] = { messages = messages, bytes = bytes }
  self.order[#self.order + 1] = id
  self.bytes = self.bytes + bytes
  while #self.order > MAX_ANSWERS or self.bytes > MAX_BYTES do drop_oldest(self) end
end

---@param id string
---@return table[]? messages
function Stored:get(id)
  return self.by_id[id] and self.by_id[id].messages
end

return stored
