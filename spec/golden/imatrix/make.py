"""Imatrix files by independent writers, and the means that they hold: python make.py (see README.md).

GGUF by the gguf package of llama.cpp's authors, .dat by struct from the layout in llama.cpp's
tools/imatrix/imatrix.cpp, expected values by numpy from the activations themselves.
"""
import json
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
CHUNK = 32

BASE = dict(vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-6,
            hidden_act="silu", tie_word_embeddings=False, attention_bias=False,
            attn_output_gate=True, linear_conv_kernel_dim=4, linear_key_head_dim=4,
            linear_value_head_dim=4, linear_num_key_heads=2, linear_num_value_heads=6,
            layer_types=["linear_attention", "full_attention"], full_attention_interval=2,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0,
                                 partial_rotary_factor=0.5))
DENSE = dict(BASE, model_type="qwen3_5_text", intermediate_size=12)
MOE = dict(BASE, model_type="qwen3_5_moe_text", num_experts=3, num_experts_per_tok=2,
           moe_intermediate_size=4, shared_expert_intermediate_size=6)

MIXER = {
    0: ({"in_proj_qkv": "attn_qkv", "in_proj_z": "attn_gate", "in_proj_a": "ssm_alpha",
         "in_proj_b": "ssm_beta"}, "linear_attn", ("out_proj", "ssm_out", 24)),
    1: ({"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v"}, "self_attn",
        ("o_proj", "attn_output", 16)),
}


def sites(config):
    """(HF names, GGUF names, inputs, matrices) of every input site."""
    H, E = config["hidden_size"], config.get("num_experts", 0)
    for layer in range(config["num_hidden_layers"]):
        hf, gg = f"layers.{layer}.", f"blk.{layer}."
        readers, mixer, (out, out_gguf, width) = MIXER[layer]
        yield [hf + f"{mixer}.{n}" for n in readers], [gg + n for n in readers.values()], H, 1
        yield [hf + f"{mixer}.{out}"], [gg + out_gguf], width, 1
        if not E:
            yield [hf + "mlp.gate_proj", hf + "mlp.up_proj"], [gg + "ffn_gate", gg + "ffn_up"], H, 1
            yield [hf + "mlp.down_proj"], [gg + "ffn_down"], config["intermediate_size"], 1
            continue
        s, m = config["shared_expert_intermediate_size"], config["moe_intermediate_size"]
        yield ([hf + "mlp.gate", hf + "mlp.shared_expert_gate", hf + "mlp.shared_expert.gate_proj",
                hf + "mlp.shared_expert.up_proj"],
               [gg + "ffn_gate_inp", gg + "ffn_gate_inp_shexp", gg + "ffn_gate_shexp",
                gg + "ffn_up_shexp"], H, 1)
        yield [hf + "mlp.shared_expert.down_proj"], [gg + "ffn_down_shexp"], s, 1
        yield ([hf + "mlp.experts.gate_proj", hf + "mlp.experts.up_proj"],
               [gg + "ffn_gate_exps", gg + "ffn_up_exps"], H, E)
        yield [hf + "mlp.experts.down_proj"], [gg + "ffn_down_exps"], m, E


def tile_heads(x):
    """From Hugging Face's order of value heads (grouped by key head) to GGUF's."""
    return x.reshape(x.shape[:-1] + (2, 3, 4)).swapaxes(-3, -2).reshape(x.shape)


def collect(config, seed, tokens, unmet=()):
    """{site: (tokens of each matrix as [n, inputs])}; unmet: (layer, expert)."""
    rng, data = np.random.default_rng(seed), []
    for hf, gg, n_in, n_mat in sites(config):
        layer = int(hf[0].split(".")[1])
        scale = np.exp(rng.normal(0, 1, n_in))
        mats = []
        for m in range(n_mat):
            n = tokens if n_mat == 1 else 5 + 7 * m
            if (layer, m) in unmet and n_mat > 1:
                n = 0
            mats.append((rng.normal(0.3, 1, (n, n_in)) * scale).astype(np.float32))
        data.append((hf, gg, n_in, n_mat, mats))
    return data


def entries(data):
    """GGUF name -> (sum of squares, sum, count), [n_mat, n_in] in GGUF's order."""
    out = {}
    for hf, gg, n_in, n_mat, mats in data:
        sums2 = np.stack([(m.astype(np.float64) ** 2).sum(0) for m in mats]).astype(np.float32)
        sums = np.stack([m.astype(np.float64).sum(0) for m in mats]).astype(np.float32)
        counts = np.array([[len(m)] for m in mats], np.float32)
        for name in gg:
            reorder = tile_heads if name.endswith("ssm_out") else np.asarray
            out[name + ".weight"] = (reorder(sums2), reorder(sums), counts)
    return out


