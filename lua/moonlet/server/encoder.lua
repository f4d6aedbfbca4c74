--- Texts to token ids, without keeping other requests waiting: long ones in the background, one at
--- a time.

local encoder = {}

local LONG <const> = 1 << 15 -- bytes; shorter ones take less than a millisecond or two

---@param model moonlet.Model
---@param loop moonlet.Loop
---@return fun(text: string, options: moonlet.EncodeOptions?): integer[]?, string?, string? encode
---  for coroutines of the loop
function encoder.new(model, loop)
  local is_busy, free = false, loop:signal()
  return function(text, options)
    if #text < LONG then return model:encode(text, options) end
    while is_busy do free:wait() end
    is_busy = true
    local encoding <close>, message, code = model.tokenizer:start(text, options)
    if encoding then loop:ready(encoding:fd()) end
    is_busy = false
    free:notify()
    if not encoding then return nil, message, code end
    return encoding:result()
  end
end

return encoder
