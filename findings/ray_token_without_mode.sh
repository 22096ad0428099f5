#!/usr/bin/env bash
# A Ray head that finds a token (RAY_AUTH_TOKEN, or ~/.ray/auth_token) demands it of everybody by itself. Nodes and drivers
# that have the very same token do not use it by themselves: they are refused until RAY_AUTH_MODE=token is set for them too.
#
# Expected: one rule for both sides, so that one environment on all machines makes a cluster. With it `ray start --head`
# succeeds, and `ray start --address` of the next machine ends with "token is missing or incorrect".
#
# Seen with: ray 2.60.0, Python 3.11, by the variable and by the file; without any token all of them go together.
# Fails with: MODE=token, under which the node joins.
set -euo pipefail
RAY=${RAY:-2.60.0}
MODE=${MODE:-}

work=$(mktemp -d)
export HOME="$work/home" RAY_TMPDIR="$work/t" RAY_USAGE_STATS_ENABLED=0
unset RAY_AUTH_TOKEN RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH RAY_ADDRESS
if [ -n "$MODE" ]; then export RAY_AUTH_MODE="$MODE"; fi
trap '"$work/venv/bin/ray" stop --force > /dev/null 2>&1 || true; rm -rf "$work"' EXIT
mkdir -p "$HOME" "$RAY_TMPDIR"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "ray==$RAY" "setuptools==80.9.0"

held=0
try() {  # name
  port=$("$work/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  "$work/venv/bin/ray" start --head --port="$port" --num-cpus=1 --include-dashboard=false \
    --object-store-memory=80000000 > "$work/head.txt" 2>&1
  if timeout 120 "$work/venv/bin/ray" start --address="127.0.0.1:$port" --num-cpus=1 > "$work/node.txt" 2>&1; then
    said="joined"
  else
    said="refused: $(grep -o 'Authentication token is missing or incorrect' "$work/node.txt" | head -n 1)"
  fi
  "$work/venv/bin/ray" stop --force > /dev/null 2>&1 || true
  echo "ray $RAY, $1, RAY_AUTH_MODE=${MODE:-(unset)}: a head starts, a node with the same is $said"
  [ "$said" = "$2" ] || held=1
}

refused="refused: Authentication token is missing or incorrect"
RAY_AUTH_TOKEN=$(printf '0%.0s' {1..64}) try "RAY_AUTH_TOKEN" "$refused"
mkdir -p "$HOME/.ray"
printf '0%.0s' {1..64} > "$HOME/.ray/auth_token"
chmod 600 "$HOME/.ray/auth_token"
try "~/.ray/auth_token" "$refused"
if [ "$held" != 0 ]; then
  echo "it does not hold any more"
  exit 1
fi
echo "it holds"
