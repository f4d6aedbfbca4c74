#!/usr/bin/env bash
# Installs the clients of the #client specs outside the tree and prints their directory.
set -euo pipefail
dir=${MOONLET_CLIENTS:-${XDG_CACHE_HOME:-$HOME/.cache}/moonlet-clients}
mkdir -p "$dir"
exec 9>"$dir/lock"
flock 9
{
  [ -x "$dir/venv/bin/python" ] || python3 -m venv "$dir/venv"
  "$dir/venv/bin/python" -c 'import anthropic, openai
assert (anthropic.__version__, openai.__version__) == ("2.12.0", "2.54.0")' 2>/dev/null ||
    "$dir/venv/bin/pip" install -q anthropic==2.12.0 openai==2.54.0
  for package in playwright==1.56.0 schemathesis==4.32.5; do
    "$dir/venv/bin/pip" show -q "${package%%=*}" 2>/dev/null ||
      "$dir/venv/bin/pip" install -q "$package"
  done
  if ! command -v chromium; then
    root=()
    [ "$(id -u)" -eq 0 ] || root=(sudo)
    "${root[@]}" apt-get install -y -q chromium
  fi
  # folder, packages with their versions; nobody's install scripts run but those named here
  install_npm() {
    [ "$(cat "$dir/$1/installed" 2>/dev/null)" = "$*" ] && return
    mkdir -p "$dir/$1"
    echo '{"private":true}' >"$dir/$1/package.json"
    npm install --prefix "$dir/$1" --ignore-scripts --no-audit --no-fund "${@:2}"
    echo "$*" >"$dir/$1/installed"
  }
  install_npm pi @mariozechner/pi-coding-agent@0.73.1
  install_npm agents @anthropic-ai/claude-code@2.1.329 @openai/codex@0.169.0
  install_npm ai-sdk ai@7.0.173 @ai-sdk/openai-compatible@3.0.92 zod@4.1.13
  install_npm opencode opencode-ai@1.18.33
  install_npm qwen-code @qwen-code/qwen-code@0.24.4
  # Node.js as Vercel's SDK and qwen-code need it; Debian's is older
  install_npm node22 "node-linux-$(node -p process.arch)@22.23.3"
  ln -sfn "$dir"/node22/node_modules/node-linux-*/bin "$dir/node"
  # these put the programs of this platform in place
  (cd "$dir/agents" && node node_modules/@anthropic-ai/claude-code/install.cjs)
  (cd "$dir/opencode" && node node_modules/opencode-ai/postinstall.mjs)
} >"$dir/setup.log" 2>&1 || {
  tail -n 20 "$dir/setup.log" >&2
  exit 1
}
echo "$dir"
