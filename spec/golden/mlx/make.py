#!/usr/bin/env python3
"""Build a random tiny Qwen3.5 checkpoint in the Hugging Face layout and convert
it with the installed, unmodified mlx-lm.

  make.py SPEC.json OUT      -> OUT/hf, OUT/mlx

SPEC.json: {"seed", "moe": bool, "tied": bool, "mtp": bool, "vision": bool,
 "text": {fields of text_config}, "convert": {arguments of mlx_lm.convert},
 "rules": [[regex on the MLX module path, value], ...]}; first match wins, value is
 true (global setting), false (stay dense) or {"group_size","bits","mode",...}.
 Without "rules" the stock choice of mlx-lm is used.
"""
import json, os, re, shutil, sys
import numpy as np

f4 = np.float32


def bf16_bits(x):
    u = np.ascontiguousarray(x, f4).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2")


def write_safetensors(path, tensors, meta):
    hdr, off, blobs = {"__metadata__": meta}, 0, []
    for k, (dt, v) in sorted(tensors.items()):
        b = (bf16_bits(v) if dt == "BF16" else np.ascontiguousarray(v, f4)).tobytes()
        hdr[k] = {"dtype": dt, "shape": list(v.shape), "data_offsets": [off, off + len(b)]}
        off += len(b); blobs.append(b)
    h = json.dumps(hdr, separators=(",", ":")).encode(); h += b" " * (-len(h) % 8)
    with open(path, "wb") as f:
        f.write(len(h).to_bytes(8, "little") + h + b"".join(blobs))


