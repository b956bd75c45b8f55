"""Choosing a backend: defaults, choices that cannot run, and what is said about it."""

import contextlib
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, HAS_GPU
from torch.utils._pytree import tree_map_only

import fastllm
from fastllm import backends, registry
from fastllm.bench.interpreter import without_interpreter
from fastllm.functional import layer_norm


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**without_interpreter(), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def picked(op: str, *args, **kwargs) -> str:
    """The backend that serves such a call."""
    return backends.pick(op, registry.OPS[op].call(*args, **kwargs)).backend


def test_cpu_never_defaults_to_the_interpreter():
    assert picked("layer_norm", torch.ones(2, 3), (3,)) == "eager"
    assert picked("swiglu", torch.ones(2, 4)) != "triton"


def test_the_choice_nests_and_is_undone_by_an_exception():
    with fastllm.backend("eager"):
        with contextlib.suppress(KeyError), fastllm.backend("triton"):
            assert backends.chosen_backend() == "triton"
            raise KeyError
        assert backends.chosen_backend() == "eager"
    assert backends.chosen_backend() == "auto"


@pytest.mark.parametrize("op", [op for op in registry.OPS.values() if op.examples is not None], ids=lambda op: op.name)
def test_what_info_asks_about_is_served_as_ordinary_tensors_are(op):
    def ordinary(t: torch.Tensor) -> torch.Tensor:
        return t.detach().clone(memory_format=torch.contiguous_format).requires_grad_(t.requires_grad)

    for sample in op.examples(torch.device("cpu")):
        answers = []
        for args, kwargs in (
            (sample.args, sample.kwargs),
            tree_map_only(torch.Tensor, ordinary, (sample.args, dict(sample.kwargs))),
        ):
            call = op.call(*args, **kwargs)
            choice = backends.pick(op.name, call)
            answers.append((choice, op.form(call, choice)))
        assert answers[0] == answers[1], sample.name


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match=r"native, hopper; got 'cuda'"), fastllm.backend("cuda"):
        pass
    result = python(
        "import torch, fastllm; fastllm.functional.layer_norm(torch.ones(2, 3), (3,))", FASTLLM_BACKEND="trtion"
    )
    assert result.returncode != 0
    assert "FASTLLM_BACKEND: expected auto, eager, triton, native, hopper; got 'trtion'" in result.stderr


@pytest.mark.skipif(HAS_GPU, reason="asks for the message of a machine without a GPU")
def test_an_explicit_choice_that_cannot_run_says_how_to_mend_it():
    code = "import torch, fastllm\nfastllm.functional.layer_norm(torch.ones(2, 3), (3,))"
    result = python(code, FASTLLM_BACKEND="triton")
    assert result.returncode != 0
    assert "BackendError: layer_norm: the triton backend was asked for" in result.stderr
    assert "set TRITON_INTERPRET=1" in result.stderr
    assert python(code, FASTLLM_BACKEND="triton", TRITON_INTERPRET="1").returncode == 0


@pytest.mark.runs_on("gpu", "interpreter")
def test_kernels_refuse_other_dtypes_by_name():
    x = torch.ones(2, 3, dtype=torch.float64, device=DEVICE)
    with fastllm.backend("triton"), pytest.raises(fastllm.BackendError, match="float16 and bfloat16, got float64"):
        layer_norm(x, (3,))
    assert layer_norm(x, (3,)).dtype == torch.float64


def test_an_op_without_the_chosen_backend_keeps_its_default():
    with fastllm.backend("native"):
        assert picked("linear", torch.ones(2, 3), torch.ones(4, 3)) == "eager"


