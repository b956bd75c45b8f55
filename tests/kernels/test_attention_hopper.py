"""The Hopper forward: its source against the definition in an emulator, its schedule, its code, and itself on a GPU."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE
from gluon_emulator import Emulated
from gluon_machine import EmulationError

import fastllm
from fastllm.backends import BackendError, why_not
from fastllm.bench.interpreter import without_interpreter
from fastllm.functional import attention, scaled_dot_product_attention
from fastllm.kernels.attention import hopper as kernels
from fastllm.kernels.attention import hopper_warps as parts
from fastllm.ops.attention.call import AttentionCall
from fastllm.ops.attention.reference import reference

SM_90 = why_not("hopper", DEVICE.type) is None
pytestmark = pytest.mark.usefixtures("one_thread")
KERNEL = kernels._attention_hopper_fwd_kernel
emulated = pytest.mark.runs_on("interpreter")  # the emulator runs on CPU tensors


def _starts(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def tensors(rows, cols, heads, heads_kv, dim, dtype=torch.bfloat16, batch=None):
    shapes = ((heads, rows), (heads_kv, cols), (heads_kv, cols))
    if batch is None:
        return [torch.randn(n, h, dim).to(dtype) for h, n in shapes]
    return [torch.randn(batch, n, h, dim).transpose(1, 2).to(dtype) for h, n in shapes]


def call_of(q, k, v, cu_q=None, cu_k=None, *, causal=False, bottom_right=True):
    none = dict.fromkeys(("bias", "sinks", "slopes", "seed"))
    return AttentionCall(
        q, k, v, **none, cu_q=cu_q, cu_k=cu_k, scale=q.shape[-1] ** -0.5, softcap=0.0, left=-1,
        right=0 if causal else -1, bottom_right=bottom_right, dropout_p=0.0,
    )  # fmt: skip


def _check(monkeypatch, q, k, v, cu_q=None, cu_k=None, *, causal=False, bottom_right=True, seed=0):
    """The kernel's outputs and statistics against the definition in fp64."""
    kernel = Emulated(KERNEL, seed)
    monkeypatch.setattr(kernels, "_attention_hopper_fwd_kernel", kernel)
    call = call_of(q, k, v, cu_q, cu_k, causal=causal, bottom_right=bottom_right)
    out = torch.full_like(q, math.nan) if cu_q is None else torch.zeros(q.shape, dtype=q.dtype)
    lse, stats = kernels.attention_hopper_fwd(call, out)
    assert kernel.launches
    truth, true_lse = reference(call._replace(q=q.double(), k=k.double(), v=v.double()))
    eager, _ = reference(call)
    floor = 4 * torch.finfo(q.dtype).eps
    assert (out - truth).abs().max() <= 2 * (eager - truth).abs().max() + floor
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)
    # What the backward takes: exp2((q k - maximum) * unit - log2 of the sum) is the softmax.
    unit = call.scale * math.log2(math.e)
    mine = (stats[0] * unit + stats[1]) * math.log(2)
    seen = lse > -math.inf
    torch.testing.assert_close(mine[seen].double(), true_lse[seen], rtol=1e-5, atol=1e-5)
    assert (stats[0][~seen] == 0).all()
    assert (stats[1][~seen] == math.inf).all()
    return out


@emulated
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(300, 300), (193, 520), (520, 193), (128, 1)])
def test_dense(monkeypatch, dim, causal, rows, cols):
    dtype = torch.float16 if dim == 64 else torch.bfloat16
    # Sections of two heads: what fills an L2 cache would be too much for a test.
    monkeypatch.setattr(kernels, "L2", 1)
    _check(monkeypatch, *tensors(rows, cols, 4, 2, dim, dtype, batch=2), causal=causal, seed=rows)
    _check(monkeypatch, *tensors(rows, cols, 3, 1, dim, dtype, batch=1), causal=causal, bottom_right=False, seed=cols)


