"""What is peculiar to attention by the extension on CPUs (csrc/cpu/attention_rows.cpp): blocks, threads, its use.

That it is right with every option: tests/test_ops.py and tests/ops/test_attention_random.py, backend ``native``.
"""

import math

import pytest
import torch
from contract import assert_all_as_true, run

import fastllm
from fastllm.backends import BackendError, pick
from fastllm.extension import load as extension
from fastllm.functional import attention
from fastllm.ops.attention.attention import attention_reference
from fastllm.ops.attention.native import MIN_ROWS, native_loses
from fastllm.registry import OPS, Sample

pytestmark = [
    pytest.mark.cpu_level,
    pytest.mark.skipif(extension.missing() is not None, reason="no extension here: no C++ compiler"),
]
SDPA = "scaled_dot_product_attention"


def planes(batch, heads, rows, columns, dtype=torch.float32):
    """(batch, heads, rows, columns), heads of one token side by side in a wider row, from an odd offset on."""
    return torch.randn(batch, rows, heads, columns + 3)[..., 3:].transpose(1, 2).to(dtype).requires_grad_()


# Whole and broken blocks of rows (96, 384), of keys (64 to 256), of vectors and of tiles; edges within and between.
SHAPES = {
    "one": (1, 1, 1, 1, {}),
    "tiles": (13, 29, 5, 7, {}),
    "causal": (391, 391, 20, 20, {"causal": True}),
    "more keys": (97, 300, 64, 33, {"causal": True}),
    "more rows": (300, 97, 33, 64, {"causal": True}),
    "window": (200, 310, 16, 16, {"window": (70, 9)}),
    "widest": (100, 130, 256, 256, {"causal": True, "window": (40, 0)}),
}


@pytest.mark.parametrize("case", SHAPES)
def test_blocks_that_are_whole_and_broken(case):
    torch.manual_seed(0)
    rows, cols, dim, dim_v, options = SHAPES[case]
    options = options | {"return_lse": True}
    q, k, v = planes(1, 2, rows, dim), planes(1, 1, cols, dim), planes(1, 1, cols, dim_v)
    wide = Sample("", tuple(x.detach().double().requires_grad_() for x in (q, k, v)), options)
    sample = Sample("", (q, k, v), options)
    got, yardstick = run(attention, sample, "native"), run(attention, sample, "eager")
    assert_all_as_true(got, lambda: run(attention_reference, wide), yardstick, torch.float32, case)


