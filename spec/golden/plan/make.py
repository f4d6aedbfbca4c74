"""What the published recipes decide for the published models, by the tools' own rules.

Writes <model>.txt beside itself; spec/plan_spec.lua compares them with moonlet's plans. Nothing here
comes from moonlet: tensors follow from the configurations, decisions are made on module names in
the order in which each tool tests them. Sources: mlx-node/mlx-node (crates/mlx-core, convert.rs)
at 434bfbf, a90def7, 31f3502, 5602f12; ml-explore/mlx-lm (mlx_lm/convert.py) 0.31.3;
ekryski/mlx-swift-lm (scripts/convert_config_i.py) at 6b6a064; olka/qstream at 9f8cd0c. Recipes of
moonlet's own are stated by what docs/recipes.md says of them, with the same tables of numbers.

    python3 spec/golden/plan/make.py
"""
import json
import pathlib

HERE = pathlib.Path(__file__).parent
MODELS = ["qwen3.6-27b", "qwen3.6-35b-a3b"]

BF16, F32, DROP = "bf16", "f32", "dropped"


class Tensor:
    """key: name in an MLX checkpoint; hf: at Hugging Face; kind: moonlet's word for the class."""

    def __init__(self, key, kind, shape, layer=None, n_layers=0, hf=None):
        self.key, self.kind, self.shape, self.layer = key, kind, shape, layer
        self.n_layers, self.hf = n_layers, hf or key

    @property
    def size(self):
        n = 1
        for d in self.shape:
            n *= d
        return n


# ---- tensors of a model -------------------------------------------------------------------------

KINDS = {
    "mlp.gate": "router", "mlp.shared_expert_gate": "shared_gate",
    "mlp.switch_mlp.gate_proj": "expert_gate", "mlp.switch_mlp.up_proj": "expert_up",
    "mlp.switch_mlp.down_proj": "expert_down",
    "mlp.shared_expert.gate_proj": "shared_gate_proj",
    "mlp.shared_expert.up_proj": "shared_up_proj",
    "mlp.shared_expert.down_proj": "shared_down_proj",
    "linear_attn.conv1d": "conv", "linear_attn.A_log": "decay", "linear_attn.dt_bias": "decay",
}


def kind_of(path):
    if path in KINDS:
        return KINDS[path]
    return "norm" if "norm" in path else path.split(".")[-1]


def layer_shapes(c, full):
    h, d = c["hidden_size"], c["head_dim"]
    out = {"input_layernorm": [h], "post_attention_layernorm": [h]}
    if full:
        q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
        out |= {"self_attn.q_proj": [2 * q, h], "self_attn.k_proj": [kv, h],
                "self_attn.v_proj": [kv, h], "self_attn.o_proj": [h, q],
                "self_attn.q_norm": [d], "self_attn.k_norm": [d]}
    else:
        heads = c["linear_num_value_heads"]
        v = heads * c["linear_value_head_dim"]
        qkv = 2 * c["linear_num_key_heads"] * c["linear_key_head_dim"] + v
        out |= {"linear_attn.in_proj_qkv": [qkv, h], "linear_attn.in_proj_z": [v, h],
                "linear_attn.in_proj_a": [heads, h], "linear_attn.in_proj_b": [heads, h],
                "linear_attn.out_proj": [h, v],
                "linear_attn.conv1d": [qkv, c["linear_conv_kernel_dim"], 1],
                "linear_attn.A_log": [heads], "linear_attn.dt_bias": [heads],
                "linear_attn.norm": [c["linear_value_head_dim"]]}
    if c.get("num_experts"):
        e, i, s = c["num_experts"], c["moe_intermediate_size"], c["shared_expert_intermediate_size"]
        out |= {"mlp.gate": [e, h], "mlp.shared_expert_gate": [1, h],
                "mlp.switch_mlp.gate_proj": [e, i, h], "mlp.switch_mlp.up_proj": [e, i, h],
                "mlp.switch_mlp.down_proj": [e, h, i], "mlp.shared_expert.gate_proj": [s, h],
                "mlp.shared_expert.up_proj": [s, h], "mlp.shared_expert.down_proj": [h, s]}
    else:
        i = c["intermediate_size"]
        out |= {"mlp.gate_proj": [i, h], "mlp.up_proj": [i, h], "mlp.down_proj": [h, i]}
    return out


