#!/usr/bin/env python3
"""Write blocks of weights and what qstream makes of them, computed in numpy from the rules.

  make.py --out qstream.safetensors --seed 20261121 [--core qstream/core.py]

--core: that file of github.com/olka/qstream (needs torch); its bytes have to be the same.
"""
import argparse, json, struct
import numpy as np

f4 = np.float32
E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6], f4)
MIDDLES = np.array([.25, .75, 1.25, 1.75, 2.5, 3.5, 5], f4)


def to_bf16(x):
    u = np.ascontiguousarray(x, f4).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) & np.uint32(0xFFFF0000)).view(f4)


def weights(rng, cols):
    n = cols // 32
    per_block = lambda lo, hi: (10.0 ** rng.uniform(lo, hi, n)).repeat(32)
    rows = [
        rng.standard_normal(cols) * 0.02,
        rng.standard_t(2, cols) * 0.02,
        rng.standard_normal(cols) * per_block(-9, 5),
        rng.standard_normal(cols) * per_block(-6.5, -5.5),            # around the block that is noise
        rng.integers(-64, 65, cols) / 64,
        rng.choice(np.concatenate([MIDDLES, -MIDDLES, E2M1]), cols) * (2.0 ** rng.integers(-6, 6, n)).repeat(32),
        np.where(rng.random(cols) < .95, 0, rng.standard_normal(cols)),  # one large weight in a block
        np.where(np.arange(cols) % 32 == 9, 30 * per_block(-3, 3), rng.standard_normal(cols) * 0.01),
        rng.choice([-.3, .3], cols),
        np.where(np.arange(cols) % 3 == 0, -0.0, 0.0),
        np.where(np.arange(cols) % 32 == 5, rng.uniform(6.8, 7.2, cols), 0),  # the anchors differ
    ]
    return np.array(rows, f4)


def quantize(w, percentile, weight):
    """w: [blocks, 32] f32; weight: the same shape or None -> codes, bytes"""
    v = to_bf16(w)
    a = np.sort(np.abs(v), 1)
    if percentile:
        t = f4(f4(0.995) * f4(31)) - f4(30)                           # torch.lerp in its upper half
        anchor = a[:, 31] - (a[:, 31] - a[:, 30]) * f4(f4(1) - t)
    else:
        anchor = a[:, 31]
    noise = anchor < f4(1e-6)
    v = np.where(noise[:, None], f4(0), v)
    _, e = np.frexp((np.maximum(anchor, f4(1e-6)) / f4(6)).astype(np.float64))
    floor = e - 1
    best, least = None, None
    for k in (floor - 1, floor, floor + 1):
        scale = np.exp2(k.astype(np.float64))[:, None]
        i = np.searchsorted(MIDDLES, np.minimum(np.abs(v) / scale, 6))  # a middle goes down
        d = E2M1[i] * scale - np.abs(v)
        err = (d * d * (1 if weight is None else weight.astype(np.float64))).sum(1)
        if best is None: best, least = k, err
        else: best, least = np.where(err < least, k, best), np.minimum(err, least)
    top = np.abs(v).max(1)
    m, e = np.frexp((np.maximum(top, f4(1e-12)) / f4(6)).astype(np.float64))
    safe = np.where(m == .5, e - 1, e)
    best = np.where((top > 6 * np.exp2(best.astype(np.float64))) & (best < safe - 1), safe, best)
    scale = np.exp2(best.astype(np.float64))[:, None]
    codes = np.searchsorted(MIDDLES, np.minimum(np.abs(v) / scale, 6)) + np.where(v < 0, 8, 0)
    return codes.astype(np.uint8), np.clip(best + 127, 0, 254).astype(np.uint8)


def save(path, tensors):
    header, at = {}, 0
    for name, a in tensors.items():
        dtype = {"float32": "F32", "uint8": "U8"}[a.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
        at += a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for a in tensors.values(): out.write(a.tobytes())


def stock(core, w, percentile, gamma):
    import importlib.util, torch
    spec = importlib.util.spec_from_file_location("core", core)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    packed, scales = module.quantize_mxfp4(torch.tensor(w).to(torch.bfloat16), 99.5 if percentile else 100.0,
                                           gamma=None if gamma is None else torch.tensor(gamma))
    return packed.numpy(), scales.numpy()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--out", required=True)
    p.add_argument("--seed", type=int, required=True)
    p.add_argument("--cols", type=int, default=1024)
    p.add_argument("--core")
    a = p.parse_args()
    rng = np.random.default_rng(a.seed)
    w = weights(rng, a.cols)
    gamma = np.exp(rng.standard_normal(a.cols)).astype(f4)
    importance = gamma * gamma
    tensors = {"in": w, "importance": importance}
    cases = {"percentile": (True, None), "amax": (False, None), "weighted": (True, importance)}
    for name, (percentile, weight) in cases.items():
        blocks = w.reshape(-1, 32)
        h = None if weight is None else np.broadcast_to(weight, w.shape).reshape(-1, 32)
        codes, scales = quantize(blocks, percentile, h)
        packed = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(len(w), -1)
        scales = scales.reshape(len(w), -1)
        if a.core:
            theirs = stock(a.core, w, percentile, None if weight is None else gamma)
            assert (theirs[0] == packed).all() and (theirs[1] == scales).all(), name
        tensors[name + ".weight"], tensors[name + ".scales"] = packed, scales
    save(a.out, tensors)


main()
