"""What ptxas makes of the kernels that the ops launch: no spills, wide loads and stores, no fp64.

A sample of the shapes. FASTLLM_TESTS=thorough pytest -n 0 tests/kernels/test_static.py compiles every shape
of the losses and activations and the norms' whole launch table for each architecture, about an hour on one core.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from thorough import IS_THOROUGH

from fastllm.bench.interpreter import without_interpreter
from fastllm.bench.limits import EVERY_GPU
from fastllm.bench.sass import WARPS, Resources, instructions, spills_in_loops
from fastllm.bench.static import Row, problems, read_rows
from fastllm.kernels.device import GPUS

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    """``start(*argv)``: Python where kernels compile (the interpreter off), with an empty Triton cache."""
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {**without_interpreter(), "TRITON_CACHE_DIR": cache}

    def start(*argv):
        return subprocess.Popen(
            [sys.executable, *argv], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )

    return start


def _finish(process):
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err.decode()
    return out.decode()


# 22 s of processor time took 122 s where other processes had four fifths of the machine.
LIMIT = 7200 if IS_THOROUGH else 900
# By architecture: the narrowest and the widest rows everywhere, those between on the one that is most in use.
ENDS, BETWEEN = ("8192x768", "32768x65536"), ("8192x4096", "4096x16384")
SHAPES = {arch: (*ENDS, *BETWEEN) if arch == 90 or IS_THOROUGH else ENDS for arch in GPUS}
EACH = """
import json, sys
from fastllm.bench import static
sys.exit(max(map(static.main, json.loads(sys.argv[1]))))
"""
OTHERS = ("Llama-2 8192x32000", "Llama-3 8192x128256", "8192x14336 packed", "NeoX")


def _rows(compiler, folder, commands):
    """What ``python -m fastllm.bench.static`` compiles for each list of arguments, all in one process."""
    # A process of a pool takes longer to start than this sample to compile.
    alone = () if IS_THOROUGH else ("--workers", "1")
    files = [folder / f"{i}.json" for i in range(len(commands))]
    every = [[*command, *alone, "--json", str(file)] for command, file in zip(commands, files, strict=True)]
    _finish(compiler("-c", EACH, json.dumps(every)))
    return [row for file in files for row in read_rows(file)]


@pytest.fixture(scope="session")
def norm_rows(compiler, tmp_path_factory):
    commands = []
    for shapes in sorted(set(SHAPES.values())):
        archs = [str(arch) for arch, own in SHAPES.items() if own == shapes]
        commands.append(["layer_norm", "--arch", *archs, "--shape", *shapes])
    return _rows(compiler, tmp_path_factory.mktemp("norms"), commands)


@pytest.fixture(scope="session")
def other_rows(compiler, tmp_path_factory):
    commands = [["cross_entropy", "geglu", "rotary_embedding", "--arch", "90", "--shape", *OTHERS]]
    if IS_THOROUGH:
        names = ("cross_entropy", "linear_cross_entropy", "geglu", "swiglu", "rotary_embedding")
        commands = [[*names, "--dtype", dtype] for dtype in ("bfloat16", "float32")]
    return _rows(compiler, tmp_path_factory.mktemp("others"), commands)


# Every width at which the norms' launchers decide anew, and those between that fill a tile worst.
TABLE = """
import sys
from itertools import product
import torch
from fastllm import OPS
from fastllm.bench.norms import norm_sample
from fastllm.bench.capture import CUDA, launches
from fastllm.kernels.device import GPUS
from fastllm.bench.sass import read_resources
from fastllm.bench.static import Row, problems

thorough, done, found = sys.argv[1] == "thorough", {}, []
widths = [1, 63, *(2**k for k in range(7, 19)), 12288, 50304] if thorough else [1024, 262144]
names = ("layer_norm", "add_rms_norm", "add_layer_norm") if thorough else ("layer_norm", "add_layer_norm")
small = GPUS[80]._replace(shared_per_block=99 << 10)  # sm_86, sm_89
# The input's dtype, and that of the residual and the parameters.
alike = [(torch.bfloat16,) * 2, (torch.float32,) * 2]
mixed = [*alike, (torch.bfloat16, torch.float32)]
planned = [(gpu, dtypes, names, widths) for gpu in GPUS.values() for dtypes in mixed]
if not thorough:
    # On sm_90 layer_norm is the sample without dropout, add_layer_norm the one with it.
    planned = [(GPUS[90], alike[0], names, widths), (GPUS[100], mixed[2], ("add_layer_norm",), [8192])]
