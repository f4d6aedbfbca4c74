--- Lua that may not run for as long as it likes: looked at every so many instructions, in the
--- coroutines that it begins as well.

local core = require "moonlet.core"

local watch = {}

---What a look may answer instead of something to raise: an error that says nothing, and which no
---handler of an xpcall is called for.
watch.END = {}

local looks = setmetatable({}, { __mode = "k" }) -- by coroutine
local resumed -- by watch.resume: what runs in there runs on its behalf

core.on_look(function()
  local thread = coroutine.running()
  local look = looks[thread] or looks[resumed]
  if not look then return end
  local problem, steps = look()
  if problem == nil then return end
  core.look(thread, steps)
  if problem == watch.END then return true end
  error(problem, 0)
end)

---Looks at a coroutine and at those that it begins.
---@param thread thread
---@param steps integer instructions between two looks; 0: no more looks
---@param look? fun(): any, integer?  answers nothing, or what is to be raised and after how many
---  instructions to look again. Without it nothing happens, but what the coroutine begins is looked
---  at wherever it runs on behalf of another
function watch.set(thread, steps, look)
  looks[thread] = look
  core.look(thread, steps)
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
