--- Python's three ways to format: `text % values`, str.format and format specifications.

local errors = require("moonlet.jinja.errors")
local number = require("moonlet.jinja.number")
local text = require("moonlet.jinja.text")
local value = require("moonlet.jinja.value")

local format = {}

local raise = errors.raise

--- Lua's string.format takes two digits of precision.
local MAX_PRECISION = 99

local function check_width(n)
  if n then value.check_bytes(n) end
  return n
end

-- Digits of a float in C's notation; `kind` is one of eEfFgG.
local function float_digits(f, kind, precision, alternate)
  if precision > MAX_PRECISION then
    raise("ValueError", "precision is limited to " .. MAX_PRECISION)
  end
  if f ~= f or f == math.huge or f == -math.huge then
    local word = f ~= f and "nan" or f > 0 and "inf" or "-inf"
    return kind:find("%u") and word:upper() or word
  end
  return string.format("%" .. (alternate and "#" or "") .. "." .. precision .. kind, f)
end

-- Digits of a non-negative integer in a base.
local function int_digits(n, base)
  if base == 10 then return string.format("%d", n) end
  if base == 8 then return string.format("%o", n) end
  if base == 16 then return string.format("%x", n) end
  local out = {}
  repeat
    table.insert(out, 1, n & 1)
    n = n >> 1
  until n == 0
  return table.concat(out)
end

local BASES = { b = { 2, "0b" }, o = { 8, "0o" }, x = { 16, "0x" }, X = { 16, "0X" } }

--- The sign and digits of an int; `prefixed` adds 0b, 0o or 0x.
local function write_int(n, kind, prefixed)
  local base = BASES[kind]
  local digits = int_digits(n < 0 and number.neg(n) or n, base and base[1] or 10)
  if kind == "X" then digits = digits:upper() end
  return n < 0 and "-" or "", base and prefixed and base[2] or "", digits
end

local function code_char(code)
  if code < 0 or code > 0x10ffff or code >= 0xd800 and code < 0xe000 then
    raise("OverflowError", "%c arg not in range(0x110000)")
  end
  return utf8.char(code)
end

-- Format specifications -----------------------------------------------------------------------

local ALIGN = "^([<>=^])(.*)$"

