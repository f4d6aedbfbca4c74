-- keep: every tensor in the format it is stored in, to write a checkpoint in another form without
-- loss. What the other form cannot hold is an error that names the tensor.
--
-- `moonlet quantize DIR OUT --recipe keep --format compressed-tensors` renames MLX's mxfp4 and
-- mxfp8, and so does `--format mlx` the other way.

return function(options, kit)
  kit.expect(next(options) == nil, "keep takes no options")
  return function() return kit.stored() end
end
