-- keep_bf16: nothing is quantized; vision tower and MTP block stay.

return function(options, kit)
  kit.options(options, {})
  return function() return kit.keep() end
end
