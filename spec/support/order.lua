--- Random values with many ties, and their ids in the order that top-k promises: larger first,
--- equal ones by id.
---@return number[] values, integer[] ids 0-based
return function(seed, n, levels, step)
  math.randomseed(seed)
  local values, ids = {}, {}
  for i = 1, n do
    values[i] = math.random(0, levels) / step
    ids[i] = i - 1
  end
  table.sort(ids, function(a, b)
    local x, y = values[a + 1], values[b + 1]
    return x > y or (x == y and a < b)
  end)
  return values, ids
end
