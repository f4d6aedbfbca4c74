-- keep_bf16: nothing is quantized; vision tower and MTP block stay.

return function(_, kit)
  return function() return kit.keep() end
end
