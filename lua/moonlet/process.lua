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

-- Asks the group to end, and kills it when it does not. `state.ended` says when nobody is there.
local function stop(loop, p, state)
  if state.ended or state.stopping then return end
  state.stopping = true
  p:kill("TERM")
  loop:spawn(function()
    loop:sleep(GRACE)
    if not state.ended then p:kill("KILL") end
  end)
end

---Runs a program to its end, in a coroutine of the loop. It has no input and no terminal; what it
---started and left behind is killed when it ends.
---@param loop moonlet.Loop
---@param given { argv: string[], cwd: string, seconds: number?, bytes: integer?,
---  on_start: fun(stop: fun())? } seconds until it is stopped; bytes of output to keep (64 KiB);
---  on_start is given what stops it before its time
---@return moonlet.ProcessResult? result, string? message, string? code
function process.run(loop, given)
  local o = options.check(given, KNOWN)
  local p <close>, message, code = core.process_open(o.argv, o.cwd)
  if not p then return nil, message, code end
  local state = { ended = false }
  local output, timed_out = clip.new(o.bytes or 64 << 10), false
  local deadline = o.seconds and core.seconds() + o.seconds
  if o.on_start then o.on_start(function() stop(loop, p, state) end) end
  while not p:status() do
    output:add(p:read())
    local rest = deadline and math.max(0, deadline - core.seconds())
    if not loop:ready(p:fd(), rest) then
      timed_out, deadline = not state.stopping, nil
      stop(loop, p, state)
    end
  end
  state.ended = true
  for _ = 1, LAST_READS do
    local piece = p:read()
    if piece == "" then break end
    output:add(piece)
  end
  local exit, signal = p:status()
  return { output = output:text(), code = exit, signal = signal, timed_out = timed_out }
end

return process
