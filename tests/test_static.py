"""What ptxas makes of the kernels that the ops launch: no spills, wide loads and stores, no fp64."""

import os
import subprocess
import sys

import pytest
from fastllm.bench.capture import GPUS
from fastllm.bench.static import Resources, read_rows


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    """``start(*argv)``: Python where kernels compile (the interpreter off), with an empty Triton cache."""
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTLLM_BACKEND")}
    # 3.9 warns while it is unset; 1 is what it and older versions do by default.
    environment |= {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1"}

    def start(*argv):
        return subprocess.Popen(
            [sys.executable, *argv], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )

    return start


def _finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    return out.decode()


SHAPES = ("8192x768", "8192x4096", "4096x16384", "32768x65536")


@pytest.fixture(scope="session")
def norm_rows(compiler, tmp_path_factory):
    file = tmp_path_factory.mktemp("static") / "rows.json"
    _finish(compiler("-m", "fastllm.bench.static", "layer_norm", "--shape", *SHAPES, "--json", str(file)))
    return read_rows(file)


def test_every_call_and_architecture_was_compiled(norm_rows):
    calls = {(row.shape.split()[-1], row.arch, row.direction) for row in norm_rows}
    assert calls == {(shape, arch, way) for shape in SHAPES for arch in GPUS for way in ("forward", "backward")}


def test_norms_do_not_spill(norm_rows):
    spilling = [(r.op, r.shape, r.arch, r.kernel) for r in norm_rows if r.resources.spills]
    assert not spilling


def test_norms_fit_on_a_processor(norm_rows):
    assert all(r.resources.occupancy(r.arch) > 0 for r in norm_rows)


def test_norms_use_no_fp64(norm_rows):
    assert not [r for r in norm_rows if r.resources.doubles]


def test_norms_move_128_bits_at_a_time(norm_rows):
    for row in norm_rows:
        loads, stores = row.resources.load_widths, row.resources.store_widths
        where = (row.shape, row.arch, row.kernel, loads, stores)
        # Narrower: statistics, an fp32 each a row (mean, rstd; past the widest whole row two means of the backward too,
        # each prefetched thrice), and at 768 columns the parameters, 4 elements a thread.
        assert loads[128] * 128 > 2 * sum(bits * n for bits, n in loads.items() if bits < 128) / 3, where
        if row.shape != "GPT-2 8192x768":
            assert sum(n for bits, n in loads.items() if bits < 64) <= 16, where
        # The column sums store one element a column at the end, and nothing else.
        if row.kernel not in ("_column_sum_kernel",):
            assert set(stores) <= {128, 64, 32}, where
            assert sum(n for bits, n in stores.items() if bits < 128) <= 2, where


@pytest.fixture(scope="session")
def other_rows(compiler, tmp_path_factory):
    file = tmp_path_factory.mktemp("static") / "others.json"
    shapes = ("Llama-2 8192x32000", "Llama-3 8192x128256", "8192x14336 packed", "NeoX")
    names = ("cross_entropy", "geglu", "rotary_embedding")
    _finish(compiler("-m", "fastllm.bench.static", *names, "--arch", "90", "--shape", *shapes, "--json", str(file)))
    return read_rows(file)


def test_losses_and_activations_do_not_spill_and_use_no_fp64(other_rows):
    assert {row.op for row in other_rows} == {"cross_entropy", "geglu", "rotary_embedding"}
    assert not [(r.op, r.shape, r.kernel) for r in other_rows if r.resources.spills or r.resources.doubles]


def test_losses_and_activations_move_128_bits_at_a_time(other_rows):
    for row in other_rows:
        if row.kernel in (
            "_forward_kernel",
            "_scale_kernel",
            "_gated_fwd_kernel",
            "_gated_bwd_kernel",
            "_rotary_kernel",
        ):
            loads, stores = row.resources.load_widths, row.resources.store_widths
            where = (row.op, row.shape, row.kernel, loads, stores)
            # Narrower: targets and statistics, one a row.
            assert loads.get(128, 0) * 128 > sum(bits * n for bits, n in loads.items() if bits < 128), where
            assert stores.get(128, 0) * 128 > sum(bits * n for bits, n in stores.items() if bits < 128), where


SPILLING = """
from fastllm import OPS
from fastllm.bench import static
from fastllm.kernels import _norm
_norm.FWD_ROW = 65536
rows = list(static.rows([OPS["layer_norm"]], [90], shapes=["32768x65536"]))
print(max(row.resources.spills for row in rows))
"""

DOUBLE = """
import torch, triton, triton.language as tl
from fastllm.bench.capture import GPUS, pretend
from fastllm.bench.static import read_resources

@triton.jit
def scale(x_ptr, y_ptr, factor, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) * factor)

@triton.jit
def scale_in_double(x_ptr, y_ptr, factor: tl.float64, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) * factor)

found = []
with pretend(GPUS[90], lambda name, grid, compiled: found.append((name, read_resources(compiled).doubles))):
    x = torch.empty(1024, device="cuda")
    scale[(1,)](x, x, 0.5, BLOCK=1024)
    scale_in_double[(1,)](x, x, 0.5, BLOCK=1024)
counts = dict(found)
assert counts["scale"] == 0 and counts["scale_in_double"] > 0, counts
"""

SYNC = """
import torch
from fastllm.bench.capture import GPUS, pretend
with pretend(GPUS[90], print):
    x = torch.ones(4, device="cuda")
    assert x.device.type == "cuda" and x[1:].data_ptr() % 16 == 4
    try:
        x.sum().item()
    except (RuntimeError, NotImplementedError):
        pass
    else:
        raise SystemExit("a value was read back from a device that is not there")
"""


def test_too_large_a_block_shows_as_spills(compiler):
    assert int(_finish(compiler("-c", SPILLING))) > 0


def test_fp64_creeping_in_shows(compiler, tmp_path):
    script = tmp_path / "double.py"  # a kernel's source must lie in a file
    script.write_text(DOUBLE)
    _finish(compiler(str(script)))


def test_a_host_sync_fails(compiler):
    _finish(compiler("-c", SYNC))


def test_compiling_under_the_interpreter_says_why_not(compiler):
    code = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\nfrom fastllm.bench import static\nstatic.main(['rms_norm'])"
    )
    process = compiler("-c", code)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "TRITON_INTERPRET" in err.decode()


def test_resources_count_by_family():
    resources = Resources(
        registers=40,
        stack=0,
        shared=1024,
        num_warps=8,
        num_stages=3,
        opcodes={"LDG.E.128": 6, "LDG.E": 2, "STG.E.U16": 2, "HGMMA.64x128x16.F32.BF16": 4, "MUFU.EX2": 3},
    )
    assert resources.load_widths == {128: 6, 32: 2}
    assert resources.store_widths == {16: 2}
    assert (resources.spills, resources.tensor_core, resources.doubles, resources.count("MUFU")) == (0, 4, 0, 3)
    # 40 registers x 32 lanes = 1280 a warp: 51 warps fit, so 6 blocks of 8 of the 64.
    assert resources.occupancy(90) == 48 / 64
