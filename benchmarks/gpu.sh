#!/usr/bin/env bash
# The figures of docs/benchmarks.md on an accelerator:
#
#   bash benchmarks/gpu.sh [OUT_FOLDER [NAME...]]    # only measurements of these names, by default all
#   SMOKE=1 bash benchmarks/gpu.sh                   # tiny, to see that all of it runs; on a CPU too
#
# Needs a Python (python3, or $PYTHON) with JAX for the device. If our other dependencies are there
# too, nothing is installed and no network is needed; else they are, into build/gpu-venv.
# A measurement that fails or takes more than four minutes is named, and the next one begins.
set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${1:-$repository/build/bench-results}"
names=" ${*:2} "
mkdir -p "$out"
out="$(cd "$out" && pwd)"
cd "$repository"

python="${PYTHON:-python3}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
needs="import transformer_vq.measure.bench, transformer_vq.cli.bench"
if ! "$python" -c "$needs"; then
  "$python" -m venv --system-site-packages build/gpu-venv
  python=build/gpu-venv/bin/python
  "$python" -m pip install -q '.[test]' # the JAX that is there stays, if it is one that we support
  "$python" -c "$needs"
fi
"$python" -c "import jax; print(jax.__version__, jax.devices())"

wanted() { # NAME: whether it was asked for
  [[ "$names" == "  " || "$names" == *" $1 "* ]]
}

run() { # NAME ARGUMENTS...
  local name="$1"
  shift
  wanted "$name" || return 0
  echo "== $name: tvq bench $*"
  timeout 240 "$python" -c "import sys; from transformer_vq.cli import main; sys.exit(main())" \
    bench "$@" --json > "$out/$name.json" || echo "failed: $name"
}

small=(--preset small --config.window-len 256 --config.block-len 256)
bf16=(--config.compute-dtype bfloat16 --config.state-dtype bfloat16)
enwik8=(--preset enwik8 --config.state-dtype bfloat16)
batches=(1 8 32) few=(1 32) prompts=(2048 100000) lengths=(2048 8192 32768 131072) rows=8
tests=(tests/nn/test_reference.py tests/nn/test_extend.py tests/nn/test_products.py)
if [[ -n "${SMOKE:-}" ]]; then
  small=(--preset tiny --config.num-layers 1 --config.d-model 16 --config.d-k 8 --repeats 1)
  small+=(--config.codebook-size 8 --config.window-len 8 --config.block-len 8)
  bf16=() enwik8=("${small[@]}") batches=(2) few=(2) prompts=(20) lengths=(32 64) rows=1
  tests=(tests/nn/test_products.py -k same_product)
fi
run decode-small decode "${small[@]}" "${bf16[@]}" --batch "${batches[@]}"
run decode-enwik8 decode "${enwik8[@]}" --batch "${batches[@]}"
run prefill-enwik8 prefill "${enwik8[@]}" --length "${prompts[@]}"
run sample-enwik8 sample "${enwik8[@]}" --batch "${few[@]}"
run train-enwik8 train "${enwik8[@]}" --batch "$rows" --length "${lengths[1]}"
run train-lengths train "${small[@]}" --batch 1 --length "${lengths[@]}" --attention vq
run train-full train "${small[@]}" --batch 1 --length "${lengths[@]:0:2}" --attention full

if wanted tests; then
  platform="$("$python" -c "import jax; print(jax.default_backend().replace('gpu', 'cuda'))")"
  echo "== tests on $platform"
  TVQ_TEST_PLATFORM="$platform" timeout 300 "$python" -m pytest -q "${tests[@]}" \
    > "$out/tests.log" 2>&1 || echo "failed: tests, see $out/tests.log"
fi
echo "done: $out"