def mtp_shapes(c):
    h = c["hidden_size"]
    shapes = [[h, 2 * h], [h], [h], [h]]
    layer = layer_shapes(c, True)
    if c.get("num_experts"):  # gate and up are one tensor
        e, i, h = layer.pop("mlp.switch_mlp.gate_proj")
        layer["mlp.switch_mlp.up_proj"] = [e, 2 * i, h]
    return shapes + list(layer.values()) * c["mtp_num_hidden_layers"]


def vision_shapes(v):
    h, f = v["hidden_size"], v["intermediate_size"]
    block = [[h], [h], [h], [h], [3 * h, h], [3 * h], [h, h], [h], [f, h], [f], [h, f], [h]]
    m, out = 4 * h, v["out_hidden_size"]
    return [[h, 3, 2, 16, 16], [h], [v["num_position_embeddings"], h]] + block * v["depth"] + \
        [[h], [h], [m, m], [m], [out, m], [out]]


def tensors_of(config):
    c, prefix = config["text_config"], "language_model.model."
    h, vocab, n = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    out = [Tensor(prefix + "embed_tokens.weight", "embed", [vocab, h]),
           Tensor("language_model.lm_head.weight", "lm_head", [vocab, h]),
           Tensor(prefix + "norm.weight", "norm", [h])]
    for i, kind in enumerate(c["layer_types"]):
        for path, shape in layer_shapes(c, kind == "full_attention").items():
            weight = "" if path.endswith(("A_log", "dt_bias")) else ".weight"
            key = f"{prefix}layers.{i}.{path}{weight}"
            hf = key.replace("language_model.model", "model.language_model") \
                    .replace("switch_mlp", "experts")
            out.append(Tensor(key, kind_of(path), shape, i, n, hf))
    out += [Tensor("vision_tower.x", "vision", s, hf="model.visual.x")
            for s in vision_shapes(config["vision_config"])]
    out += [Tensor("mtp.x", "mtp", s) for s in mtp_shapes(c)]
    return out


# ---- decisions ----------------------------------------------------------------------------------

GROUPS = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}


def affine(bits, group=64):
    return ("affine", bits, group)


def fits(t, decision):
    """Rows that do not divide into groups stay as they are, in every tool."""
    if isinstance(decision, tuple) and t.shape[-1] % decision[2]:
        return BF16
    if isinstance(decision, str) and decision in GROUPS and t.shape[-1] % GROUPS[decision]:
        return BF16
    return decision


