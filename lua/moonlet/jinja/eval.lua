--- Computes expressions. `rt` is the render in progress (init.lua), `scope` where names are
--- looked up: {vars=, parent=}.

local access = require("moonlet.jinja.access")
local errors = require("moonlet.jinja.errors")
local operators = require("moonlet.jinja.operators")
local value = require("moonlet.jinja.value")

local eval = {}

local raise = errors.raise

--- Stands in a scope for a name that is undefined there although an outer scope may know it.
eval.UNSET = setmetatable({}, { type = "unset" })

local KINDS = {}

local function evaluate(rt, node, scope)
  return KINDS[node.kind](rt, node, scope)
end
eval.expression = evaluate

local function evaluate_all(rt, nodes, scope)
  local out = {}
  for i, node in ipairs(nodes) do out[i] = evaluate(rt, node, scope) end
  return out
end

--- The value of a variable.
function eval.lookup(scope, name)
  local at = scope
  repeat
    local v = at.vars[name]
    if v ~= nil then
      if v == eval.UNSET then break end
      return v
    end
    at = at.parent
  until not at
  return value.undefined(name)
end

function KINDS.Const(_, node) return node.value end
function KINDS.Name(_, node, scope) return eval.lookup(scope, node.name) end
function KINDS.Tuple(rt, node, scope) return value.tuple(evaluate_all(rt, node.items, scope)) end
function KINDS.List(rt, node, scope) return value.list(evaluate_all(rt, node.items, scope)) end

function KINDS.Dict(rt, node, scope)
  local out = value.dict()
  for i, key in ipairs(node.keys) do
    local k = evaluate(rt, key, scope)
    local v = evaluate(rt, node.values[i], scope)
    rt.line = node.line
    value.put(out, k, v)
  end
  return out
end

function KINDS.CondExpr(rt, node, scope)
  if value.truth(evaluate(rt, node.test, scope)) then return evaluate(rt, node.yes, scope) end
  if node.no then return evaluate(rt, node.no, scope) end
  return value.undefined(nil, nil, ("the inline if-expression on line %d evaluated to false and"
    .. " no else section was defined."):format(node.line))
end

function KINDS.Or(rt, node, scope)
  local left = evaluate(rt, node.left, scope)
  if value.truth(left) then return left end
  return evaluate(rt, node.right, scope)
end

function KINDS.And(rt, node, scope)
  local left = evaluate(rt, node.left, scope)
  if not value.truth(left) then return left end
  return evaluate(rt, node.right, scope)
end

function KINDS.Not(rt, node, scope) return not value.truth(evaluate(rt, node.node, scope)) end

function KINDS.Binary(rt, node, scope)
  local left, right = evaluate(rt, node.left, scope), evaluate(rt, node.right, scope)
  rt.line = node.line
  if node.bare_base and value.number(left) and value.number(left) < 0 then
    return operators.unary("-", rt:binary("**", operators.unary("-", left), right))
  end
  return rt:binary(node.op, left, right)
end

function KINDS.Unary(rt, node, scope)
  local v = evaluate(rt, node.node, scope)
  rt.line = node.line
  return operators.unary(node.op, v)
end

function KINDS.Concat(rt, node, scope)
  local values = evaluate_all(rt, node.nodes, scope)
  rt.line = node.line
  local out = operators.concat(values, rt.autoescape)
  rt:charge(value.cost(out))
  return out
end

function KINDS.Compare(rt, node, scope)
  local left = evaluate(rt, node.left, scope)
  for i, op in ipairs(node.operators) do
    local right = evaluate(rt, node.operands[i], scope)
    rt.line = node.line
    rt:charge(math.min(value.cost(left), value.cost(right)))
    local holds
    if op == "==" then
      holds = value.eq(left, right)
    elseif op == "!=" then
      holds = not value.eq(left, right)
    elseif op == "in" then
      holds = rt:contains(right, left)
    elseif op == "not in" then
      holds = not rt:contains(right, left)
    else
      holds = value.compare(op, left, right)
    end
    if not holds then return false end
    left = right
  end
  return true
end

function KINDS.Getattr(rt, node, scope)
  local object = evaluate(rt, node.node, scope)
  rt.line = node.line
  return access.attribute(object, node.attr)
