--- Requests that are not served, from wherever that is found out: raised here, answered by http.

local refusal = {}

---@class moonlet.server.Refusal
---@field status integer of HTTP
---@field message string
---@field param string? the field of the request that is to blame
---@field code string? for programs
---@field fields table<string, string>? header fields of the reply
local Refusal = { __tostring = function(self) return self.message end }

---Ends the work on the current request.
---@param status integer
---@param message string
---@param more { param: string?, code: string?, fields: table? }?
function refusal.raise(status, message, more)
  local self = { status = status, message = message }
  for key, value in pairs(more or {}) do self[key] = value end
  error(setmetatable(self, Refusal), 0)
end

---@return boolean
function refusal.is(value)
  return getmetatable(value) == Refusal
end

---Sends away what may come again soon.
---@param message string
function refusal.raise_busy(message)
  refusal.raise(429, message, { code = "queue_full", fields = { ["Retry-After"] = "2" } })
end

-- What a failure of a module below means for the request.
local STATUS <const> = { format = 400, range = 400, limit = 400, unsupported = 400, template = 400 }

---Like assert, for what answers nil, message, code.
function refusal.check(value, message, code, ...)
  if value ~= nil then return value, message, code, ... end
  local param = message:match("^([%a_][%w_.%[%]]*): ")
  if code == "busy" then refusal.raise_busy(message) end
  refusal.raise(STATUS[code] or 500, message, { param = STATUS[code] == 400 and param or nil })
end

return refusal
