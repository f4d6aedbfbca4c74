--- What goes wrong in the world while an agent is opened or runs: raised where it is found, so that
--- it ends what goes on, and handed to the caller as nil, message, code.

local failure = {}

---@class moonlet.agent.Failure
---@field message string
---@field code string
local Failure = { __tostring = function(self) return self.message end }

---Like assert, for what answers nil, message, code.
function failure.check(value, message, code)
  if value ~= nil then return value end
  error(setmetatable({ message = message, code = code }, Failure), 0)
end

-- What the user's functions do wrong.
local Misuse = { __tostring = Failure.__tostring }

---Raises a message as it is, without the places that it was raised at.
---@param message string
function failure.misuse(message)
  error(setmetatable({ message = message }, Misuse), 0)
end

---The results of pcall or xpcall, with a failure as what the function has returned.
---@param ok boolean
function failure.returned(ok, ...)
  local problem = ...
  local kind = not ok and getmetatable(problem)
  if kind == Misuse then return ok, problem.message end
  if kind ~= Failure then return ok, ... end
  return true, nil, problem.message, problem.code
end

return failure