--- [[fill]align][sign][z][#][0][width][grouping][.precision][type]
local function parse_spec(spec)
  local s = {}
  local first = spec:match("^" .. utf8.charpattern)
  local align, rest
  if first then align, rest = spec:sub(#first + 1):match(ALIGN) end
  if align then
    s.fill, s.align = first, align
  else
    align, rest = spec:match(ALIGN)
    s.align = align
  end
  rest = rest or spec
  local sign, z, hash, zero, width, grouping, tail =
    rest:match("^([-+ ]?)(z?)(#?)(0?)(%d*)([,_]?)(.*)$")
  local precision, kind = tail:match("^%.(%d+)(.?)$")
  kind = kind or tail:match("^.?$")
  if not kind then raise("ValueError", "Invalid format specifier '" .. spec .. "'") end
  s.sign, s.alternate, s.grouping, s.kind = sign, hash ~= "", grouping, kind
  s.no_negative_zero = z ~= ""
  s.width = check_width(math.tointeger(tonumber(width)))
  s.precision = math.tointeger(tonumber(precision))
  if zero ~= "" then
    s.fill, s.align = s.fill or "0", s.align or "="
    s.zero = true
  end
  return s
end

local function place(s, sign, body, default_align)
  local fill, align = s.fill or " ", s.align or default_align
  local width = s.width or 0
  if align == "=" then
    return sign .. text.pad(body, width - #sign, fill, 1)
  elseif align == "<" then
    return text.pad(sign .. body, width, fill, 0)
  elseif align == ">" then
    return text.pad(sign .. body, width, fill, 1)
  end
  local all = sign .. body
  local missing = math.max(0, width - text.len(all))
  return fill:rep(missing // 2) .. all .. fill:rep(missing - missing // 2)
end

--- Puts `mark` between groups of `size` digits, after zeros that make the whole at least `width`.
local function group(digits, mark, size, width)
  local n = math.max(#digits, (width or 0) * size // (size + 1))
  while n + (n - 1) // size < (width or 0) do n = n + 1 end
  digits = ("0"):rep(n - #digits) .. digits
  local first = (#digits - 1) % size + 1
  local out = { digits:sub(1, first) }
  for at = first + 1, #digits, size do out[#out + 1] = digits:sub(at, at + size - 1) end
  return table.concat(out, mark)
end

local function sign_of(s, negative)
  if negative then return "-" end
  return (s.sign == "+" or s.sign == " ") and s.sign or ""
end

local function bad_kind(s, v)
  raise("ValueError", ("Unknown format code '%s' for object of type '%s'")
    :format(s.kind, value.typename(v)))
end

local function format_int(v, s)
  if s.kind == "c" then
    return place(s, "", code_char(v), "<")
  end
  if s.precision then
    raise("ValueError", "Precision not allowed in integer format specifier")
  end
  local minus, prefix, digits = write_int(v, s.kind, s.alternate)
  local sign = sign_of(s, minus ~= "") .. prefix
  if s.grouping ~= "" then
    if s.grouping == "," and BASES[s.kind] then
      raise("ValueError", "Cannot specify ',' with '" .. s.kind .. "'.")
    end
    local width = s.zero and s.align == "=" and (s.width or 0) - #sign
    digits = group(digits, s.grouping, BASES[s.kind] and 4 or 3, width or nil)
  end
  return place(s, sign, digits, ">")
end

--- The digits of a float for a specification without a type: repr-like, but with a precision.
local function general(v, precision)
  if not precision then return number.repr_float(v) end
  local out = float_digits(v, "g", math.max(precision, 1))
  -- str() style: an integer keeps ".0", and the exponent starts one digit earlier than in %g.
  local mantissa, exponent = string.format("%." .. math.max(precision, 1) - 1 .. "e", v)
    :match("^(.*)e([+-]%d+)$")
  if exponent and tonumber(exponent) == math.max(precision, 1) - 1 and precision > 0 then
    local trimmed = mantissa:gsub("%.?0+$", "")
    return trimmed .. "e" .. exponent
  end
  if not out:find("[%.en]") then out = out .. ".0" end
  return out
end

local function format_float(v, s)
  local kind, precision = s.kind, s.precision
  local percent = kind == "%"
  if percent then v, kind = v * 100.0, "f" end
  local digits
  if kind == "" then
    digits = general(v, precision)
  else
    if kind == "n" then kind = "g" end
    if (kind == "g" or kind == "G") and precision == 0 then precision = 1 end
    digits = float_digits(v, kind:gsub("F", "f"), precision or 6, s.alternate)
    if kind == "F" then digits = digits:upper() end
  end
  if s.no_negative_zero and digits:find("^%-[0%.]*$") then digits = digits:sub(2) end
  local minus, body = digits:match("^(%-?)(.*)$")
  local sign = sign_of(s, minus ~= "")
  if percent then body = body .. "%" end
  if s.grouping ~= "" then
    local whole, rest = body:match("^(%d+)(.*)$")
    if whole then
      local width = s.zero and s.align == "=" and (s.width or 0) - #sign - #rest
      body = group(whole, s.grouping, 3, width or nil) .. rest
    end
  end
  return place(s, sign, body, ">")
end

local function format_text(v, s, original)
  if s.sign ~= "" then raise("ValueError", "Sign not allowed in string format specifier") end
  if s.alternate then
    raise("ValueError", "Alternate form (#) not allowed in string format specifier")
  end
  if s.grouping ~= "" then
    raise("ValueError", "Cannot specify '" .. s.grouping .. "' with 's'.")
  end
  if s.kind ~= "" and s.kind ~= "s" then bad_kind(s, original) end
  if s.align == "=" and not s.zero then
    raise("ValueError", "'=' alignment not allowed in string format specifier")
  end
  if s.align == "=" then s.align = "<" end
  if s.precision and s.precision < text.len(v) then v = text.sub(v, 0, s.precision) end
  return place(s, "", v, "<")
end

local INT_KINDS, FLOAT_KINDS = "^[bcdoxXn]?$", "^[eEfFgGn%%]?$"

--- Python's format(v, spec).
function format.value(v, spec)
  local string = value.text(v)
  if string then return format_text(string, parse_spec(spec), v) end
  local n = value.number(v)
  if spec == "" then return value.str(v) end
  if not n then
    if value.is(v, value.Undefined) then value.fail_undefined(v) end
    raise("TypeError", "unsupported format string passed to " .. value.typename(v)
      .. ".__format__")
  end
  local s = parse_spec(spec)
  if math.type(n) == "integer" then
    if s.kind:find(INT_KINDS) then return format_int(n, s) end
    if not s.kind:find(FLOAT_KINDS) then bad_kind(s, v) end
    n = n + 0.0
  elseif not s.kind:find(FLOAT_KINDS) then
    bad_kind(s, v)
  end
  return format_float(n, s)
end

-- str.format ----------------------------------------------------------------------------------

local CONVERSIONS = {
  s = value.str,
  r = value.repr,
  a = function(v) return text.ascii(value.repr(v)) end,
}

--- Splits "name.attr[key]" into the first name and the steps that follow.
local function field_path(field)
  local first, rest = field:match("^([^.%[]*)(.*)$")
  local steps = {}
  while rest ~= "" do
    local attr, after = rest:match("^%.([^.%[]+)(.*)$")
    if attr then
      steps[#steps + 1] = { attr = attr }
    else
      local key
      key, after = rest:match("^%[([^%]]+)%](.*)$")
      if not key then raise("ValueError", "Empty attribute in format string") end
      steps[#steps + 1] = { key = key:find("^%d+$") and math.tointeger(tonumber(key)) or key }
    end
    rest = after
  end
  return first, steps
end

local Formatter = {}
Formatter.__index = Formatter

function Formatter:number_or_name(first)
  if first == "" then
    if self.manual then
      raise("ValueError", "cannot switch from manual field specification to automatic field"
        .. " numbering")
    end
    self.automatic = (self.automatic or -1) + 1
    return self.automatic
  end
  if not first:find("^%d+$") then return first end
  if self.automatic then
    raise("ValueError", "cannot switch from automatic field numbering to manual field"
      .. " specification")
  end
  self.manual = true
  return math.tointeger(tonumber(first)) or math.maxinteger
end

function Formatter:field(field)
  local first, steps = field_path(field)
  local key = self:number_or_name(first)
  local v
  if math.type(key) == "integer" then
    v = self.args[key + 1]
    if v == nil then
      raise("IndexError", "Replacement index " .. key .. " out of range for positional args tuple")
    end
  else
    v = self.named(key)
    if v == nil then raise("KeyError", text.repr(key)) end
  end
  for _, step in ipairs(steps) do
    v = step.attr and self.access.attribute(v, step.attr)
      or step.key ~= nil and self.access.item(v, step.key)
  end
  return v
end

--- The end of a replacement field whose inside begins at byte `at`.
local function field_end(s, at)
  local depth = 1
  while true do
    local i = s:find("[{}]", at)
    if not i then raise("ValueError", "expected '}' before end of string") end
    depth = depth + (s:sub(i, i) == "{" and 1 or -1)
    if depth == 0 then return i end
    at = i + 1
  end
end

function Formatter:replace(inside, depth)
  -- A colon or "!" inside brackets belongs to the key.
  local name = inside:match("^[^:!%[]*%b[][^:!%[]*") or inside:match("^[^:!]*")
  local conversion, spec = "", inside:sub(#name + 1)
  if spec:sub(1, 1) == "!" then
    conversion, spec = spec:match("^!(.)(.*)$")
    if not conversion or spec ~= "" and spec:sub(1, 1) ~= ":" then
      raise("ValueError", "expected ':' after conversion specifier")
    end
  end
  local v = self:field(name)
  if conversion ~= "" then
    local convert = CONVERSIONS[conversion]
    if not convert then
      raise("ValueError", "Unknown conversion specifier " .. conversion)
    end
    v = convert(v)
  end
  return format.value(v, self:expand(spec:sub(2), depth + 1))
end

function Formatter:expand(s, depth)
  if not s:find("[{}]") then return s end
  if depth > 2 then raise("ValueError", "Max string recursion exceeded") end
  local out, at, bytes = {}, 1, 0
  while true do
    local i = s:find("[{}]", at)
    if not i then break end
    out[#out + 1] = s:sub(at, i - 1)
    local c = s:sub(i, i)
    if s:sub(i + 1, i + 1) == c then
      out[#out + 1] = c
      at = i + 2
    elseif c == "}" then
      raise("ValueError", "Single '}' encountered in format string")
    else
      if i == #s then raise("ValueError", "Single '{' encountered in format string") end
      local stop = field_end(s, i + 1)
      out[#out + 1] = self:replace(s:sub(i + 1, stop - 1), depth)
      at = stop + 1
    end
    bytes = bytes + #out[#out]
    value.check_bytes(bytes)
  end
  out[#out + 1] = s:sub(at)
  return table.concat(out)
end

--- str.format. `named(key)` finds a keyword argument; `access` has attribute(v, name) and
--- item(v, key).
function format.format(s, args, named, access)
  local formatter = setmetatable({ args = args, named = named, access = access }, Formatter)
  return formatter:expand(s, 1)
end

-- text % values -------------------------------------------------------------------------------

local function need_number(v, kind, wanted)
  local n = value.number(v)
  if not n then
    raise("TypeError", ("%%%s format: %s is required, not %s"):format(kind, wanted,
      value.typename(v)))
  end
  return n
end

local function percent_int(v, flags, kind, precision)
  local wanted = (kind == "x" or kind == "X" or kind == "o") and "an integer" or "a real number"
  local n = need_number(v, kind, wanted)
  if math.type(n) == "float" then
    if wanted == "an integer" then need_number(value.none, kind, wanted) end
    n = number.truncate(n)
  end
  local minus, prefix, digits = write_int(n, kind, flags:find("#", 1, true))
  if precision and #digits < precision then digits = ("0"):rep(precision - #digits) .. digits end
  return minus, prefix, digits
end

local function percent_char(v)
  local n = value.number(v)
  if math.type(n) == "integer" then return code_char(n) end
  local s = value.text(v)
  if not s or text.len(s) ~= 1 then raise("TypeError", "%c requires int or char") end
  return s
end

--- One conversion: its sign, prefix and digits or text.
local function percent_convert(v, flags, kind, precision)
  if kind == "d" or kind == "i" or kind == "u" or BASES[kind] and kind ~= "b" then
    return percent_int(v, flags, kind, precision)
  elseif kind:find("^[eEfFgG]$") then
    local n = need_number(v, kind, "a real number") + 0.0
    if kind == "F" then kind = "f" end
    local digits = float_digits(n, kind, precision or 6, flags:find("#", 1, true))
    local minus, body = digits:match("^(%-?)(.*)$")
    return minus, "", body
  elseif kind == "c" then
    return nil, nil, percent_char(v)
  end
  local convert = CONVERSIONS[kind]
  if not convert then return nil end
  local s = convert(v)
  if precision and precision < text.len(s) then s = text.sub(s, 0, precision) end
  return nil, nil, s
end

local function percent_place(flags, width, minus, prefix, body)
  local left, zero = flags:find("-", 1, true), flags:find("0", 1, true)
  local sign = ""
  if minus then
    sign = minus ~= "" and "-" or flags:find("+", 1, true) and "+" or flags:find(" ", 1, true)
      and " " or ""
    sign = sign .. prefix
  end
  if minus and zero and not left then
    return sign .. text.pad(body, width - #sign, "0", 1)
  end
  return text.pad(sign .. body, width, " ", left and 0 or 1)
end

--- Python's `template % values`.
function format.percent(template, values)
  local is_tuple = value.is(values, value.Tuple)
  local mapping = value.is(values, value.Dict) and values
  local args, used = is_tuple and values or { values }, 0
  local function next_arg()
    used = used + 1
    if args[used] == nil then raise("TypeError", "not enough arguments for format string") end
    return args[used]
  end
  local function star(digits)
    if digits ~= "*" then return check_width(math.tointeger(tonumber(digits))) end
    local n = next_arg()
    if math.type(n) ~= "integer" then raise("TypeError", "* wants int") end
    return check_width(n)
  end
  local out, at, bytes, keyed = {}, 1, 0, false
  while true do
    local i = template:find("%", at, true)
    if not i then break end
    out[#out + 1] = template:sub(at, i - 1)
    local key, after = template:match("^(%b())()", i + 1)
    local flags, width, dot, precision, kind, stop =
      template:match("^([-+ #0]*)([%d*]*)(%.?)([%d*]*)[hlL]?(.[\x80-\xbf]*)()", after or i + 1)
    if not kind then raise("ValueError", "incomplete format") end
    if kind == "%" and not key then
      out[#out + 1] = "%"
    else
      local v
      if key then
        if not mapping then raise("TypeError", "format requires a mapping") end
        keyed = true
        v = value.get(mapping, key:sub(2, -2))
        if v == nil then raise("KeyError", text.repr(key:sub(2, -2))) end
      end
      width = star(width) or 0
      if width < 0 then flags, width = flags .. "-", -width end
      precision = dot ~= "" and (star(precision) or 0) or nil
      if v == nil then v = next_arg() end
      local minus, prefix, body = percent_convert(v, flags, kind, precision)
      if not body then
        raise("ValueError", ("unsupported format character '%s' (0x%x) at index %d"):format(kind,
          utf8.codepoint(kind), text.position(template, stop - #kind)))
      end
      out[#out + 1] = percent_place(flags, width, minus, prefix, body)
    end
    bytes = bytes + #out[#out]
    value.check_bytes(bytes)
    at = stop
  end
  out[#out + 1] = template:sub(at)
  -- What has items by key may stay unused; anything else must be printed.
  local may_stay = mapping or keyed or value.is(values, value.List)
    or value.is(values, value.Undefined) or value.is(values, value.Range)
  if used < #args and not may_stay then
    raise("TypeError", "not all arguments converted during string formatting")
  end
  return table.concat(out)
end

return format
