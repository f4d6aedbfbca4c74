--- Tokens with their alternatives as strings: of a long answer with many alternatives as tables
--- they would take a hundred times the memory of its text until it is written.

local packed = {}

local ONE <const> = "i4d" -- a token and its log-probability, to the last bit
local AROUND <const> = 48 -- bytes of a string beside its text, and of its place in a list

---@param token moonlet.Token
---@return string
function packed.pack(token)
  local top, values = token.top or {}, {}
  for i, other in ipairs(top) do
    values[2 * i - 1], values[2 * i] = other.id, other.logprob
  end
  return string.pack("<" .. ONE:rep(1 + #top), token.id, token.logprob, table.unpack(values))
end

---@param text string of pack
---@return moonlet.Token
function packed.unpack(text)
  local id, logprob, at = string.unpack("<" .. ONE, text)
  local top = {}
  while at <= #text do
    local other = {}
    other.id, other.logprob, at = string.unpack("<" .. ONE, text, at)
    top[#top + 1] = other
  end
  return { id = id, logprob = logprob, top = top }
end

---@param n integer alternatives
---@return integer bytes that a token takes with as many
function packed.bytes(n)
  return AROUND + string.packsize("<" .. ONE) * (1 + n)
end

return packed
