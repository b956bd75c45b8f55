#!/usr/bin/env bash
# All that a GPU is needed for:
#
#   bench/gpu.sh OUT [SECONDS] [--part correctness|speed] [--cache FOLDER]
#   bench/gpu.sh --prepare FOLDER [ARCH [SECONDS]]
#
# correctness: builds the extension in place, runs the tests that need the GPU, the parity tests first, then
# compute-sanitizer's four tools and Triton's own checks. speed: the bench and the training step. Both parts without
# --part, within SECONDS (default 540). Of one part the default is 370: two calls, one for each part, and two minutes in
# which a machine starts take less than 15 minutes. Installs nothing, needs no network, works from the source tree.
# Leaves at most eight files in OUT: log.txt, tests.xml, bench.json, bench.html, roofline.png, speedup.png, sweeps.tar,
# train.json. It says what it skipped and why, and a part that is cut off leaves what it has done.
# FASTLLM_GPU_DRY_RUN=1 takes every path of it that needs no GPU: the tests are collected as on a GPU, and what would
# run there is told with its seconds.
#
# --prepare compiles the kernels on a machine without a GPU, for sm_ARCH (default 90), into FOLDER, and --cache uses
# them. Python's minor version and Triton's must be those of the GPU machine; where they differ, --cache says so.
# FOLDER is what is carried, 21 MB for sm_90; FOLDER.cache, 480 MB, stays: it makes a second call short.
set -uo pipefail
usage=$(sed -n '4,5s/^# *//p' "$0")
python=${PYTHON:-python3}
prepare="" part=all cache="" positional=()
while [ $# -gt 0 ]; do
  case $1 in
    --prepare | --part | --cache)
      [ $# -ge 2 ] || { echo "$1: expected a value"$'\n'"$usage" >&2; exit 2; }
      case $1 in
        --prepare) prepare=$(realpath -m "$2") ;;
        --part) part=$2 ;;
        --cache) cache=$(realpath -m "$2") ;;
      esac
      shift ;;
    -*) echo "$1: no such option"$'\n'"$usage" >&2; exit 2 ;;
    *) positional+=("$1") ;;
  esac
  shift
