"""Logits of checkpoints as stock mlx-lm computes them, in float32.

mlx_logits.py IDS DIR...: IDS is comma-separated; DIR.safetensors becomes a file with `logits`
[n, vocab] F32. Loads strictly, as mlx_lm.load does. Scales, biases and dense tensors are widened
to float32 after loading: the sums of mlx's CPU kernels in bfloat16 are off by several percent.
"""
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def widen(a):
    return a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a


tokens = mx.array([int(i) for i in sys.argv[1].split(",")])[None]
for directory in sys.argv[2:]:
    model, _ = load_model(Path(directory), lazy=True, strict=True)
    model.update(tree_map(widen, model.parameters()))
    # Embeddings of byte-scaled formats come out as bfloat16; their values are exact in both.
    embeddings = model.language_model.model.embed_tokens(tokens).astype(mx.float32)
    logits = model(tokens, cache=make_prompt_cache(model), input_embeddings=embeddings)[0]
    mx.save_safetensors(directory + ".safetensors", {"logits": logits.astype(mx.float32)})
