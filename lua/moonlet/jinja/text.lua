--- Strings as Python sees them: valid UTF-8 bytes whose lengths, positions and slices count code
--- points. Positions are 0-based here, as in Python; character classes and case mappings come from
--- unicode.lua. Every search is a plain one, so no text is ever read as a Lua pattern.

local tables = require("moonlet.jinja.unicode")

local text = {}

local find, sub, byte, rep = string.find, string.sub, string.byte, string.rep
local codepoint, char, ulen, offset = utf8.codepoint, utf8.char, utf8.len, utf8.offset

local GLANCE <const> = 256 -- bytes, of which one tells in most texts

-- A class of a pattern takes five times as long as counting, and whoever renders a text of
-- megabytes holds up a whole server meanwhile.
local function is_ascii(s)
  return not find(sub(s, 1, GLANCE), "[\x80-\xff]") and ulen(s) == #s
end
text.is_ascii = is_ascii

--- The number of code points.
function text.len(s)
  return is_ascii(s) and #s or ulen(s)
end

--- The code points from `i` up to but not including `j`; 0 <= i <= j <= length.
function text.sub(s, i, j)
  if is_ascii(s) then return sub(s, i + 1, j) end
  local first = offset(s, i + 1)
  local last = offset(s, j - i + 1, first)
  return sub(s, first, last - 1)
end

--- The text as an array of one-character strings.
function text.chars(s)
  local out, n = {}, 0
  for c in string.gmatch(s, utf8.charpattern) do
    n = n + 1
    out[n] = c
  end
  return out
end

--- Turns a byte position (1-based) into a code point position (0-based).
local function position(s, at)
  if at == 1 then return 0 end
  return ulen(s, 1, at - 1)
end
text.position = position

-- Python's str.isspace; `\s` of its regular expressions is the same set.
local SPACES = { ["\u{85}"] = true, ["\u{a0}"] = true, ["\u{1680}"] = true, ["\u{2028}"] = true,
  ["\u{2029}"] = true, ["\u{202f}"] = true, ["\u{205f}"] = true, ["\u{3000}"] = true }
for c in ("\t\n\v\f\r\x1c\x1d\x1e\x1f "):gmatch(".") do SPACES[c] = true end
for c = 0x2000, 0x200a do SPACES[char(c)] = true end
text.SPACES = SPACES

--- The first byte position at or after `at` that holds no white space.
local function skip_space(s, at)
  while true do
    at = find(s, "[^\t-\r\x1c-\x20]", at) or #s + 1
    local b = byte(s, at)
    if not b or b < 0xc2 then return at end
    local c = sub(s, at, at + (b < 0xe0 and 1 or 2))
    if not SPACES[c] then return at end
    at = at + #c
  end
end
text.skip_space = skip_space

--- The last byte position down from `last` that holds no white space, 0 without one.
local function last_mark(s, last)
  while last > 0 do
    local b = byte(s, last)
    if b < 0x80 then
      if not SPACES[char(b)] then break end
      last = last - 1
    elseif SPACES[sub(s, last - 1, last)] then
      last = last - 2
    elseif SPACES[sub(s, last - 2, last)] then
      last = last - 3
    else
      break
    end
  end
  return last
end

--- str.strip, lstrip and rstrip; `chars` is a set of characters as text, nil for white space.
function text.lstrip(s, chars)
  if not chars then return sub(s, skip_space(s, 1)) end
  local set = {}
  for c in string.gmatch(chars, utf8.charpattern) do set[c] = true end
  local at = 1
  for c in string.gmatch(s, utf8.charpattern) do
    if not set[c] then break end
    at = at + #c
  end
  return sub(s, at)
end

