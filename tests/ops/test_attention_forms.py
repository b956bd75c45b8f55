"""Which form serves a call of attention that is eager's, and what info says of it."""

import pytest
import torch
import torch.nn.functional as F

import fastllm
from fastllm.backends import Choice, pick
from fastllm.environment import serving
from fastllm.extension import load as extension
from fastllm.functional import attention, scaled_dot_product_attention
from fastllm.ops.attention.forms import AMX, CHUNKS, FEW_SCORES, TORCH, form_of
from fastllm.registry import OPS

SDPA = "scaled_dot_product_attention"


def served(name, *args, **kwargs):
    """The form of a call that nobody asked eager to serve, and that no other backend serves."""
    return form_of(OPS[name].call(*args, **kwargs), Choice("eager", ""))


def picked(name, *args, **kwargs):
    return pick(name, OPS[name].call(*args, **kwargs))


@pytest.fixture
def _no_matrix_units(monkeypatch):
    monkeypatch.setitem(extension._info, "matrix_units", False)


def qkv(rows=300, cols=300, dim=8, dim_v=8, heads_kv=2, grad=True, dtype=torch.float32):
    shapes = ((1, 2, rows, dim), (1, heads_kv, cols, dim), (1, heads_kv, cols, dim_v))
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


HERE = torch.ones(1, 1, 1, 300, dtype=torch.bool)
# What the call has, and a word of the reason why chunks serve it.
CHUNKED = {
    "window": (dict(window=(3, 0)), "a window"),
    "right": (dict(window=(None, 2)), "a window"),
    "softcap": (dict(softcap=5.0), "a soft cap"),
    "slopes": (dict(alibi_slopes=torch.ones(2)), "ALiBi slopes"),
    "sinks": (dict(sinks=torch.ones(2)), "sinks"),
    "dropout": (dict(dropout_p=0.5), "every backend agrees on"),
    "lse": (dict(return_lse=True), "log-sum-exp"),
    "both": (dict(causal=True, bias=HERE), "beside a mask"),
    "mask": (dict(bias=torch.zeros(1, 1, 300, 300, requires_grad=True)), "the gradient of a mask"),
    "added": (dict(bias=torch.zeros(1, 1, 300, 300)), "that an added mask hides"),
    "minus": (dict(scale=-1.0), "a scale of -1"),
    "zero": (dict(scale=0.0), "a scale of 0"),
    "denormal": (dict(scale=1e-40), "a scale of 1e-40"),
}


@pytest.mark.usefixtures("_no_matrix_units")
@pytest.mark.parametrize("case", CHUNKED)
def test_chunks_serve_what_pytorchs_operator_has_not_or_has_wrong(case):
    options, reason = CHUNKED[case]
    form = served("attention", *qkv(), **options)
    assert form.name == CHUNKS
    assert reason in form.why


@pytest.mark.usefixtures("_no_matrix_units")
def test_shapes_that_chunks_serve():
    assert served("attention", *qkv(rows=20), causal=True).name == CHUNKS
    assert served("attention", *qkv(dim_v=4)).name == CHUNKS
    assert served("attention", *qkv(rows=0)).name == CHUNKS
    starts = torch.tensor([0, 300])
    flat = [x[0].transpose(0, 1) for x in qkv()]
    assert served("attention", *flat, cu_seqlens_q=starts, cu_seqlens_k=starts).name == CHUNKS


@pytest.mark.usefixtures("_no_matrix_units")
def test_pytorchs_operator_serves_the_rest():
    for options in ({}, dict(causal=True), dict(bias=HERE), dict(scale=0.3)):
        assert served("attention", *qkv(), **options).name == TORCH
    # An added mask is wrong in the backward alone.
    assert served("attention", *qkv(grad=False), bias=torch.zeros(300, 300)).name == TORCH
    assert served("attention", *qkv(heads_kv=1), causal=True).name == TORCH
    assert served(SDPA, *qkv(), dropout_p=0.5).name == TORCH
    q, k, v = qkv()
    assert served(SDPA, q, k, v[:, :1], enable_gqa=True).name == TORCH


@pytest.mark.usefixtures("_no_matrix_units")
def test_few_scores_go_as_they_are():
    few, many = 16, FEW_SCORES // 16 + 1
    for rows, expected in ((few, True), (many, False)):
        q, k, v = (x[0] for x in qkv(rows=16, cols=rows))
        form = served(SDPA, q, k, v)
        assert (form.name, form.as_given) == (TORCH, expected)
    added = torch.zeros(16, 16)
    assert not served(SDPA, *qkv(16, 16)).as_given
    assert served(SDPA, *qkv(16, 16), added.bool()).as_given
    assert served(SDPA, *qkv(16, 16), added.requires_grad_()).as_given
    assert served(SDPA, *qkv(16, 16), added.detach()).name == CHUNKS


def test_another_backend_has_no_forms():
    assert form_of(OPS["attention"].call(*qkv()), Choice("triton", "")) is None


def test_a_mask_of_the_lowest_number_over_whole_rows():
    # Left padding as transformers writes it: a row that sees nothing has every key at finfo.min, and equal weights.
    for rows in (6, 300):
        q, k, v = qkv(rows, rows)
        mask = torch.zeros(1, 1, rows, rows)
        mask[:, :, :2] = torch.finfo(torch.float32).min
        for out in (attention(q, k, v, bias=mask), scaled_dot_product_attention(q, k, v, mask)):
            (dv,) = torch.autograd.grad(out[:, :, :2].sum(), v, retain_graph=True)
            torch.testing.assert_close(dv, torch.full_like(dv, 2 / rows))


@pytest.mark.usefixtures("_no_matrix_units")
def test_without_matrix_units_small_calls_in_bf16_on_a_cpu_are_torchs_where_no_gradient_is_wanted(monkeypatch):
    monkeypatch.setattr("fastllm.ops.shared.widened.multiplies", lambda dtype: True)
    q, k, v = qkv(24, 24, 16, 16, dtype=torch.bfloat16)
    padding = (torch.arange(24) < 9)[None, None, None]
    for function, ours, torchs in (
        (scaled_dot_product_attention, {"is_causal": True}, {"is_causal": True}),
        (attention, {"causal": True}, {"is_causal": True}),
        (scaled_dot_product_attention, {"attn_mask": padding}, {"attn_mask": padding}),
    ):
        with torch.no_grad():
            assert torch.equal(function(q, k, v, **ours), F.scaled_dot_product_attention(q, k, v, **torchs))
    assert AMX not in _said()


def _said() -> str:
    """What info says of attention on CPU tensors, a line for each backend and reason."""
    cpu = torch.device("cpu")
    found = [entry for name in ("attention", SDPA) for entry in serving(OPS[name], cpu).items()]
    return "\n".join(f"{', '.join(names)}: {why}" for (_, why), names in found)


@pytest.mark.usefixtures("_no_matrix_units")
def test_info_says_which_form_serves_which_call():
    with fastllm.backend("eager"):
        said = _said()
    assert said.count(f"{TORCH}, since its fused kernel") == 2
    assert "float32 windowed, bfloat16 windowed: chunks of scores, since PyTorch's fused kernel does not take" in said
    assert said.count("float32 with a negative scale: chunks of scores, since") == 2
