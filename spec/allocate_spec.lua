local allocate = require "moonlet.allocate"

local state = 12345
local function random(n)
  state = (state * 1103515245 + 12345) % 2147483648
  return state // 65536 % n + 1
end

local function random_items(n)
  local items = {}
  for i = 1, n do
    local candidates = {}
    for k = 1, 2 + random(4) do candidates[k] = { bytes = random(50), damage = random(1000) } end
    items[i] = { candidates = candidates }
  end
  return items
end

-- The best sum of damages for every budget, by trying everything.
local function exhaustive(items, budget)
  local best = { [0] = 0 }
  for _, item in ipairs(items) do
    local next_best = {}
    for bytes, damage in pairs(best) do
      for _, c in ipairs(item.candidates) do
        local b, d = bytes + c.bytes, damage + c.damage
        if b <= budget and (not next_best[b] or d < next_best[b]) then next_best[b] = d end
      end
    end
    best = next_best
  end
  local least
  for _, damage in pairs(best) do least = math.min(least or damage, damage) end
  return least
end

local function sums(choice)
  local bytes, damage = 0, 0
  for _, c in ipairs(choice) do bytes, damage = bytes + c.bytes, damage + c.damage end
  return bytes, damage
end

describe("allocate", function()
  it("is the best there is at the sizes of its frontier", function()
    for _ = 1, 30 do
      local items = random_items(6)
      for _, point in ipairs(allocate.frontier(items)) do
        local choice, bytes, damage = allocate.solve(items, point.bytes)
        assert.same({ bytes, damage }, { sums(choice) })
        assert.is_true(damage <= point.damage + 1e-9)
        assert.equal(exhaustive(items, point.bytes), damage)
      end
    end
  end)

  it("keeps to its budget and is close to the best everywhere", function()
    local worst = 0
    for _ = 1, 30 do
      local items = random_items(12)
      local frontier = allocate.frontier(items)
      local least, most = frontier[1].bytes, frontier[#frontier].bytes
      for budget = least, most, math.max(1, (most - least) // 10) do
        local choice, bytes, damage = allocate.solve(items, budget)
        assert.is_true(bytes <= budget)
        assert.same({ bytes, damage }, { sums(choice) })
        local span = frontier[1].damage - frontier[#frontier].damage
        worst = math.max(worst, (damage - exhaustive(items, budget)) / math.max(1, span))
      end
    end
    assert.is_true(worst < 0.1, "off by " .. worst .. " of the range")
  end)

  it("says what the smallest takes when the budget is too small", function()
    local items = { { candidates = { { bytes = 10, damage = 1 }, { bytes = 5, damage = 2 } } },
      { candidates = { { bytes = 7, damage = 1 } } } }
    assert.same({ nil, 12 }, { allocate.solve(items, 11) })
    local choice, bytes, damage = allocate.solve(items, 12)
    assert.same({ 2, 12, 3 }, { choice[1].damage, bytes, damage })
  end)

  it("never rises along the frontier, and gains less and less per byte", function()
    local frontier = allocate.frontier(random_items(20))
    local last
    for i = 2, #frontier do
      local a, b = frontier[i - 1], frontier[i]
      assert.is_true(b.bytes > a.bytes and b.damage < a.damage)
      local gain = (a.damage - b.damage) / (b.bytes - a.bytes)
      assert.is_true(not last or gain <= last + 1e-9)
      last = gain
    end
  end)
end)
