--- Calls of an operator's functions: in a coroutine of their own, as they must not give way in the
--- middle of a request, and so many instructions at most, as everybody waits for them.

local guard = {}

guard.INSTRUCTIONS = 10000000 -- a tenth of a second or two

local function stop()
  error(("more than %d instructions"):format(guard.INSTRUCTIONS), 0)
end

---As pcall. What fn starts coroutines for is not counted.
---@param fn function
---@return boolean ok
---@return any ... what fn returns, or what went wrong
function guard.call(fn, ...)
  local thread = coroutine.create(fn)
  debug.sethook(thread, stop, "", guard.INSTRUCTIONS)
  local returned = table.pack(coroutine.resume(thread, ...))
  if coroutine.status(thread) == "suspended" then
    coroutine.close(thread)
    return false, "coroutine.yield: nobody would go on with it"
  end
  return table.unpack(returned, 1, returned.n)
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