@pytest.mark.runs_on("gpu", "interpreter")
def test_an_implicit_fallback_is_said_once(monkeypatch):
    monkeypatch.setattr(backends, "PREFERENCE", {"cpu": ("triton",), "cuda": ("triton",)})
    monkeypatch.setattr(backends, "_told", set())
    x = torch.ones(2, 3, device=DEVICE)
    with monkeypatch.context() as patch:
        record = replace(registry.OPS["rms_norm"], refuses=lambda backend, call: "too odd")
        patch.setitem(registry.OPS, "rms_norm", record)
        with pytest.warns(RuntimeWarning, match="rms_norm: eager instead of triton: too odd"):
            assert picked("rms_norm", x, (3,)) == "eager"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert picked("rms_norm", x, (3,)) == "eager"
    assert picked("rms_norm", x, (3,)) == "triton"


WITHOUT_TRITON = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
sys.modules["triton"] = None
import importlib.util, pkgutil, random
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch, fastllm
from fastllm.cli import main
from fastllm.registry import OPS
from toy import shorten_runs

for found in pkgutil.walk_packages(fastllm.__path__, "fastllm."):
    # The bench's parts that compile are imported where they are asked for.
    if not found.name.startswith(("fastllm.kernels", "fastllm.bench.")) and not found.name.endswith("__main__"):
        importlib.import_module(found.name)
import fastllm.bench.command
print(fastllm.info())
for op in OPS.values():
    sample = next(iter(op.samples(torch.device("cpu"), torch.float32)))
    outputs = op.function(*sample.args, **sample.kwargs)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
x = torch.randn(4, 8, requires_grad=True)
with fastllm.backend("triton"):
    try:
        fastllm.functional.rms_norm(x, (8,))
    except fastllm.BackendError as error:
        print(error)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8))
expected = model(x)
print(fastllm.accelerate(model))
torch.testing.assert_close(model(x), expected)
with fastllm.accelerated():
    torch.nn.functional.layer_norm(x, (8,)).sum().backward()
words = random.Random(1).choices("a few words of no great length".split(), k=4000)
open("prose.txt", "w").write(" ".join(words))
shorten_runs()
flags = "--vocab-size 300 --context-length 32 --num-layers 1 --num-heads 2 --hidden-size 16 --batch-size 2 --steps 2"
assert main(["train", "--data", "prose.txt", "--device", "cpu", "--dtype", "float32", "--quiet", *flags.split()]) == 0
"""


def test_the_package_works_without_triton(tmp_path, monkeypatch):
    """All imports, every op both ways, accelerated models and a training run."""
    monkeypatch.chdir(tmp_path)
    result = python(WITHOUT_TRITON)
    assert result.returncode == 0, result.stderr
    assert "Triton is not installed (pip install 'triton>=3.6', Linux only)" in result.stdout
    assert (tmp_path / "runs").exists()


def test_importing_loads_neither_kernels_nor_cuda():
    result = python(
        "import sys, torch, fastllm; "
        "assert not torch.cuda.is_initialized(); print([m for m in sys.modules if m.startswith('fastllm.kernels')])"
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_kernels_folder_on_sys_path_is_refused():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = "import sys; sys.path.insert(0, '.'); import kernels"
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert "not Hugging Face's package 'kernels'" in result.stderr


def test_transformers_takes_the_kernels_folder_for_no_package():
    pytest.importorskip("transformers", reason="transformers is not installed")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from transformers.utils import is_kernels_available; print(is_kernels_available())\n"
        "import fastllm.kernels; print(fastllm.kernels.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.stdout.split() == ["False", "fastllm.kernels"], result.stderr


def test_a_second_record_of_a_name_is_refused():
    with pytest.raises(ValueError, match="'layer_norm' is registered already"):
        registry.register(registry.OPS["layer_norm"])


def test_info_names_every_op_and_what_serves_it():
    report = fastllm.info()
    assert fastllm.info() == report
    for op in registry.OPS:
        assert f"  {op} " in report
    assert torch.__version__ in report


@pytest.mark.runs_on("gpu", "interpreter")
def test_a_choice_of_backend_holds_in_compiled_code():
    torch._dynamo.reset()

    def norm(x):
        return layer_norm(x, (8,))

    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, device=DEVICE)
    expected = norm(x)
    for name in ("triton", "eager", "triton"):
        with fastllm.backend(name):
            torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-6)
