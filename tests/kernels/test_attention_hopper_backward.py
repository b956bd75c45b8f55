"""The Hopper backward: its source against the definition in an emulator, its order, its code, and itself on a GPU."""

import math

import pytest
import torch
from conftest import DEVICE
from gluon_emulator import Emulated, Launch
from gluon_machine import EmulationError
from thorough import THOROUGH

from fastllm.backends import why_not
from fastllm.kernels.attention import hopper_backward as kernels
from fastllm.kernels.attention import hopper_backward_warps as parts
from fastllm.kernels.attention.backward import attention_bwd
from fastllm.ops.attention.call import AttentionCall, ForwardResult, OutputGradients, Wanted
from fastllm.ops.attention.reference import reference

SM_90 = why_not("hopper", DEVICE.type) is None
pytestmark = pytest.mark.usefixtures("one_thread")
KERNEL = kernels._attention_hopper_bwd_kernel
emulated = pytest.mark.runs_on("interpreter")  # the emulator runs on CPU tensors


def tensors(rows, cols, heads, heads_kv, dim, dtype=torch.bfloat16, batch=1):
    shapes = ((heads, rows), (heads_kv, cols), (heads_kv, cols), (heads, rows))
    return [torch.randn(batch, n, h, dim).to(dtype).transpose(1, 2) for h, n in shapes]


def call_of(q, k, v, *, causal=False, bottom_right=True):
    none = dict.fromkeys(("bias", "sinks", "slopes", "seed", "cu_q", "cu_k"))
    return AttentionCall(
        q, k, v, **none, scale=q.shape[-1] ** -0.5, softcap=0.0, left=-1, right=0 if causal else -1,
        bottom_right=bottom_right, dropout_p=0.0,
    )  # fmt: skip


def forward_of(call):
    """What the backward takes from a forward: the output and, of each row, the maximum and log2 of the sum."""
    out, _ = reference(call)
    group = call.q.shape[1] // call.k.shape[1]
    scores = call.q.float() @ call.k.float().repeat_interleave(group, 1).transpose(-1, -2)
    if call.right == 0:
        offset = scores.shape[-1] - scores.shape[-2] if call.bottom_right else 0
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(offset + 1), -math.inf)
    row_max = scores.amax(-1)
    empty = row_max == -math.inf
    row_max = row_max.masked_fill(empty, 0.0)
    total = torch.exp2((scores - row_max[..., None]) * (call.scale * math.log2(math.e))).sum(-1)
    return ForwardResult(out, torch.stack([row_max, total.log2().masked_fill(empty, math.inf)]))


def gradients(backward, call, forward, dout, dlse=None):
    wanted = Wanted(*(torch.full_like(x, math.nan) for x in (call.q, call.k, call.v)), False, False)
    assert backward(call, forward, OutputGradients(dout, dlse), wanted) == (None, None)
    return wanted[:3]


def defined(call, dout, dlse, dtype):
    inputs = [x.to(dtype, copy=True).requires_grad_() for x in (call.q, call.k, call.v)]
    out, lse = reference(call._replace(**dict(zip("qkv", inputs, strict=True))))
    upstream = [dout.to(out.dtype)] if dlse is None else [dout.to(out.dtype), dlse.to(lse.dtype)]
    return torch.autograd.grad([out, lse][: len(upstream)], inputs, upstream)


def _check(monkeypatch, rows, cols, dim, dtype, *, heads=2, heads_kv=1, batch=1, **mask):
    """Its gradients against the definition in fp64, within what eager's own error allows; returns all it had."""
    q, k, v, dout = tensors(rows, cols, heads, heads_kv, dim, dtype, batch)
    call = call_of(q, k, v, **mask)
    dlse = torch.randn(q.shape[:3])
    kernel = Emulated(KERNEL, seed=rows + cols)
    monkeypatch.setattr(kernels, "_attention_hopper_bwd_kernel", kernel)
    forward = forward_of(call)
    mine = gradients(kernels.attention_hopper_bwd, call, forward, dout, dlse)
    assert kernel.launches
    truth, eager = defined(call, dout, dlse, torch.float64), defined(call, dout, dlse, dtype)
    for a, true, plain in zip(mine, truth, eager, strict=True):
        floor = 4 * torch.finfo(dtype).eps * max(1.0, true.abs().max())
        assert (a - true).abs().max() <= 2 * (plain - true).abs().max() + floor
    return call, forward, (dout, dlse), mine, truth