@emulated
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_packed(monkeypatch, dim, causal):
    cu_q, cu_k = _starts(0, 130, 1, 0, 269), _starts(5, 200, 0, 128, 367)
    q, k, v = tensors(400, 700, 4, 2, dim)
    _check(monkeypatch, q, k, v, cu_q, cu_k, causal=causal, seed=dim)
    same = _starts(128, 3, 269)
    q, k, v = tensors(410, 410, 2, 2, dim)
    out = _check(monkeypatch, q, k, v, same, same, causal=causal, seed=dim)
    assert (out[400:] == 0).all()


@emulated
@pytest.mark.parametrize("causal", [False, True])
def test_a_packed_sequence_keeps_its_neighbours_out(monkeypatch, causal):
    cu = _starts(70, 150, 90)
    q, k, v = tensors(310, 310, 2, 1, 64)
    for x in (q, k, v):
        x[70:220] = math.nan
    clean = [torch.cat([x[:70], x[220:]]) for x in (q, k, v)]
    kernel = Emulated(KERNEL)
    monkeypatch.setattr(kernels, "_attention_hopper_fwd_kernel", kernel)
    out = torch.zeros_like(q)
    kernels.attention_hopper_fwd(call_of(q, k, v, cu, cu, causal=causal), out)
    alone = _check(monkeypatch, *clean, _starts(70, 90), _starts(70, 90), causal=causal)
    assert torch.equal(torch.cat([out[:70], out[220:]]), alone)


@emulated
def test_schedules_do_not_matter(monkeypatch):
    q, k, v = tensors(300, 900, 2, 1, 64, batch=1)
    outs = [_check(monkeypatch, q, k, v, causal=True, seed=100 * i) for i in range(8)]
    assert all(torch.equal(outs[0], out) for out in outs[1:])


FAULTS = {
    "keys are given back before the scores are there": (
        "    s = warpgroup_mma_wait(1, deps=[s])\n    mbarrier.arrive(k.empty.index(slot), count=1)\n",
        "    mbarrier.arrive(k.empty.index(slot), count=1)\n    s = warpgroup_mma_wait(1, deps=[s])\n",
    ),
    "values are not waited for": ("    mbarrier.wait(v.full.index(before), (use - 1) // STAGES & 1)\n", ""),
    "a phase is wrong": (
        "mbarrier.wait(k.full.index(slot), use // STAGES & 1)",
        "mbarrier.wait(k.full.index(slot), 1)",
    ),
    "a turn is not given on": ("        mbarrier.arrive(turns.index(1 - HALF), count=1)\n", "        pass\n"),
    "the last buffer is kept": ("    mbarrier.arrive(v.empty.index(before), count=1)\n", ""),
    "scores are used before they are there": ("warpgroup_mma_wait(1, deps=[s])", "warpgroup_mma_wait(2, deps=[s])"),
    "nothing separates a store from a product": ("    fence_async_shared()\n", ""),
}


@emulated
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_sees_faults(monkeypatch, fault):
    right, wrong = FAULTS[fault]
    found = 0
    for name in ("_step", "_clear_tail"):
        function = getattr(parts, name)
        source = function.src
        if right not in source:
            continue
        found += 1
        scope = dict(function.fn.__globals__)
        exec(compile(source.replace(right, wrong), "one line changed", "exec"), scope)
        monkeypatch.setattr(function, "fn", scope[name])
    assert found == 1
    kernel = Emulated(KERNEL)
    monkeypatch.setattr(kernels, "_attention_hopper_fwd_kernel", kernel)
    cu = _starts(900, 60)
    q, k, v = tensors(960, 960, 2, 1, 64)
    call = call_of(q, k, v, cu, cu, causal=True)

    def some_schedules():
        for _ in range(12):
            kernels.attention_hopper_fwd(call, torch.zeros_like(q))

    with pytest.raises(EmulationError):
        some_schedules()


