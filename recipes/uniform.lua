-- uniform: one format for every matrix, routers in 8-bit affine; what mlx_lm.convert -q does.
--
-- Options: mode affine (default), mxfp4, mxfp8, nvfp4; bits (affine only, default 4); group.

local ROUTERS = { router = true, shared_gate = true }

return function(options, kit)
  kit.expect(not options.mxfp, "uniform takes mode = mxfp4 or mxfp8 instead of mxfp")
  local mode = options.mode or "affine"
  local bits = options.bits or mode == "affine" and 4 or nil
  local group = options.group
    or ({ affine = 64, mxfp4 = 32, mxfp8 = 32, nvfp4 = 16 })[mode]
  kit.expect(group, "mode must be affine, mxfp4, mxfp8 or nvfp4")

  local base = { mode = mode, bits = bits, group = group }
  return function(tensor)
    if tensor.class == "mtp" then return kit.drop() end
    if not tensor.matrix then return kit.keep() end
    if ROUTERS[tensor.class] then return kit.fit(tensor, kit.affine(8, 64)) end
    return kit.fit(tensor, base)
  end, base
end
