"""KL(p || q) of two checkpoints as stock transformers computes their logits.

kld.py IDS REFERENCE_DIR DIR OUT: IDS is comma-separated; OUT becomes a safetensors file with `kl`
[n] F32, worked out in float64 from float32 logits, and `top` [n], `reference_top` [n] I32.
"""
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ids = torch.tensor([[int(i) for i in sys.argv[1].split(",")]])


def log_probs(directory):
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(ids).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


p, q = log_probs(sys.argv[2]), log_probs(sys.argv[3])
save_file({
    "kl": (p.exp() * (p - q)).sum(-1).float(),
    "reference_top": p.argmax(-1).int(),
    "top": q.argmax(-1).int(),
}, sys.argv[4])
