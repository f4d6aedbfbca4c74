--- Python's json.dumps with ensure_ascii off by default, which is what `tojson` is in a chat
--- template (transformers/utils/chat_template_utils.py).

local json = require("moonlet.json")
local quote = require("moonlet.core").json_quote
local errors = require("moonlet.jinja.errors")
local value = require("moonlet.jinja.value")

local function scalar(v)
  if v == value.none then return "null" end
  if type(v) == "boolean" then return v and "true" or "false" end
  if math.type(v) == "integer" then return tostring(v) end
  return json.float_repr(v)
end

local Writer = {}
Writer.__index = Writer

function Writer:add(s)
  self.bytes = self.bytes + #s
  if self.bytes > value.MAX_BYTES then value.check_bytes(self.bytes) end
  self.out[#self.out + 1] = s
end

function Writer:newline(depth)
  if self.indent then self:add("\n" .. self.indent:rep(depth)) end
end

--- Items between brackets; write_item(i) writes one.
function Writer:group(open, close, n, depth, write_item)
  self:add(open)
  for i = 1, n do
    if i > 1 then self:add(self.item_separator) end
    self:newline(depth + 1)
    write_item(i)
  end
  if n > 0 then self:newline(depth) end
  self:add(close)
end

function Writer:key(key)
  local s = value.text(key)
  if not s then
    if type(key) == "table" and key ~= value.none then
      errors.raise("TypeError", "keys must be str, int, float, bool or None, not "
        .. value.typename(key))
    end
    s = scalar(key)
  end
  self:add(quote(s, self.ensure_ascii))
  self:add(self.key_separator)
end

function Writer:write(v, depth)
  local s = value.text(v)
  if s then return self:add(quote(s, self.ensure_ascii)) end
  if type(v) ~= "table" or v == value.none then return self:add(scalar(v)) end
  value.check_depth(depth)
  if value.is_sequence(v) then
    self:group("[", "]", #v, depth, function(i) self:write(v[i], depth + 1) end)
  elseif value.is(v, value.Dict) then
    local keys, vals = v.keys, v.vals
    if self.sort_keys then
      vals = value.sort(vals, keys)
      keys = value.sort(keys, keys)
    end
    self:group("{", "}", #keys, depth, function(i)
      self:key(keys[i])
      self:write(vals[i], depth + 1)
    end)
  else
    errors.raise("TypeError", "Object of type " .. value.typename(v)
      .. " is not JSON serializable")
  end
end

--- The JSON text of a value. Options: ensure_ascii, indent (a string), item_separator,
--- key_separator, sort_keys.
return function(v, options)
  local writer = setmetatable({ out = {}, bytes = 0, ensure_ascii = options.ensure_ascii,
    indent = options.indent, sort_keys = options.sort_keys,
    item_separator = options.item_separator or options.indent and "," or ", ",
    key_separator = options.key_separator or ": " }, Writer)
  writer:write(v, 0)
  return table.concat(writer.out)
end
