-- patterns: string.find, match, gmatch and gsub, in Lua.
--
-- A pattern can take Lua's own matcher longer than the age of the universe, and C code cannot be
-- stopped by counting instructions. This one can. The text of this file runs in every sandbox and
-- puts the four functions into its `string`; semantics and error texts are those of Lua 5.4's
-- lstrlib.c, character classes those of the C locale. Errors come without a place in the script.

local library <const> = _ENV.string
local byte, char, sub = string.byte, string.char, string.sub
local concat = table.concat
local find_plain <const> = string.find -- knows no patterns: (text, piece, from) -> first, last

local MAX_CAPTURES <const> = 32
local UNFINISHED <const>, POSITION <const> = -1, -2

local PERCENT <const>, OPEN <const>, CLOSE <const>, SET <const>, SET_END <const>, CARET <const>,
  DOLLAR <const>, DOT <const>, STAR <const>, PLUS <const>, MINUS <const>, QUESTION <const>,
  DIGIT_0 <const>, DIGIT_9 <const>, BALANCE <const>, FRONTIER <const> =
  byte("%()[]^$.*+-?09bf", 1, -1)

-- ---- characters --------------------------------------------------------------------------------

-- Ranges of the classes; a class in capitals is everything that is not in them.
local RANGES <const> = { a = "AZaz", c = "\0\31\127\127", d = "09", g = "!~", l = "az",
  p = "!/:@[`{~", s = "\9\13  ", u = "AZ", w = "09AZaz", x = "09AFaf" }

local CLASSES <const>, COMPLEMENTS <const> = {}, {}
for name, ranges in pairs(RANGES) do
  local set = {}
  for i = 1, #ranges, 2 do
    for c = byte(ranges, i), byte(ranges, i + 1) do set[c] = true end
  end
  CLASSES[byte(name)], COMPLEMENTS[byte(name) - 32] = set, set
end

local function in_class(c, class)
  local set, complement = CLASSES[class], COMPLEMENTS[class]
  if set then return set[c] or false end
  if complement then return not complement[c] end
  return c == class
end

-- p: the '[', last: the ']'.
local function in_set(m, c, p, last)
  local pat, wanted = m.pat, true
  p = p + 1
  if pat[p] == CARET then p, wanted = p + 1, false end
  while p < last do
    if pat[p] == PERCENT then
      if in_class(c, pat[p + 1]) then return wanted end
      p = p + 2
    elseif pat[p + 1] == MINUS and p + 2 < last then
      if pat[p] <= c and c <= pat[p + 2] then return wanted end
      p = p + 3
    else
      if pat[p] == c then return wanted end
      p = p + 1
    end
  end
  return not wanted
end

-- The place behind the single-character item at p.
local function item_end(m, p)
  local pat, n = m.pat, m.n_pat
  local c = pat[p]
  p = p + 1
  if c == PERCENT then
    if p > n then error("malformed pattern (ends with '%')", 0) end
    return p + 1
  end
  if c ~= SET then return p end
  if pat[p] == CARET then p = p + 1 end
  repeat -- a ']' that comes first is a member
    if p > n then error("malformed pattern (missing ']')", 0) end
    p = p + (pat[p] == PERCENT and 2 or 1)
  until pat[p] == SET_END
  return p + 1
end

-- Whether the character at s is one of the item at p, which ends before ep.
local function is_one(m, s, p, ep)
  local c, kind = m.src[s], m.pat[p]
  if not c then return false end
  if kind == DOT then return true end
  if kind == PERCENT then return in_class(c, m.pat[p + 1]) end
  if kind == SET then return in_set(m, c, p, ep - 1) end
  return kind == c
end

-- ---- matching: the place behind what matches at s, or nil --------------------------------------

local match

local function start_capture(m, s, p, length)
  local level = m.level + 1
  if level > MAX_CAPTURES then error("too many captures", 0) end
  m.level, m.first[level], m.length[level] = level, s, length
  local e = match(m, s, p)
  if not e then m.level = level - 1 end
  return e
end

local function end_capture(m, s, p)
  local level = m.level
  while level > 0 and m.length[level] ~= UNFINISHED do level = level - 1 end
  if level == 0 then error("invalid pattern capture", 0) end
  m.length[level] = s - m.first[level]
  local e = match(m, s, p)
  if not e then m.length[level] = UNFINISHED end
  return e
end