def n_bytes(t, decision):
    n, rows = t.size, t.size // t.shape[-1]
    if isinstance(decision, tuple):
        _, bits, group = decision
        return n * bits // 8 + n // group * 4
    return {BF16: 2 * n, F32: 4 * n, DROP: 0, "mxfp4": n // 2 + n // 32, "mxfp8": n + n // 32,
            "nvfp4": n // 2 + n // 16, "fp8": n + 2 * rows}[decision]


def text(decision):
    if isinstance(decision, tuple):
        return "affine %d g%d" % decision[1:]
    return f"{decision} g{GROUPS[decision]}" if decision in GROUPS else decision


# ---- mlx-node -----------------------------------------------------------------------------------

SKIP, DEFAULT = "skip", "default"


def is_gate(key):
    return key.removesuffix(".weight").endswith((".mlp.gate", ".shared_expert_gate"))


def affine_only(key):
    return any(s in key for s in ("lm_head", "router.proj", "embed_tokens"))


def below_floor(t, small_too=True):
    """should_quantize, the other way round; after a90def7 without the small projections."""
    key = t.key
    if not key.endswith(".weight") or len(t.shape) < 2:
        return True
    words = ["vision_tower", "embed_tokens", "lm_head", "layernorm", "rms_norm", "_norm.", "conv1d"]
    words += ["in_proj_a", "in_proj_b"] if small_too else []
    return any(w in key for w in words)


def snap(bits):
    return 2 if bits <= 2 else bits if bits <= 6 else 8


def unsloth(t, n, late):
    """build_unsloth_recipe"""
    key = t.key
    if "embed_tokens" in key:
        return affine(snap(n + 2))
    if "lm_head" in key:
        return affine(snap(n + 3))
    if below_floor(t, not late):
        return SKIP
    if is_gate(key):
        return affine(8)
    if any(p in key for p in ("q_proj", "k_proj", "v_proj", "in_proj_qkv", "in_proj_z")):
        return affine(snap(n + 2))
    if any(p in key for p in ("o_proj", "out_proj", "in_proj_a", "in_proj_b")):
        return affine(8) if late else SKIP
    if "down_proj" in key:
        return affine(snap(n + 1))
    return DEFAULT


def qwen3_5(t, n, late):
    """build_qwen35_recipe"""
    key = t.key
    if below_floor(t, not late):
        return SKIP
    if is_gate(key):
        return affine(8)
    if late and any(p in key for p in ("o_proj", "out_proj", "in_proj_a", "in_proj_b")):
        return affine(8)
    if "out_proj" in key:
        return SKIP
    if "self_attn" in key or "in_proj_qkv" in key or "in_proj_z" in key:
        return affine(min(n + 2, 8))
    return affine(min(n + 1, 8)) if "down_proj" in key else DEFAULT


def mixed(low, high, rule):
    """build_recipe_predicate; the rule of mlx-lm is that of mixed_quant_predicate."""
    def eligible(i, n):
        if rule == "mlx-lm":
            return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
        return i < n // 8 or i >= n - n // 8 or i % 3 == 0

    def recipe(t, *_):
        key = t.key
        if "lm_head" in key:
            return affine(high)
        if below_floor(t):
            return SKIP
        if is_gate(key):
            return affine(8)
        if ("v_proj" in key or "down_proj" in key) and eligible(t.layer, t.n_layers):
            return affine(high)
        return affine(low)
    return recipe


def mxfp_upgrade(t, decision, n, kept=()):
    """apply_mxfp_upgrade; kept: what stays affine since 31f3502."""
    if affine_only(t.key) or any(p in t.key for p in kept):
        return decision
    if decision == SKIP:
        return SKIP
    if is_gate(t.key):
        return affine(8)
    bits = n if decision == DEFAULT else decision[1]
    return {4: "mxfp4", 8: "mxfp8"}.get(bits, decision)


def nvfp4_upgrade(t, decision):
    """apply_nvfp4_upgrade"""
    if affine_only(t.key):
        return affine(8) if decision == DEFAULT else decision
    if decision == SKIP:
        return SKIP
    if is_gate(t.key):
        return affine(8)
    return "nvfp4" if decision == DEFAULT or decision[1] == 4 else decision


def mlx_node(recipe, n=4, group=64, mxfp=False, nvfp4=False, era="2026-05"):
    late = era != "2026-05"
    kept = ("o_proj", "out_proj", "in_proj_a", "in_proj_b") if era == "2026-07" else ()

    def decide(t):
        if t.kind == "vision" or t.kind == "mtp" and late:
            return BF16
        if t.kind == "mtp":
            return DROP
        d = recipe(t, n, late)
        if mxfp:
            d = mxfp_upgrade(t, d, n, kept)
        if nvfp4:
            d = nvfp4_upgrade(t, d)
        if d == DEFAULT:
            d = affine(n)
        if isinstance(d, tuple) and group != 64 and not is_gate(t.key):
            d = affine(d[1], group)
        return BF16 if d == SKIP else d
    return decide


def no_recipe(mode, bits=4):
    """convert without --q-recipe: the floor, gates in 8 bits; --q-mxfp is mode mxfp4 or mxfp8."""
    def decide(t):
        if t.kind == "mtp":
            return DROP
        if mode in ("mxfp4", "mxfp8") and affine_only(t.key):
            return affine(8)
        if below_floor(t):
            return BF16
        if is_gate(t.key):
            return affine(8)
        return affine(bits) if mode == "affine" else mode
    return decide


def official(low, high):
    """build_official_unsloth_recipe"""
    def decide(t):
        key = t.key
        if t.kind in ("vision", "mtp") or len(t.shape) < 2 or "conv1d" in key:
            return BF16
        if is_gate(key) or "embed_tokens" in key or "in_proj_a" in key or "in_proj_b" in key:
            return BF16
        if ".mlp." in key:
            return low if t.layer < t.n_layers - 8 else high
        return high if key.endswith("proj.weight") or "in_proj" in key or "lm_head" in key else BF16
    return decide


def nvidia(t):
    """build_nvidia_recipe"""
    key = t.key
    if t.kind in ("vision", "mtp") or len(t.shape) < 2 or "conv1d" in key or "embed" in key:
        return BF16
    if is_gate(key) or "in_proj_a" in key or "in_proj_b" in key:
        return affine(8)
    return "mxfp4" if ".mlp." in key or "lm_head" in key else "mxfp8"


def card_mxfp4(t):
    """The table on the card of Qwen3.6-35B-A3B-UD-MXFP4-mlx."""
    key = t.key
    if t.kind == "mtp":
        return DROP
    if affine_only(key) or is_gate(key):
        return affine(8)
    if below_floor(t) or "o_proj" in key or "out_proj" in key:
        return BF16
    return "mxfp4"


# ---- the others ---------------------------------------------------------------------------------

def mlx_lm(mode, bits=4, group=64):
    """mlx_lm.convert -q: quantizable modules; model.quant_predicate has routers in 8 bits."""
    def decide(t):
        if t.kind == "mtp":
            return DROP
        if t.kind == "vision" or len(t.shape) < 2 or "conv1d" in t.key:
            return BF16
        if is_gate(t.key):
            return affine(8)
        return affine(bits, group) if mode == "affine" else mode
    return decide


def config_i(t):
    """convert_config_i.py, test by test, for MoE and dense models."""
    key = t.key
    if t.kind in ("vision", "mtp"):
        return DROP
    if "norm" in key or "conv1d" in key or not key.endswith(".weight"):
        return BF16
    if "embed_tokens" in key or "lm_head" in key:
        return affine(8)
    if "mlp.gate" in key and "gate_proj" not in key:
        return BF16
    if t.layer < 2 or t.layer >= t.n_layers - 2:
        return affine(8)
    if "self_attn" in key:
        return affine(4)
    if "down_proj" in key:
        return affine(3)
    if "gate_proj" in key or "up_proj" in key:
        return affine(2 if "switch_mlp" in key or "shared_expert" in key else 4)
    return affine(4)


CARD = ["*shared_expert*", "*.mlp.gate.", "*lm_head*", "*embed_tokens*", "*visual*", "*mtp*",
        "*self_attn*", "*linear_attn*"]


def qstream(patterns):
    """Patterns as qstream read them when the card was written: texts that occur in the name."""
    def decide(t):
        if len(t.shape) < 2 or any(p.replace("*", "") in t.hf for p in patterns):
            return BF16
        return "mxfp4"
    return decide


def keep_bf16(_):
    return BF16


# ---- moonlet's own ------------------------------------------------------------------------------

# Relative squared errors of fitted scales, and what classes diverge by per unit of them (nats).
ERRORS = {2: 0.102, 3: 0.0268, 4: 0.0066, 5: 0.00166, 6: 0.00042, 8: 0.000026}
GROUP_ERRORS = {32: 0.8, 64: 1, 128: 1.17}
WEIGHTS = {
    "embed": 0.085, "lm_head": 0.074, "in_proj_qkv": 0.088, "in_proj_z": 0.08,
    "in_proj_a": 0.0029, "in_proj_b": 0.0051, "out_proj": 0.093, "q_proj": 0.023,
    "k_proj": 0.010, "v_proj": 0.008, "o_proj": 0.0088, "router": 0.0123, "shared_gate": 0.0012,
    "expert_gate": 0.0155, "expert_up": 0.0126, "expert_down": 0.030, "shared_gate_proj": 0.0031,
    "shared_up_proj": 0.0030, "shared_down_proj": 0.0103, "gate_proj": 0.0186, "up_proj": 0.0156,
    "down_proj": 0.0403}


def cheapest(t, price, factor=1.0):
    """The format of a matrix with the least damage + price * bytes."""
    weight = WEIGHTS[t.kind] / (1 if t.layer is None else t.n_layers)
    costs = [(price * n_bytes(t, BF16), BF16)]
    for bits in ERRORS:
        for group in GROUP_ERRORS:
            d = affine(bits, group)
            if t.shape[-1] % group == 0:
                damage = factor * weight * ERRORS[bits] * GROUP_ERRORS[group]
                costs.append((damage + price * n_bytes(t, d), d))
    return min(costs, key=lambda c: c[0])[1]


def own(price, mtp, outwards):
    """Middle layers count 0.85 times, the outermost 1.35 times, if `outwards`."""
    def decide(t):
        if t.kind == "mtp":
            return DROP if mtp == "drop" else BF16
        if t.kind not in WEIGHTS:
            return BF16
        factor = 1.0
        if outwards and t.layer is not None:
            middle = (t.n_layers - 1) / 2
            factor = 0.85 + 0.5 * abs(t.layer - middle) / middle
        return cheapest(t, price, factor)
    return decide


def budgets(tensors):
    """The best allocations for some prices, headed by their sizes: no other has less damage."""
    for level in (34, 37, 40):
        decide = own(2.0 ** -level, "drop", False)
        size = sum(n_bytes(t, fits(t, F32 if t.key.endswith("A_log") else decide(t)))
                   for t in tensors)
        yield f"budget --set mtp=drop --target {size}B", decide


# ---- output -------------------------------------------------------------------------------------

def sections(tensors):
    for n in (2, 3, 4, 5, 6, 8):
        yield f"unsloth --bits {n}", mlx_node(unsloth, n)
    for n in (2, 3, 4, 5, 6, 8):
        yield f"unsloth --bits {n} --mxfp", mlx_node(unsloth, n, mxfp=True)
    yield "unsloth --mode nvfp4", mlx_node(unsloth, nvfp4=True)
    yield "unsloth --bits 4 --group 32", mlx_node(unsloth, 4, group=32)
    for era in ("2026-06", "2026-07"):
        yield f"unsloth --bits 4 --set era={era}", mlx_node(unsloth, 4, era=era)
        yield f"unsloth --bits 4 --mxfp --set era={era}", mlx_node(unsloth, 4, mxfp=True, era=era)
    yield "unsloth --mode nvfp4 --set era=2026-06", mlx_node(unsloth, nvfp4=True, era="2026-06")
    yield "unsloth_card_mxfp4", card_mxfp4
    yield "unsloth_fixed", official("mxfp4", "mxfp8")
    yield "unsloth_fixed --mode nvfp4", official("nvfp4", "fp8")
    for n in (2, 3, 4, 8):
        yield f"qwen3_5 --bits {n}", mlx_node(qwen3_5, n)
    yield "qwen3_5 --bits 4 --mxfp", mlx_node(qwen3_5, 4, mxfp=True)
    yield "qwen3_5 --mode nvfp4", mlx_node(qwen3_5, nvfp4=True)
    yield "qwen3_5 --bits 4 --set era=2026-06", mlx_node(qwen3_5, 4, era="2026-06")
    for low, high in ((2, 6), (3, 4), (3, 6), (4, 6)):
        for rule in ("mlx-node", "mlx-lm"):
            yield f"mixed_{low}_{high} --set rule={rule}", mlx_node(mixed(low, high, rule))
    yield "mixed_4_6 --mxfp", mlx_node(mixed(4, 6, "mlx-node"), mxfp=True)
    yield "nvidia", nvidia
    yield "config_i", config_i
    yield "qstream_mxfp4", qstream(CARD)
    some = ["*lm_head*", "*visual*", "*mtp*", "layers.3."]
    yield "qstream_mxfp4 --set exclude=" + json.dumps(some, separators=(",", ":")), qstream(some)
    for bits in (2, 4, 8):
        yield f"uniform --bits {bits}", mlx_lm("affine", bits)
    yield "uniform --bits 4 --group 32", mlx_lm("affine", 4, 32)
    for mode in ("mxfp4", "mxfp8", "nvfp4"):
        yield f"uniform --mode {mode}", mlx_lm(mode)
    yield "uniform --bits 4 --set like=mlx-node", no_recipe("affine", 4)
    for mode in ("mxfp4", "mxfp8", "nvfp4"):
        yield f"uniform --mode {mode} --set like=mlx-node", no_recipe(mode)
    yield "keep_bf16", keep_bf16
    yield "moonlet", own(2.0 ** -38, "keep", True)
    for level in (34, 42):
        yield f"moonlet --set level={level} --set mtp=drop", own(2.0 ** -level, "drop", True)
    yield from budgets(tensors)


def ranges(some, every):
    """{2, 4, 5}, {0, 1, 2, 4, 5} -> "2-5": of the layers that have the kind."""
    out, run = [], []
    for i in sorted(every) + [None]:
        if i in some:
            run.append(i)
        elif run:
            out.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
            run = []
    return ",".join(out)


def section(name, tensors, decide):
    rows, layers, sizes, n_text = {}, {}, {}, 0
    for t in tensors:
        d = decide(t)
        if d == BF16 and t.key.endswith("A_log"):
            d = F32  # kept as it is stored
        d = fits(t, d)
        row = rows.setdefault(text(d), {"n": 0, "bytes": 0, "kinds": {}})
        row["n"] += 1
        row["bytes"] += n_bytes(t, d)
        row["kinds"].setdefault(t.kind, set()).add(t.layer)
        layers.setdefault(t.kind, set()).add(t.layer)
        part = t.kind if t.kind in ("vision", "mtp") else "text"
        sizes[part] = sizes.get(part, 0) + n_bytes(t, d)
        n_text += t.size if part == "text" else 0
    lines = [f"## {name}"]
    for label in sorted(rows):
        row, kinds = rows[label], []
        for kind in sorted(row["kinds"]):
            some = row["kinds"][kind]
            kinds.append(kind if some == layers[kind] else
                         f"{kind}[{ranges(some, layers[kind])}]")
        lines.append(f"{label}: {row['n']} tensors, {row['bytes']} bytes: {' '.join(kinds)}")
    lines.append("text %d bytes, %.4f bits per weight; vision %d, mtp %d" % (
        sizes["text"], sizes["text"] * 8 / n_text, sizes["vision"], sizes["mtp"]))
    return "\n".join(lines) + "\n"


def main():
    for model in MODELS:
        config = json.loads((HERE / f"../configs/{model}.json").read_text())
        tensors = tensors_of(config)
        text_ = "\n".join(section(name, tensors, decide) for name, decide in sections(tensors))
        (HERE / f"{model}.txt").write_text(text_)


if __name__ == "__main__":
    main()
