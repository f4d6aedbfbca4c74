#!/usr/bin/env python3
"""Packs a whole small checkpoint with the stock library and computes its logits with transformers.

  make_model.py MODEL_DIR OUT --mix "REGEX=FORMAT;..." [--ignore "PATTERN;..."] [--style library|bare] [--shards N]

MODEL_DIR has hf/ and golden.safetensors (see ../models). FORMAT is one of the names in make.py. A module whose name
matches no REGEX stays plain and goes into `ignore` unless a pattern of --ignore covers it. Fused experts are written per expert.
--style bare leaves everything optional out of the config and lists every plain module by name, as some exporters do.

OUT/checkpoint is the packed checkpoint. OUT/golden.safetensors holds ids and logits for
  exact.*    every weight = the float32 product of its parts (what a reader that never rounds to bf16 gets)
  library.*  weights as the library decompresses them (rounded to bf16)
  short.ids [n], *.short.logits [n, V]; long.ids [m], long.positions [p], *.long.logits [p, V]."""
import argparse, json, os, re, shutil, sys, tempfile
sys.dont_write_bytecode = True
os.environ.setdefault("OMP_NUM_THREADS", "1"); os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import numpy as np
import torch
from safetensors.torch import load_file, save_file
import make, verify
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
torch.set_num_threads(1)
TOGETHER = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


def scheme_for(fmt, targets):
    s = make.FORMATS[fmt]
    g = preset_name_to_scheme(s, targets) if isinstance(s, str) else QuantizationScheme(targets=targets, weights=QuantizationArgs(**s))
    g.format = infer_module_format(torch.nn.Linear, g)
    return g


def source(d):
    t = {}
    for f in sorted(os.listdir(d)):
        if f.endswith(".safetensors"):
            t.update(load_file(os.path.join(d, f)))
    flat = {}
    for k, w in t.items():                                          # fused experts -> per expert
        if k.endswith("experts.gate_up_proj"):
            h = w.shape[1] // 2
            for e in range(w.shape[0]):
                flat[f"{k[:-12]}{e}.gate_proj.weight"], flat[f"{k[:-12]}{e}.up_proj.weight"] = w[e, :h].contiguous(), w[e, h:].contiguous()
        elif k.endswith("experts.down_proj"):
            for e in range(w.shape[0]):
                flat[f"{k[:-9]}{e}.down_proj.weight"] = w[e].contiguous()
        else:
            flat[k] = w
    return t, flat


def pack(name, w, scheme, flat):
    args = scheme.weights
    lo, hi = make.groups_minmax(w, args)
    sd, gs = {"weight": w}, None
    if args.strategy == "tensor_group":
        amax = w.abs().amax()
        for group in TOGETHER:                                      # one global scale for tensors that a server fuses
            for leaf in group:
                if name.endswith(leaf):
                    amax = max(flat[name[:-len(leaf)] + o + ".weight"].abs().amax() for o in group)
        gs = generate_gparam(-amax.float(), amax.float())
        sd["weight_global_scale"] = gs
    scale, zp = calculate_qparams(lo, hi, args, global_scale=gs)
    sd["weight_scale"] = scale.to(w.dtype)
    if not args.symmetric:
        sd["weight_zero_point"] = zp.to(torch.int8)
    return BaseCompressor.get_value_from_registry(scheme.format.value).compress(sd, scheme)


def exact(local, scheme):
    """float32 weights without the rounding to bf16"""
    a = {k: (v.float() if v.dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn) else v).numpy() for k, v in local.items()}
    args = scheme.weights.model_dump()
    args["strategy"] = getattr(args["strategy"], "value", args["strategy"])
    return torch.from_numpy(np.ascontiguousarray(verify.decode(a, args, scheme.format.value, verify.ROUND["F32"])))


def run(model_dir, tensors, originals, short, long, positions):
    """logits of the checkpoint with `tensors` (float32, per-expert names) in the place of the originals"""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    out = {}
    for k, w in originals.items():                                  # back to the original names
        if k.endswith("experts.gate_up_proj"):
            out[k] = torch.stack([torch.cat([tensors[f"{k[:-12]}{e}.gate_proj.weight"], tensors[f"{k[:-12]}{e}.up_proj.weight"]]) for e in range(w.shape[0])])
        elif k.endswith("experts.down_proj"):
            out[k] = torch.stack([tensors[f"{k[:-9]}{e}.down_proj.weight"] for e in range(w.shape[0])])
        else:
            out[k] = tensors[k]
    with tempfile.TemporaryDirectory() as d:
        for f in ("config.json", "generation_config.json"):
            if os.path.exists(os.path.join(model_dir, f)):
                shutil.copy(os.path.join(model_dir, f), d)
        save_file({k: v.float().contiguous() for k, v in out.items()}, os.path.join(d, "model.safetensors"), metadata={"format": "pt"})
        cls = AutoModelForImageTextToText if "Conditional" in AutoConfig.from_pretrained(d).architectures[0] else AutoModelForCausalLM
        m = cls.from_pretrained(d, dtype=torch.float32, attn_implementation="eager").eval()
        try:
            m.set_experts_implementation("eager")
        except Exception:
            pass
        with torch.no_grad():
            a = m(input_ids=short[None].long()).logits[0]
            b = m(input_ids=long[None].long()).logits[0][positions.long()]
    return a.float().contiguous(), b.float().contiguous()


