"""Dense tiles by bulk copies (tensor descriptors): the bits of the pointers' kernels, and which calls have them."""

import pytest
import torch
from conftest import DEVICE, HAS_GPU

import fastllm
from fastllm.functional import attention
from fastllm.kernels.attention import backward, forward
from fastllm.kernels.attention import problem as parts


def separate(batch, heads, heads_kv, rows, cols, dim, dim_v, dtype):
    shapes = ((batch, heads, rows, dim), (batch, heads_kv, cols, dim), (batch, heads_kv, cols, dim_v))
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def by_token(*args):
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in separate(*args)]


def of_one_projection(batch, heads, heads_kv, rows, cols, dim, dim_v, dtype):
    tokens = torch.randn(batch, rows, 3, heads, dim, device=DEVICE).to(dtype)
    return [x.transpose(1, 2) for x in tokens.unbind(2)]


def one_of_a_batch(*args):
    # Along a dimension of one a stride means nothing.
    return [x.as_strided(x.shape, (3, *x.stride()[1:])) for x in separate(1, *args[1:])]


def _run(tensors, copies, monkeypatch, **kwargs):
    """Outputs and gradients, and what the launches were given."""
    given, descriptors = [], parts.Problem.descriptors
    with monkeypatch.context() as patch, fastllm.backend("triton"):
        patch.setattr(parts, "bulk_copies", lambda arch, dtype: copies)
        patch.setattr(parts.Problem, "descriptors", lambda *args: given.append(descriptors(*args)) or given[-1])
        for module, name in ((forward, "forward_tile"), (backward, "dkdv_tile"), (backward, "dq_tile")):
            patch.setattr(module, name, lambda *_: dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1))
        leaves = [x.detach().requires_grad_() for x in tensors]
        torch.manual_seed(0)
        out = attention(*leaves, **kwargs)
        outs = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(outs, leaves, [torch.ones_like(o) / 3 for o in outs])
    return [*outs, *grads], [x is not None for pair in given for x in pair]


def assert_same(copied, plain):
    for a, b in zip(copied, plain, strict=True):
        # On a GPU the compiler may lay tiles out in another way, and sum their parts in another order.
        torch.testing.assert_close(a, b, **({} if HAS_GPU else dict(rtol=0, atol=0)))


LAYOUTS = [separate, by_token, of_one_projection, one_of_a_batch]
EVERYTHING = dict(causal=True, softcap=20.0, dropout_p=0.2, window=(30, None), return_lse=True)


@pytest.mark.parametrize(
    ("layout", "dtype", "call"),
    [
        *((layout, torch.float16, dict(causal=True)) for layout in LAYOUTS),
        (separate, torch.float32, dict()),
        (by_token, torch.float16, EVERYTHING),
    ],
)
def test_bits_are_those_of_pointers(layout, dtype, call, monkeypatch):
    # The last tiles of 40 rows and 70 columns reach past the tensors, those of head dims 24 and 40 past the heads.
    shape = (2, 2, 2, 40, 40, 24, 24) if layout is of_one_projection else (2, 4, 2, 40, 70, 24, 40)
    tensors = layout(*shape, dtype)
    copied, used = _run(tensors, True, monkeypatch, **call)
    plain, unused = _run(tensors, False, monkeypatch, **call)
    assert used == [True] * 6
    assert unused == [False] * 6
    assert_same(copied, plain)


def _expanded(x):
    return x[:, :1].expand_as(x)


def _misaligned(x):
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x)


def _transposed(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def _odd_rows(x):
    return torch.cat((x, x[..., :1]), -1)[..., :-1]


@pytest.mark.parametrize("layout", [_expanded, _misaligned, _transposed, _odd_rows])
def test_what_no_bulk_copy_takes_is_read_by_pointers(layout, monkeypatch):
    tensors = [layout(x) for x in separate(2, 2, 2, 33, 33, 16, 16, torch.float16)]
    copied, used = _run(tensors, True, monkeypatch, causal=True)
    plain, _ = _run(tensors, False, monkeypatch, causal=True)
    assert not any(used[:2])
    assert_same(copied, plain)


def test_packed_sequences_are_read_by_pointers(monkeypatch):
    starts = torch.tensor([0, 20, 53], device=DEVICE)
    q, k, v = (torch.randn(53, 2, 16, device=DEVICE) for _ in range(3))
    v[20:] = torch.nan
    (out, *_), used = _run((q, k, v), True, monkeypatch, cu_seqlens_q=starts, cu_seqlens_k=starts)
    assert not any(used)
    assert out[:20].isfinite().all()


def test_who_has_them():
    half = [arch for arch in (80, 86, 89, 90, 100, 120) if parts.bulk_copies(arch, torch.bfloat16)]
    assert half == [90, 100]
    assert not any(parts.bulk_copies(arch, torch.float32) for arch in (80, 90, 100))