@emulated
def test_other_calls_are_the_portable_kernels(monkeypatch):
    def run(q, k, v, **features):
        out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1], dtype=q.dtype).transpose(1, 2)
        return kernels.hopper_refuses(kernels.Problem(call_of(q, k, v)._replace(**features)), out)

    q, k, v = tensors(200, 200, 2, 2, 64, batch=1)
    assert run(q, k, v) is None
    assert "feature" in run(q, k, v, left=5)
    assert "feature" in run(q, k, v, bias=torch.zeros(1, 1, 200, 200))
    assert "head dims" in run(q[..., :32], k[..., :32], v)
    assert "fp16" in run(q.float(), k.float(), v.float())
    assert "few queries" in run(q[:, :, :1], *(torch.zeros(1, 2, 8192, 64, dtype=q.dtype) for _ in range(2)))
    shifted = torch.zeros(1, 2, 200 * 64 + 1, dtype=q.dtype)[..., 1:].reshape(1, 2, 200, 64)
    odd = torch.zeros(1, 2, 200, 68, dtype=q.dtype)[..., :64]
    assert "16 bytes" in run(odd, k, v)
    assert "expanded" in run(q, k[:, :1].expand(1, 2, 200, 64), v)
    assert run(shifted, k, v) is None or "16 bytes" in run(shifted, k, v)


def test_every_setting_compiles_for_sm_90():
    """No spills, warpgroup products, bulk copies, a block's shared memory; and the launch reads nothing back."""
    command = [sys.executable, "-m", "fastllm.bench.attention_tables", "--dtype", "bfloat16"]
    # Of the four variants of a setting the one with most registers; docs/attention-tables.md has them all.
    run = subprocess.run(
        [*command, "--feature", "hopper packed causal"],
        env=without_interpreter(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].startswith(f"{len(kernels.SETTINGS)} kernels, 0 that spill")


@pytest.mark.runs_on("gpu", "interpreter")
@pytest.mark.skipif(SM_90, reason="there is a GPU of sm_90")
def test_it_is_refused_elsewhere():
    x = torch.zeros(1, 2, 4, 64, dtype=torch.float16, device=DEVICE)
    for function in (attention, scaled_dot_product_attention):
        with fastllm.backend("hopper"), pytest.raises(BackendError, match="sm_90"):
            function(x, x, x)
        assert function(x, x, x).shape == x.shape


@pytest.mark.runs_on("gpu")
@pytest.mark.skipif(not SM_90, reason="no GPU of sm_90 here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(2048, 2048), (1000, 3000), (3000, 1000), (129, 127)])
def test_dense_on_a_gpu(dtype, dim, causal, rows, cols):
    q, k, v = (x.to(DEVICE).requires_grad_() for x in tensors(rows, cols, 8, 2, dim, dtype, batch=3))
    on_a_gpu((q, k, v), causal=causal)


@pytest.mark.runs_on("gpu")
@pytest.mark.skipif(not SM_90, reason="no GPU of sm_90 here")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_on_a_gpu(dim, causal):
    cu = _starts(0, 1300, 1, 0, 700, 128, 64).to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in tensors(2193, 2193, 8, 2, dim))
    on_a_gpu(tuple(x.requires_grad_() for x in (q, k, v)), causal=causal, cu_seqlens_q=cu, cu_seqlens_k=cu)
    with torch.no_grad():
        for x in (q, k, v):
            x[1301:2001] = math.nan
        with fastllm.backend("hopper"):
            out = attention(q, k, v, causal=causal, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert out[:1301].isfinite().all()
    assert out[2001:].isfinite().all()


def on_a_gpu(inputs, **options):
    """Outputs and gradients against the definition in fp64, within what the portable kernels' error allows; thrice."""

    def run(backend, tensors):
        with fastllm.backend(backend):
            out, lse = attention(*tensors, return_lse=True, **options)
        return out, lse, *torch.autograd.grad(out, tensors, grad.to(out.dtype))

    grad = torch.randn_like(inputs[0])
    truth = run("eager", [x.detach().double().requires_grad_() for x in inputs])
    portable, mine = run("triton", inputs), run("hopper", inputs)
    for a, b, true in zip(mine, portable, truth, strict=True):
        assert torch.equal(a.isinf(), true.isinf())
        seen = true.isfinite()
        error = (a - true)[seen].abs().max()
        assert error <= 2 * (b - true)[seen].abs().max() + 4 * torch.finfo(a.dtype).eps * true[seen].abs().max()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(mine, run("hopper", inputs), strict=True))
