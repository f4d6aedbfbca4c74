-- moonlet: every matrix in the format whose damage and size together cost least.
--
-- Classes differ in how much an error of their weights shows in predictions (kit.damage: measured a
-- class at a time), and a bit costs an expert stack a hundred times what it costs a router. So no
-- class has a width of its own: each tensor takes the affine format with the least
--   damage + price * bytes
-- which is the best allocation for some size (Lagrange), down to the architecture at hand. Small
-- tensors end up wide, experts narrow. MTP is kept as it is. Options:
--   level  the price of a byte is 2^-level nats; higher is larger and better (default 38, about
--          4.5 bits per weight for 35B-A3B). --target looks for the level of a size
--   mtp    "keep" (default) or "drop"
-- Scales are fitted to the weights, with an imatrix to what they meet, with Hessians errors are fed
-- back.

return function(options, kit)
  kit.options(options, { level = "number", mtp = { "keep", "drop" } })
  local level = options.level or 38
  kit.expect(level >= 0 and level <= 80, "level must be a number from 0 to 80")
  local price = 2.0 ^ -level

  -- The outer layers suffer most; rising steadily outwards also lets sizes change in small steps.
  local function outwards(tensor)
    if not tensor.layer then return 1 end
    local middle = (tensor.n_layers - 1) / 2
    return 0.85 + 0.5 * math.abs(tensor.layer - middle) / math.max(middle, 1)
  end

  return function(tensor)
    if tensor.class == "mtp" and options.mtp == "drop" then return kit.drop() end
    if not tensor.matrix then return kit.keep() end
    local weights, factor = tensor.rows * tensor.cols, outwards(tensor)
    local best, least = kit.keep(), price * weights * 2
    for _, decision in ipairs(kit.candidates(tensor)) do
      local bits = decision.bits + 32 / decision.group
      local cost = factor * kit.damage(tensor, decision) + price * weights * bits / 8
      if cost < least then best, least = decision, cost end
    end
    return best
  end, kit.affine(4, 64), { fit = "best", gptq = true }
end
