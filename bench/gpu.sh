#!/usr/bin/env bash
# All that a GPU is needed for, in one call: bench/gpu.sh OUT [SECONDS]
#
# Builds the extension in place, runs the tests on the GPU (every dtype), compute-sanitizer on the extension and on
# the kernels, the bench and the training step, within SECONDS (default 540). Installs nothing and needs no network;
# works from the source tree. Leaves in OUT: log.txt, bench.json, the plots, bench.html, train.json, and says what it
# skipped and why. FASTLLM_GPU_DRY_RUN=1 takes every path of it that needs no GPU, on little.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: bench/gpu.sh OUT [SECONDS]}")
budget=${2:-540}
mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1
python=${PYTHON:-python3}
failed=()

left() { echo $((budget - SECONDS)); }

# step NAME LIMIT COMMAND...: runs within LIMIT seconds, and within what is left of the budget.
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
  timeout -k 5 "$limit" "$@" || status=$?
  echo "== $name: exit $status after $((SECONDS - began)) s$([ "$status" = 124 ] && echo ' (out of time)')"
  [ "$status" = 0 ] || failed+=("$name (exit $status)")
  return "$status"
}

if [ -z "${FASTLLM_GPU_DRY_RUN:-}" ]; then
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total --format=csv \
    || { echo "no GPU here: nvidia-smi failed"; exit 2; }
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1)}
  export TORCH_CUDA_ARCH_LIST
  device=cuda wish=1
else
  device=cpu wish=0 # every path of this script, on a machine without a GPU
fi

step build 120 env FASTLLM_CUDA=$wish "$python" fastllm/extension/compile.py

# The source tree as the package that setup.py would install: kernels/, bench/ and csrc/ inside fastllm/.
tree=$PWD/build/gpu
rm -rf "$tree"
mkdir -p "$tree/fastllm"
ln -s "$PWD"/fastllm/* "$tree/fastllm/"
ln -s "$PWD/kernels" "$PWD/bench" "$PWD/csrc" "$tree/fastllm/"
export PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

step info 60 "$python" -m fastllm info

# pyproject.toml's options, but for one process: what is not installed here cannot be asked for.
pytest=("$python" -m pytest -o addopts="-q --strict-markers --import-mode=importlib" -p no:cacheprovider --tb=short)
tests=(tests --maxfail=25)
# One test file a line that cannot be imported here, with the packages that it lacks.
lacking=$("$python" - << 'PYTHON'
import ast, importlib.util, pathlib


def lacking(file):
    """The packages that a test file, or another file in tests/ that it imports, would not find."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for package in (name.partition(".")[0] for name in names):
            beside = file.with_name(f"{package}.py")
            if beside.exists() and beside != file:
                found |= lacking(beside)
            elif importlib.util.find_spec(package) is None:
                found.add(package)
    return found


if importlib.util.find_spec("xdist"):
    print("-n 6")
for file in sorted(pathlib.Path("tests").rglob("test_*.py")):
    packages = lacking(file)
    if packages:
        print(file, ",".join(sorted(packages)))
PYTHON
)
while read -r file package; do
  case $file in
    "") ;;
    -n) tests+=(-n "$package") ;;
    *)
      echo "== $file: skipped, not installed here: $package"
      tests+=(--ignore "$file")
      ;;
  esac
done <<< "$lacking"
if [ "$device" = cpu ]; then tests=(tests/test_registry.py); fi
step tests 210 "${pytest[@]}" "${tests[@]}"

if [ "$device" = cuda ] && command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "${pytest[@]}" -x tests/test_ops.py -k "two_backwards and (native or triton)"
  done
else
  echo "== compute-sanitizer: skipped, $([ "$device" = cuda ] && echo 'it is not installed' || echo 'no GPU')"
fi

bench=(--sweep)
if [ "$device" = cpu ]; then bench=(layer_norm swiglu --shape "one token" --rounds 2); fi
limit=$(($(left) * 3 / 5))
step bench "$limit" "$python" -m fastllm bench --device $device --out "$out" --budget $((limit > 40 ? limit - 15 : 25)) "${bench[@]}"
train=(--preset gpt2 --batch-size 32 --steps 2 --rounds 5 --compile)
if [ "$device" = cpu ]; then train=(--preset tiny --batch-size 1 --context-length 32 --steps 1 --rounds 1); fi
step train $(($(left) - 10)) "$python" -m fastllm.bench.train --device $device --json "$out/train.json" "${train[@]}"

echo "== done after $SECONDS s; failed: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
