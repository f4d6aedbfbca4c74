-- keep: every tensor in the format it is stored in: another form of a checkpoint without loss.
--
-- What the other form cannot hold is an error that names the tensor.
-- `moonlet quantize DIR OUT --recipe keep --format compressed-tensors` renames MLX's mxfp4 and
-- mxfp8, and so does `--format mlx` the other way.

return function(options, kit)
  kit.options(options, {})
  return function() return kit.stored() end
end
