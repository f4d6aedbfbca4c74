-- budget: what moonlet measured and solved for a size: one decision a tensor, from a list.
--
-- `moonlet quantize --recipe budget --target SIZE` finds out what each format does to each matrix,
-- shares the bytes out so that the sum is least (moonlet.allocate), and gives the result to this
-- recipe, so that it is on record with the checkpoint. Options:
--   choice  list of texts, "NAME MODE BITS GROUP" or "NAME keep" for every matrix
--   mtp     "keep" (default) or "drop"

return function(options, kit)
  kit.expect(type(options.choice) == "table",
    "it decides by measurement: give --target (or set choice)")
  kit.options(options, { choice = "strings", mtp = { "keep", "drop" } })
  local decisions, known = {}, {}
  for i, line in ipairs(options.choice) do
    local name, mode, bits, group = line:match("^(%S+) (%S+) (%d+) (%d+)$")
    local kept = line:match("^(%S+) keep$")
    kit.expect(name or kept, ("choice %d: NAME MODE BITS GROUP expected"):format(i))
    decisions[name or kept] = kept and kit.keep()
      or { mode = mode, bits = tonumber(bits), group = tonumber(group) }
  end
  kit.at_end(function()
    for name in pairs(decisions) do
      kit.expect(known[name], ("choice: there is no matrix %s"):format(name))
    end
    known = {}
  end)
  return function(tensor)
    if tensor.class == "mtp" and options.mtp == "drop" then return kit.drop() end
    if not tensor.matrix then return kit.keep() end
    local decision = decisions[tensor.name]
    kit.expect(decision, "choice: nothing is said of it")
    known[tensor.name] = true
    return decision
  end, kit.affine(4, 64), { fit = "best", gptq = true }
end
