--- Stop strings: text on its way out, except for an end that may turn out to begin one.

local stops = {}

---@class moonlet.Stops
local Filter = {}
Filter.__index = Filter

---@param list string[]
---@return moonlet.Stops
function stops.new(list)
  local longest = 0
  for _, stop in ipairs(list) do longest = math.max(longest, #stop) end
  return setmetatable({ list = list, longest = longest, held = "" }, Filter)
end

local function first_stop(text, list)
  local first, which
  for _, stop in ipairs(list) do
    local at = text:find(stop, 1, true)
    if at and (not first or at < first) then first, which = at, stop end
  end
  return first, which
end

-- How many bytes at the end of text may be the beginning of a stop string.
local function open_bytes(self, text)
  for n = math.min(#text, self.longest - 1), 1, -1 do
    local tail = text:sub(-n)
    for _, stop in ipairs(self.list) do
      if n < #stop and stop:sub(1, n) == tail then return n end
    end
  end
  return 0
end

---@param piece string
---@return string text that may be shown
---@return string? stop the stop string, if one is complete; the text then ends before it
function Filter:feed(piece)
  local text = self.held .. piece
  local at, stop = first_stop(text, self.list)
  if at then
    self.held = ""
    return text:sub(1, at - 1), stop
  end
  local n = open_bytes(self, text)
  self.held = n > 0 and text:sub(-n) or ""
  return n > 0 and text:sub(1, -n - 1) or text
end

---What was held back, as nothing more will come.
---@return string
function Filter:flush()
  local text = self.held
  self.held = ""
  return text
end

return stops
