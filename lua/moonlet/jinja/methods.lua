--- The methods templates may call on str, list, tuple, dict, int, float and range, with Python's
--- results. `methods[type][name]` is call(rt, self, args, kwargs); false marks a method that exists
--- but changes its object, which the sandbox refuses.

local bind = require("moonlet.jinja.bind")
local errors = require("moonlet.jinja.errors")
local format = require("moonlet.jinja.format")
local number = require("moonlet.jinja.number")
local text = require("moonlet.jinja.text")
local value = require("moonlet.jinja.value")

local methods = { str = {}, list = {}, tuple = {}, dict = {}, int = {}, float = {}, range = {} }

local raise = errors.raise
local int, str, optional = bind.int, bind.text, bind.optional_text

local function define(kind, name, signature, f)
  local bound = bind.signature(name, "/self " .. signature, f)
  methods[kind][name] = function(rt, self, args, kwargs)
    return bound(rt, { self, table.unpack(args) }, kwargs)
  end
end

local function list_of(items) return value.list(items) end

-- str: plain conversions and questions --------------------------------------------------------

for _, name in ipairs({ "upper", "lower", "title", "capitalize", "swapcase", "casefold" }) do
  define("str", name, "", function(_, s) return text[name](s) end)
end

local QUESTIONS = {
  isalpha = function(s) return text.all(s, "alpha") end,
  isalnum = function(s) return text.all(s, "alpha", "decimal", "digit", "numeric") end,
  isdigit = function(s) return text.all(s, "digit") end,
  isdecimal = function(s) return text.all(s, "decimal") end,
  isnumeric = function(s) return text.all(s, "numeric") end,
  isprintable = function(s) return s == "" or text.all(s, "printable") end,
  isspace = text.isspace,
  islower = function(s) return text.all_case(s, "lower") end,
  isupper = function(s) return text.all_case(s, "upper") end,
  istitle = text.istitle,
  isascii = text.is_ascii,
  isidentifier = function(s)
    return s ~= "" and text.is("id_start", utf8.codepoint(s)) and text.all(s, "id_continue")
  end,
}
for name, ask in pairs(QUESTIONS) do
  define("str", name, "", function(_, s) return ask(s) end)
end

-- str: cutting and joining --------------------------------------------------------------------

for _, name in ipairs({ "strip", "lstrip", "rstrip" }) do
  define("str", name, "/chars?", function(_, s, chars) return text[name](s, optional(chars)) end)
end

for _, name in ipairs({ "split", "rsplit" }) do
  define("str", name, "sep? maxsplit?", function(_, s, sep, max)
    max = int(max, -1)
    if max < 0 then max = nil end
    sep = optional(sep)
    if not sep then return list_of(text[name .. "_space"](s, max)) end
    if sep == "" then raise("ValueError", "empty separator") end
    value.check_items(text.count(s, sep))
    return list_of(text[name](s, sep, max))
  end)
end

define("str", "splitlines", "keepends?", function(_, s, keep)
  return list_of(text.splitlines(s, keep ~= nil and value.truth(keep)))
end)

