--- Reasoning that a client keeps without reading it and sends back: Anthropic's signatures of
--- thoughts that are not shown, OpenAI's encrypted_content. No secret, only out of sight.

local base64 = require "moonlet.base64"

local sealed = {}

local MARK <const> = "moonlet1."

---@param text string
---@return string
function sealed.close(text)
  return MARK .. base64.encode(text)
end

---@param given any
---@return string? text nil when it is none of ours
function sealed.open(given)
  if type(given) ~= "string" or given:sub(1, #MARK) ~= MARK then return nil end
  local text = base64.decode(given:sub(#MARK + 1))
  return text and utf8.len(text) and text or nil
end

return sealed