def build_hf(spec, out):
    os.makedirs(out)
    r = np.random.default_rng(spec["seed"]); c = spec["text"]; T = {}
    H, L, V = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"]
    nk, nv = c["linear_num_key_heads"], c["linear_num_value_heads"]
    dk, dv, kw = c["linear_key_head_dim"], c["linear_value_head_dim"], c["linear_conv_kernel_dim"]
    nh, nkv, hd = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    exact, og = spec.get("f32_small", True), spec.get("out_gain", 0.5)   # out_gain: size of block outputs against the residual
    def lin(name, *shape, gain=1.0):
        w = r.standard_normal(shape) * gain / np.sqrt(shape[-1])
        w *= np.exp(0.3 * r.standard_normal(shape[-1]))          # uneven input channels, as in trained models
        T[name] = ("BF16", w.astype(f4))
    def norm(name, n): T[name] = ("BF16", (r.standard_normal(n) * 0.15).astype(f4))
    def attn(p):
        lin(p + "self_attn.q_proj.weight", nh * hd * 2, H); lin(p + "self_attn.k_proj.weight", nkv * hd, H)
        lin(p + "self_attn.v_proj.weight", nkv * hd, H); lin(p + "self_attn.o_proj.weight", H, nh * hd, gain=og)
        norm(p + "self_attn.q_norm.weight", hd); norm(p + "self_attn.k_norm.weight", hd)
    def gdn(p):
        p += "linear_attn."; cd = 2 * nk * dk + nv * dv
        lin(p + "in_proj_qkv.weight", cd, H); lin(p + "in_proj_z.weight", nv * dv, H)
        lin(p + "in_proj_a.weight", nv, H); lin(p + "in_proj_b.weight", nv, H); lin(p + "out_proj.weight", H, nv * dv, gain=og)
        T[p + "conv1d.weight"] = ("BF16", (r.standard_normal((cd, 1, kw)) * 0.5).astype(f4))
        T[p + "A_log"] = ("F32" if exact else "BF16", np.log(r.uniform(0.05, 8, nv)).astype(f4))
        T[p + "dt_bias"] = ("BF16", r.uniform(-4, 1, nv).astype(f4))
        T[p + "norm.weight"] = ("F32" if exact else "BF16", (0.9 + 0.1 * r.standard_normal(dv)).astype(f4))
    def mlp(p):
        if not spec["moe"]:
            I = c["intermediate_size"]
            lin(p + "mlp.gate_proj.weight", I, H); lin(p + "mlp.up_proj.weight", I, H); lin(p + "mlp.down_proj.weight", H, I, gain=og)
            return
        E, I, S = c["num_experts"], c["moe_intermediate_size"], c["shared_expert_intermediate_size"]
        lin(p + "mlp.gate.weight", E, H, gain=1.5)
        lin(p + "mlp.experts.gate_up_proj", E, 2 * I, H); lin(p + "mlp.experts.down_proj", E, H, I, gain=og)
        lin(p + "mlp.shared_expert.gate_proj.weight", S, H); lin(p + "mlp.shared_expert.up_proj.weight", S, H)
        lin(p + "mlp.shared_expert.down_proj.weight", H, S, gain=og); lin(p + "mlp.shared_expert_gate.weight", 1, H)
    def layer(p, full):
        norm(p + "input_layernorm.weight", H); norm(p + "post_attention_layernorm.weight", H)
        (attn if full else gdn)(p); mlp(p)
    base = "model.language_model."
    lin(base + "embed_tokens.weight", V, H, gain=6)
    for i in range(L): layer(f"{base}layers.{i}.", (i + 1) % c["full_attention_interval"] == 0)
    norm(base + "norm.weight", H)
    if not spec["tied"]: lin("lm_head.weight", V, H, gain=2)
    if spec["mtp"]:
        lin("mtp.fc.weight", H, 2 * H); layer("mtp.layers.0.", True)
        for n in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"): norm(f"mtp.{n}.weight", H)
    if spec["vision"]:
        T["model.visual.patch_embed.proj.weight"] = ("BF16", r.standard_normal((8, 3, 2, 4, 4)).astype(f4))
        T["model.visual.patch_embed.proj.bias"] = ("BF16", r.standard_normal(8).astype(f4))
    write_safetensors(f"{out}/model.safetensors", T, {"format": "pt"})
    json.dump({"metadata": {"total_size": sum(v.size * (2 if d == "BF16" else 4) for d, v in T.values())},
               "weight_map": {k: "model.safetensors" for k in sorted(T)}}, open(f"{out}/model.safetensors.index.json", "w"), indent=1)
    kind = "qwen3_5_moe" if spec["moe"] else "qwen3_5"
    cls = "Qwen3_5MoeForConditionalGeneration" if spec["moe"] else "Qwen3_5ForConditionalGeneration"
    types = ["full_attention" if (i + 1) % c["full_attention_interval"] == 0 else "linear_attention" for i in range(L)]
    text = dict(c, model_type=kind + "_text", dtype="bfloat16", layer_types=types, tie_word_embeddings=spec["tied"], hidden_act="silu",
                attention_bias=False, attention_dropout=0.0, attn_output_gate=True, mamba_ssm_dtype="float32", initializer_range=0.02,
                use_cache=True, mtp_num_hidden_layers=int(spec["mtp"]), mtp_use_dedicated_embeddings=False, eos_token_id=0)
    cfg = {"architectures": [cls], "model_type": kind, "text_config": text, "tie_word_embeddings": spec["tied"],
           "image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253,
           "transformers_version": "5.2.0"}
    if spec["vision"]:
        cfg["vision_config"] = {"model_type": kind, "depth": 0, "hidden_size": 8, "in_channels": 3, "patch_size": 4,
                                "temporal_patch_size": 2, "spatial_merge_size": 1, "num_heads": 1, "intermediate_size": 8,
                                "out_hidden_size": H, "num_position_embeddings": 4}
    json.dump(cfg, open(f"{out}/config.json", "w"), indent=2)
    json.dump({"eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
              open(f"{out}/generation_config.json", "w"), indent=2)
    tokenizer(V, out)


def tokenizer(V, out):
    """Byte-level BPE without merges: specials, then tab, newline, printable ASCII and bytes >= 0x80, then filler."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
    printable = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))   # the usual byte <-> unicode table
    table, extra = {}, 0
    for b in range(256):
        table[b] = chr(b) if b in printable else chr(256 + extra); extra += b not in printable
    have = [9, 10] + list(range(32, 127)) + list(range(128, 256))
    vocab = {t: i for i, t in enumerate(special)}
    for b in have: vocab[table[b]] = len(vocab)
    while len(vocab) < V: vocab[f"<|unused{len(vocab)}|>"] = len(vocab)
    assert len(vocab) == V, "vocab_size too small for the toy tokenizer"
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": i < 3}
             for i, t in enumerate(special)]
    tok = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
           "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
           "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
           "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                     "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": []}}
    json.dump(tok, open(f"{out}/tokenizer.json", "w"), ensure_ascii=False)
    tmpl = ("{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
            "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
            "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- else %}{{ '<think>\\n' }}{%- endif %}{%- endif %}")
    open(f"{out}/chat_template.jinja", "w").write(tmpl)
    json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None,
               "clean_up_tokenization_spaces": False, "model_max_length": 262144, "add_bos_token": False},
              open(f"{out}/tokenizer_config.json", "w"), indent=1)


def main():
    spec = json.load(open(sys.argv[1])); out = sys.argv[2]
    if os.path.exists(out + "/hf"): shutil.rmtree(out + "/hf")
    if os.path.exists(out + "/mlx"): shutil.rmtree(out + "/mlx")
    build_hf(spec, out + "/hf")
    from mlx_lm.convert import convert
    rules = [(re.compile(p), v) for p, v in spec.get("rules", [])]
    def pred(path, module):
        for p, v in rules:
            if p.search(path): return dict(v) if isinstance(v, dict) else v
        return True
    convert(out + "/hf", out + "/mlx", quantize=True, quant_predicate=pred if rules else None, **spec["convert"])


if __name__ == "__main__":
    main()
