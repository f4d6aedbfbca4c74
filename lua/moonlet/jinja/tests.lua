--- The tests of `x is name` (jinja2/tests.py). Each is call(rt, args, kwargs) -> boolean.

local bind = require("moonlet.jinja.bind")
local text = require("moonlet.jinja.text")
local value = require("moonlet.jinja.value")

local tests = {}

local function define(names, signature, f)
  for name in names:gmatch("%S+") do
    tests[name] = bind.signature(name, signature, f)
  end
end

-- `%` on text formats it, and these tests ask no further.
define("odd", "/value", function(rt, v) return value.eq(rt:binary("%", v, 2), 1) end)
define("even", "/value", function(rt, v) return value.eq(rt:binary("%", v, 2), 0) end)
define("divisibleby", "value num", function(rt, v, n)
  return value.eq(rt:binary("%", v, n), 0)
end)

local function is_undefined(v) return value.is(v, value.Undefined) end
define("defined", "/value", function(_, v) return not is_undefined(v) end)
define("undefined", "/value", function(_, v) return is_undefined(v) end)

define("filter", "/value", function(rt, v) return rt.filters[value.hash(v)] ~= nil end)
define("test", "/value", function(_, v) return tests[value.hash(v)] ~= nil end)

define("none", "/value", function(_, v) return v == value.none end)
define("boolean", "/value", function(_, v) return type(v) == "boolean" end)
define("true", "/value", function(_, v) return v == true end)
define("false", "/value", function(_, v) return v == false end)
define("integer", "/value", function(_, v) return math.type(v) == "integer" end)
define("float", "/value", function(_, v) return math.type(v) == "float" end)
define("number", "/value", function(_, v) return value.number(v) ~= nil end)
define("string", "/value", function(_, v) return value.text(v) ~= nil end)
define("mapping", "/value", function(_, v) return value.is(v, value.Dict) end)
define("lower", "/value", function(_, v) return text.all_case(value.str(v), "lower") end)
define("upper", "/value", function(_, v) return text.all_case(value.str(v), "upper") end)
define("escaped", "/value", function(_, v) return value.is(v, value.Markup) end)

define("sequence", "/value", function(_, v)
  -- What has a length and items by position or key; views of a dict have no items. An undefined
  -- value has both, as Jinja's class does.
  local mt = type(v) == "table" and v ~= value.none and getmetatable(v)
  if mt and (value.is_view(v) or mt.length) then return false end
  return value.length(v) ~= nil
end)

define("iterable", "/value", function(_, v) return value.try_iter(v) ~= nil end)

define("callable", "/value", function(_, v)
  local mt = type(v) == "table" and v ~= value.none and getmetatable(v)
  return mt == value.Function or mt == value.Undefined or mt and mt.call ~= nil or false
end)

define("sameas", "value other", function(_, a, b)
  if type(a) == "number" then return math.type(a) == math.type(b) and a == b end
  return a == b
end)

define("in", "value seq", function(rt, v, seq) return rt:contains(seq, v) end)

define("== eq equalto", "/a /b", function(_, a, b) return value.eq(a, b) end)
define("!= ne", "/a /b", function(_, a, b) return not value.eq(a, b) end)
for op, names in pairs({ ["<"] = "< lt lessthan", ["<="] = "<= le", [">"] = "> gt greaterthan",
  [">="] = ">= ge" }) do
  define(names, "/a /b", function(_, a, b) return value.compare(op, a, b) end)
end

return tests
