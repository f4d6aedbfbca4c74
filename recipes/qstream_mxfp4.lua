-- qstream_mxfp4: routed experts (or the FFN of a dense model) in mxfp4, everything else as it is.
--
-- qstream (github.com/olka/qstream at 9f8cd0c: shard.py, handlers.py) takes every matrix that no
-- pattern excludes. The patterns below are those on the card of Qwen3.6-35B-A3B-MXFP4, and
-- *linear_attn*: the card says that linear attention is BF16, and its size agrees, though its list
-- does not have it. Options:
--   exclude  list of patterns in the place of these. A tensor is left alone if one occurs in its
--            name, `*` standing for anything; a pattern that occurs in no name is refused
-- Scales are chosen as qstream does (fit "qstream") unless told otherwise. It writes
-- compressed-tensors: --format compressed-tensors.

local ON_THE_CARD = { "*shared_expert*", "*.mlp.gate.", "*lm_head*", "*embed_tokens*", "*visual*",
  "*mtp*", "*self_attn*", "*linear_attn*" }

return function(options, kit)
  kit.options(options, { exclude = "strings" })
  local patterns, seen = options.exclude or ON_THE_CARD, {}
  local function excluded(tensor)
    local any = false
    for _, pattern in ipairs(patterns) do
      if kit.glob(pattern, tensor.name) then any, seen[pattern] = true, true end
    end
    return any
  end
  -- The card's patterns serve every architecture; a user's own are meant for this one.
  kit.at_end(function()
    for _, pattern in ipairs(options.exclude or {}) do
      kit.expect(seen[pattern], ("exclude: '%s' occurs in no tensor's name"):format(pattern))
    end
    seen = {}
  end)
  return function(tensor)
    if excluded(tensor) or not tensor.matrix then return kit.keep() end
    return kit.fit(tensor, { mode = "mxfp4" })
  end, { mode = "mxfp4" }, { fit = "qstream" }
end
