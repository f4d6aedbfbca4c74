--- Splits a template into tokens {type, value, line}: "data", "variable_begin", "variable_end",
--- "block_begin", "block_end", "name", "string", "integer", "float", the operators by name, "eof".
---
--- Follows jinja2/lexer.py with trim_blocks and lstrip_blocks on, which is how transformers sets up
--- chat templates: the newline after a block or comment goes, and so does white space between the
--- start of a line and a block or comment. "-" strips more, "+" keeps.

local errors = require("moonlet.jinja.errors")
local number = require("moonlet.jinja.number")
local text = require("moonlet.jinja.text")

local lexer = {}

local find, sub = string.find, string.sub

local OPERATORS = {
  ["+"] = "add", ["-"] = "sub", ["/"] = "div", ["//"] = "floordiv", ["*"] = "mul", ["%"] = "mod",
  ["**"] = "pow", ["~"] = "tilde", ["["] = "lbracket", ["]"] = "rbracket", ["("] = "lparen",
  [")"] = "rparen", ["{"] = "lbrace", ["}"] = "rbrace", ["=="] = "eq", ["!="] = "ne",
  [">"] = "gt", [">="] = "gteq", ["<"] = "lt", ["<="] = "lteq", ["="] = "assign", ["."] = "dot",
  [":"] = "colon", ["|"] = "pipe", [","] = "comma", [";"] = "semicolon",
}
local CLOSING = { ["("] = ")", ["["] = "]", ["{"] = "}" }

local DESCRIPTIONS = { variable_begin = "begin of print statement",
  variable_end = "end of print statement", block_begin = "begin of statement block",
  block_end = "end of statement block", data = "template data / text", eof = "end of template" }
for operator, name in pairs(OPERATORS) do DESCRIPTIONS[name] = operator end

--- How messages call a token type.
function lexer.describe_type(kind)
  return DESCRIPTIONS[kind] or kind
end

--- How messages call a token.
function lexer.describe(token)
  return token.type == "name" and token.value or lexer.describe_type(token.type)
end

local Lexer = {}
Lexer.__index = Lexer

function Lexer:fail(message)
  errors.raise("TemplateSyntaxError", message, self.line)
end

--- Moves to byte `at`, counting the lines passed.
function Lexer:advance(at)
  while self.newline < at do
    self.line = self.line + 1
    self.newline = find(self.source, "\n", self.newline + 1, true) or math.huge
  end
  self.at = at
end