define("str", "join", "/iterable", function(rt, s, iterable)
  local parts, bytes = {}, 0
  for item in value.iter(iterable) do
    local part = value.text(item)
    if not part then
      raise("TypeError", ("sequence item %d: expected str instance, %s found"):format(#parts,
        value.typename(item)))
    end
    parts[#parts + 1] = part
    bytes = bytes + #part + #s
    value.check_bytes(bytes)
  end
  rt:charge(#parts)
  return table.concat(parts, s)
end)

define("str", "replace", "/old /new /count?", function(_, s, old, new, count)
  return methods.replace(s, str(old), str(new), int(count, -1))
end)

--- str.replace with a bound on the size of the result; a negative count means everywhere.
function methods.replace(s, old, new, count)
  local found = #new > #old and text.count(s, old) or 0
  if count >= 0 then found = math.min(found, count) end
  value.check_bytes(#s + found * (#new - #old))
  return text.replace(s, old, new, count >= 0 and count or nil)
end

define("str", "removeprefix", "/prefix", function(_, s, prefix)
  prefix = str(prefix)
  return s:sub(1, #prefix) == prefix and s:sub(#prefix + 1) or s
end)

define("str", "removesuffix", "/suffix", function(_, s, suffix)
  suffix = str(suffix)
  return suffix ~= "" and s:sub(-#suffix) == suffix and s:sub(1, -#suffix - 1) or s
end)

local function separator(sep)
  sep = str(sep)
  if sep == "" then raise("ValueError", "empty separator") end
  return sep
end

define("str", "partition", "/sep", function(_, s, sep)
  sep = separator(sep)
  local at = s:find(sep, 1, true)
  if not at then return value.tuple({ s, "", "" }) end
  return value.tuple({ s:sub(1, at - 1), sep, s:sub(at + #sep) })
end)

define("str", "rpartition", "/sep", function(_, s, sep)
  sep = separator(sep)
  local at = text.rfind_byte(s, sep)
  if not at then return value.tuple({ "", "", s }) end
  return value.tuple({ s:sub(1, at - 1), sep, s:sub(at + #sep) })
end)

define("str", "expandtabs", "tabsize?", function(_, s, size)
  size = int(size, 8)
  value.check_bytes(#s + text.count(s, "\t") * math.max(size, 0))
  local out, column = {}, 0
  for _, c in ipairs(text.chars(s)) do
    if c == "\t" then
      local n = size > 0 and size - column % size or 0
      out[#out + 1] = (" "):rep(n)
      column = column + n
    else
      column = (c == "\n" or c == "\r") and 0 or column + 1
      out[#out + 1] = c
    end
  end
  return table.concat(out)
end)

-- str: searching ------------------------------------------------------------------------------

--- Python's clamping of a slice start or stop to 0..n.
local function clamp(at, n, default)
  if at == nil or at == value.none then return default end
  at = int(at)
  if at < 0 then at = math.max(0, at + n) end
  return at
end

--- The part of `s` that start and stop select, and where it begins; nil when start is past the end.
local function window(s, start, stop)
  if start == nil and stop == nil then return s, 0 end
  local n = text.len(s)
  local first, last = clamp(start, n, 0), math.min(clamp(stop, n, n), n)
  if first > n then return nil end
  return text.sub(s, first, math.max(first, last)), first, last < first
end

local function search(s, needle, start, stop, from_right)
  needle = str(needle)
  local part, first, empty = window(s, start, stop)
  if not part or empty then return -1 end
  local at
  if from_right then at = text.rfind_byte(part, needle) else
    at = part:find(needle, 1, true)
  end
  return at and first + text.position(part, at) or -1
end

for name, from_right in pairs({ find = false, rfind = true }) do
  define("str", name, "/sub /start? /end?", function(_, s, needle, start, stop)
    return search(s, needle, start, stop, from_right)
  end)
end
for name, from_right in pairs({ index = false, rindex = true }) do
  define("str", name, "/sub /start? /end?", function(_, s, needle, start, stop)
    local at = search(s, needle, start, stop, from_right)
    if at < 0 then raise("ValueError", "substring not found") end
    return at
  end)
end

define("str", "count", "/sub /start? /end?", function(_, s, needle, start, stop)
  local part, _, empty = window(s, start, stop)
  if not part or empty then return 0 end
  return text.count(part, str(needle))
end)

local function affix(name, matches)
  define("str", name, "/prefix /start? /end?", function(_, s, affixes, start, stop)
    local part, _, empty = window(s, start, stop)
    local list = value.is(affixes, value.Tuple) and affixes or { affixes }
    for _, one in ipairs(list) do
      if not value.text(one) then
        raise("TypeError", name .. " first arg must be str or a tuple of str, not "
          .. value.typename(one))
      end
      if part and not empty and matches(part, value.text(one)) then return true end
    end
    return false
  end)
end
affix("startswith", function(s, p) return s:sub(1, #p) == p end)
affix("endswith", function(s, p) return p == "" or s:sub(-#p) == p end)

-- str: padding and formatting -----------------------------------------------------------------

local function fill_char(fill)
  fill = str(fill, " ")
  if text.len(fill) ~= 1 then
    raise("TypeError", "The fill character must be exactly one character long")
  end
  return fill
end

for name, share in pairs({ ljust = 0, rjust = 1, center = "center" }) do
  define("str", name, "/width /fillchar?", function(_, s, width, fill)
    width, fill = int(width), fill_char(fill)
    value.check_bytes(#s + width * #fill)
    return text.pad(s, width, fill, share)
  end)
end

define("str", "zfill", "/width", function(_, s, width)
  width = int(width)
  value.check_bytes(#s + width)
  local sign = s:match("^[+-]") or ""
  return sign .. text.pad(s:sub(#sign + 1), width - #sign, "0", 1)
end)

define("str", "format", "*", function(rt, s, args, kwargs)
  return format.format(s, args, function(key)
    return kwargs and value.get(kwargs, key)
  end, rt.access)
end)

define("str", "format_map", "/mapping", function(rt, s, mapping)
  return format.format(s, {}, function(key)
    local found = rt.access.item(mapping, key)
    return not value.is(found, value.Undefined) and found or nil
  end, rt.access)
end)

-- list, tuple, range --------------------------------------------------------------------------

local function count(_, items, wanted)
  local n = 0
  for item in value.iter(items) do
    if value.eq(item, wanted) then n = n + 1 end
  end
  return n
end

local function index(_, items, wanted, start, stop)
  local all = value.items(items)
  local first = clamp(start, #all, 0)
  local last = math.min(clamp(stop, #all, #all), #all)
  for i = first + 1, last do
    if value.eq(all[i], wanted) then return i - 1 end
  end
  raise("ValueError", value.repr(wanted) .. " is not in " .. value.typename(items))
end

for _, kind in ipairs({ "list", "tuple", "range" }) do
  define(kind, "count", "/value", count)
  define(kind, "index", "/value /start? /stop?", index)
end
define("list", "copy", "", function(_, items) return value.list(value.items(items)) end)
for _, name in ipairs({ "append", "clear", "extend", "insert", "pop", "remove", "reverse",
  "sort" }) do
  methods.list[name] = false
end

-- dict ----------------------------------------------------------------------------------------

define("dict", "get", "/key /default?", function(_, d, key, default)
  local found = value.get(d, key)
  if found ~= nil then return found end
  if default ~= nil then return default end
  return value.none
end)

for name, mt in pairs(value.View) do
  define("dict", name, "", function(_, d) return setmetatable({ of = d }, mt) end)
end

define("dict", "copy", "", function(_, d)
  local out = value.dict()
  for i, key in ipairs(d.keys) do value.put(out, key, d.vals[i]) end
  return out
end)

--- dict.fromkeys(iterable, value).
function methods.fromkeys(_, iterable, filler)
  local out = value.dict()
  for key in value.iter(iterable) do
    value.put(out, key, filler == nil and value.none or filler)
  end
  return out
end
define("dict", "fromkeys", "/iterable /value?", function(rt, _, iterable, filler)
  return methods.fromkeys(rt, iterable, filler)
end)

for _, name in ipairs({ "clear", "pop", "popitem", "setdefault", "update" }) do
  methods.dict[name] = false
end

-- int and float -------------------------------------------------------------------------------

define("int", "bit_length", "", function(_, n)
  n = value.number(n)
  local bits = 0
  n = n < 0 and number.neg(n) or n
  while n > 0 do bits, n = bits + 1, n >> 1 end
  return bits
end)
define("int", "conjugate", "", function(_, n) return value.number(n) end)
define("float", "conjugate", "", function(_, n) return n end)
define("float", "is_integer", "", function(_, n)
  return n == math.floor(n) and n ~= math.huge and n ~= -math.huge
end)

--- Attributes that are values, not methods: f(self).
methods.attributes = {
  int = {
    real = value.number, numerator = value.number,
    imag = function() return 0 end, denominator = function() return 1 end,
  },
  float = {
    real = function(n) return n end, imag = function() return 0.0 end,
  },
  range = {
    start = function(r) return r.start end, stop = function(r) return r.stop end,
    step = function(r) return r.step end,
  },
}
methods.bool = methods.int
methods.attributes.bool = methods.attributes.int

return methods
