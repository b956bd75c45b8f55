"""What is launched is legal on every GPU: threads, registers, shared memory, grids, options; compiled for a few.

And no choice of a launcher follows the number of rows.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch_limits import _box, wrong
from thorough import IS_THOROUGH

from fastllm.backends import product_obstacle
from fastllm.bench.interpreter import without_interpreter
from fastllm.bench.limits import EVERY_GPU
from fastllm.bench.other_gpus import OtherRow, breaches
from fastllm.kernels import device
from fastllm.kernels.device import GPUS, OTHER_GPUS
from fastllm.kernels.launch import launch_options

TESTS = Path(__file__).parent.parent


def _run(*argv):
    """Output of Python where kernels compile: the interpreter off."""
    # Another Triton before the environment's own stays where it is.
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(TESTS))))
    environment = {**without_interpreter(), "PYTHONPATH": path}
    process = subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True, timeout=3600)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout.splitlines()


def test_every_launch_of_the_samples_is_legal():
    step, gpus = ("1", list(EVERY_GPU)) if IS_THOROUGH else ("20", ["sm_75", "sm_90", "gfx942"])
    lines = _run(str(TESTS / "launch_limits.py"), step, *gpus)
    counts = [line for line in lines if line.endswith(" launches")]
    assert [line.split()[0] for line in counts] == gpus
    assert all(int(line.split()[1]) >= (800 if IS_THOROUGH else 40) for line in counts), counts
    assert [line for line in lines if line.startswith("WRONG")] == []


def test_no_choice_follows_the_number_of_rows():
    """Of kernels that sum over something else; tests/kernels/test_batch_invariance.py has the bits."""
    gpus = list(EVERY_GPU) if IS_THOROUGH else ["sm_90", "gfx942"]
    lines = _run(str(TESTS / "launch_choices.py"), *gpus)
    counts = {line.split()[0]: int(line.split()[1]) for line in lines if line.endswith(" calls")}
    assert list(counts) == gpus
    assert min(counts.values()) >= 100, counts
    assert [line for line in lines if line.startswith("DIFFERS")] == []


def test_kernels_compile_for_other_gpus():
    arguments = () if IS_THOROUGH else ("rotary_embedding", "--gpu", "sm_75", "gfx942")
    assert _run("-m", "fastllm.bench.other_gpus", *arguments)[-1].endswith(
        ", 0 break a limit, 0 have a stack that no loop uses"
    )


def test_a_kernel_has_one_key_whatever_was_compiled_before_it():
    """Else gpu.sh would not find kernels that were compiled on another machine in another order. Triton 3.6 alone."""
    *differing, count = _run(str(TESTS / "kernel_keys.py"))
    assert differing == []
    assert int(count.split()[0]) > 150


def _row(gpu, **more):
    row = dict(
        gpu=gpu, op="op", shape="", dtype="bfloat16", direction="forward", kernel="k", grid=(1,), warps=8, registers=64,
        spills=0, shared=0, matrix=0,
    )  # fmt: skip
    return OtherRow(**(row | more))


def test_what_breaks_a_limit():
    t4, mi300, rdna = (OTHER_GPUS[name] for name in ("sm_75", "gfx942", "gfx1100"))
    assert breaches(t4, _row("sm_75")) == []
    assert breaches(t4, _row("sm_75", shared=65 << 10)) == ["66,560 bytes of shared memory, at most 65,536"]
    assert breaches(t4, _row("sm_75", warps=16, registers=129)) == [
        "129 registers x 512 threads a block, at most 65,536"
    ]
    assert breaches(mi300, _row("gfx942", warps=32)) == ["2048 threads a block, at most 1024"]
    assert breaches(rdna, _row("gfx1100", warps=32, registers=256)) == []
    assert breaches(rdna, _row("gfx1100", spills=3)) == ["3 spills"]
    assert breaches(t4, _row("sm_75", grid=(1, 65536))) == ["grid[1] is 65,536, at most 65,535"]


def test_what_a_launch_may_not_ask_for():
    options = SimpleNamespace(num_warps=8, maxnreg=255)
    assert wrong(GPUS[90], options, (1,), [[1, 1, 64, 128]]) == []
    assert wrong(GPUS[80], options, (1,), [[1, 1, 64, 128]]) == ["bulk copies"]
    assert wrong(OTHER_GPUS["gfx942"], options, (1,), [[64, 64]]) == [
        "255 registers x 512 threads a block, at most 65,536",
        "bulk copies",
    ]
    assert wrong(GPUS[90], SimpleNamespace(num_warps=64), (0,), [[512]]) == [
        "2048 threads a block, at most 1024",
        "an empty grid of (0,)",
        "a box of [512]",
    ]
    assert _box("tensordesc<bf16[1, 1, 64, 128], shared>") == [1, 1, 64, 128]


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ("sm_75", {"num_warps": 8, "maxnreg": 64}),
        ("gfx942", {"num_warps": 4}),
        ("gfx1100", {"num_warps": 8}),
    ],
)
def test_options_are_the_gpus(monkeypatch, gpu, expected):
    monkeypatch.setattr(device, "_gpu", lambda index: OTHER_GPUS[gpu])
    found = launch_options(torch.device("cuda", 0), num_warps=8, maxnreg=64)
    assert found == {"enable_fp_fusion": True, **expected}


def test_who_multiplies_with_pytorchs_own(monkeypatch):
    preferred = {}
    for name, gpu in {**OTHER_GPUS, "sm_90": GPUS[90]}.items():
        monkeypatch.setattr(device, "_gpu", lambda index, gpu=gpu: gpu)
        preferred[name] = product_obstacle("cuda", 0) is not None
    assert {name for name, torchs in preferred.items() if torchs} == {"sm_75", "gfx1100", "gfx1201"}
    assert product_obstacle("cpu") is product_obstacle("mps") is None
