"""Attention of few queries over many keys: split over the keys, chunk by chunk."""

import math

import pytest
import torch
from conftest import DEVICE

import fastllm
from fastllm.functional import attention, scaled_dot_product_attention
from fastllm.kernels.attention import decode
from fastllm.ops.attention.attention import attention_reference

TILE = dict(CHUNK=32, SPLIT_FROM=48, BLOCK_N=16, num_warps=4, num_stages=2)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(decode, "split_tile", lambda *_: TILE)
    with fastllm.backend("triton"):
        yield


@pytest.fixture
def split_calls(monkeypatch):
    """How many calls were split."""
    calls = []
    launch = decode.attention_decode
    monkeypatch.setattr("fastllm.kernels.attention.forward.attention_decode", lambda *a: calls.append(a) or launch(*a))
    return calls


def _qkv(batch=1, heads=2, rows=1, cols=100, dim=16, heads_kv=None, dim_v=None, dtype=torch.float32):
    heads_kv = heads_kv or heads
    return tuple(
        torch.randn(batch, h, n, d, device=DEVICE).to(dtype)
        for h, n, d in ((heads, rows, dim), (heads_kv, cols, dim), (heads_kv, cols, dim_v or dim))
    )


def _agree(tensors, **kwargs):
    """``attention``, its lse and the definition's are the same up to the rounding of fp32."""
    torch.manual_seed(1)
    mine = attention(*tensors, return_lse=True, **kwargs)
    torch.manual_seed(1)
    true = attention_reference(*tensors, return_lse=True, **kwargs)
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    return mine


def _all_features(heads, cols, rows):
    return dict(
        causal=True, window=(70, 0), softcap=3.0, alibi_slopes=torch.rand(2, heads, device=DEVICE),
        sinks=torch.randn(heads, device=DEVICE), bias=torch.randn(1, heads, rows, cols, device=DEVICE), dropout_p=0.3,
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "heads", "heads_kv"), [(1, 4, 1), (1, 3, 3), (5, 6, 2), (2, 20, 1), (64, 1, 1)])
@pytest.mark.parametrize("cols", [48, 64, 97, 130])
def test_any_group_and_length(split_calls, rows, heads, heads_kv, cols):
    _agree(_qkv(1, heads, rows, cols, 12, heads_kv, 20), causal=True)
    assert len(split_calls) == 1


def test_all_features_at_once(split_calls):
    _agree(_qkv(2, 6, 3, 97, 20, 2, 12), **_all_features(6, 97, 3))
    assert len(split_calls) == 1


@pytest.mark.parametrize("window", [(5, 0), (40, 0), (0, 0), (200, 0), (None, 0), (3, 2)])
def test_windows_leave_chunks_without_a_key(window):
    _agree(_qkv(1, 4, 3, 130, heads_kv=2), window=window)


def test_rows_that_see_nothing():
    mask = torch.ones(1, 1, 4, 100, dtype=torch.bool, device=DEVICE)
    mask[..., 1, :] = False
    mask[..., 2, :90] = False
    out, lse = _agree(_qkv(1, 2, 4, 100), bias=mask)
    assert (out[:, :, 1] == 0).all()
    assert (lse[:, :, 1] == -math.inf).all()
    # A sink alone keeps the denominator, so such a row has an lse.
    _agree(_qkv(1, 2, 4, 100), bias=mask, sinks=torch.tensor([0.5, -math.inf], device=DEVICE))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_nan_and_infinity_stay_in_their_rows():
    q, k, v = _qkv(1, 4, 2, 100, heads_kv=2)
    clean = attention(q, k, v)
    q[0, 1, 0] = math.nan
    q[0, 2, 1] = math.inf
    out = attention(q, k, v)
    bad = torch.zeros(1, 4, 2, dtype=torch.bool, device=DEVICE)
    bad[0, 1, 0] = bad[0, 2, 1] = True
    assert out[bad].isnan().all()
    torch.testing.assert_close(out[~bad], clean[~bad])


