"""Attention on a CPU's matrix units, beside torch's own and an fp64 oracle."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastllm
from fastllm.backends import Choice
from fastllm.extension import load as extension
from fastllm.functional import attention, scaled_dot_product_attention
from fastllm.ops.attention.amx import MAX_TOKENS
from fastllm.ops.attention.call import AttentionCall, AttentionRequest
from fastllm.ops.attention.forms import AMX, form_of

pytestmark = pytest.mark.skipif(
    not extension.has_matrix_units(), reason="this CPU has no matrix units (AMX), or the extension was not built"
)
EPS = torch.finfo(torch.bfloat16).eps
NAMES = ("out", "dq", "dk", "dv")


def planes(batch, heads, rows, columns, layout="heads"):
    """(batch, heads, rows, columns) bf16, in one of the layouts that models have."""
    if layout == "heads":
        x = torch.randn(batch, heads, rows, columns)
    elif layout == "tokens":
        x = torch.randn(batch, rows, heads, columns).transpose(1, 2)
    elif layout == "part":  # of a wider row, at an odd offset
        x = torch.randn(batch, rows, heads, 3 * columns + 1)[..., 1 : 1 + columns].transpose(1, 2)
    elif layout == "columns":
        x = torch.randn(batch, heads, columns, rows).transpose(2, 3)
    else:
        x = torch.randn(1, heads, 1, columns).expand(batch, heads, rows, columns)
    return x.bfloat16()


def amx_serves(q, k, v, mask, causal, asked=False, scale=1.0):
    call = AttentionCall(q, k, v, mask, right=0 if causal else -1, bottom_right=False, scale=scale)
    return form_of(AttentionRequest(call), Choice("eager", "", asked)).name == AMX


def run(function, q, k, v, dout, **options):
    """Output and gradients."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, **options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def oracle(q, k, v, scale, causal):
    t = q @ k.transpose(-1, -2) * scale
    if causal:
        t = t.masked_fill(torch.ones(t.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return torch.softmax(t, -1) @ v


@pytest.mark.parametrize(
    ("queries", "keys", "columns", "causal", "layout"),
    [
        (32, 32, 32, True, "heads"), (64, 64, 64, True, "tokens"), (65, 65, 64, True, "part"),
        (1, 1, 64, True, "heads"), (100, 37, 80, False, "tokens"), (31, 200, 16, False, "columns"),
        (300, 300, 100, True, "part"), (33, 33, 1, True, "heads"), (40, 1, 7, False, "expanded"),
        (96, 96, 256, True, "tokens"), (17, 130, 33, False, "part"), (128, 128, 64, False, "expanded"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scale", [None, 2.0, -0.3])
def test_as_close_to_the_truth_as_torch(queries, keys, columns, causal, layout, scale):
    q, k, v = (planes(2, 3, n, columns, layout) for n in (queries, keys, keys))
    dout = planes(2, 3, queries, columns, layout)
    scale = columns**-0.5 if scale is None else scale
    assert amx_serves(q, k, v, None, causal)
    truth = run(oracle, *(x.double() for x in (q, k, v, dout)), scale=scale, causal=causal)
    ours = run(attention, q, k, v, dout, scale=scale, causal=causal)
    # torch's fused form gives NaN for a negative scale and hidden keys; what it is itself judged by does not.
    with fastllm.backend("eager"), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torchs = run(F.scaled_dot_product_attention, q, k, v, dout, scale=scale, is_causal=causal)
    for name, mine, other, exact in zip(NAMES, ours, torchs, truth, strict=True):
        error, allowed = (mine.double() - exact).abs().max(), (other.double() - exact).abs().max()
        # torch's own keeps softmax and its gradient in fp32; products of bf16 ones may lose an eps of what they add up.
        size = max(exact.abs().max(), 2**-14 if name in ("dq", "dk") else 0)
        assert error <= 2 * allowed + 4 * EPS * size, (name, error, allowed, size)


@pytest.mark.parametrize("scale", [None, 2.0, -0.3])
def test_padding_that_is_hidden_is_as_if_it_were_not_there(scale):
    q, k, v = planes(4, 3, 40, 48, "tokens"), planes(4, 3, 70, 48, "part"), planes(4, 3, 70, 48)
    dout, lengths = planes(4, 3, 40, 48), torch.tensor([70, 33, 1, 0])
    mask = (torch.arange(70) < lengths[:, None])[:, None, None, :]
    assert amx_serves(q, k, v, mask, False)
    out, dq, dk, dv = run(attention, q * 30, k, v, dout, bias=mask, scale=scale)
    for row, length in enumerate(lengths.tolist()):
        if not length:
            assert not any(x[row].any() for x in (out, dq, dk, dv))
            continue
        one = [x[row : row + 1] for x in (q * 30, k[:, :, :length], v[:, :, :length], dout)]
        alone = run(attention, *one, scale=scale)
        there = (out, dq, dk[:, :, :length], dv[:, :, :length])
        for name, mine, other in zip(NAMES, there, alone, strict=True):
            assert torch.equal(mine[row], other[0]), (name, length)
        assert not dk[row, :, length:].any()
        assert not dv[row, :, length:].any()


def test_one_key_has_no_gradient_through_the_scores():
    q, k, v = planes(2, 2, 50, 24), planes(2, 2, 1, 24), planes(2, 2, 1, 24)
    out, dq, dk, _ = run(attention, q, k, v, planes(2, 2, 50, 24))
    assert torch.equal(out, v.expand_as(out))
    assert not dq.any()
    assert not dk.any()


def test_large_scores_and_what_is_not_finite():
    q, k, v = (planes(1, 1, 40, 32) for _ in range(3))
    out, *grads = run(attention, q * 300, k * 300, v, planes(1, 1, 40, 32), causal=True)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    k[0, 0, 7] = math.nan  # seen by queries 7 to 39
    out = attention(q, k, v, causal=True)
    assert out[0, 0, :7].isfinite().all()
    assert out[0, 0, 7:].isnan().all()


def test_the_same_bits_for_any_number_of_threads_alone_and_in_a_batch():
    q, k, v, dout = (planes(3, 4, 70, 48, "tokens") for _ in range(4))
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(run(attention, q, k, v, dout, causal=True))
    finally:
        torch.set_num_threads(threads)
    alone = run(attention, *(x[1:2] for x in (q, k, v, dout)), causal=True)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(torch.equal(a[1:2], b) for a, b in zip(results[0], alone, strict=True))


def test_gradients_only_where_wanted_and_second_order():
    q, k, v = (planes(1, 2, 20, 16) for _ in range(3))
    k.requires_grad_()
    out = attention(q, k, v, causal=True)
    (dk,) = torch.autograd.grad(out, k, torch.ones_like(out), create_graph=True)
    (ours,) = torch.autograd.grad(dk.float().square().sum(), k)
    exact = k.detach().double().requires_grad_()
    out = oracle(q.double(), exact, v.double(), 0.25, True)
    (dk,) = torch.autograd.grad(out, exact, torch.ones_like(out), create_graph=True)
    (truth,) = torch.autograd.grad(dk.square().sum(), exact)
    assert (ours.double() - truth).abs().max() <= 16 * EPS * truth.abs().max()


def test_under_compile_checks_and_functional_gradients():
    q, k, v = (planes(2, 2, 40, 16, "tokens").requires_grad_() for _ in range(3))
    for name, args in (
        ("fwd", (q.detach(), k.detach(), v.detach(), 0.25, True)),
        ("bwd", (v.detach(), q.detach(), k.detach(), v.detach(), 0.25, True)),
    ):
        torch.library.opcheck(getattr(torch.ops.fastllm, f"attention_amx_{name}").default, args)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True)
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, is_causal=True), expected)
    gradient = torch.func.grad(lambda q: scaled_dot_product_attention(q, k, v, is_causal=True).float().sum())(q)
    assert torch.equal(gradient, torch.autograd.grad(expected.float().sum(), q)[0])


def test_what_it_leaves_to_torch():
    q = planes(1, 2, 8, 16)
    assert amx_serves(q, q, q, None, False)
    assert not amx_serves(q, q, q, None, False, asked=True)
    assert not amx_serves(q.float(), q.float(), q.float(), None, False)
    assert not amx_serves(q, q[:, :1], q[:, :1], None, False)
    assert not amx_serves(q, q[:, :, :4], q[:, :, :4], None, True)
    assert not amx_serves(q, q, q, torch.zeros(8, 8), False)
    assert not amx_serves(q, q, q, torch.zeros(1, 1, 1, 8), False)
    padding = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    assert amx_serves(q, q, q, padding, False)
    assert not amx_serves(q, q, q, padding, True)
    # A key is hidden by a number times the scale.
    assert not any(amx_serves(q, q, q, padding, False, scale=scale) for scale in (0.0, -1e-30, 1e30))
    assert amx_serves(q, q, q, None, True, scale=0.0)
    assert not amx_serves(q, q, q, padding.expand(1, 2, 8, 8), False)
    long = q.new_empty(1, 1, MAX_TOKENS + 1, 16)
    assert not amx_serves(long, long, long, None, False)
    empty = q[:, :, :0]
    assert attention(empty, q, q).shape == (1, 2, 0, 16)
