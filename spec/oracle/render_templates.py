#!/usr/bin/env python3
"""Renders conversations through chat templates with transformers' Jinja environment.

    render_templates.py conversations.json DIR > rows.jsonl

One row per template file in DIR, conversation and options: `template`, `conversation`, `context`, and `output` or
`error` (exception class) with `message`. Needs transformers and jinja2.
"""
import importlib.util
import json
import pathlib
import sys

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden" / "jinja"


def load_render():
    spec = importlib.util.spec_from_file_location("render", GOLDEN / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.render


def main(conversations, directory):
    render = load_render()
    data = json.loads(pathlib.Path(conversations).read_text(encoding="utf-8"))
    for path in sorted(pathlib.Path(directory).glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        for conversation in data["conversations"]:
            for options in data["options"]:
                context = {"messages": conversation["messages"], "documents": None, "bos_token": "<s>",
                           "eos_token": "</s>", **options}
                context["tools"] = data["tools"] if options.get("tools") else None
                row = {"template": path.name, "conversation": conversation["name"], "context": context}
                print(json.dumps({**row, **render(source, context)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
