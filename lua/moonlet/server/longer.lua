--- JSON that is much longer than what it is made of: its long lists are made item by item while
--- they are written.

local json = require "moonlet.json"

local longer = {}

---@class moonlet.server.List
---@field n integer
---@field item fun(i: integer, style: json.encode_options): string its JSON
local List = {}

---A list that only write() and encode() know, as a member of objects or an item of lists.
---@param n integer
---@param item fun(i: integer, style: json.encode_options): string
---@return moonlet.server.List
function longer.list(n, item)
  return setmetatable({ n = n, item = item }, List)
end

local write

local function write_list(send, list, style)
  send("[")
  for i = 1, list.n do
    send((i > 1 and style.separators[1] or "") .. list.item(i, style))
  end
  send("]")
end

local function write_array(send, value, style)
  send("[")
  for i, item in ipairs(value) do
    if i > 1 then send(style.separators[1]) end
    write(send, item, style)
  end
  send("]")
end

local function write_members(send, value, style)
  send("{")
  for i, key in ipairs(json.keys(value)) do
    send((i > 1 and style.separators[1] or "") .. json.encode(key) .. style.separators[2])
    write(send, value[key], style)
  end
  send("}")
end

-- Only tables that a list may be in are taken apart.
function write(send, value, style)
  if getmetatable(value) == List then
    write_list(send, value, style)
  elseif type(value) ~= "table" or json.is_array(value) and type(value[1]) ~= "table" then
    send(json.encode(value, style))
  elseif json.is_array(value) then
    write_array(send, value, style)
  else
    write_members(send, value, style)
  end
end

local PLAIN <const> = { separators = { ", ", ": " } }

---Spells a value as json.encode does, piece by piece.
---@param send fun(text: string)
---@param value any
---@param style json.encode_options? separators only
function longer.write(send, value, style)
  write(send, value, style or PLAIN)
end

---@param value any
---@param style json.encode_options? separators only
---@return string
function longer.encode(value, style)
  local out = {}
  longer.write(function(text) out[#out + 1] = text end, value, style)
  return table.concat(out)
end

return longer
