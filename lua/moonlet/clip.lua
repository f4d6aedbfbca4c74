--- Texts made fit for a prompt: whole characters, and no more of them than there is room for.

local clip = {}

---The text with U+FFFD in the place of bytes that are no UTF-8.
---@param text string
---@return string
function clip.valid(text)
  local parts, from = {}, 1
  while true do
    local n, bad = utf8.len(text, from)
    if n then break end
    parts[#parts + 1] = text:sub(from, bad - 1)
    from = bad + 1
  end
  if from == 1 then return text end
  parts[#parts + 1] = text:sub(from)
  return table.concat(parts, "\u{FFFD}")
end

---@class moonlet.Clip
local Clip = {}
Clip.__index = Clip

---Takes a text of any length in pieces and keeps its beginning and its end.
---@param max integer bytes to keep
---@return moonlet.Clip
function clip.new(max)
  return setmetatable({ n_head = max // 2, n_tail = max - max // 2, head = "", tail = {},
    n_held = 0, n = 0 }, Clip)
end

---@param bytes string
function Clip:add(bytes)
  self.n = self.n + #bytes
  local room = self.n_head - #self.head
  if room > 0 then
    self.head = self.head .. bytes:sub(1, room)
    bytes = bytes:sub(room + 1)
  end
  if bytes == "" then return end
  self.tail[#self.tail + 1] = bytes
  self.n_held = self.n_held + #bytes
  if self.n_held > 2 * self.n_tail then -- now and then, so that it costs little
    self.tail = { table.concat(self.tail):sub(-self.n_tail) }
    self.n_held = #self.tail[1]
  end
end

---What was kept, and between beginning and end, where whole lines allow it, what is missing.
---@return string
function Clip:text()
  local tail = table.concat(self.tail)
  if #self.head + #tail == self.n and #tail <= self.n_tail then
    return clip.valid(self.head .. tail)
  end
  tail = tail:sub(-self.n_tail)
  local head = self.head:match("^.*\n") or self.head .. "\n"
  tail = tail:match("^[^\n]*\n(.+)$") or tail
  local kept = math.min(#self.head, #head) + #tail
  return ("%s[... %d of %d bytes are left out here ...]\n%s"):format(clip.valid(head),
    self.n - kept, self.n, clip.valid(tail))
end

---A text at once.
---@param text string
---@param max integer
---@return string
function clip.text(text, max)
  local c = clip.new(max)
  c:add(text)
  return c:text()
end

return clip
