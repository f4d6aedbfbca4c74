-- uniform: one format for every matrix, routers in 8-bit affine: converters without a recipe.
--
-- Options:
--   mode   affine (default), mxfp4, mxfp8, nvfp4        bits   affine only (default 4)
--   group  default 64 for affine; the others have one
--   like   "mlx-lm" (default): embedding, head and every projection, as mlx_lm.convert -q
--          "mlx-node": as its convert without --q-recipe (commit 434bfbf): embedding and head
--          dense, in mxfp4 and mxfp8 8-bit affine; the two small DeltaNet projections dense

local ROUTERS = { router = true, shared_gate = true }
local TABLES = { embed = true, lm_head = true }
local SMALL = { in_proj_a = true, in_proj_b = true }

return function(options, kit)
  kit.expect(not options.mxfp, "uniform takes mode = mxfp4 or mxfp8 instead of mxfp")
  kit.options(options, { mode = { "affine", "mxfp4", "mxfp8", "nvfp4" }, bits = kit.widths,
    group = { 16, 32, 64, 128 }, like = { "mlx-lm", "mlx-node" } })
  local mode = options.mode or "affine"
  local bits = options.bits or mode == "affine" and 4 or nil
  local group = options.group
    or ({ affine = 64, mxfp4 = 32, mxfp8 = 32, nvfp4 = 16 })[mode]

  local base, router, like_node = { mode = mode, bits = bits, group = group }, kit.affine(8, 64),
    options.like == "mlx-node"
  local tables, small = base, base
  if like_node then
    small = kit.keep()
    tables = (mode == "mxfp4" or mode == "mxfp8") and router or kit.keep()
  end
  return function(tensor)
    local class = tensor.class
    if class == "mtp" then return kit.drop() end
    if not tensor.matrix then return kit.keep() end
    if ROUTERS[class] then return kit.fit(tensor, router) end
    return kit.fit(tensor, TABLES[class] and tables or SMALL[class] and small or base)
  end, base
end
