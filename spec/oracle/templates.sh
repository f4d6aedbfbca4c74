#!/usr/bin/env bash
# Fetches the published chat templates that templates_spec.lua renders into
# $MOONLET_ORACLE/templates: those of trl and of llama.cpp, Qwen's among them. Called by .ci/oracle.
set -euo pipefail
dir=${MOONLET_ORACLE:?the directory to fetch into}
python=${PYTHON:-$dir/venv/bin/python}
[ -e "$dir/templates/qwen3_6.jinja" ] && exit 0

work=$(mktemp -d "$dir/templates.XXXXXX")
trap 'rm -rf "$work"' EXIT

"$python" -m pip download -q --no-deps -d "$work" trl==1.16.0
"$python" -m pip download -q --no-deps --no-binary llama-cpp-python -d "$work" \
  llama-cpp-python==0.3.36
mkdir "$work/templates"
"$python" - "$work" <<'EOF'
import pathlib
import sys
import tarfile
import zipfile

work = pathlib.Path(sys.argv[1])
out = work / "templates"
with zipfile.ZipFile(next(work.glob("trl-*.whl"))) as wheel:
    for name in wheel.namelist():
        if name.startswith("trl/chat_templates/") and name.endswith(".jinja"):
            (out / pathlib.PurePath(name).name).write_bytes(wheel.read(name))
with tarfile.open(next(work.glob("llama_cpp_python-*.tar.gz"))) as sdist:
    for member in sdist:
        if "/vendor/llama.cpp/models/templates/" in member.name and member.name.endswith(".jinja"):
            (out / pathlib.PurePath(member.name).name).write_bytes(sdist.extractfile(member).read())
EOF
(cd "$work/templates" && sha256sum --quiet -c - <<EOF
a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715  Qwen3.5-4B.jinja
273d8e0e683b885071fb17e08d71e5f2a5ddfb5309756181681de4f5a1822d80  qwen3_5_nothink.jinja
e84f32a23fdda27689f868aa4a1a5621f41133e51a48d7f3efcbea2839574259  qwen3_6.jinja
d287fb2edf144207f868ae1b282755dc19db2a3f1c5b3a3d57e9e5abffa98392  Qwen3-Coder.jinja
87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5  Qwen-Qwen3-0.6B.jinja
EOF
)
rm -rf "$dir/templates"
mv "$work/templates" "$dir/templates"
