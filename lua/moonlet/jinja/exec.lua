--- Runs statements. Each returns nil, or "Break" or "Continue" while one of them leaves a loop.

local errors = require("moonlet.jinja.errors")
local eval = require("moonlet.jinja.eval")
local globals = require("moonlet.jinja.globals")
local loop = require("moonlet.jinja.loop")
local markup = require("moonlet.jinja.markup")
local new_macro = require("moonlet.jinja.macro")
local value = require("moonlet.jinja.value")

local exec = {}

local raise = errors.raise
local evaluate = eval.expression

local KINDS = {}

--- A scope inside another; `unset` names what it sets before it reads.
local function new_scope(parent, unset)
  local vars = {}
  for _, name in ipairs(unset) do vars[name] = eval.UNSET end
  return { vars = vars, parent = parent }
end

local function run(rt, body, scope)
  for _, node in ipairs(body) do
    local signal = KINDS[node.kind](rt, node, scope)
    if signal then return signal end
  end
end

--- Runs a body with its output kept apart; returns the output and the signal.
local function capture(rt, body, scope)
  local outer = rt.out
  rt.out = { bytes = 0 }
  local signal = run(rt, body, scope)
  local out = table.concat(rt.out)
  rt.out = outer
  return out, signal
end

local function maybe_markup(rt, s)
  return rt.autoescape and value.markup(s) or s
end

local function emit_value(rt, v)
  rt:emit(rt.autoescape and markup.escaped(v) or value.str(v))
end

--- Filter and call blocks must make text; nothing is converted for them.
local function emit_text(rt, v)
  local s = value.text(v)
  if not s then raise("TypeError", "expected str instance, " .. value.typename(v) .. " found") end
  rt:emit(s)
end

-- Output and assignment -----------------------------------------------------------------------

function KINDS.Output(rt, node, scope)
  for _, child in ipairs(node.nodes) do
    if child.kind == "Data" then
      rt:emit(child.data)
    else
      emit_value(rt, evaluate(rt, child, scope))
    end
  end
end

