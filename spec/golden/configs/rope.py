#!/usr/bin/env python3
"""rope.json: what transformers computes for a few rope_parameters. python rope.py > rope.json"""
import json
import transformers
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding

base = {"rope_theta": 10000000.0, "partial_rotary_factor": 0.25}
yarn = dict(base, rope_type="yarn", factor=4.0, original_max_position_embeddings=262144)
cases = {
    "default": dict(base, rope_type="default"),
    "yarn": yarn,
    "no truncation": dict(yarn, truncate=False),
    "attention factor": dict(yarn, attention_factor=1.5),
    "mscale": dict(yarn, mscale=1.2, mscale_all_dim=0.7),
    "betas": dict(yarn, beta_fast=16, beta_slow=2, factor=2.0),
    "short context": dict(yarn, original_max_position_embeddings=64, rope_theta=100000.0),
}
out = []
for name, rope in cases.items():
    # the library fills in the dictionary it is given
    c = Qwen3_5TextConfig(head_dim=256, max_position_embeddings=1048576, rope_parameters=dict(rope))
    r = Qwen3_5TextRotaryEmbedding(c)
    out.append({"name": name, "rope_parameters": rope, "inv_freq": r.inv_freq.tolist(),
                "scale": float(r.attention_scaling)})
print(json.dumps({"made_with": "transformers " + transformers.__version__, "cases": out}, indent=1))
