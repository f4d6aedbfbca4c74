--- What Jinja settles when it compiles a template, before anything runs (jinja2/idtracking.py and
--- compiler.py):
---
--- - which names a scope sets before it reads them. Such a name is undefined in that scope until it
---   is set, even when an outer scope has no such variable but the render context does;
--- - which macros take `caller`, `kwargs` and `varargs`, and which loops are seen through `loop`;
--- - that filters and tests exist, except under an `if`, where only running them fails.
---
--- Results go into the nodes: `unset` (names), `takes` (set of special parameters).

local errors = require("moonlet.jinja.errors")
local parser = require("moonlet.jinja.parser")

local scope = {}

local FIELDS = parser.FIELDS

--- Calls visit(child) for every child node, in Jinja's order.
local function each_child(node, visit)
  for _, field in ipairs(FIELDS[node.kind]) do
    local list = field:match("^%[(.*)%]$")
    if list then
      for _, child in ipairs(node[list]) do visit(child) end
    elseif node[field] then
      visit(node[field])
    end
  end
end

scope.each_child = each_child

-- Names of one scope --------------------------------------------------------------------------

local Symbols = {}
Symbols.__index = Symbols

local function new_symbols(parent)
  return setmetatable({ parent = parent, loads = {}, stores = {} }, Symbols)
end

function Symbols:knows(name)
  local at = self
  while at do
    if at.loads[name] then return true end
    at = at.parent
  end
  return false
end

function Symbols:store(name)
  self.stores[name] = true
  if not self.loads[name] then
    self.loads[name] = self.parent and self.parent:knows(name) and "outer" or "unset"
  end
end

function Symbols:parameter(name)
  self.stores[name] = true
  self.loads[name] = "parameter"
end

function Symbols:load(name)
  if not self:knows(name) then self.loads[name] = "outer" end
end

function Symbols:branch()
  local copy = new_symbols(self.parent)
  for name, how in pairs(self.loads) do copy.loads[name] = how end
  for name in pairs(self.stores) do copy.stores[name] = true end
  return copy
end

--- Takes in the branches of an `if`: what only they set is looked up outside until then.
function Symbols:merge(branches)
  local before = {}
  for name in pairs(self.stores) do before[name] = true end
  for _, branch in ipairs(branches) do
    for name, how in pairs(branch.loads) do self.loads[name] = how end
    for name in pairs(branch.stores) do self.stores[name] = true end
  end
  for name in pairs(self.stores) do
    if not before[name] then self.loads[name] = "outer" end
  end
end

