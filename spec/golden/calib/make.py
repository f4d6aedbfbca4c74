"""Sums over the inputs of every matrix, as hooks on the modules of the stock transformers library see them.

    python make.py OUT

Made with Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0. What the files hold: README.md.
"""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

MODELS = Path(__file__).resolve().parent.parent / "models"
KINDS = {
    "dense-text": (Qwen3_5ForCausalLM, "linear_attn.in_proj_qkv self_attn.o_proj mlp.down_proj"),
    "moe-text": (Qwen3_5MoeForCausalLM, ""),
    "moe-wrapped": (Qwen3_5MoeForConditionalGeneration, "linear_attn.out_proj mlp.gate mlp.experts.down_proj lm_head"),
}


class Sums:
    """Sums of x and x^2 in float64 per matrix; of x x^T where the name ends in one of `squares`, but of no layers
    besides the first and the fourth."""

    def __init__(self, squares):
        self.squares, self.out = tuple(squares.split()), {}

    def add(self, name, expert, n_experts, x):
        x = x.detach().reshape(-1, x.shape[-1]).double()
        shape = (n_experts, x.shape[-1]) if n_experts else (x.shape[-1],)
        at = expert if n_experts else slice(None)
        def into(key, value, shape):
            self.out.setdefault(f"{name}.{key}", torch.zeros(shape, dtype=torch.float64))[at] += value
        into("sums", x.sum(0), shape)
        into("sums2", (x * x).sum(0), shape)
        into("counts", x.shape[0], (n_experts or 1,))
        layer = name.split(".")[1:2]
        if name.endswith(self.squares or ("-",)) and layer in ([], ["0"], ["3"]):
            into("squares", x.T @ x, (*shape, x.shape[-1]))

    def linear(self, name):
        return lambda module, args: self.add(name, None, 0, args[0])

    def experts(self, name):
        def hook(module, args):
            hidden, chosen, _ = args
            for e in range(module.num_experts):
                x = hidden[(chosen == e).any(-1)]
                gate, up = nn.functional.linear(x, module.gate_up_proj[e]).chunk(2, dim=-1)
                self.add(f"{name}.gate_proj", e, module.num_experts, x)
                self.add(f"{name}.up_proj", e, module.num_experts, x)
                self.add(f"{name}.down_proj", e, module.num_experts, module.act_fn(gate) * up)
        return hook


@torch.no_grad()
def run(name, out):
    cls, squares = KINDS[name]
    model = cls.from_pretrained(MODELS / name / "hf", dtype=torch.float32, attn_implementation="eager",
                                experts_implementation="eager").eval()
    sums = Sums(squares)
    for path, module in model.named_modules():
        path = path.removeprefix("model.").removeprefix("language_model.")
        if "visual" in path:
            continue
        if isinstance(module, nn.Linear) or path.endswith("mlp.gate"):
            module.register_forward_pre_hook(sums.linear(path))
        elif path.endswith(".experts"):
            module.register_forward_pre_hook(sums.experts(path))
    golden = load_file(MODELS / name / "golden.safetensors")
    for ids in golden["short.ids"], golden["long.ids"]:
        model(input_ids=ids.long()[None])
    tensors = {k: v.float().contiguous() for k, v in sums.out.items()}
    save_file(tensors, out / f"{name}.safetensors")
    print(name, len(tensors), "tensors,", sum(v.numel() * 4 for v in tensors.values()), "bytes")


if __name__ == "__main__":
    for kind in KINDS:
        run(kind, Path(sys.argv[1]))