local function match_balance(m, s, p)
  local open, close = m.pat[p], m.pat[p + 1]
  if not close then error("malformed pattern (missing arguments to '%b')", 0) end
  if m.src[s] ~= open then return nil end
  local depth = 1
  for i = s + 1, m.n_src do
    local c = m.src[i]
    if c == close then
      depth = depth - 1
      if depth == 0 then return i + 1 end
    elseif c == open then
      depth = depth + 1
    end
  end
  return nil
end

local function match_back_reference(m, s, digit)
  local l = digit - DIGIT_0
  if l < 1 or l > m.level or m.length[l] == UNFINISHED then
    error(("invalid capture index %%%d"):format(l), 0)
  end
  local from, length = m.first[l], m.length[l]
  if length == POSITION then -- a position, which is no text and matches nothing
    return nil
  end
  for i = 0, length - 1 do
    if m.src[s + i] ~= m.src[from + i] or not m.src[s + i] then return nil end
  end
  return s + length
end

local function match_frontier(m, s, p)
  if m.pat[p] ~= SET then error("missing '[' after '%f' in pattern", 0) end
  local ep = item_end(m, p)
  if in_set(m, m.src[s - 1] or 0, p, ep - 1) or not in_set(m, m.src[s] or 0, p, ep - 1) then
    return nil
  end
  return match(m, s, ep)
end

local function match_longest(m, s, p, ep)
  local i = 0
  while is_one(m, s + i, p, ep) do i = i + 1 end
  for n = i, 0, -1 do
    local e = match(m, s + n, ep + 1)
    if e then return e end
  end
  return nil
end

local function match_shortest(m, s, p, ep)
  while true do
    local e = match(m, s, ep + 1)
    if e then return e end
    if not is_one(m, s, p, ep) then return nil end
    s = s + 1
  end
end

-- What begins with '%' and is no single character; nil, true if it is one after all.
local function match_special(m, s, p)
  local c = m.pat[p + 1]
  if c == BALANCE then
    local e = match_balance(m, s, p + 2)
    return e and match(m, e, p + 4)
  elseif c == FRONTIER then
    return match_frontier(m, s, p + 2)
  elseif c and c >= DIGIT_0 and c <= DIGIT_9 then
    local e = match_back_reference(m, s, c)
    return e and match(m, e, p + 2)
  end
  return nil, true
end

function match(m, s, p)
  while p <= m.n_pat do
    local c = m.pat[p]
    if c == OPEN then
      if m.pat[p + 1] == CLOSE then return start_capture(m, s, p + 2, POSITION) end
      return start_capture(m, s, p + 1, UNFINISHED)
    elseif c == CLOSE then
      return end_capture(m, s, p + 1)
    elseif c == DOLLAR and p == m.n_pat then
      return s == m.n_src + 1 and s or nil
    elseif c == PERCENT then
      local e, plain = match_special(m, s, p)
      if not plain then return e end
    end
    local ep = item_end(m, p)
    local suffix = m.pat[ep]
    if suffix == STAR then return match_longest(m, s, p, ep) end
    if suffix == MINUS then return match_shortest(m, s, p, ep) end
    local one = is_one(m, s, p, ep)
    if suffix == PLUS then return one and match_longest(m, s + 1, p, ep) or nil end
    if suffix == QUESTION then
      local e = one and match(m, s + 1, ep + 1)
      if e then return e end
      p = ep + 1
    elseif one then
      s, p = s + 1, ep
    else
      return nil
    end
  end
  return s
end

-- ---- captures ----------------------------------------------------------------------------------

-- Capture l, or the whole match [s, e) where there is none.
local function capture(m, l, s, e)
  if l > m.level then
    if l ~= 1 then error(("invalid capture index %%%d"):format(l), 0) end
    return sub(m.text, s, e - 1)
  end
  local length = m.length[l]
  if length == UNFINISHED then error("unfinished capture", 0) end
  if length == POSITION then return m.first[l] end
  return sub(m.text, m.first[l], m.first[l] + length - 1)
end

-- All captures; without any, the whole match, or nothing if not `whole`.
local function captures(m, s, e, whole)
  local list, n = {}, (m.level == 0 and whole) and 1 or m.level
  for l = 1, n do list[l] = capture(m, l, s, e) end
  return table.unpack(list, 1, n)
end

-- ---- the functions -----------------------------------------------------------------------------

local function text_argument(x, i, name)
  if type(x) == "number" then return tostring(x) end
  if type(x) ~= "string" then
    error(("bad argument #%d to '%s' (string expected, got %s)"):format(i, name, x == nil
      and "no value" or type(x)), 0)
  end
  return x
end

local PIECE <const> = 4096 -- bytes that fit on the stack

