--- Attribute and item lookup: `a.b`, `a["b"]`, `a[1:2]`, as the sandboxed environment of Jinja does
--- them. What is missing is Undefined; what the sandbox forbids is an Undefined that raises
--- SecurityError when used.

local bind = require("moonlet.jinja.bind")
local errors = require("moonlet.jinja.errors")
local markup = require("moonlet.jinja.markup")
local methods = require("moonlet.jinja.methods")
local text = require("moonlet.jinja.text")
local value = require("moonlet.jinja.value")

local access = {}

local function unsafe(object, name)
  return value.undefined(name, object, ("access to attribute %s of '%s' object is unsafe.")
    :format(value.repr(name), value.typename(object)), "SecurityError")
end

local function method(object, kind, name, call)
  return value.func(name, function(rt, args, kwargs)
    rt:charge(value.cost(object))
    if kind == "Markup" then return markup.call(rt, name, object, args, kwargs) end
    local result = call(rt, object, args, kwargs)
    rt:charge(value.cost(result))
    return result
  end)
end

--- The attribute itself, not an item of that name: a value, or nil when there is none.
local function own_attribute(object, name)
  local kind = value.typename(object)
  -- Every Python object has attributes of this form, and all of them are unsafe.
  if name:find("^__.*__$") then return unsafe(object, name) end
  if value.is(object, value.Namespace) then
    return value.get(object.attrs, name)
  end
  if value.is(object, value.Tuple) and object.grouped then
    if name == "grouper" then return object[1] end
    if name == "list" then return object[2] end
  end
  local mt = type(object) == "table" and object ~= value.none and getmetatable(object)
  if mt and mt.attribute then return mt.attribute(object, name) end
  local attributes = methods.attributes[kind]
  if attributes and attributes[name] then return attributes[name](object) end
  local call = (methods[kind == "Markup" and "str" or kind] or {})[name]
  if call == nil then return nil end
  if call == false then return unsafe(object, name) end
  return method(object, kind, name, call)
end

--- An item by key or position, or nil.
local function own_item(object, key)
  local mt = type(object) == "table" and object ~= value.none and getmetatable(object)
  if mt == value.Undefined then value.fail_undefined(object) end
  if mt == value.Dict then
    -- An unhashable key is a TypeError in Python, which Jinja takes as "no such item".
    local inner = type(key) == "table" and key ~= value.none and getmetatable(key)
    if inner == value.List or inner == value.Dict then return nil end
    return value.get(object, key)
  end
  if type(key) == "boolean" then key = key and 1 or 0 end
  if math.type(key) ~= "integer" then return nil end
  local n = value.length(object)
  if not n then return nil end
  if key < 0 then key = key + n end
  if key < 0 or key >= n then return nil end
  if mt == value.List or mt == value.Tuple then return object[key + 1] end
  if mt == value.Range then return object.start + key * object.step end
  local s = value.text(object)
  if not s then return nil end
  local c = text.sub(s, key, key + 1)
  return mt and value.markup(c) or c
end

local function attribute_of_undefined(object, name)
  -- Python finds this one in the class; other names of the kind are asked of Undefined, and fail.
  if name == "__class__" then return unsafe(object, name) end
  value.fail_undefined(object)
end

--- `object.name`.
function access.attribute(object, name)
  if value.is(object, value.Undefined) then return attribute_of_undefined(object, name) end
  local found = own_attribute(object, name)
  if found == nil then found = own_item(object, name) end
  if found == nil then return value.undefined(name, object) end
  return found
end

--- `object[key]`.
function access.item(object, key)
  local found = own_item(object, key)
  if found == nil and type(key) == "string" then found = own_attribute(object, key) end
  if found == nil then return value.undefined(key, object) end
  return found
end

--- The attribute filter: attributes only, never items.
function access.only_attribute(object, name)
  if value.is(object, value.Undefined) then return attribute_of_undefined(object, name) end
  local found = own_attribute(object, name)
  if found == nil then return value.undefined(name, object) end
  return found
end

-- Slices --------------------------------------------------------------------------------------

local function slice_index(v)
  if v == nil or v == value.none then return nil end
  if type(v) ~= "boolean" and math.type(v) ~= "integer" then
    errors.raise("TypeError",
      "slice indices must be integers or None or have an __index__ method")
  end
  return bind.int(v)
end

--- Python's slice.indices: first, last (inclusive bound excluded) and step for a length.
local function bounds(n, start, stop, step)
  step = slice_index(step) or 1
  if step == 0 then errors.raise("ValueError", "slice step cannot be zero") end
  local low, high = 0, n
  if step < 0 then low, high = -1, n - 1 end
  local function clamp(at, default)
    at = slice_index(at)
    if not at then return default end
    if at < 0 then return math.max(at + n, low) end
    return math.min(at, high)
  end
  return clamp(start, step < 0 and high or low), clamp(stop, step < 0 and low or high), step
end

--- `object[start:stop:step]`; absent parts are nil.
function access.slice(object, start, stop, step)
  local s = value.text(object)
  local mt = type(object) == "table" and object ~= value.none and getmetatable(object)
  if mt == value.Undefined then value.fail_undefined(object) end
  if not s and mt ~= value.List and mt ~= value.Tuple and mt ~= value.Range then
    errors.raise("TypeError", "'" .. value.typename(object) .. "' object is not subscriptable")
  end
  local first, last, by = bounds(value.length(object), start, stop, step)
  if mt == value.Range then
    return value.range(object.start + first * object.step, object.start + last * object.step,
      object.step * by)
  end
  local out
  if s then
    if by == 1 then
      out = text.sub(s, first, math.max(first, last))
    else
      local chars, picked = text.chars(s), {}
      for i = first, last + (by > 0 and -1 or 1), by do picked[#picked + 1] = chars[i + 1] end
      out = table.concat(picked)
    end
    return mt and value.markup(out) or out
  end
  out = {}
  for i = first, last + (by > 0 and -1 or 1), by do out[#out + 1] = object[i + 1] end
  return setmetatable(out, mt)
end

return access
