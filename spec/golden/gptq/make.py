"""Golden data for error feedback: python make.py (numpy alone), writes cases.safetensors.

GPTQ as its paper has it (Frantar et al. 2022, and https://github.com/IST-DASLab/gptq, gptq.py): the
upper Cholesky factor of the inverse Hessian, errors pushed to the columns behind, in float64. With
scales fixed beforehand (plain minimum-maximum or MX rules) and columns by falling diagonal, then one
round of least squares for affine scales and of coordinate descent for codes. Nothing here is shared
with the engine, which has no inverse."""
import json
import os
import numpy as np

K, ROWS, INPUTS = 128, 16, 512
HERE = os.path.dirname(os.path.abspath(__file__))


def bf16(x):
    u = np.asarray(x, np.float32).view(np.uint32)
    return (((u + 0x7FFF + ((u >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32).astype(float)


def e4m3_values():
    out = []
    for b in range(127):
        e, m = b >> 3, b & 7
        out.append(m * 2.0 ** -9 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))
    return np.array(out)


E4M3 = e4m3_values()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


class Affine:
    """MLX's rule (mlx/ops.cpp, quantize; Metal's maximum starts at 0), bf16 scales."""
    affine = True

    def __init__(self, bits, group):
        self.bits, self.group, self.top = bits, group, 2 ** bits - 1

    def fit(self, w):
        lo, hi = w.min(1), np.maximum(w.max(1), 0)
        s = np.maximum((hi - lo) / self.top, 1e-7)
        low = np.abs(lo) > np.abs(hi)
        s, end = np.where(low, s, -s), np.where(low, lo, hi)
        zero = np.round(end / s)
        scale = np.where(zero != 0, end / np.where(zero == 0, 1, zero), s)
        return [bf16(scale), bf16(np.where(zero != 0, end, 0))]

    def value(self, p, w):
        scale, bias = p
        code = np.clip(np.round((w - bias) / scale), 0, self.top)
        return scale * code + bias


class Floats:
    """MX exponents that never clip (mlx 0.32.2 and later), or nvfp4's E4M3 scales."""
    affine = False

    def __init__(self, name, group, levels):
        self.name, self.group, self.levels = name, group, levels

    def fit(self, w):
        top = np.abs(w).max(1) / self.levels[-1]
        if self.name == "nvfp4":
            return [E4M3[np.abs(E4M3[None] - top[:, None]).argmin(1)]]
        return [2.0 ** np.ceil(np.log2(top))]

    def value(self, p, w):
        y = np.abs(w / p[0])
        return np.sign(w) * self.levels[np.abs(self.levels[None] - y[:, None]).argmin(1)] * p[0]


FORMATS = {
    "affine3": Affine(3, 64), "affine4": Affine(4, 32), "affine2": Affine(2, 128),
    "mxfp4": Floats("mxfp4", 32, E2M1), "mxfp8": Floats("mxfp8", 32, E4M3),
    "nvfp4": Floats("nvfp4", 16, E2M1),
}


def damped(H):
    return H + (0.01 + 0.1 * K / INPUTS) * np.diag(H).mean() * np.eye(K)


def parameters(f, W):
    return [f.fit(W[:, g:g + f.group]) for g in range(0, K, f.group)]


def plain(f, W, scales):
    return np.stack([f.value(scales[k // f.group], W[:, k]) for k in range(K)], 1)


def gptq(f, W, H, scales):
    order = np.argsort(-np.diag(H), kind="stable")
    inverse = np.linalg.inv(damped(H)[np.ix_(order, order)])
    U = np.linalg.cholesky(inverse).T
    W, Q = W[:, order].copy(), np.empty_like(W)
    for i in range(K):
        q = f.value(scales[order[i] // f.group], W[:, i])
        Q[:, order[i]] = q
        W[:, i:] -= np.outer((W[:, i] - q) / U[i, i], U[i, i:])
    return Q


def polish(f, W, H, Q, scales):
    H = damped(H)
    root = np.linalg.cholesky(H).T  # e H e = |root e|^2
    Q, scales = Q.copy(), [[x.copy() for x in p] for p in scales]
    for g in range(K // f.group):
        cols = slice(g * f.group, (g + 1) * f.group)
        if f.affine:
            scale, bias = scales[g]
            codes = np.round((Q[:, cols] - bias[:, None]) / scale[:, None])
            for r in range(len(W)):
                e = W[r] - Q[r]
                A = root[:, cols] @ np.stack([codes[r], np.ones(f.group)], 1)
                x, *_ = np.linalg.lstsq(A, root @ e, rcond=None)
                s, b = bf16(scale[r] + x[0]), bf16(bias[r] + x[1])
                new = e.copy()
                new[cols] = W[r, cols] - (s * codes[r] + b)
                if new @ H @ new < e @ H @ e:
                    scale[r], bias[r], Q[r] = s, b, W[r] - new
        for k in range(cols.start, cols.stop):
            slope = (W - Q) @ H[:, k]
            Q[:, k] = f.value(scales[g], Q[:, k] + slope / H[k, k])
    return Q


def price(W, Q, H):
    E = W - Q
    return np.einsum("ij,jk,ik->i", E, H, E)


def make_inputs(rng):
    """Neighbours correlated at 0.9, columns of different size, one large, one that never occurs."""
    x = rng.standard_normal((INPUTS, K))
    for k in range(1, K):
        x[:, k] = 0.9 * x[:, k - 1] + np.sqrt(1 - 0.81) * x[:, k]
    size = np.exp(0.7 * rng.standard_normal(K))
    size[17], size[40] = 20, 0
    return x * size


def write(path, tensors):
    header, data, at = {}, b"", 0
    for name, a in tensors.items():
        a = np.ascontiguousarray(a, np.float32)
        header[name] = {"dtype": "F32", "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
        data, at = data + a.tobytes(), at + a.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text + data)


def main():
    rng = np.random.default_rng(7)
    W = (0.05 * rng.standard_t(5, (ROWS, K))).astype(np.float32)
    x = make_inputs(rng)
    H = (x.T @ x).astype(np.float32)
    tensors = {"weight": W, "inputs": H, "inputs.counts": np.array([INPUTS])}
    W, H = W.astype(float), H.astype(float)
    for name, f in FORMATS.items():
        scales = parameters(f, W)
        fed = gptq(f, W, H, scales)
        steps = [plain(f, W, scales), fed, polish(f, W, H, fed, scales)]
        prices = [price(W, Q, damped(H)).sum() for Q in steps]
        tensors["cost." + name] = prices[-1:]
        print(name, *(round(p / prices[0], 4) for p in prices))
    write(os.path.join(HERE, "cases.safetensors"), tensors)


main()
