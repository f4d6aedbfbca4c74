--- The filters on text. The file returns a function that defines them through `define`.

local bind = require("moonlet.jinja.bind")
local errors = require("moonlet.jinja.errors")
local format = require("moonlet.jinja.format")
local markup = require("moonlet.jinja.markup")
local methods = require("moonlet.jinja.methods")
local text = require("moonlet.jinja.text")
local value = require("moonlet.jinja.value")
local wrap = require("moonlet.jinja.wrap")

local raise = errors.raise

local function flag(v) return v ~= nil and value.truth(v) end

--- Markup stays Markup; anything else becomes str.
local function soft(v)
  if value.is(v, value.Markup) then return v end
  return value.str(v)
end

--- Applies f to the Lua string of a soft str and keeps Markup what it is.
local function on_text(v, f)
  local s = soft(v)
  if type(s) == "string" then return f(s) end
  return value.markup(f(s.s))
end

--- The Lua string of a value that a filter uses as str without converting it first.
local function need_text(v, what)
  local s = value.text(v)
  if s then return s end
  if value.is(v, value.Undefined) then value.fail_undefined(v) end
  raise("TypeError", what .. " needs a str, not " .. value.typename(v))
end

-- Jinja's title filter starts words after these characters only, unlike str.title.
local function title(s)
  local out, at = {}, 1
  local function starts_word(c)
    return text.SPACES[c] or c:find("^[-({%[<]")
  end
  local function flush(last)
    if last < at then return end
    local piece = s:sub(at, last)
    local first = piece:match("^" .. utf8.charpattern)
    out[#out + 1] = text.upper(first) .. text.lower(piece:sub(#first + 1))
  end
  local pos = 1
  for c in s:gmatch(utf8.charpattern) do
    if starts_word(c) then
      flush(pos - 1)
      out[#out + 1] = c
      at = pos + #c
    end
    pos = pos + #c
  end
  flush(#s)
  return table.concat(out)
end

local function indent(s, width, first, blank)
  local indention = value.text(width) or (" "):rep(math.max(bind.int(width, 4), 0))
  local lines, size = text.splitlines(s .. "\n"), 0
  for i, line in ipairs(lines) do
    if (i > 1 and (blank or line ~= "")) or i == 1 and first then line = indention .. line end
    size = size + #line + 1
    value.check_bytes(size)
    lines[i] = line
  end
  return table.concat(lines, "\n")
end

local function truncate(s, length, killwords, ending, leeway)
  if length < text.len(ending) then
    raise("AssertionError", ("expected length >= %d, got %d"):format(text.len(ending), length))
  end
  if leeway < 0 then raise("AssertionError", "expected leeway >= 0, got " .. leeway) end
  if text.len(s) <= length + leeway then return s end
  local cut = text.sub(s, 0, length - text.len(ending))
  if not killwords then
    local space = text.rfind_byte(cut, " ")
    if space then cut = cut:sub(1, space - 1) end
  end
  return cut .. ending
end

local function quote_url(v, for_query)
  local s = value.str(v)
  value.check_bytes(#s * 3)
  -- urllib.parse.quote leaves these alone; a query also quotes "/" and writes "+" for a space.
  s = s:gsub(for_query and "[^%w_.~ -]" or "[^%w_.~/-]", function(c)
    return string.format("%%%02X", c:byte())
  end)
  return for_query and s:gsub(" ", "+") or s
end

local function urlencode(v)
  if value.text(v) or not value.try_iter(v) then return (quote_url(v)) end
  local pairs_of = value.is(v, value.Dict) and setmetatable({ of = v }, value.View.items) or v
  local out = {}
  for pair in value.iter(pairs_of) do
    local items = value.items(pair)
    if #items ~= 2 then raise("ValueError", "urlencode needs pairs") end
    out[#out + 1] = quote_url(items[1], true) .. "=" .. quote_url(items[2], true)
  end
  return table.concat(out, "&")
end

local function xmlattr(v, autospace)
  if not value.is(v, value.Dict) then
    raise("TypeError", "xmlattr needs a mapping, not " .. value.typename(v))
  end
  local out = {}
  for i, key in ipairs(v.keys) do
    local item = v.vals[i]
    if item ~= value.none and not value.is(item, value.Undefined) then
      if need_text(key, "an attribute name"):find("[ \t\n\r\f\v/>=]") then
        raise("ValueError", "Invalid character in attribute name: " .. value.repr(key))
      end
      out[#out + 1] = markup.escaped(key) .. '="' .. markup.escaped(item) .. '"'
    end
  end
  local s = table.concat(out, " ")
  return autospace and s ~= "" and " " .. s or s
end

local function wordcount(s)
  local n, inside = 0, false
  for _, c in utf8.codes(s) do
    local word = text.is_word(c)
    if word and not inside then n = n + 1 end
    inside = word
  end
  return n
end

return function(define)
  for _, name in ipairs({ "upper", "lower", "capitalize" }) do
    define(name, "s", function(_, v) return on_text(v, text[name]) end)
  end
  define("title", "s", function(_, v) return title(soft(v).s or soft(v)) end)

  define("trim", "value chars?", function(_, v, chars)
    return on_text(v, function(s) return text.strip(s, bind.optional_text(chars)) end)
  end)

  define("string", "/object", function(_, v) return soft(v) end)
  define("safe", "value", function(_, v) return value.markup(value.str(v)) end)
  define("escape e", "/s", function(_, v) return markup.escape(v) end)
  define("forceescape", "value", function(_, v)
    return value.markup(markup.escaped(value.str(v)))
  end)

  define("center", "value width?", function(_, v, width)
    width = bind.int(width, 80)
    value.check_bytes(width)
    return on_text(v, function(s) return text.pad(s, width, " ", "center") end)
  end)

  define("replace", "s old new count?", function(rt, s, old, new, count)
    count = bind.int(count, -1)
    local is_markup = value.is(s, value.Markup)
    local escapes = value.is(old, value.Markup) or value.is(new, value.Markup) and not is_markup
    if rt.autoescape and (escapes or is_markup) then
      return value.markup(methods.replace(markup.escaped(s), value.str(old),
        markup.escaped(new), count))
    end
    return methods.replace(value.str(s), value.str(old), value.str(new), count)
  end)

  define("format", "value *", function(_, v, args, kwargs)
    if args[1] ~= nil and kwargs then
      raise("FilterArgumentError",
        "can't handle positional and keyword arguments at the same time")
    end
    local values = kwargs or value.tuple(args)
    if value.is(v, value.Markup) then
      return value.markup(format.percent(v.s, markup.percent_args(values)))
    end
    return format.percent(value.str(v), values)
  end)

  define("indent", "s width? first? blank?", function(_, v, width, first, blank)
    need_text(v, "indent")
    return on_text(v, function(s) return indent(s, width, flag(first), flag(blank)) end)
  end)

  define("truncate", "s length? killwords? end? leeway?",
    function(_, v, length, killwords, ending, leeway)
      length, leeway, ending = bind.int(length, 255), bind.int(leeway, 5), bind.text(ending, "...")
      if not value.text(v) and (value.length(v) or math.huge) <= length + leeway then return v end
      need_text(v, "truncate")
      return on_text(v, function(s)
        return truncate(s, length, flag(killwords), ending, leeway)
      end)
    end)

  define("wordwrap", "s width? break_long_words? wrapstring? break_on_hyphens?",
    function(_, v, width, break_long, wrapstring, break_hyphens)
      return wrap(need_text(v, "wordwrap"), bind.int(width, 79),
        break_long == nil or value.truth(break_long), bind.optional_text(wrapstring) or "\n",
        break_hyphens == nil or value.truth(break_hyphens))
    end)

  define("wordcount", "s", function(_, v) return wordcount(value.str(v)) end)
  define("striptags", "value", function(_, v)
    return markup.striptags(value.str(v))
  end)
  define("urlencode", "value", function(_, v) return urlencode(v) end)
  define("urlize", "value *", function()
    raise("NotImplementedError", "filter 'urlize' is not supported")
  end)
  define("xmlattr", "d autospace?", function(rt, v, autospace)
    local s = xmlattr(v, autospace == nil or value.truth(autospace))
    return rt.autoescape and value.markup(s) or s
  end)
end