def expected(*runs):
    """HF name -> mean squares [n_mat, n_in]; matrices without tokens get the mean of all tokens."""
    out = {}
    for parts in zip(*runs):
        hf, _, n_in, n_mat, _ = parts[0]
        mats = [np.concatenate([p[4][m] for p in parts]) for m in range(n_mat)]
        pooled = (np.concatenate(mats).astype(np.float64) ** 2).mean(0)
        means = [(m.astype(np.float64) ** 2).mean(0) if len(m) else pooled for m in mats]
        for name in hf:
            out[name] = np.stack(means).astype(np.float32)
            out[name + ".pooled"] = pooled[None].astype(np.float32)
    return out


def write_gguf(path, table, with_sum, one_count=False, chunks=4, dataset="text.txt"):
    writer = gguf.GGUFWriter(path, "none")
    writer.kv_data[0].clear()  # llama.cpp writes no general.architecture here
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", CHUNK)
    for name in sorted(table):
        sums2, sums, counts = table[name]
        if one_count:
            counts = counts[:1]
        squeeze = lambda x: x.reshape(-1) if x.shape[0] == 1 else x  # ggml drops dimensions of 1
        writer.add_tensor(name + ".in_sum2", squeeze(sums2))
        writer.add_tensor(name + ".counts", squeeze(counts))
        if with_sum:
            writer.add_tensor(name + ".in_sum", squeeze(sums))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_dat(path, table, trailer):
    blob = struct.pack("<i", len(table))
    for name in sorted(table):
        sums2, _, counts = table[name]
        calls = int(-(-counts.max() // CHUNK))
        means = np.where(counts > 0, sums2 / np.maximum(counts, 1), 1.0) * calls
        blob += struct.pack("<i", len(name)) + name.encode()
        blob += struct.pack("<ii", calls, sums2.size) + means.astype("<f4").tobytes()
    if trailer:
        blob += struct.pack("<ii", 4, 8) + b"text.txt"
    Path(path).write_bytes(blob)


def fuse_experts(table):
    """One tensor for gate and up, as newer conversions have it."""
    out = {}
    for name, value in table.items():
        if "ffn_up_exps" not in name:
            out[name.replace("ffn_gate_exps", "ffn_gate_up_exps")] = value
    return out


def main():
    OUT.mkdir(exist_ok=True)
    for name, config in (("dense", DENSE), ("moe", MOE)):
        (OUT / f"{name}.config.json").write_text(json.dumps(config, indent=1) + "\n")
    dense = collect(DENSE, 1, 40)
    moe = collect(MOE, 2, 24, unmet={(0, 1)})
    more = collect(MOE, 3, 24)
    even = collect(MOE, 4, 24)
    for run in even:  # every expert meets as many tokens: one count says it all
        for m, x in enumerate(run[4]):
            run[4][m] = x[:5] if run[3] > 1 else x
    write_gguf(OUT / "dense.gguf", entries(dense), True)
    write_gguf(OUT / "moe.gguf", entries(moe), True)
    write_gguf(OUT / "more.gguf", entries(more), False, chunks=3, dataset="more.txt")
    write_gguf(OUT / "fused-one-count.gguf", fuse_experts(entries(even)), False, one_count=True)
    write_dat(OUT / "moe.dat", entries(moe), True)
    write_dat(OUT / "dense.dat", entries(dense), False)
    tables = {"dense": expected(dense), "moe": expected(moe), "moe+more": expected(moe, more),
              "even": expected(even)}
    # .dat forgets how many tokens an expert met: the mean of its neighbours is one of means.
    dat = expected(moe)
    for hf, _, n_in, n_mat, mats in moe:
        means = [(m.astype(np.float64) ** 2).mean(0) for m in mats if len(m)]
        pooled = np.mean(means, 0).astype(np.float32)
        for name in hf:
            dat[name + ".pooled"] = pooled[None]
            for m, x in enumerate(mats):
                if not len(x):
                    dat[name][m] = pooled
    tables["moe.dat"] = dat
    save_file({f"{run}/{name}": x for run, table in tables.items() for name, x in table.items()},
              OUT / "expected.safetensors")


main()
