--- Markup, the str that counts as HTML already: what `safe` and `escape` return. Text that meets it
--- is escaped first (markupsafe/__init__.py).

local methods = require("moonlet.jinja.methods")
local text = require("moonlet.jinja.text")
local value = require("moonlet.jinja.value")

local markup = {}

local ENTITIES = { ["&"] = "&amp;", [">"] = "&gt;", ["<"] = "&lt;", ["'"] = "&#39;",
  ['"'] = "&#34;" }

--- The escaped text of any value, as a Lua string.
function markup.escaped(v)
  if value.is(v, value.Markup) then return v.s end
  local s = value.str(v)
  value.check_bytes(#s)
  return (s:gsub("[&><'\"]", ENTITIES))
end

function markup.escape(v)
  if value.is(v, value.Markup) then return v end
  return value.markup(markup.escaped(v))
end

-- Methods whose text arguments meet the text itself.
local ESCAPES = { join = true, replace = 2, ljust = 2, rjust = 2, center = 2 }

local function wrap(result)
  if type(result) == "string" then return value.markup(result) end
  if value.is_sequence(result) then
    local out = {}
    for i, item in ipairs(result) do out[i] = wrap(item) end
    return setmetatable(out, getmetatable(result))
  end
  return result
end

local function escape_args(name, args)
  local which = ESCAPES[name]
  if not which then return args end
  local out = table.move(args, 1, #args, 1, {})
  if which == true and out[1] ~= nil then
    local items = {}
    for item in value.iter(out[1]) do items[#items + 1] = markup.escape(item) end
    out[1] = value.list(items)
  elseif which ~= true and out[which] ~= nil then
    out[which] = markup.escape(out[which])
  end
  return out
end

local function escape_all(values)
  local out = {}
  for i, v in ipairs(values) do
    out[i] = type(v) == "number" and v or markup.escape(v)
  end
  return out
end

--- Calls a str method on Markup: the result is Markup again.
function markup.call(rt, name, self, args, kwargs)
  if name == "format" or name == "format_map" then
    args = escape_all(args)
    if kwargs then
      local escaped = value.dict()
      for i, key in ipairs(kwargs.keys) do
        value.put(escaped, key, escape_all({ kwargs.vals[i] })[1])
      end
      kwargs = escaped
    end
  end
  return wrap(methods.str[name](rt, self.s, escape_args(name, args), kwargs))
end

--- The right side of `markup % values`, escaped.
function markup.percent_args(values)
  if value.is(values, value.Tuple) then return value.tuple(escape_all(values)) end
  if value.is(values, value.Dict) then
    local out = value.dict()
    for i, key in ipairs(values.keys) do
      value.put(out, key, escape_all({ values.vals[i] })[1])
    end
    return out
  end
  return escape_all({ values })[1]
end

-- The entities that str.striptags and the like meet in practice.
local NAMED = { amp = "&", lt = "<", gt = ">", quot = '"', apos = "'", nbsp = "\u{a0}" }

local function unescape(s)
  return (s:gsub("&(#?)([%w]+);", function(hash, name)
    if hash == "" then return NAMED[name] end
    local code = name:match("^%d+$") and tonumber(name)
      or name:match("^[xX]%x+$") and tonumber(name:sub(2), 16)
    if code and code > 0 and code <= 0x10ffff and not (code >= 0xd800 and code < 0xe000) then
      return utf8.char(code)
    end
  end))
end

--- Removes tags and comments, joins white space to single spaces and decodes entities.
function markup.striptags(s)
  local parts, at = {}, 1
  while true do
    local start = s:find("<", at, true)
    if not start then break end
    local comment = s:sub(start, start + 3) == "<!--"
    local _, stop = s:find(comment and "-->" or ">", start + (comment and 4 or 0), true)
    if not stop then break end
    parts[#parts + 1] = s:sub(at, start - 1)
    at = stop + 1
  end
  parts[#parts + 1] = s:sub(at)
  return unescape(table.concat(text.split_space(table.concat(parts)), " "))
end

return markup
