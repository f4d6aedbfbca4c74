--- Calls of users' functions that everybody waits for: in a coroutine of their own, as they must
--- not give way in the middle of something, and so many instructions at most.

local sys = require "moonlet.sys"
local watch = require "moonlet.watch"

local guard = {}

guard.INSTRUCTIONS = 10000000 -- a tenth of a second or two
local STEP <const> = 1000     -- between two looks at how many are left
local TOO_LONG <const> = ("runs too long: more than %d instructions"):format(guard.INSTRUCTIONS)

-- What to look with, and whether too many instructions were seen.
local function limit()
  local left = guard.INSTRUCTIONS
  local function is_spent() return left <= 0 end
  return function()
    left = left - STEP
    return is_spent()
  end, is_spent
end

local function call(look, is_spent, fn, ...)
  local thread = coroutine.create(fn)
  watch.set(thread, STEP, look)
  local returned = table.pack(watch.resume(thread, ...))
  if is_spent and is_spent() then return false, TOO_LONG end
  if coroutine.status(thread) == "suspended" then
    coroutine.close(thread)
    return false, "coroutine.yield: nobody would go on with it"
  end
  return table.unpack(returned, 1, returned.n)
end

---As pcall. Coroutines that fn begins are counted with it.
---@param fn function
---@return boolean ok
---@return any ... what fn returns, or what went wrong
function guard.call(fn, ...)
  local look, is_spent = limit()
  return call(look, is_spent, fn, ...)
end

---As pcall, for what makes functions that will be called by guard.call: it may take its time, until
---it is interrupted. Coroutines that it begins are counted where they go on.
---@param fn function
---@return boolean ok
---@return any ... what fn returns, or what went wrong
function guard.load(fn, ...)
  return call(sys.interrupted, nil, fn, ...)
end

-- fn, raising what went wrong.
local function guarded(fn)
  return function(...)
    local returned = table.pack(guard.call(fn, ...))
    if not returned[1] then error(returned[2], 0) end
    return table.unpack(returned, 2, returned.n)
  end
end

---A stage of moonlet.sampler whose functions are called so.
---@param stage any
---@return any
function guard.stage(stage)
  if type(stage) == "function" then return guarded(stage) end
  if type(stage) ~= "table" or type(stage.apply) ~= "function" then return stage end
  local made = {}
  for _, name in ipairs { "apply", "accept", "reset" } do
    local fn = stage[name] and guarded(stage[name])
    made[name] = fn and function(_, ...) return fn(stage, ...) end
  end
  return made
end

return guard
