"""The gate for anybody's Triton kernels: faults that are planted into a stranger's file are found."""

import copy
import json
import subprocess
import sys

import pytest

from fastllm.bench.command import main as bench
from fastllm.bench.interpreter import without_interpreter
from fastllm.bench.regress import Figures, broken, compare, read
from fastllm.bench.regress_measure import counted, load

# As somebody else writes them: an autograd function, a constant of the file, libdevice, a float argument, an autotuner.
KERNELS = """
import torch, triton, triton.language as tl
from triton.language.extra.libdevice import rsqrt

WARPS = 4
DEVICE = triton.runtime.driver.active.get_active_torch_device()

@triton.jit
def norm_kernel(x_ptr, y_ptr, n_cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n_cols + at, mask=at < n_cols, other=0.0).to(tl.float32)
    y = x * rsqrt(tl.sum(x * x) / n_cols + eps.to(tl.float32))
    tl.store(y_ptr + row * n_cols + at, y, mask=at < n_cols)

@triton.autotune([triton.Config({"BLOCK": 512}, num_warps=4), triton.Config({"BLOCK": 1024}, num_warps=8)], key=["n"])
@triton.jit
def double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at, mask=at < n), mask=at < n)

class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.empty_like(x)
        with torch.cuda.device(x.device):
            norm_kernel[(len(x),)](x, y, x.shape[1], 1e-6, BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=WARPS)
        return y

def norm(device):
    Norm.apply(torch.randn(64, 4096, device=device, dtype=torch.bfloat16))

def double(device):
    assert DEVICE.type == device.type
    x = torch.randn(98_304, device=device)
    double_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, torch.empty_like(x), x.numel())

def not_a_call(device, other): raise AssertionError
"""
PLANTED = {
    "as it was": KERNELS,
    # 8192 columns by one warp are 256 numbers a thread, more than its registers.
    "spill": KERNELS.replace("WARPS = 4", "WARPS = 1").replace("64, 4096", "64, 8192"),
    "extra read": KERNELS.replace(
        "    tl.store(y_ptr + row",
        "    y += tl.load(x_ptr + row * n_cols + at, mask=at < n_cols)\n    tl.store(y_ptr + row",
    ),
    "host sync": KERNELS.replace("def double(device):", "def double(device):\n    torch.ones(1, device=device).item()"),
}
COMPILE = """
import json, sys
from pathlib import Path
from fastllm.bench.regress_measure import compiled
print(json.dumps([compiled(Path(file), [90]) for file in sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What of the file -> its figures, all compiled in one process."""
    folder = tmp_path_factory.mktemp("kernels")
    files = {name: folder / f"kernels_{i}.py" for i, name in enumerate(PLANTED)}
    for name, file in files.items():
        file.write_text(PLANTED[name])
    command = [sys.executable, "-c", COMPILE, *map(str, files.values())]
    result = subprocess.run(command, env=without_interpreter(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = {}
    for (name, file), kernels in zip(files.items(), json.loads(result.stdout), strict=True):
        moved = counted(file)
        assert not moved["failures"]
        found[name] = Figures("1", kernels["rows"], moved["rows"], kernels["failures"])
    return found


def test_the_figures_are_what_the_kernels_take(measured):
    found = measured["as it was"]
    assert not broken(found)
    assert {(row["call"], row["kernel"].partition("[")[0]) for row in found.kernels} == {
        ("norm", "norm_kernel"), ("double", "double_kernel"),
    }  # fmt: skip
    # Both configurations of the autotuner are compiled, the first one's bytes are counted.
    assert sorted(row["warps"] for row in found.kernels if row["call"] == "double") == [4, 8]
    moved = {row["call"]: (row["loaded"], row["stored"]) for row in found.bytes}
    assert moved == {"norm": (64 * 4096 * 2, 64 * 4096 * 2), "double": (4 * 98_304, 4 * 98_304)}
    assert compare(found, copy.deepcopy(found)).worse == []


def test_a_planted_spill_is_found(measured):
    worse = compare(measured["as it was"], measured["spill"]).worse
    assert any("norm_kernel, sm_90: spills" in line for line in worse), worse


def test_a_planted_extra_read_is_found(measured):
    worse = compare(measured["as it was"], measured["extra read"]).worse
    assert "norm, norm_kernel, bytes: more bytes loaded, 524,288 -> 1,048,576" in worse


def test_a_host_sync_fails_whatever_the_file_says(measured):
    (line,) = broken(measured["host sync"])
    assert line.startswith("double, sm_90: it reads a value back to the host")
    # It is said once: that the call's kernels are missing follows from it.
    assert compare(measured["as it was"], measured["host sync"]).worse == []


ROW = dict(
    call="c", kernel="k", arch=90, launches=1, grid=[1, 1, 1], warps=4, registers=32, spills=0, shared=0, occupancy=1.0,
    fp64=0, tensor_core=8, widest_load=128, widest_store=128, over=[],
)  # fmt: skip
BYTES = dict(call="c", kernel="k", loaded=1000, stored=1000)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registers": 33, "occupancy": 0.5}, "more registers a thread, 32 -> 33"),
        ({"occupancy": 0.5}, "fewer resident warps, 1.0 -> 0.5"),
        ({"shared": 1024}, "more shared memory a block, 0 -> 1,024"),
        ({"launches": 2}, "more launches, 1 -> 2"),
        ({"fp64": 1}, "fp64 instructions, 0 -> 1"),
        ({"widest_load": 32}, "narrower loads, 128 -> 32"),
        ({"widest_store": 16}, "narrower stores, 128 -> 16"),
        ({"tensor_core": 0}, "tensor cores are no longer used (8 instructions before)"),
    ],
)
def test_each_figure_that_is_worse_fails_once(change, said):
    verdict = compare(Figures("1", [ROW], []), Figures("1", [{**ROW, **change}], []))
    assert verdict.worse == [f"c, k, sm_90: {said}"]
    assert compare(Figures("1", [{**ROW, **change}], []), Figures("1", [ROW], [])).worse == []


