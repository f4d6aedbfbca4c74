--- Programs beside the event loop: started, waited for, stopped, their output kept within bounds.

local clip = require "moonlet.clip"
local core = require "moonlet.core"
local options = require "moonlet.options"

local process = {}

local GRACE <const> = 1.0   -- seconds between asking a program to end and killing it
local LAST_READS <const> = 64 -- pieces of 16 KiB; a pipe holds four of them

local KNOWN <const> = { argv = "table", cwd = "string", seconds = "number", bytes = "integer",
  on_start = "function" }

---@class moonlet.ProcessResult
---@field output string both outputs, as they came
---@field code integer exit code, -1 when a signal ended it
---@field signal integer? which
---@field timed_out boolean

-- What others know of a program that runs: `over` tells of its end, however the run ends.
local Watched = {}
Watched.__index = Watched

function Watched:__close()
  self.ended = true
  self.over:notify()
end

-- Asks the group to end, and kills it when it does not.
function Watched:stop()
  if self.ended or self.stopping then return end
  self.stopping = true
  self.p:kill("TERM")
  self.loop:spawn(function()
    if not self.ended then self.over:wait(GRACE) end
    if not self.ended then self.p:kill("KILL") end
  end)
end

---Runs a program to its end, in a coroutine of the loop. It has no input and no terminal; what it
---left behind in its process group is killed when it ends.
---@param loop moonlet.Loop
---@param given { argv: string[], cwd: string, seconds: number?, bytes: integer?,
---  on_start: fun(stop: fun())? } seconds until it is stopped; bytes of output to keep (64 KiB);
---  on_start is given what stops it before its time
---@return moonlet.ProcessResult? result, string? message, string? code
function process.run(loop, given)
  local o = options.check(given, KNOWN)
  local p <close>, message, code = core.process_open(o.argv, o.cwd)
  if not p then return nil, message, code end
  local watched <close> = setmetatable({ p = p, loop = loop, over = loop:signal() }, Watched)
  local output, timed_out = clip.new(o.bytes or 64 << 10), false
  local deadline = o.seconds and core.seconds() + o.seconds
  if o.on_start then o.on_start(function() watched:stop() end) end
  while not p:status() do
    output:add(p:read())
    local rest = deadline and math.max(0, deadline - core.seconds())
    if not loop:ready(p:fd(), rest) then
      timed_out, deadline = not watched.stopping, nil
      watched:stop()
    end
  end
  for _ = 1, LAST_READS do
    local piece = p:read()
    if piece == "" then break end
    output:add(piece)
  end
  local exit, signal = p:status()
  return { output = output:text(), code = exit, signal = signal, timed_out = timed_out }
end

return process