local function unpack_items(target, v)
  local wanted = #target.items
  local next_item = value.try_iter(v)
  if not next_item then
    raise("TypeError", "cannot unpack non-iterable " .. value.typename(v) .. " object")
  end
  local items = {}
  for item in next_item do
    items[#items + 1] = item
    if #items > wanted then
      raise("ValueError", "too many values to unpack (expected " .. wanted .. ")")
    end
  end
  if #items < wanted then
    raise("ValueError", ("not enough values to unpack (expected %d, got %d)"):format(wanted,
      #items))
  end
  return items
end

--- Sets the names of a target in a scope.
local function assign(scope, target, v)
  if target.kind == "Name" then
    scope.vars[target.name] = v
  elseif target.kind == "NSRef" then
    globals.check_namespace_name(target.attr)
    value.put(eval.lookup(scope, target.name).attrs, target.attr, v)
  else
    for i, item in ipairs(unpack_items(target, v)) do assign(scope, target.items[i], item) end
  end
end

local function check_namespaces(scope, target)
  if target.kind == "NSRef" then
    if not value.is(eval.lookup(scope, target.name), value.Namespace) then
      raise("TemplateRuntimeError", "cannot assign attribute on non-namespace object")
    end
  elseif target.kind == "Tuple" then
    for _, item in ipairs(target.items) do check_namespaces(scope, item) end
  end
end

function KINDS.Assign(rt, node, scope)
  rt.line = node.line
  check_namespaces(scope, node.target)
  local v = evaluate(rt, node.node, scope)
  rt.line = node.line
  assign(scope, node.target, v)
end

function KINDS.AssignBlock(rt, node, scope)
  local inner = new_scope(scope, node.unset)
  local out, signal = capture(rt, node.body, inner)
  if signal then return signal end
  local v = maybe_markup(rt, out)
  if node.filter then v = eval.filter(rt, node.filter, inner, v) end
  rt.line = node.line
  check_namespaces(scope, node.target)
  assign(scope, node.target, v)
end

-- Control flow --------------------------------------------------------------------------------

function KINDS.If(rt, node, scope)
  if value.truth(evaluate(rt, node.test, scope)) then return run(rt, node.body, scope) end
  for _, branch in ipairs(node.elifs) do
    if value.truth(evaluate(rt, branch.test, scope)) then return run(rt, branch.body, scope) end
  end
  return run(rt, node.else_body, scope)
end

function KINDS.Break() return "Break" end
function KINDS.Continue() return "Continue" end

--- The item as the filter of a loop passes it on: a tuple target makes a tuple of it.
local function read_target(scope, target)
  if target.kind == "Name" then return scope.vars[target.name] end
  local out = {}
  for i, item in ipairs(target.items) do out[i] = read_target(scope, item) end
  return value.tuple(out)
end

--- The items of a loop that pass its `if`.
local function passing(rt, node, scope, iterable)
  local next_item = value.iter(iterable)
  return function()
    while true do
      local item = next_item()
      if item == nil then return nil end
      rt:charge(1)
      local inner = new_scope(scope, {})
      assign(inner, node.target, item)
      if value.truth(evaluate(rt, node.test, inner)) then
        return read_target(inner, node.target)
      end
    end
  end
end

local function run_loop(rt, node, scope, iterable, recurse, depth0)
  rt.line = node.line
  local items = node.test and passing(rt, node, scope, iterable)
  local state = loop.new(iterable, items, recurse, depth0)
  local completed = false
  while true do
    local item = loop.advance(state)
    if item == nil then break end
    rt:charge(1)
    local inner = new_scope(scope, node.unset)
    if node.extended then inner.vars.loop = state end
    rt.line = node.line
    assign(inner, node.target, item)
    local signal = run(rt, node.body, inner)
    if signal == "Break" then break end
    -- Jinja notes a round at its end, so `else` also runs after rounds that were all cut short.
    completed = completed or not signal
  end
  if not completed then
    return run(rt, node.else_body, new_scope(scope, node.else_unset))
  end
end

function KINDS.For(rt, node, scope)
  local iterable = evaluate(rt, node.iter, scope)
  if not node.recursive then return run_loop(rt, node, scope, iterable) end
  local function render(inner, depth0)
    return rt:nested(function()
      local outer = rt.out
      rt.out = { bytes = 0 }
      run_loop(rt, node, scope, inner, render, depth0)
      local out = table.concat(rt.out)
      rt.out = outer
      return maybe_markup(rt, out)
    end)
  end
  emit_value(rt, render(iterable, 0))
end

-- Scopes --------------------------------------------------------------------------------------

function KINDS.Scope(rt, node, scope)
  return run(rt, node.body, new_scope(scope, node.unset))
end

function KINDS.With(rt, node, scope)
  local inner = new_scope(scope, node.unset)
  for i, target in ipairs(node.targets) do
    assign(inner, target, evaluate(rt, node.values[i], scope))
  end
  return run(rt, node.body, inner)
end

function KINDS.Autoescape(rt, node, scope)
  local outer = rt.autoescape
  rt.autoescape = value.truth(evaluate(rt, node.option, scope))
  local signal = run(rt, node.body, new_scope(scope, node.unset))
  rt.autoescape = outer
  return signal
end

function KINDS.FilterBlock(rt, node, scope)
  local inner = new_scope(scope, node.unset)
  local out, signal = capture(rt, node.body, inner)
  if signal then return signal end
  emit_text(rt, eval.filter(rt, node.filter, inner, maybe_markup(rt, out)))
end

-- Macros --------------------------------------------------------------------------------------

local function invoke(rt, macro, bound)
  local node = macro.node
  local scope = new_scope(macro.scope, node.unset)
  for _, name in ipairs(macro.names) do
    scope.vars[name] = bound[name] == nil and eval.UNSET or bound[name]
  end
  for name in pairs(node.takes) do scope.vars[name] = bound[name] end
  return rt:nested(function()
    for i, name in ipairs(macro.names) do
      if bound[name] == nil then
        local default = node.defaults[i - #macro.names + #node.defaults]
        scope.vars[name] = default and evaluate(rt, default, scope)
          or value.undefined(name, nil, ("parameter %s was not provided"):format(value.repr(name)))
      end
    end
    return maybe_markup(rt, (capture(rt, node.body, scope)))
  end)
end

function KINDS.Macro(_, node, scope)
  scope.vars[node.name] = new_macro(node, scope, invoke)
end

function KINDS.CallBlock(rt, node, scope)
  local caller = new_macro(node, scope, invoke)
  emit_text(rt, eval.call(rt, node.call, scope, caller))
end

-- Blocks and other templates ------------------------------------------------------------------

local function run_block(rt, node, scope)
  if node.required then
    rt.line = node.line
    raise("TemplateRuntimeError", "Required block " .. value.repr(node.name) .. " not found")
  end
  local inner = new_scope(scope, node.unset)
  if node.takes.self then inner.vars.self = rt.self_reference end
  if node.takes.super then
    inner.vars.super = value.undefined("super", nil,
      "there is no parent block called " .. value.repr(node.name) .. ".")
  end
  return run(rt, node.body, inner)
end

--- What a block sees: the variables set at the top level so far, over the context.
local function block_scope(rt)
  local vars = {}
  for name, v in pairs(rt.root.vars) do
    if v ~= eval.UNSET then vars[name] = v end
  end
  return { vars = vars, parent = rt.root.parent }
end

function KINDS.Block(rt, node, scope)
  return run_block(rt, node, node.scoped and scope or block_scope(rt))
end

function KINDS.NoLoader(rt, node)
  rt.line = node.line
  raise("TypeError", "no loader for this environment specified: '" .. node.name
    .. "' cannot load another template")
end

local SelfReference = value.new_type("TemplateReference")
SelfReference.repr = function() return "<TemplateReference None>" end
SelfReference.attribute = function(reference, name)
  local node = reference.blocks[name]
  if not node then return nil end
  return value.func(name, function(rt)
    return rt:nested(function()
      local outer = rt.out
      rt.out = { bytes = 0 }
      run_block(rt, node, block_scope(rt))
      local out = table.concat(rt.out)
      rt.out = outer
      return maybe_markup(rt, out)
    end)
  end)
end

--- Runs a whole template; `context` is the scope of the render context.
function exec.template(rt, tree, context)
  rt.root = new_scope(context, tree.unset)
  rt.self_reference = setmetatable({ blocks = tree.blocks }, SelfReference)
  if tree.uses_self then rt.root.vars.self = rt.self_reference end
  run(rt, tree.body, rt.root)
end

return exec
