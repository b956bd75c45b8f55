"""No kernel's result owes anything to the order of its programs; and that the finder of such races finds them."""

import pytest
import torch
import triton
import triton.language as tl
from contract import copy, run
from races import find_races
from thorough import IS_THOROUGH

import fastllm
from fastllm.kernels.attention import decode
from fastllm.registry import OPS, Sample

pytestmark = pytest.mark.runs_on("interpreter")

# Samples of each op, spread over all that there are. The thorough profile takes every one.
SAMPLES = 6


@triton.jit
def _everyone_writes_one(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr + tl.program_id(0)))


@triton.jit
def _reads_a_neighbour(x_ptr, y_ptr):
    at = tl.program_id(0)
    tl.store(x_ptr + at, tl.load(x_ptr + at + 1) + 1)


@triton.jit
def _masked(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at), mask=tl.arange(0, BLOCK) == 0)


@triton.jit
def _adds(x_ptr, y_ptr):
    tl.atomic_add(y_ptr, tl.load(x_ptr + tl.program_id(0)))


@pytest.mark.parametrize(
    ("kernel", "settings", "found"),
    [
        (_everyone_writes_one, {}, ["_everyone_writes_one: 3 addresses"]),
        (_reads_a_neighbour, {}, ["_reads_a_neighbour: 3 reads"]),
        (_masked, {"BLOCK": 4}, []),
        (_adds, {}, []),
    ],
)
def test_planted_races_are_found_and_nothing_else(kernel, settings, found):
    x, y = torch.arange(8.0), torch.zeros(8)
    with find_races(0) as races:
        kernel[(4,)](x, y, **settings)
    assert races.launches == 1
    assert [line.partition(" of ")[0].partition(" written")[0] for line in races.found] == found


def test_programs_run_in_an_order_of_the_seeds():
    seen = []
    for seed in (0, 0, 1):
        y = torch.zeros(1)
        with find_races(seed):
            _everyone_writes_one[(64,)](torch.arange(64.0), y)
        seen.append(y.item())
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("name", [op.name for op in OPS.values() if "triton" in op.backends])
def test_no_program_meets_another(name):
    op = OPS[name]
    every = sorted(op.samples(torch.device("cpu"), torch.float32), key=lambda s: s.args[0].numel())
    chosen, launches = every[:: 1 if IS_THOROUGH else max(1, len(every) // SAMPLES)], 0
    # Their samples have so few rows that one program takes them all.
    if name in ("linear_cross_entropy", "linear_log_probs"):
        inputs = [torch.randn(shape, requires_grad=True) for shape in ((150, 8), (40, 8))]
        chosen.append(Sample("150 rows", (inputs[0], inputs[1], torch.randint(40, (150,))), {}))
    for sample in chosen:
        found = []
        for seed in (0, 1):
            torch.manual_seed(0)
            with find_races(seed) as races:
                found.append(run(op.function, copy(sample), "triton"))
            assert not races.found, f"{name}/{sample.name}: {races.found}"
            launches += races.launches
        for a, b in zip([*found[0][0], *found[0][1]], [*found[1][0], *found[1][1]], strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a.nan_to_num(), b.nan_to_num()), f"{name}/{sample.name}: the order decides"
    assert launches


@pytest.mark.parametrize("rows", [1, 3])
def test_no_program_of_a_decoding_step_meets_another(rows, monkeypatch):
    """With chunks so short that the keys of one query are split among programs, whose parts a second kernel joins."""
    tile = dict(CHUNK=32, SPLIT_FROM=48, BLOCK_N=16, num_warps=4, num_stages=2)
    monkeypatch.setattr(decode, "split_tile", lambda *_: tile)
    q, k, v = (torch.randn(2, heads, n, 16) for heads, n in ((4, rows), (2, 130), (2, 130)))
    outs = []
    for seed in (0, 1):
        with find_races(seed) as races, fastllm.backend("triton"):
            outs.append(fastllm.functional.attention(q, k, v, causal=True, window=(100, 0)))
        assert races.launches == 2
        assert not races.found
    assert torch.equal(*outs)
