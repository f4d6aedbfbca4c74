#!/usr/bin/env python3
"""Renders the templates of a row file again and rewrites what came out: rerender.py language.jsonl.

To add cases, append rows with `name`, `tier`, `template` and `context`. Needs transformers."""
import json
import sys
from render import render, write

path = sys.argv[1]
with open(path, encoding="ascii") as f:
    rows = [json.loads(line) for line in f]
kept = [{k: row[k] for k in ("name", "tier", "template", "context")} for row in rows]
write(path, [{**row, **render(row["template"], row["context"])} for row in kept])
