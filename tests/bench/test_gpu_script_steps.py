"""What bench/gpu.sh does where there is a GPU, step by step, with stand-ins for everything that it starts."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.sh"
# Notes its arguments and what is set for it, one call a line, and does nothing.
STAND_IN = r"""#!/usr/bin/env bash
names='PYTORCH_NO_CUDA_MEMORY_CACHING|TRITON_INSTRUMENTATION_MODE|TRITON_CACHE_DIR|TORCH_CUDA_ARCH_LIST|FASTLLM_COMMIT'
echo "$(basename "$0") $* $(env | grep -E "^($names)=" | tr '\n' ' ')" >> "$CALLS"
case "$*" in
  --query-gpu=compute_cap*) printf "${CAPABILITIES:-9.0\\n}" ;;
  *"prepare commit"*) echo abc ;;
  *missing_packages.py) echo "tests/test_lacking.py some_package" ;;
  *"--junitxml"*) touch "$OUT/tests.xml" ;;
  *"fastllm bench "*)
    touch "$OUT"/{bench.json,bench.html,roofline.png,speedup.png,{rms_norm,swiglu,geglu}-bfloat16-cold.png} ;;
  *bench.train*) touch "$OUT/train.json" ;;
esac
if [ -n "$SLOW" ] && [[ "$*" == *"$SLOW"* ]]; then sleep 60; fi
"""


@pytest.fixture
def gpu_script(tmp_path):
    """``run(*options, slow="")``: (exit status, log, calls) of the script; calls that have ``slow`` take a minute."""
    tree, tools = tmp_path / "tree", tmp_path / "tools"
    for folder in (tools, tmp_path / "cache", *(tree / name for name in ("bench", "fastllm", "kernels", "csrc"))):
        folder.mkdir(parents=True)
    shutil.copy(SCRIPT, tree / "bench")
    for name in ("python3", "nvidia-smi", "compute-sanitizer"):
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    calls = tmp_path / "calls"
    unset = ("PYTHON", "FASTLLM_GPU_DRY_RUN", "TORCH_CUDA_ARCH_LIST", "TRITON_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls)}
    environment["OUT"] = str(tmp_path / "out")

    def run(*options, slow="", **variables):
        arguments = [tree / "bench" / "gpu.sh", tmp_path / "out", *options]
        set_for_it = environment | {"SLOW": slow} | variables
        quiet = subprocess.DEVNULL
        status = subprocess.run(arguments, env=set_for_it, stdout=quiet, stderr=quiet).returncode
        return status, (tmp_path / "out" / "log.txt").read_text(), calls.read_text().splitlines()

    return run


def _steps(log):
    """(name, second at which it begins, limit) of every step."""
    return [(n, int(at), int(most)) for n, at, most in re.findall(r"^== (.+) \(at (\d+) s, up to (\d+) s\)", log, re.M)]


def test_correctness_in_less_than_seven_minutes(gpu_script, tmp_path):
    status, log, calls = gpu_script("--part", "correctness", "--cache", str(tmp_path / "cache"))
    assert (status, "failed: none" in log) == (0, True), log
    names = ["build", "cache", "info", "tests", "memcheck", "racecheck", "synccheck", "initcheck", "consan"]
    assert [name for name, *_ in _steps(log)] == names
    assert all(at + limit <= 370 for _, at, limit in _steps(log))
    assert "tests/test_lacking.py: skipped, not installed here: some_package" in log
    (tests,) = (line for line in calls if "--junitxml" in line)
    # Parity first; what needs no GPU is left out, and no number of failures ends it.
    assert " tests/test_ops.py tests -m gpu " in tests
    assert "--ignore tests/test_lacking.py" in tests
    assert "maxfail" not in tests
    assert "TORCH_CUDA_ARCH_LIST=9.0" in calls[-1]
    assert "FASTLLM_COMMIT=abc" in tests
    # Blocks of torch's allocator have other bounds than the tensors in them.
    sanitized = [line for line in calls if line.startswith("compute-sanitizer")]
    assert len(sanitized) == 4
    for line in sanitized:
        assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in line
        assert "--error-exitcode 9 --report-api-errors no" in line
    instrumented = [line for line in calls if "TRITON_INSTRUMENTATION_MODE=consan" in line]
    assert len(instrumented) == 1
    for line in (*sanitized, *instrumented):
        assert "tests/test_ops.py tests/kernels/test_attention_hopper.py" in line
        assert "(two_backwards and (native or triton or hopper)) or packed_on_a_gpu or gradients_on_a_gpu" in line
    # Instrumented kernels are others, and must not lie where the prepared ones do.
    assert len({re.search(r"TRITON_CACHE_DIR=(\S+)", line)[1] for line in (tests, *instrumented)}) == 2


def test_the_sanitizer_of_a_toolkit_that_is_not_on_the_path_is_found(gpu_script, tmp_path):
    toolkit = tmp_path / "toolkit" / "bin"
    toolkit.mkdir(parents=True)
    (tmp_path / "tools" / "compute-sanitizer").rename(toolkit / "compute-sanitizer")
    *_, calls = gpu_script("--part", "correctness", CUDA_HOME=str(toolkit.parent))
    assert len([line for line in calls if line.startswith("compute-sanitizer")]) == 4


def test_the_extension_is_compiled_for_every_gpu_of_the_machine(gpu_script):
    *_, calls = gpu_script("--part", "correctness", CAPABILITIES="9.0\\n8.0\\n9.0\\n")
    assert "TORCH_CUDA_ARCH_LIST=8.0;9.0" in calls[-1].split()


def test_speed_in_less_than_seven_minutes(gpu_script):
    status, log, calls = gpu_script("--part", "speed")
    assert (status, "failed: none" in log) == (0, True), log
    assert [name for name, *_ in _steps(log)] == ["build", "info", "bench", "train"]
    assert all(at + limit <= 370 for _, at, limit in _steps(log))
    bench, train = (next(line for line in calls if what in line) for what in ("fastllm bench", "fastllm.bench.train"))
    assert "--device cuda --sweep" in bench
    assert re.search(r"--compile \S+ --device", bench)[0].split()[1] == "attention"
    # The time that the bench leaves is the training step's.
    limits = {name: limit for name, _, limit in _steps(log)}
    assert int(re.search(r"--budget (\d+)", bench)[1]) < limits["bench"] < limits["train"]
    assert " --compile" in train
    # What is cut off writes nothing: it ends by itself before that.
    assert int(re.search(r"--budget (\d+)", train)[1]) < limits["train"]


def test_no_more_than_eight_files_are_left(gpu_script, tmp_path):
    assert gpu_script()[0] == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(files) == 8
    assert files >= {"log.txt", "tests.xml", "bench.json", "bench.html", "roofline.png", "speedup.png", "train.json"}
    plots = subprocess.run(["tar", "-tf", tmp_path / "out" / "sweeps.tar"], capture_output=True, text=True, check=True)
    assert sorted(plots.stdout.split()) == [f"{op}-bfloat16-cold.png" for op in ("geglu", "rms_norm", "swiglu")]


def test_the_log_is_whole_when_the_script_ends(gpu_script, tmp_path):
    slow = tmp_path / "tools" / "tee"
    slow.write_text(f'#!/usr/bin/env bash\nsleep 0.5\nexec {shutil.which("tee")} "$@"\n')
    slow.chmod(0o755)
    status, log, _ = gpu_script("--part", "speed")
    assert (status, log.splitlines()[-1].startswith("== done after")) == (0, True)


def test_a_part_that_is_cut_off_says_what_it_left_out(gpu_script):
    status, log, calls = gpu_script("6", slow="--junitxml")
    assert status == 1
    assert re.search(r"^== tests: exit 124 after \d+ s \(out of time\)$", log, re.M)
    for name in ("memcheck", "consan", "bench", "train"):
        assert f"== {name}: skipped, the budget of 6 s is spent" in log
        assert f"{name} (skipped)" in log.splitlines()[-1]
    assert not [line for line in calls if line.startswith("compute-sanitizer")]