end

local function slice_or_undefined(object, start, stop, step)
  local ok, result = pcall(access.slice, object, start, stop, step)
  if ok then return result end
  if result.kind == "TypeError" then return value.undefined("slice", object) end
  error(result, 0)
end

function KINDS.Getitem(rt, node, scope)
  local object = evaluate(rt, node.node, scope)
  local arg = node.arg
  if arg.kind == "Slice" then
    local start = arg.start and evaluate(rt, arg.start, scope)
    local stop = arg.stop and evaluate(rt, arg.stop, scope)
    local step = arg.step and evaluate(rt, arg.step, scope)
    rt.line = node.line
    rt:charge(value.cost(object))
    if node.lenient then return slice_or_undefined(object, start, stop, step) end
    return access.slice(object, start, stop, step)
  end
  local key = evaluate(rt, arg, scope)
  rt.line = node.line
  return access.item(object, key)
end

function KINDS.Slice(_, node)
  raise("TypeError", "a slice cannot stand in a list of subscripts", node.line)
end

-- Calls ---------------------------------------------------------------------------------------

local function put_keyword(kwargs, name, v)
  if value.get(kwargs, name) ~= nil then
    raise("TypeError", "got multiple values for keyword argument " .. value.repr(name))
  end
  value.put(kwargs, name, v)
end

--- Adds the arguments of a call to `args`; returns the keyword arguments as a dict or nil.
local function arguments(rt, node, scope, args)
  for _, arg in ipairs(node.args) do args[#args + 1] = evaluate(rt, arg, scope) end
  if node.dyn_args then
    for item in value.iter(evaluate(rt, node.dyn_args, scope)) do args[#args + 1] = item end
    value.check_items(#args)
  end
  if not node.kwnames[1] and not node.dyn_kwargs then return nil end
  local kwargs = value.dict()
  for i, name in ipairs(node.kwnames) do
    put_keyword(kwargs, name, evaluate(rt, node.kwvalues[i], scope))
  end
  if node.dyn_kwargs then
    local more = evaluate(rt, node.dyn_kwargs, scope)
    if not value.is(more, value.Dict) then
      raise("TypeError", "argument after ** must be a mapping, not " .. value.typename(more))
    end
    for i, name in ipairs(more.keys) do
      if type(name) ~= "string" then raise("TypeError", "keywords must be strings") end
      put_keyword(kwargs, name, more.vals[i])
    end
  end
  return kwargs
end

--- A call; `caller` is the macro of a call block, or nil.
function eval.call(rt, node, scope, caller)
  local callee, args = evaluate(rt, node.node, scope), {}
  local kwargs = arguments(rt, node, scope, args)
  if caller then
    kwargs = kwargs or value.dict()
    put_keyword(kwargs, "caller", caller)
  end
  rt.line = node.line
  local result = rt:call(callee, args, kwargs)
  rt.line = node.line
  return result
end

function KINDS.Call(rt, node, scope) return eval.call(rt, node, scope) end

--- A filter applied to `v`, or to its own node when that is not given.
function eval.filter(rt, node, scope, v)
  -- A filter of a block ends in one without a node, which takes the body of the block.
  if node.node and node.node.kind == "Filter" then
    v = eval.filter(rt, node.node, scope, v)
  elseif node.node then
    v = evaluate(rt, node.node, scope)
  end
  local args = { v }
  local kwargs = arguments(rt, node, scope, args)
  rt.line = node.line
  local call = rt.filters[node.name]
  if not call then
    raise("TemplateRuntimeError", "No filter named '" .. node.name .. "' found.")
  end
  rt:charge(1 + value.cost(v))
  local result = call(rt, args, kwargs)
  rt:charge(value.cost(result))
  return result
end

function KINDS.Filter(rt, node, scope) return eval.filter(rt, node, scope) end

function KINDS.Test(rt, node, scope)
  local args = { evaluate(rt, node.node, scope) }
  local kwargs = arguments(rt, node, scope, args)
  rt.line = node.line
  local call = rt.tests[node.name]
  if not call then
    raise("TemplateRuntimeError", "No test named '" .. node.name .. "' found.")
  end
  return call(rt, args, kwargs)
end

return eval
