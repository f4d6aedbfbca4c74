--- What requests become in Lua, bounded over all of them that are in flight: a body of many small
--- values takes a hundred times the memory of its text, and a long one passes through many hands.

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
  return setmetatable({ loop = loop, max = max, taken = 0, free = loop:signal() }, Room)
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

---Memory that a request needs, until leave().
---@param bytes integer
---@param own integer? what it has already
---@return integer bytes
function Room:take(bytes, own)
  if self.taken - (own or 0) > self.max then
    refusal.raise(503, "requests that are being answered take too much memory; try again",
      { code = "too_large", fields = { ["Retry-After"] = "2" } })
  end
  self.taken = self.taken + bytes
  return bytes
end

---Reads JSON; what it takes counts until leave(). Others have their turn between the steps that a
---long text takes; as there is no more than one of these at once, what they hold in between is
---bounded.
---@param text string
---@param options table of json.decode
---@param is_long boolean
---@return integer bytes for leave()
---@return any value, string? message, string? code
function Room:decode(text, options, is_long)
  local function pause()
    if is_long then self.loop:sleep(0) end
  end
  self:take(0)
  local document <close>, problem, kind = json.parse(text, options)
  if not document then return 0, nil, problem, kind end
  pause()
  local bytes, value, message, code = measured(json.value, document, options)
  self:take(bytes, self.taken)
  pause()
  return bytes, value, message, code
end

-- Two whole rounds of the collector, in small steps: what dies during one is found by the next. One
-- that works by generations never says that a round is over; its steps are bounded.
local function collect(self)
  local rounds, most = 0, 8 * collectgarbage("count") // STEP + 16
  for _ = 1, most do
    if collectgarbage("step", STEP) then rounds = rounds + 1 end
    if rounds == 2 then break end
    self.loop:sleep(0)
  end
  sys.give_back_heap()
end

-- The collector would not run while nothing is allocated.
local function sweep(self)
  self.sweeps_again = self.sweeps
  if self.sweeps then return end
  self.sweeps = true
  self.loop:spawn(function()
    repeat
      self.sweeps_again = false
      collect(self)
    until not self.sweeps_again
    self.sweeps = false
    if self.is_left then self.is_taken, self.is_left = false, false end
    self.free:notify()
  end)
end

---A request has ended.
---@param bytes integer
function Room:leave(bytes)
  self.taken = self.taken - bytes
  if bytes >= LARGE then sweep(self) end
end

---Waits until no other large request is being read: what that takes beside the values of its body,
---a multiple of its text, is there once.
function Room:enter_alone()
  while self.is_taken do self.free:wait() end
  self.is_taken = true
end

---The next one may, once what this one has left behind is gone.
function Room:leave_alone()
  self.is_left = true
  sweep(self)
end

return room
