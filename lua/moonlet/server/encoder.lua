--- Texts to token ids, without keeping other requests waiting: long ones in the background, one at
--- a time; after many short ones others have their turn.

local sched = require "moonlet.sched"

local encoder = {}

local LONG <const> = 1 << 15 -- bytes; shorter ones take less than a millisecond or two
local MAX_WAITING <const> = 64 -- long texts; their requests are in no queue yet

---@param model moonlet.Model
---@param loop moonlet.Loop
---@return fun(text: string, plain: moonlet.Ids?): moonlet.Ids?, string?, string? encode  for
---  coroutines of the loop; `plain` as in moonlet.EncodeOptions
function encoder.new(model, loop)
  local is_busy, n_waiting, n_short, free = false, 0, 0, loop:signal()
  return sched.in_one_piece(function(text, plain)
    local options = { packed = true, plain = plain }
    if #text < LONG then
      n_short = n_short + #text
      if n_short >= LONG then
        n_short = 0
        loop:sleep(0)
      end
      return model:encode(text, options)
    end
    if n_waiting == MAX_WAITING then return nil, "too many long texts wait; try again", "busy" end
    n_waiting = n_waiting + 1
    while is_busy do free:wait() end
    is_busy, n_waiting = true, n_waiting - 1
    local encoding <close>, message, code = model.tokenizer:start(text, options)
    local ok, problem = pcall(function()
      if encoding then loop:ready(encoding:fd()) end
    end)
    is_busy = false
    free:notify()
    if not ok then error(problem, 0) end
    if not encoding then return nil, message, code end
    return encoding:result()
  end)
end

return encoder