function text.rstrip(s, chars)
  if not chars then return sub(s, 1, last_mark(s, #s)) end
  local set = {}
  for c in string.gmatch(chars, utf8.charpattern) do set[c] = true end
  local last = #s
  while last > 0 do
    local first = last
    while first > 1 and find(s, "^[\x80-\xbf]", first) do first = first - 1 end
    if not set[sub(s, first, last)] then break end
    last = first - 1
  end
  return sub(s, 1, last)
end

function text.strip(s, chars)
  return text.rstrip(text.lstrip(s, chars), chars)
end

--- Splits at white space; at most `max` splits (nil: all of them).
function text.split_space(s, max)
  local out, at = {}, skip_space(s, 1)
  while at <= #s do
    if max and #out >= max then
      out[#out + 1] = sub(s, at)
      return out
    end
    local stop = at
    repeat
      local _, e = find(s, utf8.charpattern, stop)
      if SPACES[sub(s, stop, e)] then break end
      stop = e + 1
    until stop > #s
    out[#out + 1] = sub(s, at, stop - 1)
    at = skip_space(s, stop)
  end
  return out
end

function text.rsplit_space(s, max)
  local words = text.split_space(s)
  if not max or #words <= max then return words end
  -- What is left of the last `max` words keeps all its white space but that at the end.
  local first, last = #words - max + 1, last_mark(s, #s)
  for i = #words, first, -1 do last = last_mark(s, last - #words[i]) end
  local out = table.move(words, first, #words, 2, {})
  out[1] = sub(s, 1, last)
  return out
end

function text.split(s, sep, max)
  local out, at = {}, 1
  while not max or #out < max do
    local i, j = find(s, sep, at, true)
    if not i then break end
    out[#out + 1] = sub(s, at, i - 1)
    at = j + 1
  end
  out[#out + 1] = sub(s, at)
  return out
end

--- The byte position of the last `needle`, or nil.
function text.rfind_byte(s, needle)
  local at = find(s:reverse(), needle:reverse(), 1, true)
  return at and #s - at - #needle + 2
end

function text.rsplit(s, sep, max)
  local parts = text.split(s:reverse(), sep:reverse(), max)
  local out = {}
  for i, part in ipairs(parts) do out[#parts + 1 - i] = part:reverse() end
  return out
end

local LINE_ENDS = { ["\n"] = true, ["\r"] = true, ["\v"] = true, ["\f"] = true, ["\x1c"] = true,
  ["\x1d"] = true, ["\x1e"] = true, ["\u{85}"] = true, ["\u{2028}"] = true, ["\u{2029}"] = true }

function text.splitlines(s, keep)
  local out, from, at = {}, 1, 1
  while true do
    -- Only these bytes begin a line end; a candidate is looked at in full.
    at = find(s, "[\n\r\v\f\x1c-\x1e\xc2\xe2]", at)
    if not at then break end
    local _, stop = find(s, utf8.charpattern, at)
    if LINE_ENDS[sub(s, at, stop)] then
      if sub(s, at, at + 1) == "\r\n" then stop = at + 1 end
      out[#out + 1] = sub(s, from, keep and stop or at - 1)
      from = stop + 1
    end
    at = stop + 1
  end
  if from <= #s then out[#out + 1] = sub(s, from) end
  return out
end

--- Replaces `old` by `new`, at most `max` times (nil: everywhere). An empty `old` matches before
--- every character and at the end.
function text.replace(s, old, new, max)
  local out, n = {}, 0
  if old == "" then
    for _, c in ipairs(text.chars(s)) do
      if not max or n < max then
        out[#out + 1] = new
        n = n + 1
      end
      out[#out + 1] = c
    end
    if not max or n < max then out[#out + 1] = new end
    return table.concat(out)
  end
  local at = 1
  while not max or n < max do
    local i, j = find(s, old, at, true)
    if not i then break end
    n = n + 1
    out[n] = sub(s, at, i - 1)
    at = j + 1
  end
  if n == 0 then return s end
  out[n + 1] = sub(s, at)
  return table.concat(out, new)
end

--- How often `needle` occurs without overlap.
function text.count(s, needle)
  if needle == "" then return text.len(s) + 1 end
  local n, at = 0, 1
  while true do
    local _, j = find(s, needle, at, true)
    if not j then return n end
    n = n + 1
    at = j + 1
  end
end

--- Pads to `width` code points; `share` is the part of the padding that goes left: 0 all right,
--- 1 all left, "center" as str.center does it.
function text.pad(s, width, fill, share)
  local missing = width - text.len(s)
  if missing <= 0 then return s end
  local left = share == 1 and missing or 0
  if share == "center" then left = missing // 2 + (missing & width & 1) end
  return rep(fill, left) .. s .. rep(fill, missing - left)
end

-- Character classes and case ------------------------------------------------------------------

local decoded = {}

--- The boundaries of a class: sorted code points at which membership changes.
local function boundaries(name)
  local list = decoded[name]
  if not list then
    list = {}
    local at = 0
    for run in tables[name]:gmatch("%x+") do
      at = at + tonumber(run, 16)
      list[#list + 1] = at
    end
    decoded[name] = list
  end
  return list
end

--- Whether code point `c` is in the class `name`.
local function is(name, c)
  local list = boundaries(name)
  local low, high = 0, #list
  while low < high do
    local middle = (low + high + 1) // 2
    if list[middle] <= c then low = middle else high = middle - 1 end
  end
  return low % 2 == 1
end
text.is = is

--- The text with the decimal digits of every script as 0 to 9, which is how int() reads them.
--- Each script has its ten digits in a row.
function text.plain_digits(s)
  if is_ascii(s) then return s end
  local list = boundaries("decimal")
  return (s:gsub("[\xc2-\xf4][\x80-\xbf]+", function(digit)
    local c = codepoint(digit)
    if not is("decimal", c) then return nil end
    local start
    for _, boundary in ipairs(list) do
      if boundary <= c then start = boundary end
    end
    return tostring((c - start) % 10)
  end))
end

--- Code point -> replacement text for one mapping.
local function mapping(name)
  local map = decoded[name]
  if not map then
    map = {}
    local next_number = tables[name]:gmatch("%-?%x+")
    for first in next_number do
      first = tonumber(first, 16)
      local count, step = tonumber(next_number(), 16), tonumber(next_number(), 16)
      local delta = tonumber(next_number(), 16)
      for i = 0, count - 1 do
        local c = first + i * step
        map[c] = char(c + delta)
      end
    end
    for c, s in pairs(tables.special[name] or {}) do map[c] = s end
    decoded[name] = map
  end
  return map
end

local function is_cased(c)
  return is("lower", c) or is("upper", c) or is("title", c)
end

local function mapped(name, c)
  return mapping(name)[c] or char(c)
end

-- Unicode 3.13, Final_Sigma: a cased letter before, none after, ignorable characters skipped.
local function is_final_sigma(codes, at)
  local before, after = at - 1, at + 1
  while before >= 1 and is("ignorable", codes[before]) do before = before - 1 end
  if before < 1 or not is_cased(codes[before]) then return false end
  while after <= #codes and is("ignorable", codes[after]) do after = after + 1 end
  return after > #codes or not is_cased(codes[after])
end

local function lower_at(codes, i)
  local c = codes[i]
  if c == 0x3a3 then return is_final_sigma(codes, i) and "ς" or "σ" end
  return mapped("to_lower", c)
end

local function title_at(codes, i)
  local c = codes[i]
  return mapping("to_title")[c] or mapped("to_upper", c)
end

local function codes_of(s)
  local out = {}
  for _, c in utf8.codes(s) do out[#out + 1] = c end
  return out
end

local function convert(s, f)
  local codes, out = codes_of(s), {}
  for i = 1, #codes do out[i] = f(codes, i) end
  return table.concat(out)
end

function text.upper(s)
  if is_ascii(s) then return s:upper() end
  return convert(s, function(codes, i) return mapped("to_upper", codes[i]) end)
end

function text.lower(s)
  if is_ascii(s) then return s:lower() end
  return convert(s, lower_at)
end

function text.casefold(s)
  return convert(s, function(codes, i)
    return mapping("to_fold")[codes[i]] or mapped("to_lower", codes[i])
  end)
end

function text.capitalize(s)
  return convert(s, function(codes, i)
    return i == 1 and title_at(codes, 1) or lower_at(codes, i)
  end)
end

function text.title(s)
  local inside = false
  return convert(s, function(codes, i)
    local out = inside and lower_at(codes, i) or title_at(codes, i)
    inside = is_cased(codes[i])
    return out
  end)
end

function text.swapcase(s)
  return convert(s, function(codes, i)
    local c = codes[i]
    if is("upper", c) then return lower_at(codes, i) end
    return is("lower", c) and mapped("to_upper", c) or char(c)
  end)
end

--- True when the text is not empty and every character is in one of the classes.
function text.all(s, ...)
  if s == "" then return false end
  for _, c in utf8.codes(s) do
    local member = false
    for i = 1, select("#", ...) do member = member or is(select(i, ...), c) end
    if not member then return false end
  end
  return true
end

--- str.islower ("lower") and str.isupper ("upper"): some cased character, none of another case.
function text.all_case(s, wanted)
  local other = wanted == "lower" and "upper" or "lower"
  local seen = false
  for _, c in utf8.codes(s) do
    if is(other, c) or is("title", c) then return false end
    seen = seen or is(wanted, c)
  end
  return seen
end

function text.istitle(s)
  local seen, inside = false, false
  for _, c in utf8.codes(s) do
    if is("upper", c) or is("title", c) then
      if inside then return false end
      seen, inside = true, true
    elseif is("lower", c) then
      if not inside then return false end
      seen = true
    else
      inside = false
    end
  end
  return seen
end

function text.isspace(s)
  return s ~= "" and skip_space(s, 1) > #s
end

--- Whether code point `c` is what `\w` matches.
function text.is_word(c)
  return c == 0x5f or is("alpha", c) or is("numeric", c)
end

-- repr ----------------------------------------------------------------------------------------

local ESCAPES = { ["\\"] = "\\\\", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t" }

--- Python's repr of a string.
function text.repr(s)
  local quote = "'"
  if find(s, "'", 1, true) and not find(s, '"', 1, true) then quote = '"' end
  if not find(s, "[\0-\x1f\\'\x7f-\xff]") then return quote .. s .. quote end
  local out = { quote }
  for c in string.gmatch(s, utf8.charpattern) do
    local code = codepoint(c)
    local escape = ESCAPES[c] or c == quote and "\\" .. c
    if not escape and not is("printable", code) then
      escape = string.format(code < 0x100 and "\\x%02x" or code < 0x10000 and "\\u%04x"
        or "\\U%08x", code)
    end
    out[#out + 1] = escape or c
  end
  out[#out + 1] = quote
  return table.concat(out)
end

--- Python's ascii(): a repr with everything outside ASCII escaped.
function text.ascii(repr)
  return (string.gsub(repr, "[\xc2-\xf4][\x80-\xbf]+", function(c)
    local code = codepoint(c)
    return string.format(code < 0x100 and "\\x%02x" or code < 0x10000 and "\\u%04x"
      or "\\U%08x", code)
  end))
end

return text