done
case $part in all | correctness | speed) ;; *) echo "--part: expected correctness or speed, got '$part'" >&2; exit 2 ;; esac
[ -z "$cache" ] || [ -d "$cache" ] || { echo "--cache: no folder $cache" >&2; exit 2; }
[ -n "$prepare" ] || [ ${#positional[@]} -gt 0 ] || { echo "$usage" >&2; exit 2; }
cd "$(dirname "$0")/.."

# The source tree as the package that setup.py would install: kernels/, bench/ and csrc/ inside fastllm/.
link_tree() {
  tree=$PWD/build/gpu
  rm -rf "$tree"
  mkdir -p "$tree/fastllm"
  ln -s "$PWD"/fastllm/* "$tree/fastllm/"
  ln -s "$PWD/kernels" "$PWD/bench" "$PWD/csrc" "$tree/fastllm/"
  export PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
}

# What Triton takes for unset, named, so that 3.9 does not warn and both machines have the same keys.
export TRITON_DEFAULT_FP_FUSION=${TRITON_DEFAULT_FP_FUSION:-1}

if [ -n "$prepare" ]; then
  link_tree
  exec "$python" -m fastllm.bench.prepare pack "$prepare" --arch "${positional[0]:-90}" --budget "${positional[1]:-inf}"
fi

out=$(realpath -m "${positional[0]}")
budget=${positional[1]:-$([ "$part" = all ] && echo 540 || echo 370)}
mkdir -p "$out"
exec > >(tee -a "$out/log.txt") 2>&1
log=$!
failed=()

left() { echo $((budget - SECONDS)); }

# step NAME LIMIT COMMAND...: runs within LIMIT seconds, and within what is left of the budget. Out of time, a command is
# interrupted, so that pytest tells what has failed by then. pytest-xdist waits up to 10 s for workers that a GPU holds,
# and writes tests.xml after that.
step() {
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
  [ "$limit" -le "$(left)" ] || limit=$(left)
  if [ "$limit" -lt 5 ]; then
    echo "== $name: skipped, the budget of $budget s is spent"
    failed+=("$name (skipped)")
    return 1
  fi
  echo "== $name (at $SECONDS s, up to $limit s): $*"
  timeout -s INT -k 15 "$limit" "$@" || status=$?
  echo "== $name: exit $status after $((SECONDS - began)) s$([ "$status" = 124 ] && echo ' (out of time)')"
  [ "$status" = 0 ] || failed+=("$name (exit $status)")
  return "$status"
}

# on_gpu NAME LIMIT COMMAND...: a step; a machine without a GPU says what it would be.
on_gpu() {
  if [ "$device" = cuda ]; then
    step "$@"
  else
    echo "== $1: on a GPU, up to $2 s: ${*:3}"
  fi
}

wants() { [ "$part" = all ] || [ "$part" = "$1" ]; }

if [ -z "${FASTLLM_GPU_DRY_RUN:-}" ]; then
  timeout 30 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total --format=csv \
    || { echo "no GPU here: nvidia-smi failed"; exit 2; }
  capabilities=$(timeout 30 nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | paste -sd ';' -)
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capabilities}
  export TORCH_CUDA_ARCH_LIST
  # As fastllm/extension/compile.py finds nvcc: compute-sanitizer lies beside it.
  export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
  device=cuda wish=1
else
  device=cpu wish=0 # every path of this script, on a machine without a GPU
fi

step build 120 env FASTLLM_CUDA=$wish PYTHONPATH=fastllm/extension "$python" -m compile
link_tree
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
if [ -n "$cache" ]; then step cache 60 "$python" -m fastllm.bench.prepare unpack "$cache" "$TRITON_CACHE_DIR"; fi
if [ -n "$cache" ] && [ ! -e .git ]; then
  FASTLLM_COMMIT=$("$python" -m fastllm.bench.prepare commit "$cache")
  export FASTLLM_COMMIT
fi
step info 60 "$python" -m fastllm info

# pyproject.toml's options, but for one process: what is not installed here cannot be asked for.
pytest=("$python" -m pytest -o addopts="-q --strict-markers --import-mode=importlib" -p no:cacheprovider --tb=short)

correctness() {
  local tests=(tests/test_ops.py tests -m gpu -v "--junitxml=$out/tests.xml") workers=()
  local file package tool checks chosen as_if
  while read -r file package; do
    [ -n "$file" ] || continue
    echo "== $file: skipped, not installed here: $package"
    tests+=(--ignore "$file")
  done < <("$python" tests/missing_packages.py)
  # CUDA's settings are read when it starts: see tests/conftest.py.
  if "$python" -c 'import xdist' 2> /dev/null; then workers=(-n 6); fi
  on_gpu tests 210 "${pytest[@]}" "${tests[@]}" "${workers[@]}"

  chosen="(two_backwards and (native or triton or hopper)) or packed_on_a_gpu or gradients_on_a_gpu"
  checks=("${pytest[@]}" -m gpu -x tests/test_ops.py tests/kernels/test_attention_hopper.py
    tests/kernels/test_attention_hopper_backward.py -k "$chosen")
  if [ "$device" = cpu ]; then # what both choose, collected as on a GPU
    as_if=(env "PYTHONPATH=$PWD/tests:$PYTHONPATH")
    step "collection of tests" 210 "${as_if[@]}" "${pytest[@]}" "${tests[@]}" -p as_if_gpu --collect-only -qqq
    step "collection of checks" 60 "${as_if[@]}" "${checks[@]}" -p as_if_gpu --collect-only -qq
  fi
  if [ "$device" = cuda ] && ! command -v compute-sanitizer > /dev/null; then
    echo "== compute-sanitizer: skipped, it is not installed"
  else
    # torch's allocator would hand out parts of large blocks, whose bounds are not the tensors'. CUDA's own errors are
    # torch's business: it asks for what may fail.
    for tool in memcheck racecheck synccheck initcheck; do
      on_gpu "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        --report-api-errors no "${checks[@]}"
    done
  fi
  if ! "$python" -c 'import sys; from triton import knobs; sys.exit(not hasattr(knobs.compilation, "instrumentation_mode"))'; then
    echo "== Triton's consan: skipped, this Triton has none"
  else
    on_gpu consan 60 env TRITON_INSTRUMENTATION_MODE=consan TRITON_CACHE_DIR="$PWD/build/consan" "${checks[@]}"
  fi
}

# A plot for each op's sweep, OP-DTYPE-CACHE.png, in one file; bench.html shows them too.
pack_sweeps() {
  local plots=("$out"/*-*.png)
  [ -e "${plots[0]}" ] || return 0
  tar -cf "$out/sweeps.tar" -C "$out" "${plots[@]##*/}" && rm "${plots[@]}"
}

speed() {
  local limit=$(($(left) * 3 / 5)) bench train
  bench=("$python" -m fastllm bench --out "$out" --budget $((limit > 40 ? limit - 15 : 25))
    --compile attention)
  train=("$python" -m fastllm.bench.train --json "$out/train.json")
  on_gpu bench "$limit" "${bench[@]}" --device cuda --sweep
  pack_sweeps
  if [ "$device" = cpu ]; then step bench "$limit" "${bench[@]}" --device cpu layer_norm swiglu --shape "one token" --rounds 2; fi
  limit=$(($(left) - 10))
  train+=(--budget $((limit > 40 ? limit - 15 : 25)))
  on_gpu train "$limit" "${train[@]}" --device cuda --preset gpt2 --batch-size 32 --steps 2 --rounds 5 --compile
  if [ "$device" = cpu ]; then
    step train "$limit" "${train[@]}" --device cpu --preset tiny --batch-size 1 --context-length 32 --steps 1 --rounds 1
  fi
}

if wants correctness; then correctness; fi
if wants speed; then speed; fi

echo "== done after $SECONDS s; failed: ${failed[*]:-none}"
# The files are taken away when this ends: the log has its last line by then.
exec >&- 2>&-
wait "$log"
[ ${#failed[@]} = 0 ]
