--- Where it shows that Jinja computes constant expressions while it compiles a template
--- (jinja2/optimizer.py) and everything else in the Python it generates (compiler.py):
---
--- - a slice of what cannot be sliced is Undefined in a constant expression (nodes.py,
---   Getitem.as_const), and a TypeError when it runs;
--- - a negative constant is written without parentheses: `(-2) ** n` runs as `-2 ** n`, -(2 ** n).
---
--- Results go into the nodes: `lenient` (Getitem), `bare_base` (Binary).

local scope = require("moonlet.jinja.scope")

local constant = {}

local COMPUTED <const> = { Const = true, Tuple = true, List = true, Dict = true, CondExpr = true,
  Or = true, And = true, Not = true, Binary = true, Unary = true, Concat = true, Compare = true,
  Getattr = true, Getitem = true, Slice = true, Filter = true, Test = true }
-- Filters that take the context and therefore only run.
local RUN <const> = { map = true, select = true, reject = true, selectattr = true,
  rejectattr = true }

local function may_be_constant(node)
  if node.kind == "Filter" then return node.node ~= nil and not RUN[node.name] end
  return COMPUTED[node.kind] or false
end

--- Marks the nodes of a template; answers whether `node` is a constant.
function constant.mark(node)
  local all, children, constants = may_be_constant(node), {}, {}
  scope.each_child(node, function(child)
    children[#children + 1] = child
    constants[child] = constant.mark(child)
    all = all and constants[child]
  end)
  for _, child in ipairs(children) do
    if child.kind == "Getitem" and constants[child] and (all or node.kind == "Output") then
      child.lenient = true
    end
  end
  if node.kind == "Binary" and node.op == "**" then
    node.bare_base = constants[node.left] and not all
  end
  return all
end

return constant
