--- The errors a template can raise. Inside the renderer they are Lua errors that carry a table
--- {kind, message, line}; init.lua turns them into `nil, message, "template"`. Kinds are the names
--- of the Python exceptions that Jinja would raise.

local errors = {}

local Failure = {}
Failure.__index = Failure
Failure.__tostring = function(e) return e.message end

function errors.new(kind, message, line)
  return setmetatable({ kind = kind, message = message, line = line }, Failure)
end

--- Raises a template error; `line` is known to the lexer and parser only.
function errors.raise(kind, message, line)
  error(errors.new(kind, message, line), 0)
end

function errors.is_failure(e)
  return getmetatable(e) == Failure
end

return errors