CASES = [
    (64, torch.float16, True, 100, 150),
    (64, torch.bfloat16, False, 70, 130),
    (128, torch.bfloat16, True, 70, 300),
    (128, torch.float16, True, 200, 70),
    (128, torch.bfloat16, False, 65, 64),
]


@emulated
@pytest.mark.parametrize(("dim", "dtype", "causal", "rows", "cols"), CASES)
def test_gradients(monkeypatch, dim, dtype, causal, rows, cols):
    _check(monkeypatch, rows, cols, dim, dtype, causal=causal)


@emulated
def test_heads_and_batches(monkeypatch):
    _check(monkeypatch, 70, 150, 64, torch.float16, heads=4, heads_kv=2, batch=2, causal=True)
    _check(monkeypatch, 70, 150, 64, torch.float16, causal=True, bottom_right=False)


@emulated
@THOROUGH
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(150, 150), (70, 300), (300, 70), (1, 129), (128, 256)])
def test_gradients_beside_the_portable_kernels(monkeypatch, dim, dtype, causal, rows, cols):
    call, forward, upstream, mine, truth = _check(monkeypatch, rows, cols, dim, dtype, causal=causal)
    portable = gradients(attention_bwd, call, forward, *upstream)
    for a, b, true in zip(mine, portable, truth, strict=True):
        floor = 4 * torch.finfo(dtype).eps * max(1.0, true.abs().max())
        assert (a - true).abs().max() <= 2 * (b - true).abs().max() + floor


@emulated
def test_scores_far_below_zero_beside_the_last_column(monkeypatch):
    q, k, v, dout = tensors(64, 70, 1, 1, 64)
    q, k = torch.full_like(q, 30.0), torch.full_like(k, -30.0)
    call = call_of(q, k, v)
    monkeypatch.setattr(kernels, "_attention_hopper_bwd_kernel", Emulated(KERNEL))
    truth = defined(call, dout, None, torch.float64)
    mine = gradients(kernels.attention_hopper_bwd, call, forward_of(call), dout)
    # All keys are equal, so dq's terms, which are as large as dk's and rounded to bfloat16 each, cancel.
    allowed = 2 * torch.finfo(torch.bfloat16).eps * max(b.abs().max() for b in truth).item()
    for a, b in zip(mine, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=allowed)


class _Sums:
    """Stands for the kernel that makes dq, and keeps the fp32 sums that it is given."""

    def __init__(self, kernel):
        self.kernel, self.kept = kernel, []

    def __getitem__(self, grid):
        def launch(dq, sums, *args, **options):
            self.kept.append(sums.dq.clone())
            self.kernel[grid](dq, sums, *args, **options)

        return launch


def _schedules(monkeypatch, count, rows=64, cols=512, together=4):
    """The fp32 sums of dq under some schedules of ``together`` programs side by side."""
    q, k, v, dout = tensors(rows, cols, 1, 1, 64)
    call = call_of(q, k, v)
    forward = forward_of(call)
    with monkeypatch.context() as patch:
        sums = _Sums(kernels._attention_hopper_dq_kernel)
        patch.setattr(kernels, "_attention_hopper_dq_kernel", sums)
        for seed in range(count):
            patch.setattr(kernels, "_attention_hopper_bwd_kernel", Emulated(KERNEL, 100 * seed, together))
            gradients(kernels.attention_hopper_bwd, call, forward, dout)
    return sums.kept


@emulated
def test_programs_side_by_side_give_the_same_bits(monkeypatch):
    first, *others = _schedules(monkeypatch, 4)
    assert all(torch.equal(first, other) for other in others)


@emulated
def test_atomics_are_asked_for_and_deterministic_algorithms_refuse_them(monkeypatch):
    assert kernels._ordered()
    monkeypatch.setenv("FASTLLM_ATOMIC_DQ", "1")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert kernels._ordered()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert not kernels._ordered()
    first, *others = _schedules(monkeypatch, 3)
    # The order of addends differs from schedule to schedule, and their sum's last bits with it.
    assert any(not torch.equal(first, other) for other in others)
    for other in others:
        torch.testing.assert_close(first, other)


