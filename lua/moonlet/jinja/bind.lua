--- Python's calling convention for built-in functions: positional and keyword arguments become the
--- Lua arguments of one function, by a signature such as "value width? first?".
---
---   name    required          name?   optional, nil when not given
---   /name   cannot be given by keyword
---   *       the rest: the function gets the remaining arguments as an array and the keyword dict

local errors = require("moonlet.jinja.errors")
local value = require("moonlet.jinja.value")

local bind = {}

local raise = errors.raise

local function parse(signature)
  local s = { names = {}, at = {}, required = 0 }
  for word in signature:gmatch("%S+") do
    if word == "*" then
      s.rest = true
    else
      local slash, name, optional = word:match("^(/?)([%w_]+)(%??)$")
      s.names[#s.names + 1] = name
      if slash == "" then s.at[name] = #s.names end
      if optional == "" then s.required = #s.names end
    end
  end
  return s
end

--- Wraps `f(rt, a, b, ...)` as `call(rt, args, kwargs)`; kwargs is a dict or nil.
function bind.signature(fname, signature, f)
  local s = parse(signature)
  local n = #s.names
  return function(rt, args, kwargs)
    local given = table.move(args, 1, math.min(#args, n), 1, {})
    local rest, extra
    if #args > n then
      if not s.rest then
        raise("TypeError", ("%s() takes at most %d arguments (%d given)"):format(fname, n, #args))
      end
      rest = table.move(args, n + 1, #args, 1, {})
    end
    for i, name in ipairs(kwargs and kwargs.keys or {}) do
      local at = s.at[name]
      if at then
        if given[at] ~= nil then
          raise("TypeError", fname .. "() got multiple values for argument '" .. name .. "'")
        end
        given[at] = kwargs.vals[i]
      elseif s.rest then
        extra = extra or value.dict()
        value.put(extra, name, kwargs.vals[i])
      else
        raise("TypeError", fname .. "() got an unexpected keyword argument '" .. name .. "'")
      end
    end
    for i = 1, s.required do
      if given[i] == nil then
        raise("TypeError", fname .. "() missing required argument: '" .. s.names[i] .. "'")
      end
    end
    if s.rest then
      given[n + 1], given[n + 2] = rest or {}, extra
      return f(rt, table.unpack(given, 1, n + 2))
    end
    return f(rt, table.unpack(given, 1, n))
  end
end

-- Checks that functions make on their arguments -----------------------------------------------

--- An integer argument, or `default` when it was not given or None.
function bind.int(v, default)
  if v == nil or v == value.none and default ~= nil then return default end
  if v == true then return 1 end
  if v == false then return 0 end
  if math.type(v) ~= "integer" then
    if value.is(v, value.Undefined) then value.fail_undefined(v) end
    raise("TypeError", "'" .. value.typename(v) .. "' object cannot be interpreted as an integer")
  end
  return v
end

--- The Lua string of a str argument, or `default` when it was not given.
function bind.text(v, default)
  if v == nil then return default end
  local s = value.text(v)
  if not s then raise("TypeError", "expected str, got " .. value.typename(v)) end
  return s
end

--- Like `text`, and None counts as not given.
function bind.optional_text(v)
  if v == value.none then return nil end
  return bind.text(v)
end

return bind
