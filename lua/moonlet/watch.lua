--- Lua that may not run for as long as it likes: looked at every so many instructions, in the
--- coroutines that it begins as well, and ended where it is when its time is over.
---
--- It is ended by errors that say nothing and that no handler of an xpcall is called for.

local core = require "moonlet.core"

local watch = {}

local CLOSING_STEPS <const>, MOST_ENDS <const> = 10000, 16

local watched = setmetatable({}, { __mode = "k" }) -- { is_over, n_ends } by coroutine
local resumed -- by watch.resume: what runs in there runs on its behalf

-- Instructions until one that is ended is ended again: every other time enough for what it has to
-- close; else one, as it may go on in a loop around a pcall; and after a while always one, as there
-- may be pcalls around each other.
local function steps_left(one)
  one.n_ends = one.n_ends + 1
  return one.n_ends % 2 == 1 and one.n_ends < MOST_ENDS and CLOSING_STEPS or 1
end

-- A coroutine that was begun by the one looked at gives way and is left as it is; what goes on in
-- its place is ended in turn.
core.on_look(function()
  local thread = coroutine.running()
  local own = watched[thread]
  local one = own or watched[resumed]
  if not (one and one.is_over()) then return false end
  core.look(thread, own and steps_left(own) or 1)
  if not own then core.look(resumed, 1) end
  return true, not own
end)

local function begin(thread, is_over)
  watched[thread] = is_over and { is_over = is_over, n_ends = 0 }
end

---Looks at a coroutine and at those that it begins.
---@param thread thread
---@param steps integer instructions between two looks
---@param is_over? fun(): boolean  whether it is to be ended. Without it nothing happens, but what
---  the coroutine begins is looked at wherever it runs on behalf of another
function watch.set(thread, steps, is_over)
  begin(thread, is_over)
  core.look(thread, steps)
end

local function finish(thread, ...)
  watched[thread] = nil
  return ...
end

---As pcall, in a coroutine that is looked at meanwhile, with those that it begins. Nothing else may
---look at it.
---@param steps integer instructions between two looks
---@param is_over fun(): boolean
---@param fn function
---@return boolean ok
---@return any ... what fn returns, or what went wrong
function watch.pcall(steps, is_over, fn, ...)
  local thread = coroutine.running()
  begin(thread, is_over)
  return finish(thread, core.look_pcall(steps, fn, ...))
end

local function back(before, ...)
  resumed = before
  return ...
end

---coroutine.resume, as whoever runs coroutines on behalf of others has to call it.
---@param thread thread
---@return boolean ok
---@return any ...
function watch.resume(thread, ...)
  local before = resumed
  resumed = thread
  return back(before, coroutine.resume(thread, ...))
end

return watch