def test_what_only_one_side_has_fails():
    with_row, without = Figures("1", [ROW], [BYTES]), Figures("1", [], [])
    gone = compare(with_row, without).worse
    assert gone == ["c, k, sm_90: is no longer launched", "c, k, bytes: is no longer launched"]
    assert compare(without, with_row).worse == ["c, k, sm_90: is not in the file", "c, k, bytes: is not in the file"]


def test_the_committed_file_may_allow_more():
    committed = Figures("1", [ROW], [BYTES], allow={"registers": 4, "shared": 0, "bytes": 0.01})
    assert not compare(committed, Figures("1", [{**ROW, "registers": 36}], [{**BYTES, "loaded": 1010}])).worse
    assert len(compare(committed, Figures("1", [{**ROW, "registers": 37}], [{**BYTES, "loaded": 1011}])).worse) == 2


def test_a_file_survives_writing_and_a_broken_one_is_refused(tmp_path):
    file = tmp_path / "x.regress.json"
    Figures("3.9.0", [ROW], [BYTES]).write(file)
    again = read(file)
    assert again.kernels == [{k: v for k, v in ROW.items() if k != "over"}]
    assert again.bytes == [BYTES]
    text = file.read_text()
    changes = (
        ("regress/1", "regress/9"),
        ('"call"', '"kall"'),
        ('"registers": 0,', '"registers": -1,'),
        ("0.0}", '0, "x": 1}'),
    )
    for broken_text in ("{", "[]", *(text.replace(*change) for change in changes)):
        file.write_text(broken_text)
        with pytest.raises(ValueError, match="not a file of fastllm bench regress"):
            read(file)


def test_a_command_without_a_file_says_what_to_do(tmp_path, capsys):
    file = tmp_path / "kernels.py"
    for expected in ("no such file", "--update writes it"):
        with pytest.raises(SystemExit) as exit_:
            bench(["regress", str(file)])
        assert exit_.value.code == 2
        assert expected in capsys.readouterr().err
        file.write_text(KERNELS)


def test_the_file_may_have_any_suffix(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "gate_of_mine").write_text("WARPS = 4")
    assert load(tmp_path / "gate_of_mine").WARPS == 4
    del sys.modules["gate_of_mine"]
