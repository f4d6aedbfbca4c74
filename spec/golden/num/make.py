#!/usr/bin/env python3
"""Write a quantizer fixture: inputs, what mx.quantize makes of them on this
machine (CPU flavour), and what the Metal kernels are expected to make of them
(emulated here in numpy from the rules; no Apple hardware was used).

  make.py --out quantize.safetensors --seed 1 --rows 16 --cols 256 \
      --dtypes f32,bf16 [--kinds 0,1,...] [--old-python PY_WITH_MLX_0.32.1]

--old-python names an interpreter whose mlx is 0.32.1 or earlier; it adds the
`cpu-old.*` tensors (MX scale exponent rounded to nearest instead of up).
"""
import argparse, json, os, subprocess, sys, tempfile
import numpy as np

f4 = np.float32
MODES = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6], f4)


# ---------------------------------------------------------------- inputs
def row(kind, n, rng):
    h = n // 2
    g = lambda m, s=0.02: (rng.standard_normal(m) * s).astype(f4)
    a = np.zeros(n, f4)
    if kind == 0: a[:] = g(n)
    elif kind == 1: a[:] = g(n, 1.0)
    elif kind == 2: a[:] = rng.standard_t(2, n) * 0.02
    elif kind == 3: a[h:] = g(n - h)                       # zero half
    elif kind == 4: a[:h] = 0.375; a[h:] = -0.375          # constant halves
    elif kind == 5:                                        # min == -max
        a[:h] = np.clip(g(h, 0.5), -1, 1); a[h:] = g(n - h, 0.3)
        a[0:n:16] = 1; a[1:n:16] = -1; a[h::16] = -1.5; a[h + 1::16] = 1.5
        a[h:] = np.clip(a[h:], -1.5, 1.5)
    elif kind == 6:                                        # |max|>|min|, then the reverse
        a[:h] = g(h) + f4(0.03); a[h:] = g(n - h) - f4(0.03)
    elif kind == 7:                                        # all positive, then all negative
        a[:h] = np.abs(g(h)) + f4(0.01); a[h:] = -np.abs(g(n - h)) - f4(0.01)
    elif kind == 8:                                        # float32 denormals, then |w| below the 1e-7 floor
        a[:h] = (rng.standard_normal(h) * 1e-40).astype(f4); a[h:] = g(n - h, 2e-8)
    elif kind == 9:                                        # exact code ties for affine 4 and affine 8
        a[:h] = rng.integers(-14, 17, h) * f4(0.0625); a[0:h:16] = 1; a[1:h:16] = -0.875
        a[h:] = rng.integers(-254, 257, n - h) * f4(1 / 512); a[h::16] = 0.5; a[h + 1::16] = f4(-127 / 256)
    elif kind == 10:                                       # exact E2M1 midpoints, then E4M3 midpoints
        t = np.array([6, 5, 3.5, 2.5, 1.75, 1.25, .75, .25, -5, -3.5, -2.5, -1.75, -1.25, -.75, -.25, -0.0], f4)
        a[:h] = np.resize(t, h) * np.repeat(f4(2) ** rng.integers(-6, 2, -(-h // 32)), 32)[:h]
        m = (8 + rng.integers(0, 8, n - h) + 0.5) * f4(2) ** rng.integers(-8, 5, n - h)
        a[h:] = m * rng.choice([-1, 1], n - h); a[h::16] = 448
    elif kind == 11:                                       # outliers of both signs
        a[:] = g(n); a[5] = 50; a[h + 77] = -50
    elif kind == 12:                                       # group maxima around the MX scale decision points
        a[:] = rng.uniform(-1, 1, n)
        tops = [6, 6.0625, 3.5, 4.25, 8.4375, 5.96875, 448 / 512, 6 * 2.0 ** -20, 449, 317, 316, 640]
        for i, s in enumerate(range(0, n, 32)):
            t = tops[i % len(tops)]; a[s:s + 32] *= f4(t); a[s + 3] = -t if i & 1 else t
    elif kind == 13:                                       # nvfp4 scale byte from subnormal to saturated
        a[:] = rng.uniform(-1, 1, n)
        tops = [1e-3, 3e-3, 0.0058, 0.006, 0.011, 0.09, 0.1, 1, 6, 96, 2688, 2700, 5376, 0.02, 0.0029, 40]
        for i, s in enumerate(range(0, n, 16)):
            t = tops[i % len(tops)]; a[s:s + 16] *= f4(t); a[s + 7] = t
    elif kind == 14: a[:] = rng.integers(-8, 8, n) * f4(2 ** -5)
    elif kind == 15:                                       # sparse, then alternating sign
        a[:h:29] = g(len(a[:h:29]), 1.0); a[h:] = np.where(np.arange(n - h) & 1, 1, -1) * f4(0.7)
    else: raise SystemExit(f"no row kind {kind}")
    return a


# ---------------------------------------------------------------- emulation of the Metal rules
def bf16(x):
    u = np.ascontiguousarray(x, f4).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) & np.uint32(0xFFFF0000)).view(f4)


def away(x):
    t = np.trunc(x)
    return t + np.where(np.abs(x - t) >= f4(.5), np.copysign(f4(1), x), f4(0))


def pack(q, bits):
    r, k = q.shape
    b = ((q[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1).reshape(r, k * bits)
    return np.packbits(b, axis=1, bitorder="little").view("<u4")


def affine(w, bits, gs, half, metal):
    """half: store scale and bias as bfloat16. metal: ties away, maximum starts at 0."""
    rnd = away if metal else np.rint
    x = w.reshape(w.shape[0], -1, gs)
    lo, hi = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    if metal: hi = np.maximum(hi, f4(0))
    n = f4(2 ** bits - 1)
    if bits == 1:
        s, b = np.maximum(hi - lo, f4(1e-7)), lo
    else:
        neg = np.abs(lo) > np.abs(hi)
        s = np.maximum((hi - lo) / n, f4(1e-7)); s = np.where(neg, s, -s)
        e = np.where(neg, lo, hi)
        q0 = rnd(e / s)
        with np.errstate(divide="ignore", invalid="ignore"):
            b = np.where(q0 != 0, e, f4(0)); s = np.where(q0 != 0, e / q0, s)
    q = np.clip(rnd((x - b) / s), 0, n).reshape(w.shape)
    st = bf16 if half else (lambda v: v.astype(f4))
    return pack(q, bits), st(s[..., 0]), st(b[..., 0])


def e4m3_table():
    c = np.arange(256); e, m = (c >> 3) & 15, c & 7
    v = np.where(e == 0, m * 2.0 ** -9, (1 + m / 8) * 2.0 ** (e - 7.0))
    return np.where(c & 128, -v, v).astype(f4)


T8 = e4m3_table()


def to_e4m3(x):
    """nearest, ties to even code, saturating at code 0x7E; sign kept"""
    a = np.minimum(np.abs(x.astype(np.float64)), 448.0); t = T8[:127].astype(np.float64)
    i = np.clip(np.searchsorted(t, a), 1, 126); l, r = t[i - 1], t[i]
    dl, dr = a - l, r - a
    c = np.where((dl < dr) | ((dl == dr) & (i % 2 == 1)), i - 1, i)
    return (c + np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def to_e2m1(x):
    a = np.abs(x); c = np.zeros(x.shape, np.uint8)
    for lim, strict in ((.25, 1), (.75, 0), (1.25, 1), (1.75, 0), (2.5, 1), (3.5, 0), (5, 1)):
        c += (a > lim) if strict else (a >= lim)
    return c + np.where(np.signbit(x), 8, 0).astype(np.uint8)


def fp(w, mode, rule, gscale=None, cpu=False):
    """cpu: float32 graph fallback: E2M1 ties go to the smaller magnitude, no -0, zero groups get byte 127"""
    gs, bits = MODES[mode]
    x = w.reshape(w.shape[0], -1, gs)
    d = np.abs(x).max(-1, keepdims=True) / f4(6 if bits == 4 else 448)
    enc = f4(1)
    if mode == "nvfp4":
        if gscale is not None: enc = f4(2688) / f4(gscale); d = d * enc
        s = to_e4m3(d); v = T8[s]
    else:
        with np.errstate(divide="ignore"): l2 = np.log2(d.astype(np.float64))
        if rule == "nearest":
            e = np.where(d > 0, np.floor(l2 + 0.5), -127)
        else:
            m, ex = np.frexp(d.astype(np.float64)); e = np.where(d > 0, np.where(m == .5, ex - 1, ex), -127)
        if cpu: e = np.where(d > 0, e, 0)
        e = np.clip(e, -127, 127); s = (e + 127).astype(np.uint8); v = np.exp2(e).astype(f4)
    with np.errstate(divide="ignore"): inv = np.where(v == 0, f4(0), enc / v)
    y = x * inv                                  # Metal multiplies by the float32 reciprocal, the CPU graph divides
    if cpu:
        with np.errstate(divide="ignore", invalid="ignore"): y = np.where(v == 0, f4(0), x / v * enc)
    q = (to_e2m1(y) if bits == 4 else to_e4m3(y)).reshape(w.shape)
    if cpu and bits == 4:
        c = (np.abs(y)[..., None] > (E2M1[1:] + E2M1[:-1]) / f4(2)).sum(-1).astype(np.uint8)
        q = (c + np.where((y < 0) & (c > 0), 8, 0).astype(np.uint8)).reshape(w.shape)
    return pack(q, bits), s[..., 0]


# ---------------------------------------------------------------- real mlx
def run_mlx(inputs, affine_too, out):
    import mlx.core as mx
    res = {"mlx_version": mx.__version__}
    def put(k, a):
        res[k] = np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)
        if a.dtype == mx.bfloat16: res[k + "#bf16"] = 1
    for dt, x in inputs.items():
        w = mx.array(x).astype(mx.bfloat16 if dt == "bf16" else mx.float32)
        jobs = []
        if affine_too:
            jobs += [(f"affine.b{b}.g{g}.{dt}", dict(group_size=g, bits=b, mode="affine"), None)
                     for b in (1, 2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
        jobs += [(f"{m}.{dt}", dict(group_size=MODES[m][0], bits=MODES[m][1], mode=m), None) for m in MODES]
        if affine_too:
            jobs.append((f"nvfp4gs.{dt}", dict(group_size=16, bits=4, mode="nvfp4"), mx.max(mx.abs(w)).astype(mx.float32)))
        for name, kw, gsc in jobs:
            ex = {} if gsc is None else {"global_scale": gsc}
            r = mx.quantize(w, **kw, **ex)
            d = mx.dequantize(*r, **kw, **ex, dtype=w.dtype)
            for n, a in zip(("weight", "scales", "biases"), r): put(f"{name}.{n}", a)
            put(f"{name}.dequant", d)
            if gsc is not None: put(f"{name}.global_scale", gsc.reshape(1))
    np.savez(out, **res)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out"); p.add_argument("--seed", type=int, default=1)
    p.add_argument("--rows", type=int, default=16); p.add_argument("--cols", type=int, default=256)
    p.add_argument("--kinds"); p.add_argument("--dtypes", default="f32,bf16")
    p.add_argument("--old-python"); p.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker:
        z = np.load(a.worker[0]); return run_mlx({k: z[k] for k in z.files}, False, a.worker[1])
    rng = np.random.default_rng(a.seed)
    kinds = [int(k) for k in a.kinds.split(",")] if a.kinds else [i % 16 for i in range(a.rows)]
    x = np.stack([row(k, a.cols, rng) for k in kinds]).astype(f4)
    inputs = {dt: (bf16(x) if dt == "bf16" else x) for dt in a.dtypes.split(",")}
    t = tempfile.mkdtemp()
    run_mlx(inputs, True, f"{t}/new.npz")
    parts = {"cpu": dict(np.load(f"{t}/new.npz"))}
    if a.old_python:
        np.savez(f"{t}/in.npz", **inputs)
        subprocess.check_call([a.old_python, os.path.abspath(__file__), "--worker", f"{t}/in.npz", f"{t}/old.npz"])
        parts["cpu-old"] = dict(np.load(f"{t}/old.npz"))
    meta = {"format": "mlx-quantize-fixture 1", "seed": str(a.seed), "kinds": ",".join(map(str, kinds)),
            "mlx_cpu": str(parts["cpu"].pop("mlx_version"))}
    if "cpu-old" in parts: meta["mlx_cpu_old"] = str(parts["cpu-old"].pop("mlx_version"))
    T = {}                                       # name -> (safetensors dtype, array)
    for dt, v in inputs.items():
        T[f"in.{dt}"] = ("BF16", (v.view(np.uint32) >> 16).astype(np.uint16)) if dt == "bf16" else ("F32", v)
    for pre, res in parts.items():
        for k, v in res.items():
            if k.endswith("#bf16"): continue
            T[f"{pre}.{k}"] = ("BF16" if k + "#bf16" in res else {"uint32": "U32", "uint8": "U8", "float32": "F32"}[v.dtype.name], v)
    f32 = lambda e: (e[1].astype(np.uint32) << 16).view(f4) if e[0] == "BF16" else e[1]
    def put_metal(pre, name, vals, half):
        for n, v in zip(("weight", "scales", "biases"), vals):
            if v.dtype == np.float32 and half: T[f"{pre}.{name}.{n}"] = ("BF16", (v.view(np.uint32) >> 16).astype(np.uint16))
            else: T[f"{pre}.{name}.{n}"] = ({"uint32": "U32", "uint8": "U8", "float32": "F32"}[v.dtype.name], np.ascontiguousarray(v))
    def same(pre_c, pre_m, name, bits, gs):
        wc, wm = T[f"{pre_c}.{name}.weight"][1], T[f"{pre_m}.{name}.weight"][1]
        ng = wc.shape[1] * 32 // bits // gs
        ok = (wc.view(np.uint8).reshape(len(wc), ng, -1) == wm.view(np.uint8).reshape(len(wm), ng, -1)).all(-1)
        for n in ("scales", "biases"):
            if f"{pre_c}.{name}.{n}" in T: ok &= T[f"{pre_c}.{name}.{n}"][1] == T[f"{pre_m}.{name}.{n}"][1]
        return ok
    def decode(pre, name, bits, gs):
        w = T[f"{pre}.{name}.weight"][1]; r = len(w)
        q = np.unpackbits(w.view(np.uint8), axis=1, bitorder="little").reshape(r, -1, bits) @ (1 << np.arange(bits)).astype(np.int64)
        q = q.reshape(r, -1, gs); s = T[f"{pre}.{name}.scales"]
        if f"{pre}.{name}.biases" in T:
            return q * f32(s)[..., None].astype(np.float64) + f32(T[f"{pre}.{name}.biases"])[..., None]
        v = np.where(q & 8, -E2M1[q & 7], E2M1[q & 7]) if bits == 4 else T8[q]
        return v * (T8[s[1]] if gs == 16 else np.exp2(s[1].astype(np.float64) - 127))[..., None]
    def masks(kind, pre_c, pre_m, name, bits, gs):
        T[f"same{kind}.{name}"] = ("U8", same(pre_c, pre_m, name, bits, gs).astype(np.uint8))
        T[f"eqval{kind}.{name}"] = ("U8", (decode(pre_c, name, bits, gs) == decode(pre_m, name, bits, gs)).all(-1).astype(np.uint8))
    def check_fp(pre, name, vals):
        for n, e in zip(("weight", "scales"), vals):
            if not np.array_equal(e, T[f"{pre}.{name}.{n}"][1]):
                bad = np.argwhere(e != T[f"{pre}.{name}.{n}"][1])
                report.append(f"emulation differs: {pre}.{name}.{n} in {len(bad)} words, rows {sorted(set(bad[:, 0].tolist()))}")
    report = []
    for dt, v in inputs.items():
        half = dt == "bf16"
        for b in (1, 2, 3, 4, 5, 6, 8):
            for g in (32, 64, 128):
                name = f"affine.b{b}.g{g}.{dt}"
                em = affine(v, b, g, half, False)          # self-check: the CPU emulation must equal real mlx
                for n, e in zip(("weight", "scales", "biases"), em):
                    if not np.array_equal(e, f32(T[f"cpu.{name}.{n}"])): report.append(f"emulation differs: {name}.{n}")
                put_metal("metal", name, affine(v, b, g, half, True), half)
                masks("", "cpu", "metal", name, b, g)
        for m, (g, b) in MODES.items():
            name = f"{m}.{dt}"
            put_metal("metal", name, fp(v, m, "ceil"), half)
            if not half: check_fp("cpu", name, fp(v, m, "ceil", cpu=True))
            masks("", "cpu", "metal", name, b, g)
            if "cpu-old" in parts and m != "nvfp4":
                put_metal("metal-old", name, fp(v, m, "nearest"), half)
                masks("-old", "cpu-old", "metal-old", name, b, g)
                if not half: check_fp("cpu-old", name, fp(v, m, "nearest", cpu=True))
        name = f"nvfp4gs.{dt}"
        put_metal("metal", name, fp(v, "nvfp4", None, T[f"cpu.{name}.global_scale"][1][0]), half)
        masks("", "cpu", "metal", name, 4, 16)
        if not half: check_fp("cpu", name, fp(v, "nvfp4", None, T[f"cpu.{name}.global_scale"][1][0], cpu=True))
    if "cpu-old" in parts:                        # nvfp4 did not change: drop the copies if they agree
        for k in [k for k in T if k.startswith("cpu-old.nvfp4")]:
            if np.array_equal(T[k][1], T["cpu" + k[7:]][1]): del T[k]
            else: report.append(f"{k} differs from the newer version")
    hdr, off = {"__metadata__": meta}, 0
    for k, (d, v) in sorted(T.items()):
        n = v.nbytes; hdr[k] = {"dtype": d, "shape": list(v.shape), "data_offsets": [off, off + n]}; off += n
    h = json.dumps(hdr, separators=(",", ":")).encode(); h += b" " * (-len(h) % 8)
    with open(a.out, "wb") as f:
        f.write(len(h).to_bytes(8, "little") + h)
        for k, (d, v) in sorted(T.items()): f.write(np.ascontiguousarray(v).tobytes())
    for k in sorted(T):
        if k.startswith(("same", "eqval")): print(f"{k}: {int(T[k][1].sum())} of {T[k][1].size} groups equal")
    print("\n".join(report) or "emulated CPU flavour equals mlx: every affine case, and mxfp4/mxfp8/nvfp4 from float32")


if __name__ == "__main__":
    sys.exit(main())
