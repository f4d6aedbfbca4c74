--- Python's pprint.pformat at its default width: what fits on a line is the repr with sorted keys,
--- the rest is broken up one item per line.

local errors = require("moonlet.jinja.errors")
local text = require("moonlet.jinja.text")
local value = require("moonlet.jinja.value")

local WIDTH = 80
local MAX_BYTES = 256 * 1024

-- Keys that cannot be compared sort by the name of their class.
local function sort_keys(d)
  local order = {}
  for i in ipairs(d.keys) do order[i] = i end
  local kinds = {}
  for i, key in ipairs(d.keys) do
    kinds[i] = value.tuple({ value.number(key) and "int" or value.typename(key), key })
  end
  return value.sort(order, kinds)
end

--- The value with the keys of every dict in order.
local function sorted(v, depth)
  value.check_depth(depth)
  if value.is_sequence(v) then
    local out = {}
    for i, item in ipairs(v) do out[i] = sorted(item, depth + 1) end
    return setmetatable(out, getmetatable(v))
  elseif value.is(v, value.Dict) then
    local out = value.dict()
    for _, i in ipairs(sort_keys(v)) do
      value.put(out, v.keys[i], sorted(v.vals[i], depth + 1))
    end
    return out
  end
  return v
end

local write

local function newline(out, indent)
  out[#out + 1] = ",\n" .. (" "):rep(indent)
end

local function write_items(out, items, indent, allowance)
  for i, item in ipairs(items) do
    if i > 1 then newline(out, indent + 1) end
    write(out, item, indent + 1, i == #items and allowance or 1, 2)
  end
end

local function write_dict(out, d, indent, allowance)
  out[#out + 1] = "{"
  for i, key in ipairs(d.keys) do
    if i > 1 then newline(out, indent + 1) end
    local name = value.repr(key)
    out[#out + 1] = name .. ": "
    write(out, d.vals[i], indent + 1 + text.len(name) + 2, i == #d.keys and allowance + 1 or 1, 2)
  end
  out[#out + 1] = "}"
end

--- The words of a line with the white space after each.
local function words(line)
  local out, at = {}, 1
  while at <= #line do
    local stop = at
    while stop <= #line and text.skip_space(line, stop) == stop do
      stop = stop + #line:match("^" .. utf8.charpattern, stop)
    end
    stop = text.skip_space(line, stop)
    out[#out + 1] = line:sub(at, stop - 1)
    at = stop
  end
  return out
end

local function text_chunks(s, width, allowance)
  local chunks = {}
  local lines = text.splitlines(s, true)
  for i, line in ipairs(lines) do
    local room = width - (i == #lines and allowance or 0)
    if text.len(text.repr(line)) <= room then
      chunks[#chunks + 1] = text.repr(line)
    else
      local current, parts = "", words(line)
      for j, part in ipairs(parts) do
        local limit = width - (j == #parts and i == #lines and allowance or 0)
        if text.len(text.repr(current .. part)) > limit then
          if current ~= "" then chunks[#chunks + 1] = text.repr(current) end
          current = part
        else
          current = current .. part
        end
      end
      if current ~= "" then chunks[#chunks + 1] = text.repr(current) end
    end
  end
  return chunks
end

local function write_text(out, s, indent, allowance, level)
  if level == 1 then indent, allowance = indent + 1, allowance + 1 end
  local chunks = text_chunks(s, WIDTH - indent, allowance)
  if #chunks == 1 then level = 2 end
  out[#out + 1] = (level == 1 and "(" or "")
    .. table.concat(chunks, "\n" .. (" "):rep(indent)) .. (level == 1 and ")" or "")
end

function write(out, v, indent, allowance, level)
  local rep = value.repr(v)
  if text.len(rep) <= WIDTH - indent - allowance then
    out[#out + 1] = rep
  elseif type(v) == "string" then
    write_text(out, v, indent, allowance, level)
  elseif value.is(v, value.Dict) then
    write_dict(out, v, indent, allowance)
  elseif value.is(v, value.List) then
    out[#out + 1] = "["
    write_items(out, v, indent, allowance + 1)
    out[#out + 1] = "]"
  elseif value.is(v, value.Tuple) then
    local close = #v == 1 and ",)" or ")"
    out[#out + 1] = "("
    write_items(out, v, indent, allowance + #close)
    out[#out + 1] = close
  else
    out[#out + 1] = rep
  end
end

return function(v)
  -- Every level is written out to see whether it fits on a line.
  if #value.repr(v) > MAX_BYTES then
    errors.raise("OverflowError", "value is too large for pprint")
  end
  local out = {}
  write(out, sorted(v, 1), 0, 0, 1)
  return table.concat(out)
end
