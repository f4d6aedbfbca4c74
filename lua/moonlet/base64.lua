--- Base64 (RFC 4648, with padding).

local base64 = {}

local ALPHABET <const> = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

local function letter(bits) return ALPHABET:sub(bits + 1, bits + 1) end

---@param bytes string
---@return string
function base64.encode(bytes)
  local out = {}
  for at = 1, #bytes, 3 do
    local a, b, c = bytes:byte(at, at + 2)
    local bits = a << 16 | (b or 0) << 8 | (c or 0)
    out[#out + 1] = letter(bits >> 18) .. letter(bits >> 12 & 63)
      .. (b and letter(bits >> 6 & 63) or "=") .. (c and letter(bits & 63) or "=")
  end
  return table.concat(out)
end

local VALUES <const> = {}
for i = 1, #ALPHABET do VALUES[ALPHABET:byte(i)] = i - 1 end

---@param text string
---@return string? bytes nil for what is no Base64
function base64.decode(text)
  local letters = text:match("^([%w+/]*)=?=?$")
  if not letters or #text % 4 ~= 0 then return nil end
  local out = {}
  for at = 1, #letters, 4 do
    local bits, n = 0, math.min(4, #letters - at + 1)
    for i = 0, 3 do bits = bits << 6 | (i < n and VALUES[letters:byte(at + i)] or 0) end
    out[#out + 1] = string.pack(">I3", bits):sub(1, n - 1)
  end
  return table.concat(out)
end

return base64
