--- Word wrapping as Python's textwrap does it, for the filter wordwrap: white space is kept as it
--- is inside a line and dropped around line breaks.

local errors = require("moonlet.jinja.errors")
local text = require("moonlet.jinja.text")

local SPACE = "[\t-\r ]"

local function is_space(c) return c ~= nil and c:find(SPACE) ~= nil end
local function is_word(c) return c ~= nil and text.is_word(utf8.codepoint(c)) end
local function is_letter(c)
  return is_word(c) and not text.is("decimal", utf8.codepoint(c))
end
local function is_punct(c) return is_word(c) or c ~= nil and c:find("^[!\"'&.,?]$") ~= nil end

--- The dashes of an em-dash that begins at `at` and is followed by a word, or nil.
local function em_dash(chars, at)
  local stop = at
  while chars[stop] == "-" do stop = stop + 1 end
  if stop - at >= 2 and is_word(chars[stop]) then return stop - 1 end
end

--- Whether a word may break after the hyphen at `i`: between letters, as in "goof-ball".
local function breaks_at_hyphen(chars, i)
  local before = is_letter(chars[i - 1]) and (is_letter(chars[i - 2])
    or chars[i - 2] == "-" and is_letter(chars[i - 3]))
  local ahead = is_letter(chars[i + 1])
    and (is_letter(chars[i + 2]) or chars[i + 2] == "-" and is_letter(chars[i + 3]))
  return before and ahead
end

--- The end of the chunk that begins at `at` (textwrap.TextWrapper.wordsep_re).
local function chunk_end(chars, at, hyphens)
  local i = at
  if is_space(chars[at]) then
    while is_space(chars[i + 1]) do i = i + 1 end
    return i
  end
  if hyphens and is_punct(chars[at - 1]) then
    local dash = em_dash(chars, at)
    if dash then return dash end
  end
  while true do
    if chars[i + 1] == nil or is_space(chars[i + 1]) then return i end
    if hyphens then
      if is_punct(chars[i]) and em_dash(chars, i + 1) then return i end
      if chars[i + 1] == "-" and breaks_at_hyphen(chars, i + 1) then return i + 1 end
    end
    i = i + 1
  end
end

local function chunks_of(line, hyphens)
  local chars, out, at = text.chars(line), {}, 1
  while at <= #chars do
    local stop = chunk_end(chars, at, hyphens)
    out[#out + 1] = table.concat(chars, "", at, stop)
    at = stop + 1
  end
  return out
end

--- How much of a chunk too long for any line goes on this one: up to the last hyphen that fits.
local function split_point(chunk, room, hyphens)
  if hyphens then
    local head = text.sub(chunk, 0, math.min(room, text.len(chunk)))
    local hyphen = text.rfind_byte(head, "-")
    if hyphen and hyphen > 1 and head:sub(1, hyphen - 1):find("[^-]") then
      return text.position(chunk, hyphen) + 1
    end
  end
  return room
end

local function wrap_line(line, width, break_long, hyphens)
  local chunks, lines, at = chunks_of(line, hyphens), {}, 1
  while at <= #chunks do
    local current, length = {}, 0
    if #lines > 0 and text.strip(chunks[at]) == "" then at = at + 1 end
    while chunks[at] and length + text.len(chunks[at]) <= width do
      current[#current + 1] = chunks[at]
      length = length + text.len(chunks[at])
      at = at + 1
    end
    if chunks[at] and text.len(chunks[at]) > width then
      if break_long then
        local cut = split_point(chunks[at], width - length, hyphens)
        current[#current + 1] = text.sub(chunks[at], 0, cut)
        chunks[at] = text.sub(chunks[at], cut, text.len(chunks[at]))
      elseif #current == 0 then
        current[1] = chunks[at]
        at = at + 1
      end
    end
    if current[1] and text.strip(current[#current]) == "" then current[#current] = nil end
    if current[1] then lines[#lines + 1] = table.concat(current) end
  end
  return lines
end

--- Wraps every line of `s` to `width` characters and joins the pieces with `joint`.
return function(s, width, break_long, joint, hyphens)
  if width <= 0 then
    errors.raise("ValueError", "invalid width " .. width .. " (must be > 0)")
  end
  local out = {}
  for i, line in ipairs(text.splitlines(s)) do
    out[i] = table.concat(wrap_line(line, width, break_long, hyphens), joint)
  end
  return table.concat(out, joint)
end
