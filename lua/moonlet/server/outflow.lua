--- Replies go out no faster than their clients take them: however long what is to be written,
--- little of it waits in buffers.

local outflow = {}

local PART_BYTES <const> = 1 << 16
-- Seconds, for a client to take what there is: the first after none, the longest.
local SHORTEST_WAIT <const>, LONGEST_WAIT <const> = 0.0005, 0.02

---Writes a piece of a reply; others have their turn meanwhile.
---@param loop moonlet.Loop
---@param request userdata
---@param text string
---@return boolean? ok true also when the client has left, string? message
function outflow.write(loop, request, text)
  for from = 1, #text, PART_BYTES do
    local ok, message = request:write(text:sub(from, from + PART_BYTES - 1))
    if not ok then return nil, message end
    local seconds = 0
    while request:pending() > PART_BYTES do
      loop:sleep(seconds)
      seconds = math.min(2 * seconds + SHORTEST_WAIT, LONGEST_WAIT)
    end
  end
  return true
end

return outflow
