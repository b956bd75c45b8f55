"""What is peculiar to attention: empty rows and sequences, masks, extreme logits, dropout, layouts, determinism."""

import math
import threading

import pytest
import torch
from attention_calls import BACKENDS, agree, qkv
from conftest import DEVICE
from contract import backend_fixture

import fastllm
from fastllm.backends import why_not
from fastllm.functional import attention
from fastllm.kernels.attention import backward, bias_gradient, forward
from fastllm.ops.attention import attention as module
from fastllm.ops.attention.attention import attention_reference
from fastllm.ops.attention.reference import dropout_kept

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

backend = backend_fixture(*BACKENDS)


@pytest.fixture
def small_tiles(monkeypatch):
    tile = dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)
    monkeypatch.setattr(forward, "forward_tile", lambda *_: tile)
    monkeypatch.setattr(backward, "dkdv_tile", lambda *_: tile)
    monkeypatch.setattr(backward, "dq_tile", lambda *_: tile)


@pytest.mark.parametrize(("batch", "rows", "cols"), [(0, 3, 3), (1, 0, 4), (1, 4, 0), (1, 1, 1), (1, 1, 5), (1, 5, 1)])
def test_sizes_of_none_and_one(backend, batch, rows, cols):
    agree(qkv(batch, 2, rows, cols), causal=True, return_lse=True)


def test_rows_without_a_key_give_zero_and_no_gradient(backend):
    q, k, v = qkv(rows=21, cols=13)
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :, :8] == 0).all()
    assert (lse[:, :, :8] == -math.inf).all()
    dq, dk, dv = torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), torch.ones_like(lse)])
    assert (dq[:, :, :8] == 0).all()
    assert all(g.isfinite().all() for g in (dq, dk, dv))


@pytest.mark.cpu_level
@pytest.mark.parametrize("which", [*BACKENDS, pytest.param("native", marks=pytest.mark.runs_on("interpreter"))])
def test_what_comes_in_for_the_lse_of_rows_without_a_key_goes_nowhere(which):
    if (reason := why_not(which, DEVICE.type)) is not None:
        pytest.skip(reason)
    tensors = qkv(rows=21, cols=13)
    found = []
    with fastllm.backend(which):
        out, lse = attention(*tensors, causal=True, return_lse=True)
        for upstream in (0.0, math.nan, math.inf):
            dlse = torch.ones_like(lse)
            dlse[:, :, :8] = upstream
            found.append(torch.autograd.grad([out, lse], tensors, [torch.ones_like(out), dlse], retain_graph=True))
    for got in found[1:]:
        torch.testing.assert_close(got, found[0], rtol=0, atol=0)


