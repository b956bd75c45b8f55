"""Where tests run: what ``-m gpu`` selects goes to the GPU and needs one, shown on a machine that has none."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from thorough import THOROUGH

TESTS = Path(__file__).parent
UNMARKED = """
import torch
from conftest import DEVICE
def test_one():
    torch.ones(2, device=DEVICE)
"""
FIXTURE = "def test_one(device): pass"
MARKED = """
import pytest, torch
from conftest import DEVICE
pytestmark = pytest.mark.runs_on("gpu", "interpreter")
def test_both():
    torch.ones(2, device=DEVICE)
@pytest.mark.runs_on("gpu")
def test_gpu():
    assert DEVICE.type == "cuda"
    torch.ones(2, device=DEVICE)
@pytest.mark.runs_on("interpreter")
def test_interpreter():
    assert DEVICE.type == "cpu"
@pytest.mark.runs_on("anywhere")
def test_anywhere():
    pass
"""


OPTIONS = ("-n", "0", "-p", "no:cacheprovider", "--tb=short")
# With this folder's conftest on a file elsewhere.
OUTSIDE = ("-c", str(TESTS.parent / "pyproject.toml"), "-p", "conftest")
# pytest on each file of a list; prints {name: (exit code, what it said)}. Each start of torch takes a second.
EACH = """
import contextlib, io, json, pathlib, pytest, sys
told = {}
for file in sys.argv[2:]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = pytest.main([*json.loads(sys.argv[1]), file])
    told[pathlib.Path(file).stem] = code, said.getvalue()
print(json.dumps(told))
"""


def run_pytest(*arguments) -> subprocess.CompletedProcess:
    return run_python("-m", "pytest", *OPTIONS, *arguments)


def run_python(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CUBLAS_WORKSPACE_CONFIG")}
    path = os.pathsep.join(p for p in (str(TESTS), os.environ.get("PYTHONPATH")) if p)
    return subprocess.run(
        command, env={**inherited, "PYTHONPATH": path}, cwd=TESTS.parent, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture
def outside(tmp_path):
    """``outside(text, *arguments)``: pytest with this folder's conftest on a test file elsewhere."""
    file = tmp_path / "test_file.py"

    def run(text, *arguments):
        file.write_text(text)
        return run_pytest(*arguments, *OUTSIDE, file)

    return run


@THOROUGH
def test_every_gpu_test_reaches_the_gpu_and_fails_nowhere_before():
    """Nothing puts CPU tensors on a kernel, and what never asks for the device is not selected: see ``as_if_gpu``.

    ``.ci/run`` has the first case of each.
    """
    run = run_pytest("-p", "as_if_gpu", "-m", "gpu", "tests")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr
    assert "deselected" in run.stdout


REFUSED = {
    "test_unmarked": (UNMARKED, "uses the device, and no runs_on marker says which it may be"),
    "test_fixture": (FIXTURE, "uses the device, and no runs_on marker says which it may be"),
    "test_other_place": (MARKED.replace('"gpu", "interpreter"', '"tpu"'), "or 'anywhere'; got ('tpu',)"),
    "test_no_place": (MARKED.replace('runs_on("anywhere")', "runs_on()"), "or 'anywhere'; got ()"),
}


@pytest.fixture(scope="module")
def without_gpu(tmp_path_factory):
    """What pytest says of a marked file and of each of REFUSED, on this machine: {name: (exit code, output)}."""
    folder = tmp_path_factory.mktemp("outside")
    texts = {"test_marked": MARKED, **{name: text for name, (text, _) in REFUSED.items()}}
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    options = json.dumps([*OPTIONS, *OUTSIDE, "-rs", "-v"])
    run = run_python("-c", EACH, options, *(folder / f"{name}.py" for name in texts))
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout)


def test_the_closest_marker_decides(outside, without_gpu):
    _, said = without_gpu["test_marked"]
    assert "3 passed, 1 skipped" in said, said
    assert "no GPU here" in said
    run = outside(MARKED, "-p", "as_if_gpu", "-m", "gpu", "-v")
    assert "2 passed, 2 deselected" in run.stdout, run.stdout
    run = outside(MARKED, "-p", "as_if_gpu", "-rs", "-v", "-m", "interpreter and not gpu")
    assert "Triton's interpreter is off where there is a GPU" in run.stdout


@pytest.mark.parametrize("name", REFUSED)
def test_a_test_that_does_not_say_where_it_runs_is_refused(without_gpu, name):
    code, said = without_gpu[name]
    assert code == 4, said
    assert REFUSED[name][1] in said


def test_a_test_that_needs_no_gpu_is_found_among_those_that_say_so(outside):
    run = outside(
        MARKED.replace("    torch.ones(2, device=DEVICE)\n@", "    pass\n@", 1), "-p", "as_if_gpu", "-m", "gpu"
    )
    assert run.returncode == 1
    assert "test_both: passes without a GPU, so it needs none" in run.stdout


def test_compilations_write_no_trace():
    """torch's own handler goes at the first record, where no TORCH_TRACE asks for one."""
    assert {type(handler).__name__ for handler in logging.getLogger("torch.__trace").handlers} <= {"LazyTraceHandler"}


def test_poisoned_memory_brings_no_warnings(poisoned_memory):
    torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


@pytest.mark.parametrize(("version", "interpreted"), [("2.11.0+cu130", False), ("2.13.0", False), ("2.13.0+cpu", True)])
def test_a_gpu_is_of_no_use_to_a_torch_without_cuda(version, interpreted):
    code = f"""
import importlib.metadata, os, pathlib, sys
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self: str(self) == "/dev/nvidiactl" or exists(self)
importlib.metadata.version = lambda name: {version!r}
sys.modules["pytest"] = None  # all is decided before it is imported
try:
    import conftest
except ImportError:
    print(os.environ.get("TRITON_INTERPRET"))
"""
    hidden = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    told = subprocess.run([sys.executable, "-c", code], cwd=TESTS, env=environment, capture_output=True, text=True)
    assert told.stdout.strip() == ("1" if interpreted else "None"), told.stderr