def main():
    ap = argparse.ArgumentParser(); ap.add_argument("model"); ap.add_argument("out"); ap.add_argument("--mix", required=True)
    ap.add_argument("--ignore", default=""); ap.add_argument("--style", default="library"); ap.add_argument("--shards", type=int, default=1)
    a = ap.parse_args()
    src = os.path.join(a.model, "hf")
    originals, flat = source(src)
    mix = [x.split("=") for x in a.mix.split(";")]
    groups = {}
    for rx, fmt in mix:
        groups.setdefault(fmt, []).append("re:" + rx)
    schemes = {fmt: scheme_for(fmt, t) for fmt, t in groups.items()}
    packed, plain, lib, ex = {}, [], {}, {}
    for k, w in flat.items():
        mod, _, leaf = k.rpartition(".")
        fmt = next((f for rx, f in mix if leaf == "weight" and re.match(rx, mod) and w.ndim == 2), None)
        if fmt is None:
            packed[k] = w; lib[k] = ex[k] = w
            if leaf == "weight" and (w.ndim == 2 or a.style == "bare"):
                plain.append(mod)
            continue
        s = schemes[fmt]
        local = pack(mod, w, s, flat)
        for p, v in local.items():
            packed[f"{mod}.{p}"] = v.contiguous()
        lib[k] = BaseCompressor.get_value_from_registry(s.format.value).decompress(local, s)["weight"]
        ex[k] = exact(local, s)
        assert torch.equal(ex[k].bfloat16().float(), lib[k].float()), k
    pats = [p for p in a.ignore.split(";") if p]
    ignore = pats + [m for m in sorted(plain) if not any(re.match(p[3:], m) if p.startswith("re:") else p == m for p in pats)]
    formats = {s.format.value for s in schemes.values()}
    cfg = QuantizationConfig(config_groups={f"group_{i}": s for i, s in enumerate(schemes.values())}, ignore=ignore, quantization_status="compressed",
                             format=formats.pop() if len(formats) == 1 else "mixed-precision")
    d = os.path.join(a.out, "checkpoint")
    shutil.rmtree(a.out, ignore_errors=True); os.makedirs(d)
    config = json.load(open(os.path.join(src, "config.json")))
    q = json.loads(cfg.model_dump_json())
    if a.style == "bare":
        s = next(iter(schemes.values()))
        w = {"num_bits": s.weights.num_bits, "type": s.weights.type, "strategy": getattr(s.weights.strategy, "value", s.weights.strategy), "group_size": s.weights.group_size, "symmetric": True}
        q = {"quant_method": "compressed-tensors", "format": s.format.value, "config_groups": {"group_0": {"targets": ["Linear"], "weights": w}}, "ignore": ignore}
    else:
        import compressed_tensors
        q = {**q, "quant_method": "compressed-tensors", "version": compressed_tensors.__version__, "sparsity_config": {}, "transform_config": {}}
    config["quantization_config"] = q
    json.dump(config, open(os.path.join(d, "config.json"), "w"), indent=2)
    names = sorted(packed)
    if a.shards == 1:
        save_file({k: packed[k] for k in names}, os.path.join(d, "model.safetensors"), metadata={"format": "pt"})
    else:
        where = {}
        for i in range(a.shards):
            f = f"model-{i + 1:05d}-of-{a.shards:05d}.safetensors"
            part = names[i::a.shards]
            save_file({k: packed[k] for k in part}, os.path.join(d, f), metadata={"format": "pt"}); where.update((k, f) for k in part)
        json.dump({"metadata": {"total_size": sum(t.numel() * t.element_size() for t in packed.values())}, "weight_map": dict(sorted(where.items()))}, open(os.path.join(d, "model.safetensors.index.json"), "w"), indent=1)
    g = load_file(os.path.join(a.model, "golden.safetensors"))
    short, long = g["short.ids"], g["long.ids"]
    pos = g["long.positions"]
    s0, l0 = run(src, flat, originals, short, long, pos)
    print("float32 of the original against its golden file:", (s0 - g["short.logits"]).abs().max().item(), (l0 - g["long.logits"]).abs().max().item())
    se, le = run(src, ex, originals, short, long, pos); sl, ll = run(src, lib, originals, short, long, pos)
    noise = torch.Generator().manual_seed(1)
    sn, ln = run(src, {k: w.float() * (1 + 1e-6 * torch.randn(w.shape, generator=noise)) for k, w in ex.items()}, originals, short, long, pos)
    print("change of exact.* when every weight moves by 1e-6:", (se - sn).abs().max().item(), (le - ln).abs().max().item())
    print("exact against library:", (se - sl).abs().max().item(), (le - ll).abs().max().item(), " packed against original:", (se - s0).abs().max().item(), "logit spread", s0.std().item())
    save_file({"short.ids": short, "long.ids": long, "long.positions": pos, "exact.short.logits": se, "exact.long.logits": le, "library.short.logits": sl, "library.long.logits": ll}, os.path.join(a.out, "golden.safetensors"))
    for r, _, fs in os.walk(a.out):
        for f in fs:
            os.chmod(os.path.join(r, f), 0o644)


if __name__ == "__main__":
    main()
