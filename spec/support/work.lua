-- Work in steps instead of seconds, so that what grows with the square of a text is told from what
-- grows with the text on any machine.

local work = {}

local NAMES <const> = { "find", "match", "gmatch", "gsub" }
local EVERY <const> = 10

-- The library of strings with the matcher that is written in Lua, whose steps can be counted.
local function counted_strings()
  local library = {}
  for name, fn in pairs(string) do library[name] = fn end
  local env = setmetatable({ string = library }, { __index = _G })
  assert(loadfile("lua/moonlet/patterns.lua", "t", env))()
  return library
end

-- Instructions of Lua that fn(...) takes, those of coroutines that it creates included. Bytes that
-- are copied or that the C core reads cost nothing.
function work.steps(fn, ...)
  local n, create, own, counted = 0, coroutine.create, {}, counted_strings()
  local function count() n = n + EVERY end
  for _, name in ipairs(NAMES) do
    own[name] = string[name]
    rawset(string, name, counted[name])
  end
  rawset(coroutine, "create", function(body)
    local thread = create(body)
    debug.sethook(thread, count, "", EVERY)
    return thread
  end)
  debug.sethook(count, "", EVERY)
  local ok, problem = pcall(fn, ...)
  debug.sethook()
  rawset(coroutine, "create", create)
  for _, name in ipairs(NAMES) do rawset(string, name, own[name]) end
  if not ok then error(problem, 0) end
  return n
end

-- How much more fn(make(4 * n)) takes than fn(make(n)): about 4 for what grows with the text, 16
-- for what grows with its square.
function work.growth(n, make, fn)
  local small, large = make(n), make(4 * n)
  return work.steps(fn, large) / work.steps(fn, small)
end

return work
