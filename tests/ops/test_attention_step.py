"""One query of each head on a CPU, by the extension (csrc/cpu/attention_step.cpp): right, the same bits, who is served.

That the public functions are right with it: tests/test_ops.py, whose samples have calls of one query.
"""

import pytest
import torch
from contract import assert_as_true

import fastllm
from fastllm.backends import Choice
from fastllm.extension import load as extension
from fastllm.functional import attention, scaled_dot_product_attention
from fastllm.ops.attention.call import AttentionCall
from fastllm.ops.attention.forms import STEP, form_of
from fastllm.ops.attention.reference import reference
from fastllm.ops.attention.step import attention_step, takes_step
from fastllm.registry import OPS

pytestmark = [
    pytest.mark.cpu_level,
    pytest.mark.skipif(
        extension.missing() is not None or extension.cpu_level() == "baseline",
        reason="no extension here, or no vector instructions that it is measured on",
    ),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Batch, heads, heads of keys, keys, head dim and that of values: whole and broken blocks of keys (64), columns (32, 8).
SHAPES = ((1, 1, 1, 1, 1, 1), (2, 4, 4, 63, 64, 64), (3, 8, 2, 130, 43, 33), (1, 6, 2, 300, 96, 128))


def case(shape, dtype):
    """Query, key and value; keys and values with room for more tokens, as in a cache."""
    batch, heads, heads_kv, keys, dim, dim_v = shape
    torch.manual_seed(sum(shape))
    q = torch.randn(batch, 1, heads, dim).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, heads_kv, keys + 5, n).to(dtype)[:, :, :keys] for n in (dim, dim_v))
    return q, k, v


def masks(shape):
    batch, heads, _, keys, *_ = shape
    seen = torch.rand(batch, 1, 1, keys) < 0.7
    seen[0] = False  # a sequence that sees nothing
    yield None
    yield seen.expand(batch, heads, 1, keys)
    yield torch.randn(1, heads, 1, keys).masked_fill(~seen, -torch.inf)
    # Keys that do not lie side by side in the mask: every second number of a row, and one number for all keys.
    beside = torch.stack((seen, ~seen), -1).flatten(-2)
    yield beside[..., ::2].expand(batch, heads, 1, keys)
    yield torch.zeros(beside.shape).masked_fill(~beside, -torch.inf)[..., ::2].expand(batch, heads, 1, keys)
    yield (torch.arange(batch) > 0).view(-1, 1, 1, 1).expand(batch, heads, 1, keys)


def eager(call):
    with fastllm.backend("eager"):
        return attention(call.q, call.k, call.v, bias=call.bias, scale=call.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_true_as_eager(shape, dtype):
    q, k, v = case(shape, dtype)
    for mask in masks(shape):
        call = AttentionCall(q, k, v, mask, scale=0.3)
        truth = reference(call._replace(q=q.double(), k=k.double(), v=v.double()))[0]
        got = attention_step(q, k, v, mask, 0.3)
        assert_as_true(got, truth, eager(call), dtype, f"{shape}, {mask is not None}")
        if mask is not None:
            assert not got[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_in_any_batch_and_for_any_number_of_threads(dtype):
    q, k, v = case((5, 8, 2, 700, 64, 64), dtype)
    every = attention_step(q, k, v, None, 0.125)
    for i in range(len(q)):
        one = attention_step(*(x[i : i + 1] for x in (q, k, v)), None, 0.125)
        assert torch.equal(one[0], every[i])
    before = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(attention_step(q, k, v, None, 0.125), every)
    finally:
        torch.set_num_threads(before)


def test_nan_and_infinite_scores_are_passed_on():
    q, k, v = case((1, 1, 1, 9, 8, 8), torch.float32)
    k[0, 0, 4, 0] = torch.nan
    assert attention_step(q, k, v, None, 1.0).isnan().all()


def test_who_is_served():
    q, k, v = case((2, 4, 2, 20, 16, 16), torch.bfloat16)
    assert takes_step(q, k, v, None)
    assert not takes_step(q.expand(2, 4, 3, 16), k, v, None)
    assert not takes_step(q.double(), k.double(), v.double(), None)
    assert not takes_step(q.clone().requires_grad_(), k, v, None)
    own = attention_step(q, k, v, None, 0.25)
    assert torch.equal(attention(q, k, v, causal=True), own)
    assert torch.equal(scaled_dot_product_attention(q, k, v, enable_gqa=True), own)
    # A causal edge from the top left shows the one query the first key alone.
    first = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(first[:, 0, 0], v[:, 0, 0])
    request = OPS["attention"].call(q, k, v)
    assert form_of(request, Choice("eager", "")).name == STEP
    assert form_of(request, Choice("eager", "asked for", True)).name != STEP


@pytest.mark.parametrize("wrong", ["rows", "heads", "dtype", "mask"])
def test_what_does_not_fit_is_refused(wrong):
    q, k, v = case((2, 4, 2, 20, 16, 16), torch.float32)
    mask = torch.ones(2, 4, 1, 20, dtype=torch.bool)
    if wrong == "rows":
        q = q.expand(2, 4, 3, 16)
    elif wrong == "heads":
        k, v = k.repeat(1, 2, 1, 1)[:, :3], v.repeat(1, 2, 1, 1)[:, :3]
    elif wrong == "dtype":
        k = k.bfloat16()
    else:
        mask = mask[:, :1]
    with pytest.raises((ValueError, RuntimeError), match="attention_step"):
        attention_step(q, k, v, mask, 1.0)
