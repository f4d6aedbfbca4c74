--- The filters of `x|name` (jinja2/filters.py). Each is call(rt, args, kwargs), the value first.
--- This file holds those that work on any value, on numbers and on collections; text_filters.lua
--- adds the rest.

local access = require("moonlet.jinja.access")
local bind = require("moonlet.jinja.bind")
local errors = require("moonlet.jinja.errors")
local markup = require("moonlet.jinja.markup")
local number = require("moonlet.jinja.number")
local text = require("moonlet.jinja.text")
local text_filters = require("moonlet.jinja.text_filters")
local tojson = require("moonlet.jinja.tojson")
local value = require("moonlet.jinja.value")

local filters = {}

local raise = errors.raise
local truth, none = value.truth, value.none

local function define(names, signature, f)
  for name in names:gmatch("%S+") do
    filters[name] = bind.signature(name, signature, f)
  end
end
text_filters(define)

local function given(v) return v ~= nil and v ~= none end
local function flag(v) return v ~= nil and truth(v) end

-- Items in a fresh array, charged to the render.
local function collect(rt, v)
  local items = value.items(v)
  rt:charge(#items)
  return items
end

-- Attributes of items -------------------------------------------------------------------------

local function path_of(attribute)
  if not given(attribute) then return {} end
  local s = value.text(attribute)
  if not s then return { attribute } end
  local parts = text.split(s, ".")
  for i, part in ipairs(parts) do
    if part:find("^%d+$") then parts[i] = number.parse_int(part, 10) end
  end
  return parts
end

--- A function that follows a dotted attribute; `default` stands in for what is undefined.
local function getter(attribute, default)
  local path = path_of(attribute)
  return function(item)
    for _, part in ipairs(path) do
      item = access.item(item, part)
      if given(default) and value.is(item, value.Undefined) then item = default end
    end
    return item
  end
end

local function ignore_case(v)
  local s = value.text(v)
  return s and text.lower(s) or v
end

--- getter, with text in lower case unless the filter is case sensitive.
local function key_getter(attribute, case_sensitive, default)
  local get = getter(attribute, default)
  if flag(case_sensitive) then return get end
  return function(item) return ignore_case(get(item)) end
end

-- Any value -----------------------------------------------------------------------------------

define("default d", "value default_value? boolean?", function(_, v, default, boolean)
  if value.is(v, value.Undefined) or flag(boolean) and not truth(v) then
    return default == nil and "" or default
  end
  return v
end)

define("attr", "obj name", function(_, object, name)
  return access.only_attribute(object, bind.text(name))
end)

define("length count", "/obj", function(_, v)
  local n = value.length(v)
  if not n then raise("TypeError", "object of type '" .. value.typename(v) .. "' has no len()") end
  return n
end)

define("tojson", "x ensure_ascii? indent? separators? sort_keys?",
  function(rt, v, ensure_ascii, indent, separators, sort_keys)
    local options = { ensure_ascii = flag(ensure_ascii), sort_keys = flag(sort_keys) }
    if given(indent) then
      options.indent = value.text(indent)
      if not options.indent then
        local width = math.max(bind.int(indent), 0)
        value.check_bytes(width)
        options.indent = (" "):rep(width)
      end
    end
    if given(separators) then
      local pair = value.items(separators)
      if #pair ~= 2 then raise("ValueError", "separators must be a pair") end
      options.item_separator, options.key_separator = bind.text(pair[1]), bind.text(pair[2])
    end
    local out = tojson(v, options)
    rt:charge(#out // 8)
    return out
  end)

define("pprint", "value", function(_, v) return require("moonlet.jinja.pprint")(v) end)

-- Numbers -------------------------------------------------------------------------------------

define("abs", "/x", function(_, v)
  local n = value.number(v)
  if not n then
    if value.is(v, value.Undefined) then value.fail_undefined(v) end
    raise("TypeError", "bad operand type for abs(): '" .. value.typename(v) .. "'")
  end
  return n < 0 and number.neg(n) or math.abs(n)
end)

local function to_int(v, base)
  local n, s = value.number(v), value.text(v)
  if s then
    n = number.parse_int(s, base)
    if n then return n end
    n = number.parse_float(s)
    if not n or n ~= n or n == math.huge or n == -math.huge then return nil end
  end
  if not n then
    if value.is(v, value.Undefined) then value.fail_undefined(v) end
    return nil
  end
  if math.type(n) == "integer" then return n end
  if n ~= n then return nil end
  return number.truncate(n)
end

define("int", "value default? base?", function(_, v, default, base)
  local n = to_int(v, bind.int(base, 10))
  if n then return n end
  return default == nil and 0 or default
end)

define("float", "value default?", function(_, v, default)
  local s = value.text(v)
  local n = value.number(v)
  if s then n = number.parse_float(s) end
  if n then return n + 0.0 end
  if value.is(v, value.Undefined) then value.fail_undefined(v) end
  return default == nil and 0.0 or default
end)

define("round", "value precision? method?", function(_, v, precision, method)
  precision, method = bind.int(precision, 0), bind.text(method, "common")
  local n = value.number(v)
  if method ~= "common" and method ~= "ceil" and method ~= "floor" then
    raise("FilterArgumentError", "method must be common, ceil or floor")
  end
  if not n then
    if value.is(v, value.Undefined) then value.fail_undefined(v) end
    raise("TypeError", "type " .. value.typename(v) .. " doesn't define __round__ method")
  end
  if method == "common" then return number.round(n, precision) end
  local scale = number.pow(10, precision)
  local scaled = number.mul(n, scale)
  if math.type(scaled) == "integer" then return number.div(scaled, scale) end
  if math.abs(scaled) >= 2.0 ^ 53 then -- whole already, and perhaps beyond 64 bits
    if scaled ~= scaled or scaled - scaled ~= 0 then number.truncate(scaled) end
    return scaled / scale
  end
  local whole = method == "ceil" and math.ceil(scaled) or math.floor(scaled)
  return number.div(whole, scale)
end)

define("filesizeformat", "value binary?", function(_, v, binary)
  local s = value.text(v)
  local bytes = value.number(v) or s and number.parse_float(s)
  if not bytes then
    raise("ValueError", "could not convert to float: " .. value.repr(v))
  end
  local base, tail = 1000, "B"
  if flag(binary) then base, tail = 1024, "iB" end
  if bytes == 1 then return "1 Byte" end
  if bytes < base then return string.format("%d Bytes", number.truncate(bytes + 0.0)) end
  local prefixes, unit = "kMGTPEZY", base * 1.0
  if base == 1024 then prefixes = "KMGTPEZY" end
  for i = 1, 8 do
    unit = unit * base
    if bytes < unit or i == 8 then
      return string.format("%.1f %s%s", base * (bytes + 0.0) / unit, prefixes:sub(i, i), tail)
    end
  end
end)

-- Collections ---------------------------------------------------------------------------------

define("list", "value", function(rt, v) return value.list(collect(rt, v)) end)

define("items", "value", function(_, v)
  -- A generator in Jinja: nothing is checked before the first item is asked for.
  local next_item
  return value.generator(function()
    if not next_item then
      if value.is(v, value.Undefined) then return nil end
      if not value.is(v, value.Dict) then
        raise("TypeError", "Can only get item pairs from a mapping.")
      end
      next_item = value.try_iter(setmetatable({ of = v }, value.View.items))
    end
    return next_item()
  end)
end)

define("first", "seq", function(_, v)
  local first = value.iter(v)()
  if first == nil then
    return value.undefined(nil, nil, "No first item, sequence was empty.")
  end
  return first
end)

local function reversible(v)
  if value.is(v, value.Generator) or value.is(v, value.Undefined) then return false end
  return value.try_iter(v) ~= nil
end

define("last", "seq", function(rt, v)
  if not reversible(v) and not value.is(v, value.Undefined) then
    raise("TypeError", "'" .. value.typename(v) .. "' object is not reversible")
  end
  local items = collect(rt, v)
  if #items == 0 then
    return value.undefined(nil, nil, "No last item, sequence was empty.")
  end
  return items[#items]
end)

define("random", "seq", function()
  raise("NotImplementedError", "filter 'random' is not supported: renderings are reproducible")
end)

define("reverse", "value", function(rt, v)
  local s = value.text(v)
  if s then
    local reversed = access.slice(v, nil, nil, -1)
    return reversed
  end
  if not value.try_iter(v) then raise("FilterArgumentError", "argument must be iterable") end
  local items = collect(rt, v)
  local out = {}
  for i = #items, 1, -1 do out[#out + 1] = items[i] end
  if not reversible(v) then return value.list(out) end
  return value.generator(value.iter(value.list(out)))
end)

local function empty_aggregate()
  return value.undefined(nil, nil, "No aggregated item, sequence was empty.")
end

for name, op in pairs({ min = "<", max = ">" }) do
  define(name, "value case_sensitive? attribute?", function(rt, v, case_sensitive, attribute)
    local get = key_getter(attribute, case_sensitive)
    local best, best_key
    for _, item in ipairs(collect(rt, v)) do
      local key = get(item)
      if best == nil or value.compare(op, key, best_key) then best, best_key = item, key end
    end
    if best == nil then return empty_aggregate() end
    return best
  end)
end

define("sum", "iterable attribute? start?", function(rt, v, attribute, start)
  local get, total = getter(attribute), start == nil and 0 or start
  if value.text(total) then
    raise("TypeError", "sum() can't sum strings [use ''.join(seq) instead]")
  end
  for _, item in ipairs(collect(rt, v)) do total = rt:binary("+", total, get(item)) end
  return total
end)

define("sort", "value reverse? case_sensitive? attribute?",
  function(rt, v, reverse, case_sensitive, attribute)
    local names = given(attribute) and value.text(attribute)
      and text.split(value.text(attribute), ",") or { attribute or none }
    local getters = {}
    for i, name in ipairs(names) do getters[i] = key_getter(name, case_sensitive) end
    local items, keys = collect(rt, v), {}
    for i, item in ipairs(items) do
      local key = {}
      for j, get in ipairs(getters) do key[j] = get(item) end
      keys[i] = value.list(key)
    end
    rt:charge(#items * 8)
    return value.list(value.sort(items, keys, flag(reverse)))
  end)

define("dictsort", "value case_sensitive? by? reverse?",
  function(rt, v, case_sensitive, by, reverse)
    by = bind.text(by, "key")
    if by ~= "key" and by ~= "value" then
      raise("FilterArgumentError", 'You can only sort by either "key" or "value"')
    end
    local view = access.attribute(v, "items")
    local items, keys = collect(rt, rt:call(view, {})), {}
    for i, pair in ipairs(items) do
      keys[i] = by == "key" and pair[1] or pair[2]
      if not flag(case_sensitive) then keys[i] = ignore_case(keys[i]) end
    end
    return value.list(value.sort(items, keys, flag(reverse)))
  end)

define("unique", "value case_sensitive? attribute?", function(_, v, case_sensitive, attribute)
  local get, seen, next_item = key_getter(attribute, case_sensitive), {}, value.iter(v)
  return value.generator(function()
    while true do
      local item = next_item()
      if item == nil then return nil end
      local key = value.hash(get(item))
      if not seen[key] then
        seen[key] = true
        return item
      end
    end
  end)
end)

define("groupby", "value attribute default? case_sensitive?",
  function(rt, v, attribute, default, case_sensitive)
    local get, real = key_getter(attribute, case_sensitive, default), getter(attribute, default)
    local items, keys = collect(rt, v), {}
    for i, item in ipairs(items) do keys[i] = get(item) end
    local sorted, sorted_keys = value.sort(items, keys), value.sort(keys, keys)
    local groups = {}
    for i, item in ipairs(sorted) do
      if i == 1 or not value.eq(sorted_keys[i], sorted_keys[i - 1]) then
        local name = flag(case_sensitive) and sorted_keys[i] or real(item)
        groups[#groups + 1] = value.tuple({ name, value.list({}), grouped = true })
      end
      local members = groups[#groups][2]
      members[#members + 1] = item
    end
    return value.list(groups)
  end)

define("batch", "value linecount fill_with?", function(rt, v, size, fill)
  size = bind.int(size)
  value.check_items(size)
  local out, row = {}, {}
  for _, item in ipairs(collect(rt, v)) do
    if #row == size then
      out[#out + 1] = value.list(row)
      row = {}
    end
    row[#row + 1] = item
  end
  if row[1] ~= nil then
    for _ = #row + 1, given(fill) and size or 0 do row[#row + 1] = fill end
    out[#out + 1] = value.list(row)
  end
  return value.generator(value.iter(value.list(out)))
end)

define("slice", "value slices fill_with?", function(rt, v, slices, fill)
  local items = collect(rt, v)
  slices = bind.int(slices)
  if slices == 0 then raise("ZeroDivisionError", "integer division or modulo by zero") end
  value.check_items(slices)
  local size, extra, at = #items // slices, #items % slices, 1
  local out = {}
  for i = 1, slices do
    local n = size + (i <= extra and 1 or 0)
    local row = table.move(items, at, at + n - 1, 1, {})
    if given(fill) and i > extra then row[#row + 1] = fill end
    out[i] = value.list(row)
    at = at + n
  end
  return value.generator(value.iter(value.list(out)))
end)

define("join", "value d? attribute?", function(rt, v, separator, attribute)
  separator = separator == nil and "" or separator
  local items, get, escape = collect(rt, v), getter(attribute), value.is(separator, value.Markup)
  for i, item in ipairs(items) do
    items[i] = get(item)
    escape = escape or value.is(items[i], value.Markup)
  end
  escape = escape and rt.autoescape
  local write = escape and markup.escaped or value.str
  local glue, bytes = write(separator), 0
  for i, item in ipairs(items) do
    items[i] = write(item)
    bytes = bytes + #items[i] + #glue
    value.check_bytes(bytes)
  end
  local out = table.concat(items, glue)
  return escape and value.markup(out) or out
end)

-- map, select and their kin -------------------------------------------------------------------

--- A generator over what step(item) returns; nil skips the item. Arguments are looked at when the
--- first item is asked for, and not at all when there is none.
local function lazy(v, prepare)
  local next_item, step
  return value.generator(function()
    if not next_item then
      if not truth(v) then return nil end
      step, next_item = prepare(), value.iter(v)
    end
    while true do
      local item = next_item()
      if item == nil then return nil end
      local out = step(item)
      if out ~= nil then return out end
    end
  end)
end

local function named(rt, kind, name)
  local call = rt[kind .. "s"][value.text(name) or ""]
  if not call then
    raise("TemplateRuntimeError", "No " .. kind .. " named " .. value.repr(name) .. ".")
  end
  return call
end

define("map", "value *", function(rt, v, args, kwargs)
  return lazy(v, function()
    local attribute = kwargs and value.get(kwargs, "attribute")
    if not args[1] and attribute then
      for _, key in ipairs(kwargs.keys) do
        if key ~= "attribute" and key ~= "default" then
          raise("FilterArgumentError", "Unexpected keyword argument " .. value.repr(key))
        end
      end
      return getter(attribute, value.get(kwargs, "default"))
    end
    if args[1] == nil then raise("FilterArgumentError", "map requires a filter argument") end
    local call = named(rt, "filter", args[1])
    return function(item) return call(rt, { item, table.unpack(args, 2) }, kwargs) end
  end)
end)

for name, how in pairs({ select = { true, false }, reject = { false, false },
  selectattr = { true, true }, rejectattr = { false, true } }) do
  local wanted, by_attribute = how[1], how[2]
  define(name, "value *", function(rt, v, args, kwargs)
    return lazy(v, function()
      local get, first = function(item) return item end, 1
      if by_attribute then
        if args[1] == nil then
          raise("FilterArgumentError", "Missing parameter for attribute name")
        end
        get, first = getter(args[1]), 2
      end
      local test = truth
      if args[first] ~= nil then
        local call = named(rt, "test", args[first])
        test = function(item)
          return truth(call(rt, { item, table.unpack(args, first + 1) }, kwargs))
        end
      end
      return function(item)
        if test(get(item)) == wanted then return item end
      end
    end)
  end)
end

return filters
