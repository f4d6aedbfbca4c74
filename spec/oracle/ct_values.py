"""Weights of compressed-tensors checkpoints as the stock library decompresses them.

ct_values.py DIR...: DIR.safetensors becomes a file with `library.<module>` (BF16) for every packed
module, and `exact.<module>` (F32) where the library computes in the type of the scales: there these
are widened first. Which scheme a module has is asked of the library too: the targets and the ignore
list of config.json, matched against a module of the right class. Fails where a module with scales
has no scheme, one without has one, or tensors are missing, too many or of other types.
"""
import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from safetensors import safe_open
from safetensors.torch import save_file

PLAIN = {"embed_tokens": torch.nn.Embedding, "norm": torch.nn.LayerNorm, "conv1d": torch.nn.Conv1d}


def kind(module):
    last = module.rpartition(".")[2]
    for part, cls in PLAIN.items():
        if part in last:
            return cls
    return torch.nn.Linear


def scheme_of(config, module):
    cls = kind(module)
    dummy = cls.__new__(cls)
    hits = [g for g in config.config_groups.values() if is_match(module, dummy, g.targets)]
    if not hits or is_match(module, dummy, config.ignore):
        return None
    assert len(hits) == 1, f"{module}: targeted by {len(hits)} groups"
    return hits[0]


def tensors_of(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    files = {f: safe_open(directory / f, "pt") for f in set(index.values())}
    listed = {name for f in files.values() for name in f.keys()}
    assert listed == set(index), f"{directory}: the index lists {len(index)} of {len(listed)}"
    modules = {}
    for name, f in index.items():
        module, _, last = name.rpartition(".")
        modules.setdefault(module, {})[last] = files[f].get_tensor(name)
    return modules


def decompress(module, tensors, scheme):
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    wanted = set(compressor.compression_param_names(scheme))
    assert wanted == set(tensors), f"{module}: {sorted(tensors)}, expected {sorted(wanted)}"
    inferred = infer_module_format(kind(module), scheme).value
    # Weight-only 8-bit floats are inferred as naive-quantized, which has the same tensors.
    assert inferred == scheme.format or scheme.format == "float-quantized", f"{module}: {inferred}"
    weight = compressor.decompress(dict(tensors), scheme)["weight"]
    out = {f"library.{module}": weight.to(torch.bfloat16).contiguous()}
    scale = tensors["weight_scale"]
    if scale.dtype == torch.bfloat16:
        wide = compressor.decompress({**tensors, "weight_scale": scale.float()}, scheme)["weight"]
        assert wide.dtype == torch.float32
        out[f"exact.{module}"] = wide.contiguous()
    return out


def check(directory):
    block = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(block)
    formats = {g.format for g in config.config_groups.values()}
    assert config.format == (formats.pop() if len(formats) == 1 else "mixed-precision")
    out = {}
    for module, tensors in tensors_of(directory).items():
        packed = "weight_scale" in tensors
        if not packed and "weight" not in tensors:
            continue  # no module of a kind that has schemes
        scheme = scheme_of(config, module)
        assert packed == (scheme is not None), f"{module}: packed {packed}, scheme {scheme}"
        if packed:
            out.update(decompress(module, tensors, scheme))
    save_file(out, str(directory) + ".safetensors")


for argument in sys.argv[1:]:
    check(Path(argument))
