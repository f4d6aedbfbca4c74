--- Tokens on their way from whoever makes them to whoever waits: what the tickets of an engine and
--- of a scripted one share. Their fields: `queue` of tokens, signal `changed`, `finish_reason` at
--- the end.

local ticket = {}

---The next token; waits for it.
---@param seconds? number
---@return moonlet.Token? token nil at the end, or when the time was over
---@return string? why "waiting" when the time was over
function ticket:next(seconds)
  while true do
    local token = table.remove(self.queue, 1)
    if token then return token end
    if self.finish_reason then return nil end
    if not self.changed:wait(seconds) then return nil, "waiting" end
  end
end

---Iterator over all tokens.
function ticket:tokens()
  return function() return (self:next()) end
end

return ticket