def results(q, k, v, dout, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with fastllm.backend("native"):
        out = attention(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads_alone_and_in_a_batch(dtype):
    q, k, v, dout = (planes(3, heads, 405, 24, dtype).detach() for heads in (4, 2, 2, 4))
    options = dict(causal=True, window=(333, 0), softcap=3.0)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(results(q, k, v, dout, **options))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    alone = results(*(x[1:2] for x in (q, k, v, dout)), **options)
    assert all(torch.equal(a[1:2], b) for a, b in zip(found[0], alone, strict=True))


def test_a_row_is_the_same_whatever_rows_and_keys_are_beside_it():
    """What a causal edge hides is as if it were not there, bit for bit."""
    q, k, v, dout = (planes(1, 2, 500, 40).detach() for _ in range(4))
    out, dq, *_ = results(q, k, v, dout, causal=True)
    for n in (1, 7, 100, 385):
        shorter, its_dq, *_ = results(*(x[:, :, :n] for x in (q, k, v, dout)), causal=True)
        assert torch.equal(out[:, :, :n], shorter)
        assert torch.equal(dq[:, :, :n], its_dq)


def test_large_scores_and_what_is_not_finite():
    q, k, v, dout = (planes(1, 1, 130, 32).detach() for _ in range(4))
    assert all(x.isfinite().all() for x in results(q * 1e4, k * 1e4, v, dout, causal=True))
    k = k.clone()
    k[0, 0, 70] = math.nan  # seen by queries 70 to 129
    out = results(q, k, v, dout, causal=True)[0]
    assert out[0, 0, :70].isfinite().all()
    assert out[0, 0, 70:].isnan().all()


def test_rows_that_a_mask_hides_whole():
    q, k, v, dout = (planes(2, 2, 40, 16).detach() for _ in range(4))
    mask = torch.rand(2, 1, 40, 40) < 0.5
    mask[1, :, 5] = False
    for bias in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
        out, dq, dk, dv = results(q, k, v, dout, bias=bias)
        assert not out[1, :, 5].any()
        assert not dq[1, :, 5].any()
        assert all(x.isfinite().all() for x in (out, dq, dk, dv))


def choice(name="attention", batch=1, heads=8, rows=512, cols=512, dtype=torch.float32, **options):
    q, k, v = (torch.zeros(1, 1, 1, 64, dtype=dtype).expand(batch, heads, n, 64) for n in (rows, cols, cols))
    return pick(name, OPS[name].call(q, k, v, **options))


@pytest.mark.skipif(extension.cpu_level() not in ("avx2", "avx512"), reason="the choice is made for AVX2 and AVX-512")
def test_what_is_served_without_being_asked_for():
    for options in ({}, {"causal": True}, {"causal": True, "dtype": torch.bfloat16}, {"rows": 64, "cols": 4096}):
        assert choice(**options).backend == "native", options
    for options in ({"heads": 1, "rows": 128, "cols": 128, "causal": True}, {"rows": MIN_ROWS - 1, "cols": 10000}):
        assert "faster for" in choice(**options).why, options
        # Beside chunks of scores it is always faster.
        assert choice(**options, softcap=2.0).backend == "native"
    assert choice(dtype=torch.float64).backend == "eager"
    assert choice(SDPA, dropout_p=0.5).backend == "eager"
    assert choice(SDPA, is_causal=True).backend == "native"


def test_levels_that_were_not_measured_are_torchs(monkeypatch):
    request = OPS["attention"].call(*(torch.zeros(1, 8, 512, 64) for _ in range(3)), causal=True)
    monkeypatch.setitem(extension._info, "cpu_level", "baseline")
    assert "AVX2" in native_loses(request)
    monkeypatch.setitem(extension._info, "cpu_level", "amx")
    assert native_loses(request) is None
    monkeypatch.setattr("fastllm.ops.shared.widened.multiplies", lambda dtype: True)
    half = OPS["attention"].call(*(torch.zeros(1, 8, 512, 64).half() for _ in range(3)), causal=True)
    assert "matrix units" in native_loses(half)


def test_a_small_call_in_16_bits_is_the_extensions_where_a_gradient_is_wanted(monkeypatch):
    monkeypatch.setattr("fastllm.ops.shared.widened.multiplies", lambda dtype: True)
    request = lambda dtype: OPS["attention"].call(  # noqa: E731
        *(torch.zeros(1, 4, 20, 64, dtype=dtype, requires_grad=True) for _ in range(3)), causal=True
    )
    for level, dtype, reason in (
        ("avx512", torch.bfloat16, None), ("avx512", torch.float32, "faster"), ("amx", torch.bfloat16, "matrix units"),
    ):  # fmt: skip
        monkeypatch.setitem(extension._info, "cpu_level", level)
        why = native_loses(request(dtype))
        assert why is None if reason is None else reason in why, (level, dtype)
        with torch.no_grad():
            assert native_loses(request(dtype)) is not None


def test_float64_is_refused_by_name():
    with fastllm.backend("native"), pytest.raises(BackendError, match="computes in float32"):
        attention(*(torch.zeros(1, 1, 4, 8, dtype=torch.float64) for _ in range(3)))


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_call_has_gradients_for_one_number_seen_as_many(backend, dtype):
    """The gradient of a sum is that, and an empty tensor of any strides counts as contiguous."""
    for batch, heads, rows, keys in ((0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0), (2, 4, 0, 0)):
        q = torch.randn(batch, heads, rows, 8, dtype=dtype, requires_grad=True)
        k, v = (torch.randn(batch, 2, keys, 8, dtype=dtype, requires_grad=True) for _ in range(2))
        with fastllm.backend(backend):
            out = attention(q, k, v)
            grads = torch.autograd.grad(out.sum(), (q, k, v))
        for x, grad in zip((q, k, v), grads, strict=True):
            assert torch.equal(grad, torch.zeros_like(x)), (batch, heads, rows, keys)