local function bytes_of(text)
  if #text <= PIECE then return { byte(text, 1, -1) } end
  local list = {}
  for i = 1, #text, PIECE do
    local piece = { byte(text, i, i + PIECE - 1) }
    table.move(piece, 1, #piece, i, list)
  end
  return list
end

local function matcher(text, pattern)
  return { text = text, src = bytes_of(text), n_src = #text, pat = bytes_of(pattern),
    n_pat = #pattern, level = 0, first = {}, length = {} }
end

-- Where to begin, from an `init` argument.
local function start_of(init, n)
  init = init or 1
  if init > 0 then return init end
  return init < -n and 1 or init == 0 and 1 or n + init + 1
end

local SPECIAL <const> = {}
for _, c in ipairs { byte("^$*+?.([%-", 1, -1) } do SPECIAL[c] = true end

local function has_special(pattern)
  for i = 1, #pattern do
    if SPECIAL[byte(pattern, i)] then return true end
  end
  return false
end

local function find_or_match(text, pattern, init, plain, find)
  local name = find and "find" or "match"
  text, pattern = text_argument(text, 1, name), text_argument(pattern, 2, name)
  local from = start_of(init, #text)
  if from > #text + 1 then return nil end
  if find and (plain or not has_special(pattern)) then return find_plain(text, pattern, from) end
  local m = matcher(text, pattern)
  local anchored = m.pat[1] == CARET
  for s = from, anchored and from or m.n_src + 1 do
    m.level = 0
    local e = match(m, s, anchored and 2 or 1)
    if e and find then return s, e - 1, captures(m, s, e) end
    if e then return captures(m, s, e, true) end
  end
  return nil
end

function library.find(text, pattern, init, plain)
  return find_or_match(text, pattern, init, plain, true)
end

function library.match(text, pattern, init)
  return find_or_match(text, pattern, init, false, false)
end

function library.gmatch(text, pattern, init)
  text, pattern = text_argument(text, 1, "gmatch"), text_argument(pattern, 2, "gmatch")
  local m, from, last = matcher(text, pattern), start_of(init, #text), nil
  return function()
    for s = from, m.n_src + 1 do
      m.level = 0
      local e = match(m, s, 1)
      if e and e ~= last then
        from, last = e, e
        return captures(m, s, e, true)
      end
    end
    from = m.n_src + 2
    return nil
  end
end

-- A replacement text with its captures filled in.
local function filled(m, template, s, e)
  local out, i = {}, 1
  while i <= #template do
    local c = byte(template, i)
    if c ~= PERCENT then
      out[#out + 1] = char(c)
    else
      i = i + 1
      local d = byte(template, i)
      if d == PERCENT then
        out[#out + 1] = "%"
      elseif d == DIGIT_0 then
        out[#out + 1] = sub(m.text, s, e - 1)
      elseif d and d > DIGIT_0 and d <= DIGIT_9 then
        out[#out + 1] = tostring(capture(m, d - DIGIT_0, s, e))
      else
        error("invalid use of '%' in replacement string", 0)
      end
    end
    i = i + 1
  end
  return concat(out)
end

local function replacement(m, by, s, e)
  local value
  if type(by) == "string" then
    value = filled(m, by, s, e)
  elseif type(by) == "table" then
    value = by[capture(m, 1, s, e)]
  else
    value = by(captures(m, s, e, true))
  end
  if not value then return sub(m.text, s, e - 1) end
  if type(value) ~= "string" and type(value) ~= "number" then
    error(("invalid replacement value (a %s)"):format(type(value)), 0)
  end
  return tostring(value)
end

function library.gsub(text, pattern, by, max)
  text, pattern = text_argument(text, 1, "gsub"), text_argument(pattern, 2, "gsub")
  if type(by) == "number" then by = tostring(by) end
  if type(by) ~= "string" and type(by) ~= "table" and type(by) ~= "function" then
    error(("bad argument #3 to 'gsub' (string/function/table expected, got %s)"):format(by == nil
      and "no value" or type(by)), 0)
  end
  local m, out, n, s, last = matcher(text, pattern), {}, 0, 1, nil
  local anchored = m.pat[1] == CARET
  while n < (max or m.n_src + 1) do
    m.level = 0
    local e = match(m, s, anchored and 2 or 1)
    if e and e ~= last then
      n = n + 1
      out[#out + 1] = replacement(m, by, s, e)
      s, last = e, e
    elseif s <= m.n_src then
      out[#out + 1] = char(m.src[s])
      s = s + 1
    else
      break
    end
    if anchored then break end
  end
  out[#out + 1] = sub(text, s)
  return concat(out), n
end
