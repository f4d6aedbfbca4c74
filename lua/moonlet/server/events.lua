--- A stream of server-sent events as a reply.

local json = require "moonlet.json"
local longer = require "moonlet.server.longer"
local outflow = require "moonlet.server.outflow"
local sys = require "moonlet.sys"

local events = {}

local FIELDS <const> = { ["Content-Type"] = "text/event-stream; charset=utf-8",
  ["Cache-Control"] = "no-cache", ["X-Accel-Buffering"] = "no" }
local COMPACT <const> = { separators = { ",", ":" } }

---@class moonlet.server.Events
---@field written number when something was last written
---@field is_writing boolean an event is on its way, part by part
---@field free moonlet.Signal told when it no longer is
local Events = {}
Events.__index = Events

---Begins the reply; the client has its head at once.
---@param request userdata
---@param fields table<string, string> more header fields
---@param on_stalled fun(message: string) called when the client cannot be written to
---@param loop moonlet.Loop
---@return moonlet.server.Events
function events.start(request, fields, on_stalled, loop)
  local all = {}
  for _, set in ipairs { fields, FIELDS } do
    for name, value in pairs(set) do all[name] = value end
  end
  request:start(200, all)
  return setmetatable({ request = request, written = sys.seconds(), beats = 0,
    on_stalled = on_stalled, loop = loop, is_writing = false, free = loop:signal() }, Events)
end

-- What several coroutines write comes one after the other.
local function write(self, text)
  while self.is_writing do self.free:wait() end
  if self.stalled then return end
  self.is_writing = true
  local ok, message = outflow.write(self.loop, self.request, text)
  self.is_writing, self.written = false, sys.seconds()
  self.free:notify()
  if not ok then
    self.stalled = true
    self.on_stalled(message)
  end
end

---@param value any as JSON, or a string as it is
function Events:data(value)
  local text = type(value) == "string" and value or json.encode(value, COMPACT)
  write(self, "data: " .. text .. "\n\n")
end

---@param value any for moonlet.server.longer
function Events:longer(value)
  self:data(self.loop:gently(longer.encode, value, COMPACT))
end

---An event that says its name, which its value has as `type`.
---@param value { type: string }
function Events:event(value)
  write(self, ("event: %s\ndata: %s\n\n"):format(value.type, json.encode(value, COMPACT)))
end

---Keeps clients waiting that give up on silence. Some count comments as life and some only data
---(qwen-code), so these take turns.
---@param seconds number of silence that is allowed
---@param send_empty fun() sends what says nothing new
---@return number seconds until this should be called again
function Events:beat(seconds, send_empty)
  local rest = self.written + seconds - sys.seconds()
  if rest > 0.001 then return rest end
  if self.is_writing then return seconds end
  self.beats = self.beats + 1
  if self.beats % 2 == 1 then
    self:comment()
  else
    send_empty()
  end
  return seconds
end

---Says nothing, unless something is being said. Waits for nobody, as who asks for it may have seen
---the request end by then.
function Events:comment()
  if self.is_writing or self.stalled then return end
  self.written = sys.seconds()
  self.request:write(": waiting\n\n")
end

---Ends the reply; one that lacks something has no end.
function Events:finish()
  if not self.stalled then self.request:finish() end
end

return events
