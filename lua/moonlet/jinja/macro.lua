--- Macros, as jinja2/runtime.py binds their arguments. Running the body is left to `invoke`, which
--- the statements hand over.

local errors = require("moonlet.jinja.errors")
local value = require("moonlet.jinja.value")

local Macro = value.new_type("Macro")

local raise = errors.raise

--- A macro of a Macro or CallBlock node, defined in `scope`. invoke(rt, macro, bound) renders it;
--- `bound` maps parameter names to values, without those that were not given.
local function new_macro(node, scope, invoke)
  local names = {}
  for i, arg in ipairs(node.args) do names[i] = arg.name end
  return setmetatable({ node = node, scope = scope, name = node.name, names = names,
    invoke = invoke }, Macro)
end

local function has(list, wanted)
  for _, name in ipairs(list) do
    if name == wanted then return true end
  end
  return false
end

local function reject_keyword(macro, name)
  if has(name, "caller") then
    raise("TypeError", ("macro %s was invoked with two values for the special caller argument."
      .. " This is most likely a bug."):format(value.repr(macro.name or value.none)))
  end
  raise("TypeError", ("macro %s takes no keyword argument %s"):format(
    value.repr(macro.name or value.none), value.repr(name[1])))
end

--- Sorts call arguments into parameters.
local function bind_arguments(macro, args, kwargs)
  local names, takes = macro.names, macro.node.takes
  local bound, rest = {}, value.dict()
  for i, key in ipairs(kwargs and kwargs.keys or {}) do value.put(rest, key, kwargs.vals[i]) end
  local used = {}
  local found_caller = #args >= #names and has(names, "caller")
  for i, name in ipairs(names) do
    if i <= #args then
      bound[name] = args[i]
    else
      bound[name], used[name] = value.get(rest, name), true
      found_caller = found_caller or name == "caller"
    end
  end
  if takes.caller and not found_caller then
    local caller = value.get(rest, "caller")
    used.caller = true
    if caller == nil or caller == value.none then
      caller = value.undefined("caller", nil, "No caller defined")
    end
    bound.caller = caller
  end
  local left = value.dict()
  for i, key in ipairs(rest.keys) do
    if not used[key] then value.put(left, key, rest.vals[i]) end
  end
  if takes.kwargs then
    bound.kwargs = left
  elseif left.keys[1] ~= nil then
    reject_keyword(macro, left.keys)
  end
  if takes.varargs then
    bound.varargs = value.tuple(table.move(args, #names + 1, #args, 1, {}))
  elseif #args > #names then
    raise("TypeError", ("macro %s takes not more than %d argument(s)"):format(
      value.repr(macro.name or value.none), #names))
  end
  return bound
end

Macro.call = function(macro, rt, args, kwargs)
  return macro.invoke(rt, macro, bind_arguments(macro, args, kwargs))
end

Macro.attribute = function(macro, name)
  if name == "name" then return macro.name or value.none end
  if name == "arguments" then
    return value.tuple(table.move(macro.names, 1, #macro.names, 1, {}))
  end
  if name == "caller" then return macro.node.takes.caller or false end
  if name == "catch_kwargs" then return macro.node.takes.kwargs or false end
  if name == "catch_varargs" then return macro.node.takes.varargs or false end
end

Macro.repr = function(macro)
  return "<Macro " .. (macro.name and value.repr(macro.name) or "anonymous") .. ">"
end

return new_macro
