--- The values a template handles and what Python's core protocols do with them: truth, str, repr,
--- len, iteration, equality, order and hashing.
---
---   None -> json.null   bool, int, float, str -> the Lua values   everything else -> a table whose
---   metatable is one of the types below; `type` in it is the Python class name.
---
--- Lists and tuples are Lua sequences; a dict keeps `keys` and `vals` in insertion order and `pos`,
--- the place of each hashed key. Values are never changed once built (the sandbox forbids it).

local json = require("moonlet.json")
local errors = require("moonlet.jinja.errors")
local number = require("moonlet.jinja.number")
local text = require("moonlet.jinja.text")

local value = {}

local raise = errors.raise
local none = json.null
value.none = none

--- The longest text in bytes, the longest list and the deepest nesting a template can build. A
--- prompt of a million tokens has about 5 MB.
value.MAX_BYTES = 16 * 1024 * 1024
value.MAX_ITEMS = 1000 * 1000
value.MAX_DEPTH = 400
-- Comparing values that share parts can take exponential time.
local MAX_COMPARES = 1000 * 1000

local function new_type(name)
  return { type = name }
end

local List, Tuple, Dict = new_type("list"), new_type("tuple"), new_type("dict")
local Undefined, Markup = new_type("Undefined"), new_type("Markup")
local Range, Generator = new_type("range"), new_type("generator")
local View = { keys = new_type("dict_keys"), values = new_type("dict_values"),
  items = new_type("dict_items") }
local Namespace = new_type("Namespace")
local Function = new_type("builtin_function_or_method")
value.List, value.Tuple, value.Dict, value.Undefined = List, Tuple, Dict, Undefined
value.Markup, value.Range, value.Generator, value.View = Markup, Range, Generator, View
value.Namespace, value.Function, value.new_type = Namespace, Function, new_type

-- Constructors --------------------------------------------------------------------------------

function value.list(items) return setmetatable(items, List) end
function value.tuple(items) return setmetatable(items, Tuple) end
function value.markup(s) return setmetatable({ s = s }, Markup) end
function value.generator(next_item) return setmetatable({ next = next_item }, Generator) end
function value.func(name, call) return setmetatable({ name = name, call = call }, Function) end

--- `hint` is the whole message, or nil for the message that names `name` (and `obj`).
function value.undefined(name, obj, hint, kind)
  return setmetatable({ name = name, obj = obj, hint = hint, kind = kind }, Undefined)
end

function value.range(start, stop, step)
  local n = 0
  if step > 0 and start < stop then n = (stop - start - 1) // step + 1 end
  if step < 0 and start > stop then n = (start - stop - 1) // -step + 1 end
  return setmetatable({ start = start, stop = stop, step = step, n = n }, Range)
end

-- Types ---------------------------------------------------------------------------------------

--- The Python class name of a value.
local function typename(v)
  local t = type(v)
  if t == "string" then return "str" end
  if t == "boolean" then return "bool" end
  if t == "number" then return math.type(v) == "integer" and "int" or "float" end
  if v == none then return "NoneType" end
  return getmetatable(v).type
end
value.typename = typename

local function is(v, kind) return v ~= none and getmetatable(v) == kind end
value.is = is

local function is_view(v)
  local mt = v ~= none and getmetatable(v)
  return mt == View.keys or mt == View.values or mt == View.items
end
value.is_view = is_view

--- The Lua string of a str or Markup, else nil.
function value.text(v)
  if type(v) == "string" then return v end
  if is(v, Markup) then return v.s end
end

--- The Lua number of an int, float or bool, else nil.
function value.number(v)
  if type(v) == "number" then return v end
  if v == true then return 1 end
  if v == false then return 0 end
end

function value.is_sequence(v) return is(v, List) or is(v, Tuple) end

-- How Jinja names an object in "... has no attribute ...".
local MODULES = { Markup = "markupsafe.", Macro = "jinja2.runtime.",
  LoopContext = "jinja2.runtime.", TemplateReference = "jinja2.runtime.",
  Cycler = "jinja2.utils.", Joiner = "jinja2.utils.",
  Namespace = "transformers.utils.chat_template_utils.Template" }
local function describe(v)
  if v == none then return "None" end
  local name = typename(v)
  return (MODULES[name] or "") .. name .. " object"
end

