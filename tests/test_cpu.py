"""What a CPU can do: levels, caps, 16-bit products; and that nothing multiplies 16 bits where the hardware does not."""

import os
import subprocess
import sys
import types

import pytest
import torch

import fastllm
import fastllm.functional as FF
from fastllm import cpu, extension, matmul, timing
from fastllm.config import InputError

CPU = torch.device("cpu")
AVX2 = frozenset({"avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
BF16 = AVX512 | {"avx512_bf16"}
AMX = BF16 | {"amx_tile", "amx_bf16", "avx512_fp16"}
CLOCKS = ("perf_counter", "process_time", "thread_time")
BOTH, NONE, ONLY_BF16 = (True, True), (False, False), (True, False)


@pytest.fixture
def no_narrow_products(monkeypatch):
    """As on a CPU with AVX2 alone; torch's products of 16-bit matrices fail."""
    found = cpu.Cpu("avx2", {}, {torch.bfloat16: False, torch.float16: False})
    monkeypatch.setattr(cpu, "here", lambda: found)

    def checked(real):
        def product(*args, **kwargs):
            assert all(x.dtype.itemsize > 2 for x in args if isinstance(x, torch.Tensor)), "a 16-bit product"
            return real(*args, **kwargs)

        return product

    for name in ("mm", "addmm", "bmm", "baddbmm", "matmul"):
        monkeypatch.setattr(torch, name, checked(getattr(torch, name)))


@pytest.mark.parametrize(
    ("flags", "torchs", "environment", "level", "products"),
    [
        (frozenset(), "DEFAULT", {}, "baseline", NONE),
        (AVX2, "AVX2", {}, "avx2", NONE),
        (AVX512, "AVX512", {}, "avx512", NONE),
        (BF16, "AVX512", {}, "avx512", ONLY_BF16),
        (AMX, "AVX512", {}, "amx", BOTH),
        (AVX2 | {"avx_ne_convert", "avx512_bf16"}, "AVX2", {}, "avx2", NONE),  # conversions are no products
        (AMX, "AVX512", {"FASTLLM_CPU": "avx512"}, "avx512", BOTH),
        (AMX, "AVX512", {"FASTLLM_CPU": "avx2"}, "avx2", NONE),
        (AMX, "AVX512", {"FASTLLM_CPU": "baseline"}, "baseline", NONE),
        (AVX2, "AVX2", {"FASTLLM_CPU": "amx"}, "avx2", NONE),  # a cap gives nothing
        (AMX, "AVX2", {"ATEN_CPU_CAPABILITY": "avx2"}, "avx2", NONE),
        (AMX, "AVX2", {"ATEN_CPU_CAPABILITY": "avx2", "FASTLLM_CPU": "avx512"}, "avx2", NONE),  # the lower one
        (AMX, "DEFAULT", {"ATEN_CPU_CAPABILITY": "default"}, "baseline", NONE),
        (AMX, "AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "avx2", NONE),
        (AMX, "AVX512", {"ONEDNN_MAX_CPU_ISA": "avx512_core"}, "avx512", NONE),
        (AMX, "AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512", ONLY_BF16),
        (AMX, "AVX512", {"DNNL_MAX_CPU_ISA": "AVX2_VNNI"}, "avx2", NONE),
        (AMX, "AVX512", {"ONEDNN_MAX_CPU_ISA": "ALL"}, "amx", BOTH),
        (None, "AVX512", {}, "avx512", (None, None)),  # to be measured
        (None, "DEFAULT", {}, "baseline", (None, None)),
        (None, "AVX512", {"FASTLLM_CPU": "avx2"}, "avx2", NONE),
    ],
)
def test_level_and_products_follow_flags_and_caps(flags, torchs, environment, level, products):
    found = cpu.find(flags, torchs, {**environment, "HOME": "/"})
    assert (found.level, tuple(found.products.values()), found.caps) == (level, products, environment)


@pytest.mark.parametrize("slower", [1, 50])
def test_where_flags_are_not_known_a_small_product_decides(slower, monkeypatch):
    found = cpu.Cpu("baseline", {}, {torch.bfloat16: None, torch.float16: False})
    monkeypatch.setattr(cpu, "here", lambda: found)
    monkeypatch.setattr(cpu, "_seconds", lambda dtype: 1e-5 * (1 if dtype == torch.float32 else slower))
    cpu._measured.cache_clear()
    assert cpu.multiplies(torch.bfloat16) == (slower == 1)
    assert not cpu.multiplies(torch.float16)
    assert cpu.multiplies(torch.float32)
    assert cpu.matmul_dtype(CPU) == (torch.bfloat16 if slower == 1 else torch.float32)
    assert cpu.matmul_dtype(torch.device("cuda")) == torch.bfloat16
    cpu._measured.cache_clear()


def test_measured_and_known_agree_here():
    known = cpu.here().products[torch.bfloat16]
    if known is None:
        pytest.skip("this CPU's flags are not known: there is nothing to compare with")
    with torch.autocast("cpu", torch.bfloat16):  # which must not reach the products that are timed
        ratios = [cpu._seconds(torch.bfloat16) / cpu._seconds(torch.float32) for _ in range(5)]
        cpu._measured.cache_clear()
        cpu._measured(torch.bfloat16)
    if known:
        assert min(ratios) <= cpu._SLOWER
    elif not cpu.here().caps:
        # A cap takes the products from oneDNN and leaves others that may be quick.
        assert max(ratios) > cpu._SLOWER


LEVEL = """
import torch, fastllm
from fastllm import cpu
info = fastllm._C.build_info()
x = torch.ones(1, 1, 4, 16, dtype=torch.bfloat16)
def refused(run):
    try:
        run()
    except Exception as error:
        return "this machine has no" in str(error) or "doesn't exist" in str(error) or "not implemented" in str(error)
    return False
print(cpu.level(), info["cpu_level"], info["cpu_capability"], info["bf16_products"], info["matrix_units"])
print(refused(lambda: torch.ops.fastllm.attention_amx_fwd(x, x, x, 1.0, True)))
print(refused(lambda: torch.ops.fastllm.add_product_(torch.zeros(16, 16), x[0, 0], x[0, 0], False)))
"""


def _python(code, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in cpu.CAPS}
    return subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(extension.missing() is not None, reason="the extension is not built")
@pytest.mark.parametrize("level", cpu.LEVELS)
def test_the_extension_obeys_the_cap(level):
    machine = cpu.find(cpu._flags(), "AVX512", {})
    if cpu.LEVELS.index(level) > cpu.LEVELS.index(machine.level):
        pytest.skip(f"this CPU has no {level}")
    result = _python(LEVEL, FASTLLM_CPU=level)
    assert result.returncode == 0, result.stderr
    first, *refused = result.stdout.splitlines()
    ours, extensions, vectors, products, units = first.split()
    assert ours == extensions == level
    assert vectors == {"baseline": "default", "amx": "avx512"}.get(level, level)
    pairs = level == "avx512" and "avx512_bf16" in (cpu._flags() or ())
    assert products == ("amx" if level == "amx" else "avx512_bf16" if pairs else "none")
    assert units == str(level == "amx")
    assert refused == [str(level != "amx"), str(products == "none")]


@pytest.mark.skipif(extension.missing() is not None, reason="the extension is not built")
@pytest.mark.parametrize(("torchs", "ours"), [("avx2", "amx"), ("avx512", "avx2"), ("default", "avx2")])
def test_of_torchs_cap_and_ours_the_lower_one_wins(torchs, ours):
    result = _python(LEVEL, FASTLLM_CPU=ours, ATEN_CPU_CAPABILITY=torchs)
    assert result.returncode == 0, result.stderr
    machine = cpu.find(cpu._flags(), "AVX512", {})
    expected = min((machine.level, "baseline" if torchs == "default" else "avx2"), key=cpu.LEVELS.index)
    first, *refused = result.stdout.splitlines()
    assert first.split()[:2] == [expected, expected]
    assert refused == ["True", "True"]


def test_a_wrong_cap_is_an_error_that_names_the_levels():
    message = "FASTLLM_CPU: expected baseline, avx2, avx512 or amx, got 'sse9'"
    with pytest.raises(InputError, match=message):
        cpu.wished({"FASTLLM_CPU": "sse9"})
    result = _python("import fastllm", FASTLLM_CPU="sse9")
    assert result.returncode == 1
    assert result.stderr.strip().endswith(f"InputError: {message}")
    assert cpu.wished({"FASTLLM_CPU": ""}) == "amx"


@pytest.mark.skipif(extension.missing() is not None, reason="the extension is not built")
def test_the_extension_alone_refuses_a_wrong_cap():
    code = (
        "import importlib.util, torch\n"
        f"spec = importlib.util.spec_from_file_location('fastllm._C', {extension.module().__file__!r})\n"
        "found = importlib.util.module_from_spec(spec); spec.loader.exec_module(found); found.build_info()"
    )
    result = _python(code, FASTLLM_CPU="sse9")
    assert "FASTLLM_CPU: expected baseline, avx2, avx512 or amx, got 'sse9'" in result.stderr


def test_info_names_level_caps_and_products():
    result = _python("import fastllm; print(fastllm.info())", FASTLLM_CPU="baseline", ONEDNN_MAX_CPU_ISA="AVX2")
    line = next(line for line in result.stdout.splitlines() if line.startswith("CPU "))
    assert "baseline, 16-bit products in hardware: none" in line
    assert line.endswith("capped by FASTLLM_CPU=baseline, ONEDNN_MAX_CPU_ISA=AVX2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matrix_rate_is_measured_in_bounded_time(dtype, monkeypatch):
    """The flags promise products, which run at 0.2 GFLOP/s by a clock that only products move."""
    sizes, clock = [], [0.0]

    def slow(a, b):
        sizes.append(len(a))
        clock[0] += 2 * len(a) ** 3 / 2e8
        return a

    stopped = types.SimpleNamespace(**dict.fromkeys(CLOCKS, lambda: clock[0]))
    monkeypatch.setattr(matmul, "time", stopped)
    monkeypatch.setattr(timing, "time", stopped)
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(matmul, "_product", slow)
    found = matmul.matmul_flops(CPU, dtype, within=0.3)
    assert clock[0] <= 0.3
    assert found == pytest.approx(2e8)
    assert max(sizes) <= 256


@pytest.mark.parametrize(
    ("worked", "alone", "rate"), [(0.5, 0.25, 4e9), (2.0, 1.0, 1e9), (9.0, 4.5, 1e9), (1.0, 1.0, 1e9), (0.5, 0.5, 2e9)]
)
def test_the_matrix_rate_is_that_of_cores_which_no_other_work_takes(worked, alone, rate, monkeypatch):
    """Products at 1 GFLOP/s by the clock; seconds of two threads' and of the first one's work in one of the clock's."""
    clock = [0.0]

    def product(a, b):
        clock[0] += 2 * len(a) ** 3 / 1e9

    rates = dict(zip(CLOCKS, (1.0, worked, alone), strict=True))
    stopped = types.SimpleNamespace(**{name: lambda rate=rate: rate * clock[0] for name, rate in rates.items()})
    monkeypatch.setattr(matmul, "time", stopped)
    monkeypatch.setattr(timing, "time", stopped)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(matmul, "_product", product)
    assert matmul.matmul_flops(CPU, torch.float32, within=0.3) == pytest.approx(rate)


@pytest.mark.parametrize(("has", "largest"), [(True, 2048), (False, 256)])
def test_the_matrix_rate_of_narrow_products_follows_the_capability(has, largest, monkeypatch):
    sizes = []
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: has)
    monkeypatch.setattr(matmul, "_product", lambda a, b: sizes.append(len(a)))
    assert matmul.matmul_flops(CPU, torch.bfloat16, within=60.0) > 0
    assert max(sizes) == largest
    assert sizes.count(largest) == matmul.PRODUCTS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("ignored", [False, True])
def test_linear_cross_entropy_multiplies_no_narrow_matrices(dtype, backend, ignored, no_narrow_products, monkeypatch):
    if backend == "native" and extension.missing() is not None:
        pytest.skip("the extension is not built")
    monkeypatch.setitem(extension.load._info, "bf16_products", "none")
    x, w, b = torch.randn(50, 24).to(dtype), (torch.randn(5000, 24) * 0.3).to(dtype), torch.randn(5000).to(dtype)
    y = torch.randint(5000, (50,))
    y[:10] = -100 if ignored else 0
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    truth = [t.double().requires_grad_() for t in (x, w, b)]
    with fastllm.backend(backend):
        loss = FF.linear_cross_entropy(leaves[0], leaves[1], y, linear_bias=leaves[2])
        loss.backward()
    expected = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*truth), y)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2 * torch.finfo(dtype).eps)
    for mine, wide in zip(leaves, truth, strict=True):
        error = (mine.grad.double() - wide.grad).norm() / wide.grad.norm()
        assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_multiplies_no_narrow_matrices(dtype, no_narrow_products):
    q, k, v = (torch.randn(1, 2, 9, 16).to(dtype).requires_grad_() for _ in range(3))
    with fastllm.backend("eager"):
        out = FF.attention(q, k, v, causal=True, softcap=5.0)
        out.sum().backward()
    truth = [t.detach().double().requires_grad_() for t in (q, k, v)]
    with fastllm.backend("eager"):
        expected = FF.attention(*truth, causal=True, softcap=5.0)
        expected.sum().backward()
    assert (out.double() - expected).norm() / expected.norm() < torch.finfo(dtype).eps
    for mine, wide in zip((q, k, v), truth, strict=True):
        assert (mine.grad.double() - wide.grad).norm() / wide.grad.norm() < 2 * torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # of Inductor's import
def test_compiled_code_on_disk_is_kept_apart_by_vector_level(monkeypatch):
    """The key that Inductor gives to the code of one graph: another one at another level, a user's own tag beside."""
    from torch._inductor.codecache import compiled_fx_graph_hash

    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    keys = set()
    for level in ("AVX512", "AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda level=level: level)
        with torch.compiler.config.patch(cache_key_tag="mine"):
            cpu.compiled(graph)
            cpu.compiled(graph)
            assert torch.compiler.config.cache_key_tag == f"mine {level}"
            keys.add(compiled_fx_graph_hash(graph, [torch.ones(8)], {}, [])[0])
    assert len(keys) == 2
