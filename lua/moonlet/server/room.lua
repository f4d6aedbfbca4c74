--- What the bodies of requests become in Lua, bounded over all requests that are in flight: a body
--- of many small values takes a hundred times the memory of its text.

local json = require "moonlet.json"
local refusal = require "moonlet.server.refusal"
local sys = require "moonlet.sys"

local room = {}

local LARGE <const> = 1 << 20 -- bytes whose end is worth looking for garbage
local STEP <const> = 256 -- KiB

---@class moonlet.server.Room
---@field taken integer bytes
local Room = {}
Room.__index = Room

---@param loop moonlet.Loop
---@param max integer bytes; the request that goes beyond them is the last to be taken
---@return moonlet.server.Room
function room.new(loop, max)
  return setmetatable({ loop = loop, max = max, taken = 0 }, Room)
end

-- fn(...) and the bytes that were allocated for it. Nothing is collected meanwhile.
local function measured(fn, ...)
  local runs, before = collectgarbage("isrunning"), collectgarbage("count")
  collectgarbage("stop")
  local value, message, code = fn(...)
  local bytes = (collectgarbage("count") - before) * 1024 // 1 | 0
  if runs then collectgarbage("restart") end
  return bytes, value, message, code
end

---Reads JSON; what it takes counts until leave().
---@param text string
---@param options table of json.decode
---@return integer bytes for leave()
---@return any value, string? message, string? code
function Room:decode(text, options)
  if self.taken > self.max then
    refusal.raise(503, "requests that are being answered take too much memory; try again",
      { code = "too_large", fields = { ["Retry-After"] = "2" } })
  end
  local bytes, value, message, code = measured(json.decode, text, options)
  self.taken = self.taken + bytes
  return bytes, value, message, code
end

-- Two whole rounds of the collector, in small steps: what dies during one is found by the next. One
-- that works by generations never says that a round is over; its steps are bounded.
local function sweep(self)
  local rounds, most = 0, 8 * collectgarbage("count") // STEP + 16
  for _ = 1, most do
    if collectgarbage("step", STEP) then rounds = rounds + 1 end
    if rounds == 2 then break end
    self.loop:sleep(0)
  end
  sys.give_back_heap()
  self.sweeps = false
end

---A request has ended. The collector would not run while nothing is allocated.
---@param bytes integer
function Room:leave(bytes)
  self.taken = self.taken - bytes
  if bytes < LARGE or self.sweeps then return end
  self.sweeps = true
  self.loop:spawn(sweep, self)
end

return room
