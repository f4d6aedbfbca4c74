-- mixed_2_6: 2 bits, 6 for the head, and for v_proj and down_proj in some of the layers.
--
-- `mixed` with low 2 and high 6, as mlx-node and mlx-lm publish it under this name. Options:
-- group, mxfp and rule, as of `mixed`.

return function(options, kit)
  kit.options(options, { group = { 32, 64, 128 }, mxfp = "boolean",
    rule = { "mlx-node", "mlx-lm" } })
  return kit.recipe("mixed", { low = 2, high = 6, group = options.group, mxfp = options.mxfp,
    rule = options.rule })
end