planned += [(small, dtypes, ("add_layer_norm",), [256, 8192] if thorough else [256]) for dtypes in alike]
for gpu, (dtype, wide), names, widths in planned:
    for name, cols in product(names, widths):
        rates = (0.0, 0.1) if name == "add_layer_norm" and gpu is not small else (0.0,)
        for p in rates[-1:] if gpu.arch == 90 and not thorough else rates:
            def call():
                made = norm_sample("", (4096, cols), name.endswith("layer_norm"), name.startswith("add"), CUDA, dtype)
                def widened(t):
                    return t.detach().to(wide).requires_grad_()
                args = (made.args[0], *map(widened, made.args[1:-1]), made.args[-1])
                kwargs = {name: widened(t) for name, t in made.kwargs.items()}
                return type(made)("", args, kwargs | ({"dropout_p": p} if p else {}))
            for launch in launches(OPS[name], call, gpu):
                if launch.compiled.hash not in done:
                    done[launch.compiled.hash] = resources = read_resources(launch.compiled)
                    row = Row(name, f"{cols} p={p}", f"{dtype} {wide}", gpu.arch, "", launch.kernel, [], resources)
                    found += [(row.op, row.shape, row.dtype, gpu.arch, row.kernel, x) for x in problems(row)]
                    if resources.shared > gpu.shared_per_block:
                        found.append((row.op, row.shape, row.dtype, gpu, row.kernel, resources.shared))
                    if resources.narrow_products and not p:  # Philox multiplies in 32 bits
                        found.append((row, "32-bit products"))
print(f"{len(done)} kernels", *found, sep="\\n")
"""


def test_the_norms_launch_table(compiler):
    count, *found = _finish(compiler("-c", TABLE, "thorough" if IS_THOROUGH else "sample")).splitlines()
    assert int(count.split()[0]) >= (300 if IS_THOROUGH else 4)
    assert not found


def test_every_call_and_architecture_was_compiled(norm_rows):
    calls = {(row.shape.split()[-1], row.arch, row.direction) for row in norm_rows}
    ways = ("forward", "backward")
    assert calls == {(shape, arch, way) for arch, shapes in SHAPES.items() for shape in shapes for way in ways}


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


def test_losses_and_activations_do_not_spill_and_use_no_fp64(other_rows):
    assert {row.op for row in other_rows} >= {"cross_entropy", "geglu", "rotary_embedding"}
    assert not [(r.op, r.shape, r.kernel) for r in other_rows if r.resources.spills or r.resources.doubles]


def test_rows_that_are_read_twice_stay_in_the_cache(other_rows):
    """An H200 has 50 MB of L2. A row in flight needs its bytes there, for half of its time on average."""
    classes, key = 128256, ("cross_entropy", "Llama-3 8192x128256", "_forward_kernel", 90)
    (kernel,) = (r.resources for r in other_rows if (r.op, r.shape, r.kernel, r.arch) == key and r.dtype == "bfloat16")
    in_flight = kernel.occupancy(90) * WARPS / kernel.num_warps * GPUS[90].processors
    assert in_flight * classes * 2 / 2 <= 50 << 20, in_flight


def test_offsets_of_more_than_2_31_elements_are_computed_in_64_bits(norm_rows, other_rows):
    """A kernel's rows times its columns, strides too: no 32-bit product of two numbers that the launch brings."""
    allowed = {"_rotary_kernel": 1}  # a program's first head
    for row in (*norm_rows, *other_rows):
        assert row.resources.narrow_products <= allowed.get(row.kernel, 0), (row.op, row.shape, row.kernel)


def test_losses_and_activations_move_128_bits_at_a_time(other_rows):
    for row in other_rows:
        # One position's 64 pairs are two a thread, and a launch takes longer than they do.
        few = row.kernel == "_rotary_kernel" and row.shape.startswith("one token")
        if not few and row.kernel in (
            "_forward_kernel",
            "_scale_kernel",
            "_gated_fwd_kernel",
            "_gated_bwd_kernel",
            "_rotary_kernel",
        ):
            loads, stores = row.resources.load_widths, row.resources.store_widths
            where = (row.op, row.shape, row.kernel, loads, stores)
            # Narrower: targets and statistics, one a row; of 256 columns they are as many as the row's own.
            assert loads.get(128, 0) * 128 >= sum(bits * n for bits, n in loads.items() if bits < 128), where
            assert stores.get(128, 0) * 128 > sum(bits * n for bits, n in stores.items() if bits < 128), where