--- Raises what using an undefined value raises.
function value.fail_undefined(u)
  local message = u.hint
  if not message and u.obj == nil then
    message = value.repr(u.name) .. " is undefined"
  elseif not message and type(u.name) == "string" then
    message = text.repr(describe(u.obj)) .. " has no attribute " .. value.repr(u.name)
  elseif not message then
    message = describe(u.obj) .. " has no element " .. value.repr(u.name)
  end
  raise(u.kind or "UndefinedError", message)
end

function value.check_bytes(n)
  if n > value.MAX_BYTES then
    raise("OverflowError", "text is too long: the limit is " .. value.MAX_BYTES .. " bytes")
  end
end

function value.check_items(n)
  if n > value.MAX_ITEMS then
    raise("OverflowError", "list is too long: the limit is " .. value.MAX_ITEMS .. " items")
  end
end

-- dict ----------------------------------------------------------------------------------------

local NAN_KEY, TUPLE_KEY = "\xff nan", "\xff("   -- no text begins with this byte

--- The Lua table key that stands for a Python dict key: 1, 1.0 and True are one key.
local function hash(v)
  local t = type(v)
  if t == "string" then return v end
  if t == "number" then return v == v and v or NAN_KEY end
  if t == "boolean" then return v and 1 or 0 end
  if v == none then return none end
  local mt = getmetatable(v)
  if mt == Markup then return v.s end
  if mt == Undefined then return Undefined end
  if mt == Tuple then
    local parts = {}
    for i, item in ipairs(v) do
      local h = hash(item)
      parts[i] = type(h) == "string" and "s" .. #h .. ":" .. h
        or type(h) == "number" and string.format("n%.17g", h) or tostring(h)
    end
    local key = TUPLE_KEY .. table.concat(parts, ",")
    value.check_bytes(#key)
    return key
  end
  if mt == List or mt == Dict or is_view(v) then
    raise("TypeError", "unhashable type: '" .. mt.type .. "'")
  end
  return v
end
value.hash = hash

function value.dict()
  return setmetatable({ keys = {}, vals = {}, pos = {} }, Dict)
end

--- Sets a key of a dict under construction.
function value.put(d, key, v)
  local h = hash(key)
  local at = d.pos[h]
  if not at then
    at = #d.keys + 1
    d.keys[at], d.pos[h] = key, at
  end
  d.vals[at] = v
end

--- The value of a key, or nil.
function value.get(d, key)
  local at = d.pos[hash(key)]
  return at and d.vals[at]
end

-- Truth, length, iteration --------------------------------------------------------------------

function value.truth(v)
  local t = type(v)
  if t == "boolean" then return v end
  if t == "string" then return v ~= "" end
  if t == "number" then return v ~= 0 end
  if v == none then return false end
  local mt = getmetatable(v)
  if mt == List or mt == Tuple then return v[1] ~= nil end
  if mt == Dict then return v.keys[1] ~= nil end
  if mt == Undefined then return false end
  if mt == Markup then return v.s ~= "" end
  if mt == Range then return v.n > 0 end
  if is_view(v) then return v.of.keys[1] ~= nil end
  return true
end

--- The length, or nil for what has none.
function value.length(v)
  if type(v) == "string" then return text.len(v) end
  if type(v) ~= "table" or v == none then return nil end
  local mt = getmetatable(v)
  if mt == List or mt == Tuple then return #v end
  if mt == Dict then return #v.keys end
  if mt == Undefined then return 0 end
  if mt == Markup then return text.len(v.s) end
  if mt == Range then return v.n end
  if is_view(v) then return #v.of.keys end
  if mt.length then return mt.length(v) end
end

local function over(items)
  local i = 0
  return function()
    i = i + 1
    return items[i]
  end
end

local function over_range(r)
  local i = -1
  return function()
    i = i + 1
    if i < r.n then return r.start + i * r.step end
  end
end

local function over_items(d)
  local i = 0
  return function()
    i = i + 1
    if d.keys[i] ~= nil then return value.tuple({ d.keys[i], d.vals[i] }) end
  end
end

--- A function that yields the items one by one and then nil; nil for what cannot be iterated.
function value.try_iter(v)
  if type(v) == "string" then return string.gmatch(v, utf8.charpattern) end
  if type(v) ~= "table" or v == none then return nil end
  local mt = getmetatable(v)
  if mt == List or mt == Tuple then return over(v) end
  if mt == Dict then return over(v.keys) end
  if mt == Undefined then return function() end end
  if mt == Generator then return v.next end
  if mt == Markup then return string.gmatch(v.s, utf8.charpattern) end
  if mt == Range then return over_range(v) end
  if mt == View.keys then return over(v.of.keys) end
  if mt == View.values then return over(v.of.vals) end
  if mt == View.items then return over_items(v.of) end
end

function value.iter(v)
  local next_item = value.try_iter(v)
  if not next_item then
    raise("TypeError", "'" .. typename(v) .. "' object is not iterable")
  end
  return next_item
end

--- What it costs to go through a text or list once, in steps of a rendering: text outside ASCII is
--- handled character by character.
function value.cost(v)
  local s = value.text(v)
  if s then return text.is_ascii(s) and #s // 32 or #s // 8 end
  return value.is_sequence(v) and #v or 0
end

--- All items as a new Lua array.
function value.items(v)
  local out, n = {}, 0
  for item in value.iter(v) do
    n = n + 1
    if n > value.MAX_ITEMS then value.check_items(n) end
    out[n] = item
  end
  return out
end

-- str and repr --------------------------------------------------------------------------------

local function add(out, s)
  out.bytes = out.bytes + #s
  if out.bytes > value.MAX_BYTES then value.check_bytes(out.bytes) end
  out[#out + 1] = s
end

local function check_depth(depth)
  if depth > value.MAX_DEPTH then
    raise("RecursionError", "value is nested deeper than " .. value.MAX_DEPTH .. " levels")
  end
end
value.check_depth = check_depth

local write_repr

local function write_all(out, open, items, close, depth)
  add(out, open)
  for i, item in ipairs(items) do
    if i > 1 then add(out, ", ") end
    write_repr(out, item, depth + 1)
  end
  add(out, close)
end

local function write_dict(out, d, depth)
  add(out, "{")
  for i, key in ipairs(d.keys) do
    if i > 1 then add(out, ", ") end
    write_repr(out, key, depth + 1)
    add(out, ": ")
    write_repr(out, d.vals[i], depth + 1)
  end
  add(out, "}")
end

local REPR = {
  [List] = function(out, v, depth) write_all(out, "[", v, "]", depth) end,
  [Tuple] = function(out, v, depth) write_all(out, "(", v, #v == 1 and ",)" or ")", depth) end,
  [Dict] = write_dict,
  [Undefined] = function(out) add(out, "Undefined") end,
  [Markup] = function(out, v) add(out, "Markup(" .. text.repr(v.s) .. ")") end,
  [Range] = function(out, v)
    add(out, "range(" .. v.start .. ", " .. v.stop
      .. (v.step ~= 1 and ", " .. v.step or "") .. ")")
  end,
  [Namespace] = function(out, v, depth)
    add(out, "<Namespace ")
    write_dict(out, v.attrs, depth + 1)
    add(out, ">")
  end,
}

--- Appends the repr of a value to `out`, an array with its size in `out.bytes`.
function write_repr(out, v, depth)
  local t = type(v)
  if t == "string" then return add(out, text.repr(v)) end
  if t == "number" or t == "boolean" or v == none then return add(out, value.str(v)) end
  check_depth(depth)
  local mt = getmetatable(v)
  local write = REPR[mt]
  if write then
    write(out, v, depth)
  elseif is_view(v) then
    write_all(out, mt.type .. "([", value.items(v), "])", depth)
  elseif mt.repr then
    add(out, mt.repr(v))
  else
    -- Python prints an address here; no template can depend on it.
    add(out, "<" .. mt.type .. " object>")
  end
end

function value.repr(v)
  local out = { bytes = 0 }
  write_repr(out, v, 1)
  return table.concat(out)
end

function value.str(v)
  local t = type(v)
  if t == "string" then return v end
  if t == "number" then
    return math.type(v) == "integer" and tostring(v) or number.repr_float(v)
  end
  if t == "boolean" then return v and "True" or "False" end
  if v == none then return "None" end
  local mt = getmetatable(v)
  if mt == Markup then return v.s end
  if mt == Undefined then return "" end
  return value.repr(v)
end

-- Equality and order --------------------------------------------------------------------------

local equal

local function equal_items(a, b, state)
  if #a ~= #b then return false end
  for i = 1, #a do
    if not equal(a[i], b[i], state) then return false end
  end
  return true
end

local function equal_dicts(a, b, state)
  if #a.keys ~= #b.keys then return false end
  for h, at in pairs(a.pos) do
    local other = b.pos[h]
    if not other or not equal(a.vals[at], b.vals[other], state) then return false end
  end
  return true
end

function equal(a, b, state)
  if a == b then return true end
  local ta, tb = type(a), type(b)
  if ta == "boolean" then a, ta = a and 1 or 0, "number" end
  if tb == "boolean" then b, tb = b and 1 or 0, "number" end
  if ta ~= "table" and tb ~= "table" then return a == b end
  local ma, mb = a ~= none and getmetatable(a), b ~= none and getmetatable(b)
  if ma == Markup or mb == Markup then
    local sa, sb = value.text(a), value.text(b)
    return sa ~= nil and sa == sb
  end
  if ma ~= mb or not ma then return false end
  state.compares = state.compares + 1 + (value.length(a) or 0)
  state.depth = state.depth + 1
  if state.compares > MAX_COMPARES then
    raise("RecursionError", "comparison is too large")
  end
  check_depth(state.depth)
  local result = false
  if ma == List or ma == Tuple then
    result = equal_items(a, b, state)
  elseif ma == Dict then
    result = equal_dicts(a, b, state)
  elseif ma == Undefined then
    result = true
  elseif ma == Range then
    result = a.n == b.n and (a.n == 0 or a.start == b.start and (a.n == 1 or a.step == b.step))
  elseif ma == View.keys or ma == View.items then
    result = value.set_equal(a, b)
  end
  state.depth = state.depth - 1
  return result
end

--- Python's ==.
function value.eq(a, b)
  return equal(a, b, { compares = 0, depth = 0 })
end

--- dict_keys and dict_items compare as sets.
function value.set_equal(a, b)
  if #a.of.keys ~= #b.of.keys then return false end
  for h, at in pairs(a.of.pos) do
    local other = b.of.pos[h]
    if not other then return false end
    if getmetatable(a) == View.items and not value.eq(a.of.vals[at], b.of.vals[other]) then
      return false
    end
  end
  return true
end

local function unordered(a, b, op)
  for _, v in ipairs({ a, b }) do
    if is(v, Undefined) then value.fail_undefined(v) end
  end
  raise("TypeError", ("'%s' not supported between instances of '%s' and '%s'")
    :format(op, typename(a), typename(b)))
end

local ORDER = {
  ["<"] = function(a, b) return a < b end, ["<="] = function(a, b) return a <= b end,
  [">"] = function(a, b) return a > b end, [">="] = function(a, b) return a >= b end,
}

--- Python's <, <=, > and >=.
function value.compare(op, a, b)
  local test = ORDER[op]
  local na, nb = value.number(a), value.number(b)
  if na and nb then return test(na, nb) end
  local sa, sb = value.text(a), value.text(b)
  -- UTF-8 bytes sort as their code points do; Lua compares bytes in the "C" locale it starts in.
  if sa and sb then return test(sa, sb) end
  if is(a, List) and is(b, List) or is(a, Tuple) and is(b, Tuple) then
    for i = 1, math.min(#a, #b) do
      if not value.eq(a[i], b[i]) then return value.compare(op, a[i], b[i]) end
    end
    return test(#a, #b)
  end
  return unordered(a, b, op)
end

--- A stable merge sort by `keys`, where keys[i] belongs to items[i]; Lua's table.sort is not stable
--- and rejects comparisons that raise.
function value.sort(items, keys, reverse)
  local order = {}
  for i = 1, #items do order[i] = i end
  local op = reverse and ">" or "<"
  local width, spare = 1, {}
  while width < #order do
    for low = 1, #order, 2 * width do
      local middle, high = math.min(low + width, #order + 1), math.min(low + 2 * width, #order + 1)
      local i, j = low, middle
      for at = low, high - 1 do
        if j < high and (i >= middle or value.compare(op, keys[order[j]], keys[order[i]])) then
          spare[at], j = order[j], j + 1
        else
          spare[at], i = order[i], i + 1
        end
      end
    end
    order, spare = spare, order
    width = width * 2
  end
  local out = {}
  for i, at in ipairs(order) do out[i] = items[at] end
  return out
end

return value
