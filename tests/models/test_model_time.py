"""The modelled time: counted on the real shape and grid, above the floor, and worse for a kernel that is made so."""

import subprocess
import sys

import pytest

from fastllm import OPS
from fastllm.bench import model
from fastllm.bench.interpreter import without_interpreter
from fastllm.kernels.norm import backward as _norm_backward
from fastllm.kernels.norm import forward as _norm
from fastllm.ops.cross_entropy import chunks


def _rows(*shapes):
    return {row.direction: row for row in model.rows([OPS["layer_norm"]], shapes=shapes)}


def test_llama_norms_come_close_to_their_floor():
    rows = _rows("8192x4096")
    forward, backward = rows["forward"], rows["backward"]
    assert forward.least_bytes == 2 * 8192 * 4096 * 2 + 2 * 4096 * 2
    assert 1.0 < forward.counted_bytes / forward.least_bytes < 1.002
    # 132 programs leave a row of partial sums each for weight and bias, and the second kernel reads them.
    partial = 132 * 4096 * 4 * 2 * 2
    least = backward.least_bytes + partial
    assert backward.counted_bytes == pytest.approx(least, rel=0.005)
    assert backward.counted_bytes / backward.least_bytes < 1.05
    assert (forward.launches, backward.launches) == (1, 2)
    assert forward.floor <= forward.seconds == pytest.approx(33.2e-6, rel=0.01)
    assert backward.floor <= backward.seconds < 60e-6


def test_reading_twice_costs_time(monkeypatch):
    good = _rows("4096x768")
    monkeypatch.setattr(_norm, "FWD_ROW", 0)
    monkeypatch.setattr(_norm_backward, "BWD_ROW", 0)
    slow = _rows("4096x768")
    for direction in ("forward", "backward"):
        assert slow[direction].counted_bytes > 1.45 * good[direction].counted_bytes
        assert slow[direction].seconds > 1.25 * good[direction].seconds
        assert slow[direction].floor == good[direction].floor


def test_linear_losses_have_the_workspace_of_a_gpu(monkeypatch):
    def launches(megabytes):
        monkeypatch.setitem(chunks.DEFAULT_WORKSPACE_MB, "cuda", megabytes)
        found = model.rows([OPS["linear_cross_entropy"]], shapes=["128x768x4096"])
        return next(row.launches for row in found if row.direction == "forward")

    # A row of 4096 logits in bfloat16 takes 8 KiB: one chunk of 128 rows, or two of 64.
    whole, halves = launches(1.0), launches(0.5)
    assert halves > whole


def test_shapes_too_large_for_the_interpreter_are_left_out():
    assert not _rows("32768x65536")


def test_flops_bound_the_time():
    row = model.Row("op", "shape", "bfloat16", 90, "forward", 10**6, 10**6, 790 * 10**9, 1)
    assert row.seconds == pytest.approx(1e-3 + model.LAUNCH)
    assert row.floor == row.seconds


def test_the_command_brings_its_own_interpreter():
    command = [sys.executable, "-m", "fastllm.bench.model", "layer_norm", "--shape", "4096x768"]
    run = subprocess.run(command, env=without_interpreter(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert " 12.6 " in run.stdout  # the least megabytes of its forward
