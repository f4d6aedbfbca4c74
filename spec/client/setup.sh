#!/usr/bin/env bash
# Installs the clients of the #client specs outside the tree and prints their directory.
set -euo pipefail
dir=${MOONLET_CLIENTS:-${XDG_CACHE_HOME:-$HOME/.cache}/moonlet-clients}
mkdir -p "$dir"
exec 9>"$dir/lock"
flock 9
{
  [ -x "$dir/venv/bin/python" ] || python3 -m venv "$dir/venv"
  "$dir/venv/bin/python" -c 'import openai; assert openai.__version__ == "2.54.0"' 2>/dev/null ||
    "$dir/venv/bin/pip" install -q openai==2.54.0
  pi=@mariozechner/pi-coding-agent
  if ! grep -q '"version": "0.73.1"' "$dir/pi/node_modules/$pi/package.json" 2>/dev/null; then
    mkdir -p "$dir/pi"
    cd "$dir/pi"
    echo '{"private":true}' >package.json
    npm install --ignore-scripts --no-audit --no-fund "$pi@0.73.1"
  fi
} >"$dir/setup.log" 2>&1 || {
  tail -n 20 "$dir/setup.log" >&2
  exit 1
}
echo "$dir"
