--- Texts without the white space around them, in a time that grows with their length only: the
--- pattern "^%s*(.-)%s*$" takes the square of it where there is much white space inside.

local trim = {}

---@param text string
---@return string
function trim.both(text)
  local first = text:find("%S")
  return first and text:match("^.*%S", first) or ""
end

---Without what stands at its end.
---@param text string
---@return string
function trim.right(text)
  return text:match("^.*%S") or ""
end

---What stands at its end apart.
---@param text string
---@return string body
---@return string space
function trim.split(text)
  local body = trim.right(text)
  return body, text:sub(#body + 1)
end

return trim
