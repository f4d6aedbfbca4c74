--- Tokens on their way from whoever makes them to whoever waits: what the tickets of an engine and
--- of a scripted one share. Their fields: `queue` of tokens, signal `changed`, `finish_reason` at
--- the end.

local ticket = {}

---What a ticket's `queue` is in the beginning: the tokens from `first` to `last`, by number.
---@return table
function ticket.queue()
  return { first = 1, last = 0 }
end

---@param token moonlet.Token
function ticket:push(token)
  local queue = self.queue
  queue.last = queue.last + 1
  queue[queue.last] = token
end

local function pull(queue)
  local token = queue[queue.first]
  if token then
    queue[queue.first] = nil
    queue.first = queue.first + 1
  end
  return token
end

---The next token; waits for it.
---@param seconds? number
---@return moonlet.Token? token nil at the end, or when the time was over
---@return string? why "waiting" when the time was over
function ticket:next(seconds)
  while true do
    local token = pull(self.queue)
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
