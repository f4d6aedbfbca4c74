-- keep: every tensor in the format it is stored in: another form of a checkpoint without loss.
--
-- `moonlet quantize DIR OUT --recipe keep --format compressed-tensors` renames MLX's mxfp4 and
-- mxfp8, and so does `--format mlx` the other way. What the other form cannot hold is an error
-- that names the tensor. Options:
--   undo  list of modes whose matrices become BF16 instead: ["affine"] lets mxfp4 checkpoints of
--         MLX's converters pass, whose routers are affine with any bias

local MODES <const> = { affine = true, mxfp4 = true, mxfp8 = true, nvfp4 = true, fp8 = true }

return function(options, kit)
  kit.options(options, { undo = "strings" })
  local undo = options.undo or {}
  for _, mode in ipairs(undo) do
    kit.expect(MODES[mode], ("undo: there is no mode %s"):format(mode))
  end
  return function(tensor)
    if tensor.packed and kit.contains(undo, tensor.packed.mode) then return kit.keep() end
    return kit.stored()
  end
end
