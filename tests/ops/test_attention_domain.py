"""Calls that are handed to PyTorch's operators, on CPU, against the definition over their whole domain.

40 draws; FASTLLM_ATTENTION_DRAWS=500 pytest tests/ops/test_attention_domain.py is the thorough run.
"""

import math
import os

import pytest
import torch
from contract import assert_as_true
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastllm
from fastllm.functional import attention, scaled_dot_product_attention
from fastllm.ops.attention.attention import attention_reference
from fastllm.ops.attention.call import check_window
from fastllm.ops.attention.sdpa import scaled_dot_product_attention_reference

DRAWS = int(os.environ.get("FASTLLM_ATTENTION_DRAWS", "40"))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SCALES = [None, 1.0, 0.0, -0.0, -0.3, -1.0, 2.0, 1e-6, 1e-40, -1e-40, 1e-300, -1e-300]
# What the tensors are multiplied by. 1e-41 is denormal in fp32 and bf16, and 0 in fp16.
SIZES = [1.0, 1.0, 0.0, 1e-6, 1e-30, 1e-41]
# Above 2^16 scores PyTorch's operator no longer gets the arguments as they were given.
LENGTHS = [(1, 1), (1, 9), (9, 9), (20, 31), (31, 20), (0, 4), (4, 0), (270, 270), (130, 520)]
# What the additive masks of transformers hold where a key is hidden.
HIDDEN = ["-inf", -1e4, "lowest"]


def test_a_windows_side_that_no_sequence_reaches_is_unbounded():
    assert check_window("attention", (2**30 - 1, 2**30), causal=False) == (2**30 - 1, -1)
    assert check_window("attention", (2**40, None), causal=True) == (-1, 0)


@st.composite
def masks(draw, shape, dtype):
    """A boolean or added mask that broadcasts to ``shape``; some hide all keys from a row."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = [n if draw(st.booleans()) else 1 for n in shape[:-1]] + [shape[-1]]
    seen = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.5, 0.9]))
    if draw(st.booleans()):
        seen[..., :: draw(st.integers(1, 3)), :] = False
    if draw(st.booleans()):
        return seen
    hidden = draw(st.sampled_from(HIDDEN))
    hidden = dict({"-inf": -math.inf, "lowest": torch.finfo(dtype).min}).get(hidden, hidden)
    added = torch.zeros(shape) if draw(st.booleans()) else torch.randn(shape, generator=generator)
    return added.to(dtype).masked_fill(~seen, hidden)


@st.composite
def calls(draw):
    """(dtype, query, key, value, options of scaled_dot_product_attention)"""
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, cols = draw(
        st.sampled_from([(1, 1), (1, 9), (9, 9), (20, 31), (31, 20), (0, 4), (4, 0), (270, 270), (130, 520)])
    )
    dim = draw(st.sampled_from([1, 8, 16]))
    leading = draw(st.sampled_from([(), (2,), (2, 2), (1, 2, 2)]))
    sizes = [draw(st.sampled_from(SIZES)) for _ in range(3)]
    tensors = [
        (torch.randn(*leading, n, dim, generator=generator, dtype=torch.float64) * size).to(dtype)
        for n, size in zip((rows, cols, cols), sizes, strict=True)
    ]
    options = dict(scale=draw(st.sampled_from(SCALES)))
    kind = draw(st.sampled_from(["plain", "causal", "causal", "mask", "mask"]))
    if kind == "causal":
        options["is_causal"] = True
    if kind == "mask":
        options["attn_mask"] = draw(masks((*leading, rows, cols), dtype))
    return dtype, *tensors, options


def _results(function, tensors, upstream, options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, **options)
    return out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def _wide(options):
    mask = options.get("attn_mask")
    return options if mask is None or mask.dtype == torch.bool else dict(options, attn_mask=mask.double())


def _agree(mine, truth, plain, dtype):
    # Sums in another order, and q and k each times the scale's root, of hundreds of draws. A wrong form is off by the
    # size of the numbers themselves. Nothing is wider than fp64, whose plain error is 0: logits of 100 cost 100 eps.
    floor = 4096.0 if dtype == torch.float64 else 16.0
    for name, got, true, stick in zip(("out", "dq", "dk", "dv")[: len(mine)], mine, truth, plain, strict=True):
        assert_as_true(got, true, stick, dtype, name, slack=4.0, floor=floor)


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=DRAWS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(call=calls())
def test_outputs_and_gradients_are_the_definitions(call):
    dtype, *tensors, options = call
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(*tensors[0].shape[:-1], tensors[2].shape[-1], generator=generator).to(dtype)
    wide = [x.double() for x in tensors]
    truth = _results(scaled_dot_product_attention_reference, wide, upstream, _wide(options))
    plain = _results(scaled_dot_product_attention_reference, tensors, upstream, options)
    mine = _results(scaled_dot_product_attention, tensors, upstream, options)
    _agree(mine, truth, plain, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-1.0, 0.0, -1e-300, 1e-300, 1e38])
def test_causal_scales_of_every_sign_and_size(dtype, scale):
    tensors = [torch.randn(1, 2, 40, 8).to(dtype) * (1e-19 if scale > 1 else 1) for _ in range(3)]
    upstream = torch.randn(1, 2, 40, 8).to(dtype)
    for function, definition, name in (
        (attention, attention_reference, "causal"),
        (scaled_dot_product_attention, scaled_dot_product_attention_reference, "is_causal"),
    ):
        options = {name: True, "scale": scale}
        truth = _results(definition, [x.double() for x in tensors], upstream, options)
        plain, mine = (_results(f, tensors, upstream, options) for f in (definition, function))
        _agree(mine, truth, plain, dtype)


@pytest.mark.parametrize("shape", [(9, 8), (2, 9, 8), (2, 2, 9, 8), (2, 2, 300, 8)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": -1.0, "is_causal": True}, {"mask": True}])
def test_dropout_of_everything_gives_zeros(shape, options):
    options = dict(options)
    if options.pop("mask", False):
        options["attn_mask"] = torch.zeros(shape[-2], shape[-2]).fill_(-math.inf).triu(1)
    tensors = [torch.randn(shape) for _ in range(3)]
    for result in _results(scaled_dot_product_attention, tensors, torch.ones(shape), dict(options, dropout_p=1.0)):
        assert (result == 0).all()
    none = _results(scaled_dot_product_attention, tensors, torch.ones(shape), options)
    zero = _results(scaled_dot_product_attention, tensors, torch.ones(shape), dict(options, dropout_p=0))
    assert all(torch.equal(got, expected) for got, expected in zip(zero, none, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", DTYPES)
def test_a_mask_of_another_dtype_without_gradients(dtype, mask_dtype):
    """PyTorch's fused kernel reads a float32 mask beside float64 as float64, and refuses what is neither."""
    query, key, value = (torch.randn(1, 2, n, 16).to(dtype) for n in (3, 17, 17))
    mask = torch.randn(1, 2, 3, 17).to(mask_dtype)
    wide = [x.double() for x in (query, key, value)]
    truth = attention_reference(*wide, bias=mask.double())
    plain = attention_reference(query, key, value, bias=mask)
    with torch.no_grad():
        for backend in ("auto", "eager"):
            with fastllm.backend(backend):
                _agree([attention(query, key, value, bias=mask)], [truth], [plain], dtype)
                if mask_dtype in (dtype, torch.float32):
                    _agree([scaled_dot_product_attention(query, key, value, mask)], [truth], [plain], dtype)
