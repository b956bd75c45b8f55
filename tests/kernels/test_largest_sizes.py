"""Sizes just below 2^31, where a sum with a block's length no longer fits in 32 bits: the last elements are right."""

import sys
import types
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from last_programs import large, last_programs
from triton.runtime import interpreter

import fastllm
from fastllm.bench.limits import GRID
from fastllm.functional import attention
from fastllm.kernels import gated, rotary_embedding, sizes
from fastllm.kernels.cross_entropy import backward as ce_backward
from fastllm.kernels.cross_entropy import forward as ce_forward
from fastllm.kernels.norm import backward as norm_backward
from fastllm.ops.cross_entropy.loss import Labelled, Loss
from fastllm.ops.cross_entropy.operator import LossGradients, RowStatistics
from fastllm.ops.norm.call import NormBackward
from fastllm.registry import OPS

pytestmark = pytest.mark.runs_on("interpreter")
MOST = 2**31 - 1
TAIL = 20


def _filled(*shape, dtype=torch.float16, tail=TAIL):
    """Zeros but for ``tail`` of the first dimension."""
    x = large(*shape, dtype=dtype)
    x[-tail:] = torch.randn(tail, *shape[1:]).to(dtype)
    return x


def test_gated_products():
    gate, up, dy = _filled(MOST), _filled(MOST), _filled(MOST)
    with last_programs(gated):
        y = gated.gated_fwd(gate, up, "silu")
        dgate, dup = gated.gated_bwd(dy, gate, up, "silu", (True, True))
    parts = [t[-TAIL:].float().requires_grad_() for t in (gate, up)]
    expected = F.silu(parts[0]) * parts[1]
    slopes = torch.autograd.grad(expected, parts, dy[-TAIL:].float())
    for got, want in zip((y, dgate, dup), (expected, *slopes), strict=True):
        torch.testing.assert_close(got[-TAIL:].float(), want, rtol=2e-3, atol=2e-3)


def test_the_scale_of_a_gradient():
    dx = _filled(MOST)
    expected = dx[-TAIL:] * 2
    with last_programs(ce_backward):
        ce_backward.scale_gradient(dx, torch.tensor(2.0))
    assert torch.equal(dx[-TAIL:], expected)


@pytest.mark.parametrize("positions", [MOST, 2**30 + 5])
def test_cross_entropy_of_many_positions(positions):
    x = _filled(positions, 2)
    target = large(positions, 1, dtype=torch.int64)
    target[-TAIL:] = 1
    labelled = Labelled(x.unsqueeze(-1), target, None, Loss(reduction="none"))
    with last_programs(ce_forward, ce_backward):
        value, lse, stats, _, _ = ce_forward.cross_entropy_fwd(labelled, torch.float32)
        upstream = LossGradients(_filled(positions, dtype=torch.float32))
        dx, _ = ce_backward.cross_entropy_bwd(upstream, labelled, RowStatistics(stats), (True, False))
    z = x[-TAIL:].float().requires_grad_()
    expected = F.cross_entropy(z, target[-TAIL:, 0], reduction="none")
    (slope,) = torch.autograd.grad(expected, z, upstream.loss[-TAIL:])
    torch.testing.assert_close(value[-TAIL:], expected)
    torch.testing.assert_close(lse[-TAIL:], z.logsumexp(1))
    torch.testing.assert_close(dx[-TAIL:, :, 0].float(), slope, rtol=2e-3, atol=2e-3)


def test_sums_over_many_positions():
    # Two turns of 128 programs see no more than these.
    target = large(MOST, dtype=torch.int64)
    with last_programs(ce_forward):
        total = ce_forward.target_mass(target, None, 2, -100)
        out = torch.empty(())
        ce_forward._sum_into(out, _filled(MOST, dtype=torch.float32))
    assert 0 < total <= 128 * 2 * ce_forward.SUM_BLOCK
    assert out.isfinite()


def test_rotary_embedding_of_a_long_sequence():
    query = _filled(MOST, 2).view(1, 1, MOST, 2)
    cos, sin = torch.tensor([[0.6]]).expand(MOST, 1), torch.tensor([[0.8]]).expand(MOST, 1)
    call = types.SimpleNamespace(
        query=query, key=None, cos=cos, sin=sin, position_ids=None, offset=0, interleaved=False, inverse=False
    )
    out = large(1, 1, MOST, 2, dtype=torch.float16)
    with last_programs(rotary_embedding):
        rotary_embedding.rotary(call, out, None)
    a, b = query[0, 0, -TAIL:].float().unbind(-1)
    expected = torch.stack([a * 0.6 - b * 0.8, b * 0.6 + a * 0.8], -1)
    torch.testing.assert_close(out[0, 0, -TAIL:].float(), expected, rtol=2e-3, atol=2e-3)


