#!/usr/bin/env bash
# The figures of docs/benchmarks.md on an accelerator: bash benchmarks/gpu.sh [OUT_FOLDER]
# Needs a Python with JAX for the device; installs this package beside it. Under ten minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-bench-results}"
mkdir -p "$out"

python -m venv --system-site-packages "$out/venv"
"$out/venv/bin/python" -m pip install -q --no-deps --editable .
"$out/venv/bin/python" -c "import transformer_vq, optax, grain, orbax.checkpoint, tyro, rich" ||
  "$out/venv/bin/python" -m pip install -q --constraint constraints.txt --editable .
tvq="$out/venv/bin/tvq"

run() { # NAME ARGUMENTS...
  local name="$1"
  shift
  echo "== tvq bench $*"
  timeout 240 "$tvq" bench "$@" --json > "$out/$name.json" || echo "failed: $name"
}

small=(--preset small --config.window-len 256 --config.block-len 256)
run decode-small decode "${small[@]}" --config.compute-dtype bfloat16 --config.state-dtype bfloat16
run decode-enwik8 decode --preset enwik8 --config.state-dtype bfloat16 --batch 1 8 32
run prefill-enwik8 prefill --preset enwik8 --length 2048 100000
run sample-enwik8 sample --preset enwik8 --batch 1 32
run train-enwik8 train --preset enwik8 --batch 8 --length 8192
run train-lengths train "${small[@]}" --batch 1 --length 2048 8192 32768 131072 --attention vq
run train-full train "${small[@]}" --batch 1 --length 2048 8192 --attention full
TVQ_TEST_PLATFORM=cuda timeout 300 "$out/venv/bin/python" -m pytest -q -n 0 \
  tests/test_reference.py tests/test_extend.py tests/test_pieces.py > "$out/tests.log" 2>&1 ||
  echo "tests: see $out/tests.log"
echo "done: $out"
