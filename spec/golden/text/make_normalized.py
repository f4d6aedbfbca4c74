#!/usr/bin/env python3
"""Added tokens that are matched behind NFC: make_normalized.py OUTDIR   (needs tokenizers; 0.23.3 was used)

The demo tokenizer with tokens as a plain add_tokens() declares them ("normalized": true) among others that are matched in the
raw text; texts strung together at random from what makes the two differ: tokens that overlap, marks behind a token's last
character, characters that NFC turns into ASCII."""
import json, os, random, sys
from tokenizers import Tokenizer
out = sys.argv[1]
demo = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../../examples/demo-model/tokenizer.json")
tok = json.load(open(demo, encoding="utf-8"))
NORMALIZED = ["<tool>", "<a", "K;", "`x`", "qzx", " sp "]
RAW = ["tool>b", "zxqk", "<too", "\u00e9<"]
ATOMS = NORMALIZED + RAW + ["\u212a;", "\u212a\u037e", "\u1fefx\u1fef", "qzxqk", "e\u0301<", "\u0338", "\u0301", "\u0323\u0301", "\u0327",
                            "a", "x", "<", "\u4f60", "\u1100\u1161", "\uac00", " ", "\n", "<|im_end|>", "hello"]
top = max(a["id"] for a in tok["added_tokens"]) + 1
new = [dict(id=top + i, content=s, single_word=False, lstrip=False, rstrip=False, normalized=s in NORMALIZED, special=False)
       for i, s in enumerate(NORMALIZED + RAW)]
tok["added_tokens"] += new
with open(os.path.join(out, "normalized.added_tokens.json"), "w") as f:
    json.dump(new, f, indent=1)
t, r = Tokenizer.from_str(json.dumps(tok)), random.Random(5)
with open(os.path.join(out, "normalized-demo.jsonl"), "w") as f:
    for i in range(300):
        s = "".join(r.choice(ATOMS) for _ in range(r.randint(1, 12)))
        f.write(json.dumps(dict(name=f"normalized-{i}", text=s, ids=t.encode(s, add_special_tokens=False).ids)) + "\n")
