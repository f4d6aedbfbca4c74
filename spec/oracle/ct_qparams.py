"""Scales, zero points and codes that stock compressed-tensors chooses for integer groups.

ct_qparams.py IN OUT CASE...: IN is a safetensors file with `w` F32 [rows, cols]; a CASE is
bits:group:symmetric or bits:group:asymmetric. OUT gets CASE.scales F32 [rows, groups], CASE.zeros
and CASE.codes U8, both counted from 0.
"""
import sys

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

source, target, *cases = sys.argv[1:]
w, out = load_file(source)["w"], {}
for case in cases:
    bits, group, kind = case.split(":")
    args = QuantizationArgs(num_bits=int(bits), group_size=int(group), symmetric=kind == "symmetric",
                            strategy="group", type="int")
    groups = w.reshape(w.shape[0], -1, int(group))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    codes = quantize(w, scale, zero, args)
    middle = 2 ** (int(bits) - 1)
    out[f"{case}.scales"] = scale.contiguous()
    out[f"{case}.zeros"] = (zero.to(torch.int32) + middle).to(torch.uint8).contiguous()
    out[f"{case}.codes"] = (codes.to(torch.int32) + middle).to(torch.uint8).contiguous()
save_file(out, target)
