--- Python's numbers: int as a 64-bit Lua integer, float as a Lua float. Where Python would go on
--- to a longer integer the result is refused by name, never wrapped around.

local json = require("moonlet.json")
local errors = require("moonlet.jinja.errors")
local text = require("moonlet.jinja.text")

local number = {}

local raise = errors.raise
local floor, huge, fmod = math.floor, math.huge, math.fmod

local function overflow()
  raise("OverflowError", "integer overflow: integers are limited to 64 bits")
end

--- Python's repr of a float.
function number.repr_float(f)
  if f ~= f then return "nan" end
  if f == huge or f == -huge then return f > 0 and "inf" or "-inf" end
  return json.float_repr(f)
end

local is_int = function(x) return math.type(x) == "integer" end

function number.add(a, b)
  local r = a + b
  if is_int(r) and (a ~ r) & (b ~ r) < 0 then overflow() end
  return r
end

function number.sub(a, b)
  local r = a - b
  if is_int(r) and (a ~ b) & (a ~ r) < 0 then overflow() end
  return r
end

function number.mul(a, b)
  local r = a * b
  -- A float product is off by a relative 2^-52 at most: enough to tell a wrapped result.
  if is_int(r) and (math.abs(a * 1.0 * b) > 2.0 ^ 62) then
    if a ~= 0 and (r // a ~= b or r % a ~= 0 or (a == -1 and b == math.mininteger)) then
      overflow()
    end
  end
  return r
end

function number.neg(a)
  if a == math.mininteger and is_int(a) then overflow() end
  return -a
end

-- a / b of positive integers, rounded once: 55 bits of the quotient and whether a rest is left
-- decide it, as in CPython's long_true_divide.
local function exact_quotient(a, b)
  local quotient, rest, exponent = a // b, a % b, 0
  while quotient < 1 << 54 do
    quotient, exponent = quotient << 1, exponent - 1
    if rest >= b - rest then
      quotient, rest = quotient | 1, rest - (b - rest)
    else
      rest = rest << 1
    end
  end
  if rest > 0 then quotient = quotient | 1 end
  return quotient * 2.0 ^ exponent
end

-- Integers up to here are floats exactly.
local EXACT <const> = 1 << 53

local function is_exact(n)
  return not is_int(n) or n >= -EXACT and n <= EXACT
end

function number.div(a, b)
  local ints = is_int(a) and is_int(b)
  if b == 0 then
    raise("ZeroDivisionError", ints and "division by zero" or "float division by zero")
  end
  if not ints or is_exact(a) and is_exact(b) or a == 0 then return a / b end
  if a == math.mininteger or b == math.mininteger then return a / b end
  local quotient = exact_quotient(math.abs(a), math.abs(b))
  return (a < 0) ~= (b < 0) and -quotient or quotient
end

-- CPython, Objects/floatobject.c, float_divmod: the quotient is rounded from the exact remainder.
local function float_divmod(a, b)
  local mod = fmod(a, b)
  local div = (a - mod) / b
  if mod ~= 0 then
    if (b < 0) ~= (mod < 0) then
      mod = mod + b
      div = div - 1.0
    end
  else
    mod = b < 0 and -0.0 or 0.0
  end
  if div ~= 0 then
    local whole = floor(div) + 0.0
    if div - whole > 0.5 then whole = whole + 1.0 end
    div = whole
  else
    div = (a / b < 0 or 1 / (a / b) < 0) and -0.0 or 0.0
  end
  return div, mod
end

function number.floordiv(a, b)
  if is_int(a) and is_int(b) then
    if b == 0 then raise("ZeroDivisionError", "integer division or modulo by zero") end
    if b == -1 then return number.neg(a) end
    return a // b
  end
  if b == 0 then raise("ZeroDivisionError", "float floor division by zero") end
  return (float_divmod(a + 0.0, b + 0.0))
end

function number.mod(a, b)
  if is_int(a) and is_int(b) then
    if b == 0 then raise("ZeroDivisionError", "integer modulo by zero") end
    return a % b
  end
  if b == 0 then raise("ZeroDivisionError", "float modulo") end
  return select(2, float_divmod(a + 0.0, b + 0.0))
end

function number.pow(a, b)
  if is_int(a) and is_int(b) and b >= 0 then
    local result, base = 1, a
    if base == 0 or base == 1 then return b == 0 and 1 or base end
    if base == -1 then return b % 2 == 0 and 1 or -1 end
    if b > 63 then overflow() end
    for _ = 1, b do result = number.mul(result, base) end
    return result
  end
  if a == 0 and b < 0 then
    raise("ZeroDivisionError", "0.0 cannot be raised to a negative power")
  end
  if a < 0 and b ~= floor(b) and b == b and b ~= -huge then
    raise("ValueError", "a negative number to a fractional power is a complex number")
  end
  local r = (a + 0.0) ^ b
  if (r == huge or r == -huge) and a ~= huge and a ~= -huge and b ~= huge and b ~= -huge then
    raise("OverflowError", "(34, 'Numerical result out of range')")
  end
  return r
end

--- The int of a float, towards zero.
function number.truncate(f)
  if f ~= f then raise("ValueError", "cannot convert float NaN to integer") end
  if f == huge or f == -huge then
    raise("OverflowError", "cannot convert float infinity to integer")
  end
  local whole = f < 0 and -floor(-f) or floor(f)
  return math.tointeger(whole) or overflow()
end

local function digits_value(digits, base, negative)
  local value = 0
  for d in digits:gmatch("%w") do
    value = number.sub(number.mul(value, base), tonumber(d, 36))
  end
  return negative and value or number.neg(value)
end

local PREFIX = { b = 2, o = 8, x = 16 }

-- "1_000" yes, "_1", "1__0" and "1_" no.
local function plain_digits(s)
  if s == "" or s:find("^_") or s:find("_$") or s:find("__", 1, true) then return nil end
  return (s:gsub("_", ""))
end
number.plain_digits = plain_digits

--- Python's int(text, base); nil when the text is not such a number.
function number.parse_int(s, base)
  local sign, rest = text.plain_digits(text.strip(s)):match("^([+-]?)(%w[%w_]*)$")
  if not sign then return nil end
  local letter, body = rest:match("^0([bBoOxX])_?(.*)$")
  local named = letter and PREFIX[letter:lower()]
  if named and (base == 0 or base == named) then
    rest, base = body, named
  elseif base == 0 then
    if rest:find("^0[0_]*[1-9]") then return nil end
    base = 10
  end
  local digits = plain_digits(rest)
  if not digits or digits == "" then return nil end
  for d in digits:gmatch(".") do
    local value = tonumber(d, 36)
    if not value or value >= base then return nil end
  end
  return digits_value(digits, base, sign == "-")
end

--- Python's float(text); nil when the text is not such a number.
function number.parse_float(s)
  local sign, rest = text.plain_digits(text.strip(s)):match("^([+-]?)(.*)$")
  local word = rest:lower()
  local value
  if word == "inf" or word == "infinity" then
    value = huge
  elseif word == "nan" then
    value = 0 / 0
    return value ~= value and -value or value
  else
    local mantissa, exponent = rest:match("^([%d_%.]+)(.*)$")
    if not mantissa or exponent ~= "" and not exponent:find("^[eE][+-]?%d[%d_]*$") then
      return nil
    end
    local whole, dot, fraction = mantissa:match("^([%d_]*)(%.?)([%d_]*)$")
    if not whole or whole == "" and fraction == "" then return nil end
    for _, part in ipairs({ whole, fraction, exponent:match("%d.*$") or "" }) do
      if part ~= "" and not plain_digits(part) then return nil end
    end
    value = tonumber(((whole .. dot .. fraction .. exponent):gsub("_", ""))) + 0.0
  end
  return sign == "-" and -value or value
end

-- Half to even among the multiples of 10^places.
local function round_int(n, places)
  if places > 18 then return 0 end
  local unit = math.tointeger(10 ^ places)
  local rest = n % unit
  local low = n - rest
  if rest * 2 > unit or rest * 2 == unit and (low // unit) % 2 == 1 then
    return number.add(low, unit)
  end
  return low
end

--- Python's round(value, digits): ints stay ints, floats are rounded on their exact value.
function number.round(value, digits)
  if is_int(value) then return digits >= 0 and value or round_int(value, -digits) end
  if value ~= value or value == huge or value == -huge or digits > 22 then return value end
  -- The point makes "-0" read as a float.
  if digits == 0 then return tonumber(string.format("%.0f.0", value)) end
  if digits > 0 then return tonumber(string.format("%." .. digits .. "f", value)) end
  if digits < -308 then return value < 0 and -0.0 or 0.0 end
  local unit = 10.0 ^ -digits
  local scaled = string.format("%.0f.0", value / unit)
  return tonumber(scaled) * unit
end

return number