@pytest.fixture(scope="session")
def faults(compiler):
    return json.loads(_finish(compiler(str(TESTS / "compiled_faults.py"))).splitlines()[-1])


def test_too_large_a_block_shows_as_spills(faults):
    found = faults["too_large_a_block"]
    assert found["spills"] > 0
    assert any("thread-local memory" in problem for problem in found["problems"])
    assert found["compiled_without_time"] == 0
    assert found["left_out"] == ["layer_norm, one token 1x4096: the budget of 0 s was spent"]


def test_fp64_and_narrow_offsets_creeping_in_show(faults):
    found = faults["creeping_in"]
    assert found["scale"]["doubles"] == 0 < found["scale_in_double"]["doubles"], found
    assert found["scale"]["narrow_products"] == 0, found
    assert found["scale_rows"]["narrow_products"] == 1, found


def test_a_python_float_that_comes_as_fp64_shows(faults):
    """Under torch.compile a Python float can reach a kernel as fp64; in a kernel of this library it must show."""
    assert faults["python_float"]["fp32"] == 0 < faults["python_float"]["fp64"]


def test_a_host_sync_fails(faults):
    found = faults["host_sync"]
    assert (found["device"], found["address"]) == ("cuda", 4)
    assert found["error"] is not None, "a value was read back from a device that is not there"


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


def test_what_no_kernel_may_have_is_a_problem():
    def found(arch=90, **resources):
        common = dict(registers=32, stack=0, shared=0, num_warps=4, num_stages=1, opcodes={"LDG.E.128": 1})
        return problems(Row("op", "shape", "bfloat16", arch, "forward", "k", [(1,)], Resources(**(common | resources))))

    assert found() == []
    assert found(opcodes={"STL.128": 3, "LDL.128": 2}) == ["5 loads and stores of thread-local memory"]
    assert found(stack=16) == ["1 loads and stores of thread-local memory"]
    assert found(opcodes={"DFMA": 1, "F2F.F64.F32": 1}) == ["2 fp64 instructions"]
    assert found(80, shared=170 << 10) == found(90, shared=228 << 10) == ["does not fit on a multiprocessor"]
    assert found(90, shared=170 << 10) == []


def test_the_oldest_tritons_page_has_every_gpu_and_no_spills_in_loops():
    page = (Path(__file__).parents[2] / "docs" / "static-oldest.md").read_text(encoding="utf-8")
    by_gpu, spilled = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| ")]
        for part in page.split("## With a stack")
    )
    assert [row[0] for row in by_gpu[1:]] == list(EVERY_GPU)
    over, stacks = by_gpu[0].index("over a limit"), by_gpu[0].index("with a stack")
    assert {row[over] for row in by_gpu[1:]} == {"0"}
    assert len(spilled[1:]) == sum(int(row[stacks]) for row in by_gpu[1:])
    looped = spilled[0].index("of them in a loop")
    assert {row[looped] for row in spilled[1:]} <= {"0"}


# As cuobjdump prints them: a loop from 0x20 to 0x50 that waits at 0xa0, behind the kernel's end, and comes back.
LOOP = """
        /*0000*/                   STL [R1], R4 ;        /* 0x00 */
        /*0010*/                   MOV R2, RZ ;
        /*0020*/              @!P5 BRA 0xa0 ;
        /*0030*/                   {store}
        /*0040*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0050*/               @P4 BRA 0x20 ;
        /*0060*/                   LDL.LU R4, [R1] ;
        /*0070*/                   EXIT ;
        /*00a0*/              @!P2 BRA 0xa0 ;
        /*00b0*/                   BRA 0x30 ;
        /*00c0*/                   BRA 0xc0;
"""


@pytest.mark.parametrize(("store", "looped", "length"), [("FADD R0, R0, R0 ;", 0, 0), ("STL.64 [R1+0x8], R0 ;", 1, 6)])
def test_spills_are_in_a_loop_or_outside_of_all(store, looped, length):
    code = instructions(LOOP.format(store=store))
    assert len(code) == 11
    assert spills_in_loops(code) == {"looped_spills": looped, "loop_length": length}
