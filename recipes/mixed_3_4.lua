-- mixed_3_4: 3 bits, 4 for the head, and for v_proj and down_proj in some of the layers.
--
-- `mixed` with low 3 and high 4, as mlx-node and mlx-lm publish it under this name. Options:
-- group, mxfp and rule, as of `mixed`.

return function(options, kit)
  kit.options(options, { group = { 32, 64, 128 }, mxfp = "boolean",
    rule = { "mlx-node", "mlx-lm" } })
  return kit.recipe("mixed", { low = 3, high = 4, group = options.group, mxfp = options.mxfp,
    rule = options.rule })
end