def test_caches_longer_than_what_they_hold_are_read_as_views():
    # A cache of 160 positions of which 100 are filled; the rest must not be touched.
    q, *_ = _qkv(2, 4, 1, 100)
    room = torch.full((2, 2, 2, 160, 16), math.nan, device=DEVICE)
    room[..., :100, :] = torch.randn(2, 2, 2, 100, 16, device=DEVICE)
    _agree((q, room[0][:, :, :100], room[1][:, :, :100]), causal=True)


def test_packed_calls_split_the_sequences_that_can_be(split_calls):
    # Long queries, short keys, nothing, and two that are split, in one call.
    lengths = [(40, 60), (1, 100), (0, 70), (2, 30), (0, 0), (7, 64), (3, 0)]
    starts = torch.tensor([(0, 0), *lengths], device=DEVICE).cumsum(0)
    total_q, total_k = starts[-1].tolist()
    tensors = [torch.randn(n, h, 16, device=DEVICE) for n, h in ((total_q + 2, 4), (total_k, 2), (total_k, 2))]
    more = dict(_all_features(4, 100, 40), alibi_slopes=torch.rand(7, 4, device=DEVICE), causal=True)
    more |= dict(max_seqlen_q=40, max_seqlen_k=100)
    _agree(tensors, cu_seqlens_q=starts[:, 0], cu_seqlens_k=starts[:, 1], **more)
    assert len(split_calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_in_a_batch_and_packed(dtype):
    q, k, v = _qkv(3, 6, 2, 100, heads_kv=2, dtype=dtype)
    more = dict(softcap=5.0, window=(90, 0), sinks=torch.linspace(-1, 1, 6, device=DEVICE))
    whole = attention(q, k, v, **more)
    for b in range(3):
        assert torch.equal(attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], **more), whole[b : b + 1])
    # Beside a long sequence of another kind.
    rows = torch.cat([torch.randn(50, 6, 16, device=DEVICE).to(dtype), q[1].transpose(0, 1)])
    keys, values = (torch.cat([torch.randn(75, 2, 16, device=DEVICE).to(dtype), x[1].transpose(0, 1)]) for x in (k, v))
    starts = torch.tensor([[0, 0], [50, 75], [52, 175]], device=DEVICE)
    packed = attention(rows, keys, values, cu_seqlens_q=starts[:, 0], cu_seqlens_k=starts[:, 1], **more)
    assert torch.equal(packed[50:].transpose(0, 1), whole[1])


def test_gradients_go_through_a_split_forward(split_calls):
    leaves = [t.requires_grad_() for t in _qkv(1, 4, 3, 97, 8, 2)]
    more = dict(_all_features(4, 97, 3), alibi_slopes=None)
    more["bias"] = more["bias"].requires_grad_()
    leaves.append(more["bias"])
    grads = []
    for function in (attention, attention_reference):
        torch.manual_seed(1)
        out, lse = function(*leaves[:3], return_lse=True, **more)
        grads.append(torch.autograd.grad([out.sin().sum(), lse.sum()], leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(split_calls) == 1


def test_what_is_split_is_chosen_by_the_sequence(split_calls):
    attention(*_qkv(1, 2, 1, 47))
    attention(*_qkv(1, 1, 65, 100))
    attention(*_qkv(1, 13, 5, 100, heads_kv=1))
    q, *_ = _qkv(60, 2, 1, 16)
    rows = q.reshape(60, 2, 16)
    starts = torch.tensor([0, 60], device=DEVICE)
    attention(rows, rows, rows, cu_seqlens_q=starts, cu_seqlens_k=starts)
    assert not split_calls
    # torch's own alignment of the diagonal: the query sees the first key alone.
    q, k, v = _qkv(1, 2, 1, 100)
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert len(split_calls) == 1
    torch.testing.assert_close(out, v[:, :, :1])


def test_memory_that_nobody_wrote_is_not_read(poisoned_memory):
    out = attention(*_qkv(1, 6, 3, 130, heads_kv=2), window=(30, 0))
    assert out.isfinite().all()
