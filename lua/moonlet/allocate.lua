--- Shares a budget of bytes out among tensors so that the sum of their damages is smallest.
---
--- Each item has candidates {bytes =, damage =}. Taking them by falling gain per byte along each
--- item's lower convex hull gives, at every size it passes through, the best sum there is
--- (Everett 1963, generalized Lagrange multipliers); between those sizes what is left over buys
--- single improvements. Pure.

local allocate = {}

local function by_bytes(a, b)
  if a.bytes ~= b.bytes then return a.bytes < b.bytes end
  return a.damage < b.damage
end

-- Gain of damage per byte from a to b.
local function slope(a, b) return (a.damage - b.damage) / (b.bytes - a.bytes) end

-- The candidates that are best at some price of a byte, smallest first.
local function hull_of(candidates)
  local sorted = table.move(candidates, 1, #candidates, 1, {})
  table.sort(sorted, by_bytes)
  local hull = {}
  for _, c in ipairs(sorted) do
    local last = hull[#hull]
    if not last or c.damage < last.damage and c.bytes > last.bytes then
      while #hull >= 2 and slope(hull[#hull - 1], hull[#hull]) <= slope(hull[#hull], c) do
        hull[#hull] = nil
      end
      hull[#hull + 1] = c
    end
  end
  return hull
end

-- Every step from one hull candidate to the next, of all items, best gain per byte first; the
-- smallest choice with its bytes and damage, and the damage behind the last step.
local function steps_of(items)
  local steps, choice, bytes, damage, least = {}, {}, 0, 0, 0
  for i, item in ipairs(items) do
    local hull = hull_of(item.candidates)
    choice[i], bytes, damage = hull[1], bytes + hull[1].bytes, damage + hull[1].damage
    least = least + hull[#hull].damage
    for k = 2, #hull do
      steps[#steps + 1] = { item = i, from = hull[k - 1], to = hull[k],
        gain = slope(hull[k - 1], hull[k]), order = #steps }
    end
  end
  table.sort(steps, function(a, b)
    if a.gain ~= b.gain then return a.gain > b.gain end
    return a.order < b.order
  end)
  return steps, choice, bytes, damage, least
end

-- What is left buys whatever single change lowers the damage most.
local function spend_rest(items, choice, bytes, damage, budget)
  while true do
    local best, best_item, best_gain = nil, nil, 0
    for i, item in ipairs(items) do
      for _, c in ipairs(item.candidates) do
        local gain = choice[i].damage - c.damage
        if gain > best_gain and bytes - choice[i].bytes + c.bytes <= budget then
          best, best_item, best_gain = c, i, gain
        end
      end
    end
    if not best then return bytes, damage end
    bytes = bytes - choice[best_item].bytes + best.bytes
    damage = damage - best_gain
    choice[best_item] = best
  end
end

---@class moonlet.allocate.Item
---@field candidates { bytes: number, damage: number }[]  at least one

---The candidate of each item, with at most `budget` bytes in all.
---@param items moonlet.allocate.Item[]
---@param budget number
---@return table[]? choice  one of each item's candidates; nil when not even the smallest fit
---@return number bytes  of the choice, or of the smallest candidates when they do not fit
---@return number? damage
function allocate.solve(items, budget)
  local steps, choice, bytes, damage = steps_of(items)
  if bytes > budget then return nil, bytes end
  for _, step in ipairs(steps) do
    local more = step.to.bytes - step.from.bytes
    -- A step that does not fit bars the later ones of its item, which are cheaper for their size.
    if choice[step.item] == step.from and bytes + more <= budget then
      choice[step.item] = step.to
      bytes, damage = bytes + more, damage - (step.from.damage - step.to.damage)
    end
  end
  bytes, damage = spend_rest(items, choice, bytes, damage, budget)
  return choice, bytes, damage
end

---Sizes and sums of damages from the smallest to the best there is.
---@param items moonlet.allocate.Item[]
---@return { bytes: number, damage: number }[]
function allocate.frontier(items)
  local steps, _, bytes, _, damage = steps_of(items)
  local points = {}
  for i, step in ipairs(steps) do
    points[i] = { bytes = bytes }
    bytes = bytes + step.to.bytes - step.from.bytes
  end
  -- From the end, where damages are small, so that sums lose nothing.
  points[#steps + 1] = { bytes = bytes, damage = damage }
  for i = #steps, 1, -1 do
    damage = damage + (steps[i].from.damage - steps[i].to.damage)
    points[i].damage = damage
  end
  return points
end

return allocate
