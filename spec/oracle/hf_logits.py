"""Logits of checkpoints as stock transformers computes them, in float32.

hf_logits.py IDS DIR...: IDS is comma-separated; DIR.safetensors becomes a file with `logits`
[n, vocab] F32. Compressed checkpoints are decompressed while they load. Fails where a tensor is
missing, unexpected or of another shape.
"""
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

ids = torch.tensor([[int(i) for i in sys.argv[1].split(",")]])
for directory in sys.argv[2:]:
    options = {}
    if "quantization_config" in json.loads((Path(directory) / "config.json").read_text()):
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True, **options)
    assert not any(info.values()), f"{directory}: {info}"
    model.float()  # experts come out of compressed-tensors in bfloat16
    with torch.no_grad():
        logits = model(ids).logits[0]
    save_file({"logits": logits.float().contiguous()}, directory + ".safetensors")