function Lexer:emit(kind, token_value)
  self.tokens[#self.tokens + 1] = { type = kind, value = token_value, line = self.line }
end

function Lexer:unexpected_char()
  local c = self.source:match("^" .. utf8.charpattern, self.at)
  self:fail(("unexpected char %s at %d"):format(text.repr(c),
    text.position(self.source, self.at)))
end

--- Emits the text up to byte `stop`, where a tag with the white space mark `sign` begins.
function Lexer:emit_text(stop, sign, is_variable)
  local data = sub(self.source, self.at, stop - 1)
  if sign == "-" then
    data = text.rstrip(data)
  elseif sign == "" and not is_variable then
    local line_start = data:match("^.*\n()") or 1
    if (line_start > 1 or self.at_line_start) and line_start <= #data
      and text.skip_space(data, line_start) > #data then
      data = sub(data, 1, line_start - 1)
    end
  end
  if data ~= "" then self:emit("data", data) end
  self:advance(stop)
end

--- Finishes a match that ends before byte `at`: the next text may be at the start of a line.
function Lexer:finish(at)
  self:advance(at)
  self.at_line_start = sub(self.source, at - 1, at - 1) == "\n"
end

--- The byte after a closing delimiter that begins at `at` with its mark, if there is one there.
--- `trims`: a newline right after the plain delimiter belongs to it.
function Lexer:match_end(at, delimiter, marks, trims)
  local mark = self.source:match("^[" .. marks .. "]", at) or ""
  local stop = at + #mark + 2
  if sub(self.source, at + #mark, stop - 1) ~= delimiter then return nil end
  if mark == "-" then return text.skip_space(self.source, stop) end
  if mark == "" and trims and sub(self.source, stop, stop) == "\n" then stop = stop + 1 end
  return stop
end

function Lexer:comment()
  local start = self.at
  local stop = find(self.source, "#}", start, true)
  if not stop then
    -- Nothing after "{#" at all is no error in Jinja either.
    if start > #self.source then return end
    self:fail("Missing end of comment tag")
  end
  if stop > start and find(self.source, "^[-+]", stop - 1) then stop = stop - 1 end
  self:finish(self:match_end(stop, "#}", "-+", true))
end

--- The end of a {% raw %} tag whose "raw" would begin at `at`, or nil.
function Lexer:match_raw(at)
  at = text.skip_space(self.source, at)
  if sub(self.source, at, at + 2) ~= "raw" then return nil end
  return self:match_end(text.skip_space(self.source, at + 3), "%}", "-", false)
end

function Lexer:raw()
  local from = self.at
  if from > #self.source then return end
  while true do
    local start = find(self.source, "{%", from, true)
    if not start then self:fail("Missing end of raw directive") end
    local sign = self.source:match("^[-+]?", start + 2)
    local at = text.skip_space(self.source, start + 2 + #sign)
    if sub(self.source, at, at + 5) == "endraw" then
      local stop = self:match_end(text.skip_space(self.source, at + 6), "%}", "-+", true)
      if stop then
        self:emit_text(start, sign, false)
        return self:finish(stop)
      end
    end
    from = start + 2
  end
end

-- Inside tags ---------------------------------------------------------------------------------

--- The end of a run of digits with single underscores between them, at byte `at`.
local function digits_end(source, at, class)
  local _, stop = find(source, "^" .. class .. "+", at)
  while stop do
    local _, more = find(source, "^_" .. class .. "+", stop + 1)
    if not more then break end
    stop = more
  end
  return stop
end

function Lexer:match_float()
  local source, at = self.source, self.at
  if sub(source, at - 1, at - 1) == "." then return nil end
  local stop = digits_end(source, at, "%d")
  if not stop then return nil end
  local fraction = sub(source, stop + 1, stop + 1) == "." and digits_end(source, stop + 2, "%d")
  local _, mark = find(source, "^[eE][+-]?", (fraction or stop) + 1)
  local exponent = mark and digits_end(source, mark + 1, "%d")
  return exponent or fraction or nil
end

function Lexer:match_integer()
  local source, at = self.source, self.at
  local prefix = source:match("^0[bBoOxX]_?", at)
  if prefix then
    local class = ({ b = "[01]", o = "[0-7]", x = "%x" })[prefix:sub(2, 2):lower()]
    local stop = digits_end(source, at + #prefix, class)
    if stop then return stop end
  end
  return digits_end(source, at, sub(source, at, at) == "0" and "0" or "%d")
end

local SIMPLE_ESCAPES = { ["\n"] = "", ["\\"] = "\\", ["'"] = "'", ['"'] = '"', a = "\a", b = "\b",
  f = "\f", n = "\n", r = "\r", t = "\t", v = "\v" }
local HEX_ESCAPES = { x = { 2, "truncated \\xXX escape" }, u = { 4, "truncated \\uXXXX escape" },
  U = { 8, "truncated \\UXXXXXXXX escape" } }

--- Decodes the escape after the backslash at byte `at` of `s`; returns its text and its last byte.
function Lexer:escape(s, at)
  local c = sub(s, at + 1, at + 1)
  if SIMPLE_ESCAPES[c] then return SIMPLE_ESCAPES[c], at + 1 end
  local octal = s:match("^[0-7][0-7]?[0-7]?", at + 1)
  if octal then return utf8.char(tonumber(octal, 8)), at + #octal end
  if c == "N" then
    self:fail("\\N{...} escapes are not supported: character names are not known here")
  end
  local hex = HEX_ESCAPES[c]
  if not hex then return "\\", at end
  local digits = s:match("^%x+", at + 2) or ""
  if #digits < hex[1] then self:fail(hex[2]) end
  local code, last = tonumber(digits:sub(1, hex[1]), 16), at + 1 + hex[1]
  if code >= 0xd800 and code < 0xdc00 then
    local low = s:match("^\\u([dD][c-fC-F]%x%x)", last + 1)
    if low then
      code, last = 0x10000 + (code - 0xd800) * 0x400 + tonumber(low, 16) - 0xdc00, last + 6
    end
  end
  if code >= 0xd800 and code < 0xe000 then self:fail("lone surrogate in a string") end
  if code > 0x10ffff then self:fail("illegal Unicode character") end
  return utf8.char(code), last
end

function Lexer:unescape(s)
  if not find(s, "\\", 1, true) then return s end
  local out, at = {}, 1
  while true do
    local slash = find(s, "\\", at, true)
    if not slash then break end
    out[#out + 1] = sub(s, at, slash - 1)
    local piece, last = self:escape(s, slash)
    out[#out + 1] = piece
    at = last + 1
  end
  out[#out + 1] = sub(s, at)
  return table.concat(out)
end

--- The byte of the closing quote of a string that begins at `at`.
local function string_end(source, at)
  local pattern = "[" .. sub(source, at, at) .. "\\]"
  local from = at + 1
  while true do
    local stop = find(source, pattern, from)
    if not stop or sub(source, stop, stop) ~= "\\" then return stop end
    from = stop + 2
  end
end

--- The last byte of a name that begins at `at`, or nil: a Python identifier.
local function name_end(source, at)
  local _, last = find(source, "^[%a_][%w_]*", at)
  local from = last and last + 1 or at
  while find(source, last and "^[%w_\xc2-\xf4]" or "^[\xc2-\xf4]", from) do
    local class = last and "id_continue" or "id_start"
    if not text.is(class, utf8.codepoint(source, from)) then break end
    _, last = find(source, "^" .. utf8.charpattern, from)
    from = last + 1
  end
  return last
end

function Lexer:operator(balance)
  local two, one = sub(self.source, self.at, self.at + 1), sub(self.source, self.at, self.at)
  local op = OPERATORS[two] and two or OPERATORS[one] and one
  if not op then self:unexpected_char() end
  if CLOSING[op] then
    balance[#balance + 1] = CLOSING[op]
  elseif op == ")" or op == "]" or op == "}" then
    local expected = table.remove(balance)
    if not expected then self:fail("unexpected '" .. op .. "'") end
    if expected ~= op then
      self:fail("unexpected '" .. op .. "', expected '" .. expected .. "'")
    end
  end
  self:emit(OPERATORS[op])
  self:advance(self.at + #op)
end

--- One token of an expression.
function Lexer:expression_token(balance)
  local source, at = self.source, self.at
  local stop = self:match_float()
  if stop then
    self:emit("float", tonumber((sub(source, at, stop):gsub("_", ""))) + 0.0)
    return self:advance(stop + 1)
  end
  stop = self:match_integer()
  if stop then
    self:emit("integer", number.parse_int(sub(source, at, stop), 0))
    return self:advance(stop + 1)
  end
  stop = name_end(source, at)
  if stop then
    self:emit("name", sub(source, at, stop))
    return self:advance(stop + 1)
  end
  if find(source, "^['\"]", at) then
    stop = string_end(source, at)
    if not stop then self:unexpected_char() end
    self:emit("string", self:unescape(sub(source, at + 1, stop - 1)))
    return self:advance(stop + 1)
  end
  self:operator(balance)
end

--- The inside of a tag up to and with its end.
function Lexer:tag(kind)
  local delimiter, marks, trims = "}}", "-", false
  if kind == "block" then delimiter, marks, trims = "%}", "-+", true end
  local balance = {}
  while true do
    local stop = #balance == 0 and self:match_end(self.at, delimiter, marks, trims)
    if stop then
      self:emit(kind .. "_end")
      return self:finish(stop)
    end
    local at = text.skip_space(self.source, self.at)
    if at > self.at then
      self:advance(at)
    elseif at > #self.source then
      return
    else
      self:expression_token(balance)
    end
  end
end

function Lexer:run()
  local source = self.source
  while self.at <= #source do
    local start, _, mark, sign = find(source, "{([{%%#])([-+]?)", self.at)
    if not start then
      self:emit("data", sub(source, self.at))
      self:advance(#source + 1)
      break
    end
    local raw_stop = mark == "%" and self:match_raw(start + 2 + #sign)
    self:emit_text(start, sign, mark == "{")
    if raw_stop then
      self:finish(raw_stop)
      self:raw()
    else
      if mark ~= "#" then self:emit(mark == "{" and "variable_begin" or "block_begin") end
      self:finish(start + 2 + #sign)
      if mark == "#" then self:comment() else self:tag(mark == "{" and "variable" or "block") end
    end
  end
  self:emit("eof")
end

--- The tokens of a template. The last one is "eof", or "error" with the failure as its value: the
--- parser raises it when it gets there, so that mistakes are reported in the order they stand.
--- The source must be valid UTF-8.
function lexer.tokenize(source)
  source = source:gsub("\r\n?", "\n"):gsub("\n$", "")
  local self = setmetatable({ source = source, at = 1, line = 1, tokens = {},
    newline = find(source, "\n", 1, true) or math.huge, at_line_start = true }, Lexer)
  local ok, failure = pcall(self.run, self)
  if not ok then self:emit("error", failure) end
  return self.tokens
end

return lexer