FAULTS = {
    "queries are given back before their product is done": (
        "    dk = warpgroup_mma_wait(0, deps=[dk])\n    mbarrier.arrive(rings.q.empty.index(slot), count=1)\n",
        "    mbarrier.arrive(rings.q.empty.index(slot), count=1)\n    dk = warpgroup_mma_wait(0, deps=[dk])\n",
    ),
    "the output gradients are not waited for": ("    mbarrier.wait(rings.dout.full.index(slot), phase)\n", ""),
    "nothing separates ds from its product": ("    fence_async_shared()\n", ""),
    "dq is used before it is there": ("dq = warpgroup_mma_wait(1, deps=[dq])", "dq = warpgroup_mma_wait(2, deps=[dq])"),
    "the last buffer is kept": ("    mbarrier.arrive(rings.q.empty.index(slot), count=1)\n", ""),
    "a phase is wrong": ("rings.dq.empty.index(0), (use & 1) ^ 1)", "rings.dq.empty.index(0), 1)"),
    "a turn is not given on": ('gl.atomic_add(sums.turns + slot, 1, sem="release")', "pass"),
    "the order is the other way round": ("before = most\n", "before = first // BLOCK_N\n"),
}  # fmt: skip


@emulated
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_sees_faults(monkeypatch, fault):
    right, wrong = FAULTS[fault]
    found = 0
    for name in ("_step", "add"):
        function = getattr(parts, name)
        if right not in function.src:
            continue
        found += 1
        scope = dict(function.fn.__globals__)
        exec(compile(function.src.replace(right, wrong), "one line changed", "exec"), scope)
        monkeypatch.setattr(function, "fn", scope[name])
    assert found == 1
    monkeypatch.setattr(Launch, "MOST_TURNS", 2000)
    monkeypatch.setitem(kernels.SETTINGS, 64, dict(BLOCK_M=64, BLOCK_N=128, STAGES=2))
    with pytest.raises(EmulationError):
        _schedules(monkeypatch, 8, rows=320, cols=140, together=1)


@emulated
def test_other_gradients_are_the_portable_kernels():
    q, k, v, dout = tensors(70, 70, 2, 2, 64)

    def why(call, dout=dout, wanted=None):
        wanted = wanted or Wanted(q, k, v, False, False)
        return kernels.hopper_backward_refuses(kernels.Problem(call), dout, wanted)

    call = call_of(q, k, v)
    assert why(call) is None
    assert "feature" in why(call._replace(left=5))
    assert "not all" in why(call, wanted=Wanted(q, None, v, False, False))
    assert "expanded" in why(call, dout[:, :1].expand_as(dout))
    starts = torch.tensor([0, 70], dtype=torch.int32)
    packed = call._replace(**{name: x[0].transpose(0, 1) for name, x in zip("qkv", (q, k, v), strict=True)})
    assert "packed" in why(packed._replace(cu_q=starts, cu_k=starts), packed.q)


@pytest.mark.runs_on("gpu")
@pytest.mark.skipif(not SM_90, reason="no GPU of sm_90 here")
@pytest.mark.parametrize("atomic", ["0", "1"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_on_a_gpu(monkeypatch, atomic, dim, causal):
    """Against the portable kernels and the definition in fp64; in order, thrice the same bits."""
    monkeypatch.setenv("FASTLLM_ATOMIC_DQ", atomic)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    for rows, cols, dtype in ((300, 300, torch.bfloat16), (193, 520, torch.float16)):
        q, k, v, dout = (x.to(DEVICE) for x in tensors(rows, cols, 4, 2, dim, dtype, 2))
        call = call_of(q, k, v, causal=causal)
        forward = forward_of(call)
        mine = gradients(kernels.attention_hopper_bwd, call, forward, dout)
        portable = gradients(attention_bwd, call, forward, dout)
        truth = defined(call, dout, None, torch.float64)
        for a, b, true in zip(mine, portable, truth, strict=True):
            floor = 4 * torch.finfo(dtype).eps * max(1.0, true.abs().max())
            assert (a - true).abs().max() <= 2 * (b - true).abs().max() + floor
        for _ in range(2 if atomic == "0" else 0):
            again = gradients(kernels.attention_hopper_bwd, call, forward, dout)
            assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))