@pytest.mark.runs_on("interpreter")
@pytest.mark.parametrize("shape", [(1, 1, 1, 20), (1, 3, 1, 20), (3, 1, 1, 20), (1, 1, 20, 20), (1, 1, 20, 1)])
def test_a_biass_gradient_in_pieces_of_which_the_last_is_short(shape, small_tiles, monkeypatch):
    """Two pieces of three batches, heads or row tiles. Beside the tensors lie NaNs, which no piece may read."""
    monkeypatch.setattr(bias_gradient, "dbias_tile", lambda *_: forward.forward_tile())
    room = torch.full((3, 4, 4, 40, 8), math.nan)
    for programs in (2, 4, 8):
        monkeypatch.setattr(bias_gradient, "PROGRAMS", programs * -(-shape[2] // 16) * -(-shape[3] // 16))
        tensors = [x[:3, :3, :n].copy_(torch.randn(3, 3, n, 8)) for x, n in zip(room, (40, 20, 20), strict=True)]
        if shape[2] > 1:
            tensors[0] = tensors[0][:, :, :20]
        tensors = [x.requires_grad_() for x in tensors]
        with fastllm.backend("triton"):
            agree(tensors, bias=torch.randn(shape, requires_grad=True))


def test_packed_sequences_may_be_empty(backend):
    starts_q = torch.tensor([0, 0, 3, 3, 8], device=DEVICE)
    starts_k = torch.tensor([0, 4, 4, 9, 11], device=DEVICE)
    q, k, v = (torch.randn(n, 2, 8, device=DEVICE, requires_grad=True) for n in (8, 11, 11))
    agree((q, k, v), cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, causal=True, return_lse=True)
    none = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    q, k, v = (torch.randn(0, 2, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    agree((q, k, v), cu_seqlens_q=none, cu_seqlens_k=none, return_lse=True)


def test_rows_of_no_packed_sequence_give_zero(backend):
    # cu_seqlens has one entry. Whoever looks for a second finds one behind it.
    starts = torch.tensor([0, 300], device=DEVICE)[:1]
    leaves = [torch.randn(300, 2, 8, device=DEVICE, requires_grad=True) for _ in range(3)]
    out, lse = attention(*leaves, cu_seqlens_q=starts, cu_seqlens_k=starts, return_lse=True)
    assert (lse == -math.inf).all()
    for x in (out, *torch.autograd.grad(out.sum(), leaves)):
        assert (x == 0).all()


def test_rows_past_the_last_packed_sequence_give_zero(backend):
    starts = torch.tensor([0, 5, 9], device=DEVICE)
    q, k, v = (torch.randn(12, 2, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts)
    assert (out[9:] == 0).all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (grad[9:] == 0).all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("window", [(0, 0), (-1, 0), (None, 3), (100, 100), (17, 0), (3, 20)])
def test_windows(backend, window, small_tiles):
    # 50 rows against 70 columns in 16 x 16 tiles: edges on both sides, and tiles that some of their rows cannot see.
    agree(qkv(1, 1, 50, 70), window=window, return_lse=True)
    agree(qkv(1, 1, 40, 24), window=window, causal=True)


def test_a_mask_that_hides_the_first_tiles_of_some_rows(backend, small_tiles):
    mask = torch.ones(1, 1, 33, 60, dtype=torch.bool, device=DEVICE)
    mask[..., ::2, :40] = False
    mask[..., 5, :] = False
    q, k, v = qkv(1, 1, 33, 60)
    # Negative logits throughout: a maximum that restarts at 0 would lose them.
    mine, _ = agree((q, k, v), bias=mask, return_lse=True)
    assert mine[1][0, 0, 5] == -math.inf
    agree((q, k, v), bias=mask.float().mul(100).sub(1000), return_lse=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [-1e7, -math.inf, torch.finfo(torch.float32).min, -1e30])
def test_rows_of_extreme_logits(backend, value):
    bias = torch.zeros(1, 1, 20, 20, device=DEVICE)
    bias[..., 3, :] = value
    bias[..., 4, 5:] = value
    bias[..., :, 7] = value
    # At 1e7 the logits themselves keep one digit: what the softmax sees must be the same rounded numbers.
    agree(qkv(), bias=bias.requires_grad_(), return_lse=True)


def test_nan_and_infinity_stay_in_their_rows(backend):
    q, k, v = qkv()
    poisoned = q.detach().clone()
    poisoned[0, 0, 2] = math.nan
    poisoned[0, 1, 3] = math.inf
    out, clean = attention(poisoned, k, v), attention(q, k, v)
    bad = torch.zeros(1, 2, 20, dtype=torch.bool, device=DEVICE)
    bad[0, 0, 2] = bad[0, 1, 3] = True
    assert out[bad].isnan().all()
    torch.testing.assert_close(out[~bad], clean[~bad])


def test_fp16_logits_beyond_its_range(backend):
    q, k, v = qkv(dtype=torch.float16, scale=100.0, dim=16)
    out = attention(q, k, v, scale=1.0)
    torch.testing.assert_close(out, attention_reference(q, k, v, scale=1.0))


def test_lse_is_the_natural_logarithm_and_merges_halves(backend):
    q, k, v = qkv(1, 2, 9, 30)
    out, lse = attention(q, k, v, return_lse=True)
    logits = q @ k.transpose(-1, -2) / math.sqrt(8)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    parts = [attention(q, k[:, :, at], v[:, :, at], return_lse=True) for at in (slice(0, 11), slice(11, 30))]
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    merged = (outs * torch.softmax(lses, 0).unsqueeze(-1)).sum(0)
    torch.testing.assert_close(merged, out)
    grad = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(merged, (q, k, v), grad), torch.autograd.grad(out, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_offsets_past_32_bits():
    # Rows, heads and a gradient more than 2^31 elements apart; only the touched pages are ever real.
    far = 2**31 + 64
    whole = torch.empty(4 * far, dtype=torch.float16, device=DEVICE)
    base = torch.randn(2, 2, 3, 16, device=DEVICE).half()
    wide = [whole.as_strided((2, 2, 3, 16), (2 * far, far, 48, 3), offset) for offset in (0, 1, 2)]
    for view in wide:
        view.copy_(base)
    with fastllm.backend("triton"):
        far_leaves = [w.detach().requires_grad_() for w in wide]
        near_leaves = [base.clone().requires_grad_() for _ in range(3)]
        far_out, near_out = attention(*far_leaves), attention(*near_leaves)
        assert torch.equal(far_out, near_out)
        far_grads = torch.autograd.grad(far_out, far_leaves, wide[0])
        near_grads = torch.autograd.grad(near_out, near_leaves, base)
    assert all(torch.equal(a, b) for a, b in zip(far_grads, near_grads, strict=True))


@pytest.mark.parametrize(("dim", "dim_v"), [(1, 3), (36, 80), (96, 160), (192, 128), (256, 256)])
def test_head_dims_do_not_read_past_the_row(backend, dim, dim_v):
    def padded(rows, size):
        room = torch.full((1, 1, rows + 1, size + 5), math.nan, device=DEVICE)
        room[:, :, 1:, 2 : 2 + size] = torch.randn(1, 1, rows, size, device=DEVICE)
        return room[:, :, 1:, 2 : 2 + size].requires_grad_()

    agree((padded(5, dim), padded(7, dim), padded(7, dim_v)), causal=True)


def test_head_dims_past_the_kernels_run_eager():
    q, k, v = qkv(1, 1, 4, 4, 300)
    with fastllm.backend("triton"), pytest.raises(fastllm.BackendError, match=r"up to 256, got 300"):
        attention(q, k, v)
    with fastllm.backend("eager"):
        agree((q, k, v))


def test_gradients_of_shared_heads_are_summed_in_fp32(backend):
    q, k, v = qkv(1, 16, 8, 8, heads_kv=1, dtype=torch.bfloat16)
    got = torch.autograd.grad(attention(q, k, v).float().sum(), (k, v))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(attention_reference(*wide).sum(), wide[1:])
    for a, b in zip(got, expected, strict=True):
        assert ((a.double() - b).abs() <= 0.016 * b.abs().clamp(min=1)).all()


def _identity_values(cols):
    return torch.eye(cols, device=DEVICE).expand(2, 3, cols, cols)


def test_dropout_drops_what_the_host_says(backend, monkeypatch):
    q, k, _ = (t.detach() for t in qkv(2, 3, 19, 24))
    v = _identity_values(24)
    seed = torch.tensor([-(2**40) + 5, 2**33 + 9], device=DEVICE)
    monkeypatch.setattr(module, "draw_seed", lambda device: seed)
    kept = dropout_kept(
        seed, torch.arange(6, device=DEVICE).view(2, 3), torch.arange(19, device=DEVICE), 24, 0.4
    )  # fmt: skip
    out = attention(q, k, v, dropout_p=0.4)
    assert torch.equal(out != 0, kept)
    torch.testing.assert_close(out, attention(q, k, v) * kept / 0.6)
    # The mask does not depend on the tiles, nor on where a sequence lies.
    with monkeypatch.context() as patch:
        patch.setattr(forward, "forward_tile", lambda *_: dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1))
        assert torch.equal(attention(q, k, v, dropout_p=0.4) != 0, kept)


def test_dropout_probabilities(backend):
    q, k, v = qkv(1, 1, 64, 64)
    assert torch.equal(attention(q, k, v, dropout_p=0.0), attention(q, k, v))
    out = attention(q, k, v, dropout_p=1.0)
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    torch.manual_seed(1)
    first, second = (attention(q, k, v, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(attention(q, k, v, dropout_p=0.5), first)


@pytest.mark.runs_on("anywhere")
def test_dropout_is_exact_to_more_than_eight_bits():
    planes, rows = torch.arange(64).view(8, 8), torch.arange(64)
    kept = dropout_kept(torch.tensor([11, 0]), planes, rows, 256, 0.0015)
    dropped = 1 - kept.float().mean().item()
    # 2^20 draws: the deviation of the mean is 3.8e-5; a p rounded to 1/256 would be 0 or 0.0039.
    assert abs(dropped - 0.0015) < 1.6e-4


def test_activation_checkpointing_replays_dropout(backend):
    q, k, v = qkv()
    torch.manual_seed(3)
    expected = torch.autograd.grad(attention(q, k, v, dropout_p=0.3).sum(), (q, k, v))
    torch.manual_seed(3)
    out = torch.utils.checkpoint.checkpoint(
        lambda *a: attention(*a, dropout_p=0.3), q, k, v, use_reentrant=False
    )  # fmt: skip
    for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), expected, strict=True):
        assert torch.equal(a, b)


FEATURES = dict(causal=True, softcap=4.0, window=(30, 0), sinks=True, alibi_slopes=True, dropout_p=0.2)


def _features(heads):
    made = dict(FEATURES)
    made["sinks"] = torch.linspace(-1, 1, heads, device=DEVICE)
    made["alibi_slopes"] = torch.linspace(0.1, 0.3, heads, device=DEVICE)
    return made


def test_ten_backwards_are_equal_bit_for_bit():
    with fastllm.backend("triton"):
        q, k, v = qkv(1, 4, 20, 20, heads_kv=2, dtype=torch.bfloat16)
        bias = torch.randn(1, 1, 20, 20, device=DEVICE, requires_grad=True)
        out = attention(q, k, v, bias=bias, **_features(4))
        grad = torch.randn_like(out)
        first = torch.autograd.grad(out, (q, k, v, bias), grad, retain_graph=True)
        for _ in range(9):
            again = torch.autograd.grad(out, (q, k, v, bias), grad, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_has_the_same_bits_alone_in_a_batch_and_packed(dtype):
    lengths = (70, 33, 70)
    rows = [torch.randn(3, n, 2, 16, device=DEVICE).to(dtype) for n in lengths]
    starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    kwargs = {k: v for k, v in _features(2).items() if k != "dropout_p"}

    def run(q, k, v, **more):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = attention(*leaves, **kwargs, **more)
        return [out, *torch.autograd.grad(out, leaves, out.detach())]

    with fastllm.backend("triton"):
        packed = run(*torch.cat(rows, 1), cu_seqlens_q=starts, cu_seqlens_k=starts)
        batch = run(*(torch.stack([rows[0][i], rows[2][i]]).transpose(1, 2) for i in range(3)))
        for index, at in ((0, slice(0, 70)), (2, slice(103, 173))):
            alone = run(*(rows[index][i].transpose(0, 1).unsqueeze(0) for i in range(3)))
            for a, b, c in zip(alone, batch, packed, strict=True):
                assert torch.equal(a[0], b[index // 2])
                assert torch.equal(a[0].transpose(0, 1), c[at])


def test_backward_on_another_thread(backend):
    q, k, v = qkv()
    out = attention(q, k, v, causal=True)
    expected = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    got = []
    thread = threading.Thread(target=lambda: got.extend(torch.autograd.grad(out.sum(), (q, k, v))))
    thread.start()
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_autocast_runs_in_its_dtype(backend):
    q, k, v = qkv()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = attention(q, k, v)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_definition_has_the_gradients_of_finite_differences():
    q, k, v = (t.detach().double().requires_grad_() for t in qkv(1, 2, 4, 5, 3, heads_kv=1))
    sinks = torch.randn(2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    bias = torch.randn(1, 1, 4, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def call(q, k, v, sinks, bias):
        return attention_reference(q, k, v, sinks=sinks, bias=bias, softcap=2.0, causal=True, return_lse=True)

    torch.autograd.gradcheck(call, (q, k, v, sinks, bias))


def test_chunked_eager_gradients_in_fp64():
    q, k, v = (t.detach().double().requires_grad_() for t in qkv(1, 2, 4, 5, 3, heads_kv=1))
    sinks = torch.randn(2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    with fastllm.backend("eager"):
        torch.autograd.gradcheck(lambda *a: attention(*a[:3], sinks=a[3], window=(2, 1)), (q, k, v, sinks))


@pytest.mark.parametrize("side", [2**31 - 1, 2**62, 2**63 - 1, 10**30])
@pytest.mark.parametrize("name", ["eager", "triton", pytest.param("native", marks=pytest.mark.runs_on("interpreter"))])
def test_a_window_wider_than_32_or_64_bits_hides_nothing(name, side):
    q, k, v = qkv(1, 2, 3, 5, 8)
    with fastllm.backend(name):
        torch.testing.assert_close(attention(q, k, v, window=(side, side)), attention(q, k, v))
        torch.testing.assert_close(attention(q, k, v, window=(1, side)), attention(q, k, v, window=(1, None)))