def test_the_norms_backward_of_many_rows():
    x, dy = _filled(MOST, 2), _filled(MOST, 2)
    rstd = large(MOST, dtype=torch.float32)
    z = x[-TAIL:].float().requires_grad_()
    rstd[-TAIL:] = (z.detach().square().mean(1) + 1e-6).rsqrt()
    call = NormBackward(
        dy, None, x, None, None, torch.empty(0), rstd, torch.float16, torch.float16, 0.0, 0.0, False,
        (True, False, False, False), "triton",
    )  # fmt: skip
    with last_programs(norm_backward):
        dx = norm_backward.norm_bwd(call)[0]
    expected = torch.autograd.grad(F.rms_norm(z, (2,), eps=1e-6), z, dy[-TAIL:].float())[0]
    torch.testing.assert_close(dx[-TAIL:].float(), expected, rtol=2e-3, atol=2e-3)


def test_the_widest_windows_reach_every_column():
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))

    def outcome(backend, window):
        with fastllm.backend(backend):
            out = attention(q, k, v, window=window)
        return (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))

    for window, narrow in (
        ((2**31 - 1, 2**31 - 1), (40, 40)), ((None, sys.maxsize), (None, 40)), ((2**63, 0), (40, 0)),
    ):  # fmt: skip
        for backend in ("triton", "native", "eager"):
            torch.testing.assert_close(outcome(backend, window), outcome("eager", narrow))


def _reason(op, *args, **kwargs):
    """Why the kernels refuse a call; its tensors have no memory."""
    return OPS[op].refuses("triton", OPS[op].call(*args, **kwargs))


def test_sizes_past_a_grid_are_refused_by_name():
    row = large(sizes.NORM_COLUMNS + 1, dtype=torch.float16)
    for op in ("layer_norm", "rms_norm"):
        assert "67,107,840 elements of normalized_shape, got 67,107,841" in _reason(op, row, row.shape)
        assert _reason(op, row[:-1], row[:-1].shape) is None
    logits = large(1, sizes.CROSS_ENTROPY_CLASSES + 1, dtype=torch.float16)
    target = torch.zeros(1, dtype=torch.int64)
    assert "134,215,680 classes, input has 134,215,681" in _reason("cross_entropy", logits, target)
    assert _reason("cross_entropy", logits[:, :-1], target) is None
    key = large(1, 1, sizes.ATTENTION_ROWS + 1, 16, dtype=torch.float16)
    query = key[:, :, :1]
    for op in ("attention", "scaled_dot_product_attention"):
        assert "1,073,741,823 rows of query and of key, got 1 and 1,073,741,824" in _reason(op, query, key, key)
        assert _reason(op, query, key[:, :, :-1], key[:, :, :-1]) is None


class _Launched(Exception):
    pass


def _grid(launch, *args):
    """The grid of the first launch that ``launch(*args)`` makes, which is not run."""

    def launched(executor, *args, **kwargs):
        raise _Launched(executor.grid)

    with mock.patch.object(interpreter.GridExecutor, "__call__", launched), pytest.raises(_Launched) as found:
        launch(*args)
    return found.value.args[0]


def test_the_largest_sizes_fit_a_grid():
    row = large(1, sizes.NORM_COLUMNS, dtype=torch.float16)
    call = NormBackward(
        row, None, row, None, None, torch.empty(0), torch.empty(1), torch.float16, torch.float16, 0.0, 0.0, False,
        (False, False, True, False), "triton",
    )  # fmt: skip
    # A gradient of the weight alone needs no sums over the row, which come first.
    assert _grid(lambda: norm_backward.norm_bwd(call._replace(weight=row[0])))[1] == sizes.GRID_SIDE
    n = sizes.CROSS_ENTROPY_CLASSES
    for logits in (large(1, n, 1, dtype=torch.float16), large(1, n, 2, dtype=torch.float16)):
        positions = logits.shape[2]
        labelled = Labelled(logits, torch.zeros(1, positions, dtype=torch.int64), None, Loss())
        statistics = RowStatistics(torch.zeros(3, positions), torch.ones(()))
        grid = _grid(
            lambda *given: ce_backward.cross_entropy_bwd(LossGradients(torch.ones(())), *given, (True, False)),
            labelled, statistics,
        )  # fmt: skip
        assert all(side <= most for side, most in zip(grid, GRID, strict=False)), grid
