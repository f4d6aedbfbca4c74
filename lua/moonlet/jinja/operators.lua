--- The operators + - * / // % **, unary + and -, and `in`, with Python's rules for mixed types.

local bind = require("moonlet.jinja.bind")
local errors = require("moonlet.jinja.errors")
local format = require("moonlet.jinja.format")
local markup = require("moonlet.jinja.markup")
local number = require("moonlet.jinja.number")
local value = require("moonlet.jinja.value")

local operators = {}

local raise = errors.raise
local ARITHMETIC = { ["+"] = number.add, ["-"] = number.sub, ["*"] = number.mul,
  ["/"] = number.div, ["//"] = number.floordiv, ["%"] = number.mod, ["**"] = number.pow }

local function unsupported(op, a, b)
  for _, v in ipairs({ a, b }) do
    if value.is(v, value.Undefined) then value.fail_undefined(v) end
  end
  local sequence = value.text(a) and "str" or value.is_sequence(a) and value.typename(a)
  if op == "+" and sequence then
    raise("TypeError", ('can only concatenate %s (not "%s") to %s'):format(sequence,
      value.typename(b), sequence))
  end
  raise("TypeError", ("unsupported operand type(s) for %s: '%s' and '%s'"):format(
    op == "**" and "** or pow()" or op, value.typename(a), value.typename(b)))
end

local function add(a, b)
  local sa, sb = value.text(a), value.text(b)
  if sa and sb then
    value.check_bytes(#sa + #sb)
    if type(a) == "table" or type(b) == "table" then
      return value.markup(markup.escaped(a) .. markup.escaped(b))
    end
    return sa .. sb
  end
  local mt = value.is_sequence(a) and getmetatable(a)
  if mt and value.is(b, mt) then
    value.check_items(#a + #b)
    local out = table.move(a, 1, #a, 1, {})
    return setmetatable(table.move(b, 1, #b, #a + 1, out), mt)
  end
  return unsupported("+", a, b)
end

local function multiply(a, b)
  if value.number(a) then a, b = b, a end
  if type(b) ~= "boolean" and math.type(b) ~= "integer" then return unsupported("*", a, b) end
  local n = math.max(bind.int(b), 0)
  local s = value.text(a)
  if s then
    value.check_bytes(#s > 0 and math.min(n, value.MAX_BYTES + 1) * #s or 0)
    local out = s ~= "" and s:rep(n) or ""
    return type(a) == "table" and value.markup(out) or out
  end
  if not value.is_sequence(a) then return unsupported("*", a, b) end
  if #a == 0 then return a end
  value.check_items(math.min(n, value.MAX_ITEMS + 1) * #a)
  local out = {}
  for i = 0, n - 1 do table.move(a, 1, #a, i * #a + 1, out) end
  return setmetatable(out, getmetatable(a))
end

--- `a op b`.
function operators.binary(op, a, b)
  local na, nb = value.number(a), value.number(b)
  if na and nb then return ARITHMETIC[op](na, nb) end
  if op == "+" then return add(a, b) end
  if op == "*" then return multiply(a, b) end
  if op == "%" and value.text(a) then
    if type(a) == "string" then return format.percent(a, b) end
    return value.markup(format.percent(a.s, markup.percent_args(b)))
  end
  return unsupported(op, a, b)
end

--- `+v` and `-v`.
function operators.unary(op, v)
  local n = value.number(v)
  if not n then
    if value.is(v, value.Undefined) then value.fail_undefined(v) end
    raise("TypeError", ("bad operand type for unary %s: '%s'"):format(op, value.typename(v)))
  end
  return op == "-" and number.neg(n) or n
end

--- `item in container`; `charge(n)` accounts for the items looked at.
function operators.contains(container, item, charge)
  local s = value.text(container)
  if s then
    local part = value.text(item)
    if not part then
      raise("TypeError", "'in <string>' requires string as left operand, not "
        .. value.typename(item))
    end
    charge(#s // 32)
    return s:find(part, 1, true) ~= nil
  end
  if value.is(container, value.Dict) then return value.get(container, item) ~= nil end
  if value.is(container, value.View.keys) then
    return value.get(container.of, item) ~= nil
  end
  local next_item = value.try_iter(container)
  if not next_item then
    raise("TypeError", "argument of type '" .. value.typename(container) .. "' is not iterable")
  end
  for other in next_item do
    charge(1)
    if value.eq(other, item) then return true end
  end
  return false
end

--- `a ~ b ~ c`: the str of each. `escape`: as Markup, unless nothing in it is.
function operators.concat(values, escape)
  local parts, bytes, any = {}, 0, false
  for _, v in ipairs(values) do any = any or value.is(v, value.Markup) end
  for i, v in ipairs(values) do
    parts[i] = escape and any and markup.escaped(v) or value.str(v)
    bytes = bytes + #parts[i]
    value.check_bytes(bytes)
  end
  local out = table.concat(parts)
  return escape and any and value.markup(out) or out
end

return operators