function Symbols:unset()
  local names = {}
  for name, how in pairs(self.loads) do
    if how == "unset" then names[#names + 1] = name end
  end
  return names
end

-- Nodes whose inside is another scope: only what they evaluate outside counts here.
local OUTSIDE = {
  For = { "iter" }, CallBlock = { "call" }, FilterBlock = { "filter" }, AssignBlock = { "target" },
  With = { "values" }, Scope = {}, Autoescape = {}, Block = {},
}

local track

local function track_all(nodes, symbols)
  for _, node in ipairs(nodes) do track(node, symbols) end
end

--- Records what a node reads and sets in the scope it stands in (FrameSymbolVisitor).
function track(node, symbols)
  local kind = node.kind
  if kind == "Name" then
    if node.ctx == "param" then
      symbols:parameter(node.name)
    elseif node.ctx == "store" then
      symbols:store(node.name)
    else
      symbols:load(node.name)
    end
  elseif kind == "NSRef" then
    symbols:load(node.name)
  elseif kind == "Macro" then
    symbols:store(node.name)
  elseif kind == "Assign" then
    track(node.node, symbols)
    track(node.target, symbols)
  elseif kind == "If" then
    track(node.test, symbols)
    local branches = {}
    for i, body in ipairs({ node.body, node.elifs, node.else_body }) do
      branches[i] = symbols:branch()
      track_all(body, branches[i])
    end
    symbols:merge(branches)
  elseif OUTSIDE[kind] then
    for _, field in ipairs(OUTSIDE[kind]) do
      if field == "values" then
        track_all(node.values, symbols)
      else
        track(node[field], symbols)
      end
    end
  else
    each_child(node, function(child) track(child, symbols) end)
  end
end

--- Which of `names` the nodes read before setting them (find_undeclared).
local function undeclared(nodes, names)
  local open, found = {}, {}
  for _, name in ipairs(names) do open[name] = true end
  local function visit(node)
    if node.kind == "Name" and open[node.name] then
      if node.ctx == "load" then found[node.name] = true else open[node.name] = nil end
    end
    if node.kind ~= "Block" then each_child(node, visit) end
  end
  for _, node in ipairs(nodes) do visit(node) end
  return found
end

-- The walk ------------------------------------------------------------------------------------

local Checker = {}
Checker.__index = Checker

--- Checks the filters and tests of an expression. `soft`: missing ones fail only when run.
function Checker:expression(node, soft)
  if not node then return end
  if not soft and node.kind == "Filter" and not self.filters[node.name] then
    errors.raise("TemplateAssertionError", "No filter named '" .. node.name .. "'.", node.line)
  elseif not soft and node.kind == "Test" and not self.tests[node.name] then
    errors.raise("TemplateAssertionError", "No test named '" .. node.name .. "'.", node.line)
  end
  soft = soft or node.kind == "CondExpr"
  each_child(node, function(child) self:expression(child, soft) end)
end

function Checker:expressions(nodes, soft)
  for _, node in ipairs(nodes) do self:expression(node, soft) end
end

function Checker:body(nodes, symbols, soft)
  for _, node in ipairs(nodes) do
    local check = self[node.kind]
    if check then
      check(self, node, symbols, soft)
    else
      self:expression(node, soft)
    end
  end
end

--- A scope with nothing but a body.
function Checker:Scope(node, symbols)
  local inner = new_symbols(symbols)
  track_all(node.body, inner)
  self:body(node.body, inner, false)
  node.unset = inner:unset()
end

function Checker:Autoescape(node, symbols)
  self:expression(node.option)
  self:Scope(node, symbols)
end

function Checker:Block(node)
  local inner = new_symbols(nil)
  node.takes = undeclared(node.body, { "self", "super" })
  for name in pairs(node.takes) do inner:parameter(name) end
  track_all(node.body, inner)
  self:body(node.body, inner, false)
  node.unset = inner:unset()
end

function Checker:If(node, symbols)
  self:expression(node.test, true)
  self:body(node.body, symbols, true)
  self:body(node.elifs, symbols, true)
  self:body(node.else_body, symbols, true)
end

local function find_loop_store(node)
  if node.kind == "Name" and node.ctx == "store" and node.name == "loop" then
    errors.raise("TemplateAssertionError",
      "Can't assign to special loop variable in for-loop target", node.line)
  end
  each_child(node, find_loop_store)
end

local function has_scoped_block(nodes)
  local found = false
  local function visit(node)
    found = found or node.kind == "Block" and node.scoped
    each_child(node, visit)
  end
  for _, node in ipairs(nodes) do visit(node) end
  return found
end

function Checker:For(node, symbols, soft)
  find_loop_store(node)
  self:expression(node.iter, soft)
  self:expression(node.test)
  local inner = new_symbols(symbols)
  node.extended = node.recursive or undeclared(node.body, { "loop" }).loop
    or has_scoped_block(node.body)
  if node.extended then inner:parameter("loop") end
  local function targets(target)
    if target.kind == "Name" then inner:parameter(target.name) end
    if target.kind == "Tuple" then
      for _, item in ipairs(target.items) do targets(item) end
    end
  end
  targets(node.target)
  track_all(node.body, inner)
  self:body(node.body, inner, false)
  node.unset = inner:unset()
  local other = new_symbols(symbols)
  track_all(node.else_body, other)
  self:body(node.else_body, other, false)
  node.else_unset = other:unset()
end

--- A macro or call block.
function Checker:Macro(node, symbols)
  local inner = new_symbols(symbols)
  local names = {}
  for _, arg in ipairs(node.args) do names[arg.name] = true end
  node.takes = {}
  for name in pairs(undeclared(node.body, { "caller", "kwargs", "varargs" })) do
    if name == "caller" or not names[name] then node.takes[name] = true end
  end
  if node.takes.caller and names.caller then
    for i, arg in ipairs(node.args) do
      if arg.name == "caller" and not node.defaults[i - #node.args + #node.defaults] then
        errors.raise("TemplateAssertionError", "When defining macros or call blocks the special"
          .. ' "caller" argument must be omitted or be given a default.', node.line)
      end
    end
  end
  for _, arg in ipairs(node.args) do inner:parameter(arg.name) end
  for name in pairs(node.takes) do inner:parameter(name) end
  self:expressions(node.defaults)
  track_all(node.defaults, inner)
  track_all(node.body, inner)
  self:body(node.body, inner, false)
  node.unset = inner:unset()
end

function Checker:CallBlock(node, symbols, soft)
  self:Macro(node, symbols)
  self:expression(node.call, soft)
end

function Checker:FilterBlock(node, symbols)
  self:Scope(node, symbols)
  self:expression(node.filter)
end

function Checker:With(node, symbols, soft)
  self:expressions(node.values, soft)
  local inner = new_symbols(symbols)
  track_all(node.targets, inner)
  track_all(node.body, inner)
  self:body(node.body, inner, false)
  node.unset = inner:unset()
end

function Checker:AssignBlock(node, symbols)
  self:Scope(node, symbols)
  self:expression(node.filter)
end

--- Analyses the tree of a template. `filters` and `tests` hold the names that exist.
function scope.analyse(tree, filters, tests)
  local checker = setmetatable({ filters = filters, tests = tests }, Checker)
  local symbols = new_symbols(nil)
  tree.uses_self = undeclared(tree.body, { "self" }).self
  if tree.uses_self then symbols:parameter("self") end
  track_all(tree.body, symbols)
  checker:body(tree.body, symbols, false)
  tree.unset = symbols:unset()
end

return scope
