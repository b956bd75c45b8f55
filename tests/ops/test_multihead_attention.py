"""MultiheadAttention is torch's: same keys, outputs and gradients, masks included, on every backend."""

import pytest
import torch
from conftest import DEVICE

import fastllm
from fastllm.nn import MultiheadAttention

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

BATCH, LENGTH, SIZE, HEADS = 2, 5, 7, 2


@pytest.fixture(params=["eager", "triton"], autouse=True)
def _backend(request):
    with fastllm.backend(request.param):
        yield


def pair(**kwargs):
    theirs = torch.nn.MultiheadAttention(8, HEADS, device=DEVICE, **kwargs)
    mine = MultiheadAttention(8, HEADS, device=DEVICE, **kwargs)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.4)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def same(mine, theirs, tensors, **kwargs):
    """Equal outputs, and equal gradients of inputs and parameters."""
    results = []
    for module in (mine, theirs):
        leaves = {id(t): t.detach().clone().requires_grad_() for t in tensors}
        out, weights = module(*(leaves[id(t)] for t in tensors), need_weights=False, **kwargs)
        assert weights is None
        wanted = [*leaves.values(), *module.parameters()]
        grad = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
        results.append([out, *torch.autograd.grad(out, wanted, grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def cross(batch_first=False, kdim=8, vdim=8):
    shapes = [(BATCH, n, e) for n, e in ((LENGTH, 8), (SIZE, kdim), (SIZE, vdim))]
    tensors = [torch.randn(s, device=DEVICE) for s in shapes]
    return tensors if batch_first else [t.transpose(0, 1) for t in tensors]


def padding(kind):
    mask = torch.zeros(BATCH, SIZE, dtype=torch.bool, device=DEVICE)
    mask[1, 4:] = True
    return mask if kind == "bool" else torch.randn(BATCH, SIZE, device=DEVICE)


def pairs(kind, planes):
    shape = (BATCH * HEADS, LENGTH, SIZE) if planes else (LENGTH, SIZE)
    return torch.rand(shape, device=DEVICE) < 0.3 if kind == "bool" else torch.randn(shape, device=DEVICE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(batch_first=True),
        dict(bias=False, kdim=5, vdim=6),
        dict(add_bias_kv=True),
        dict(add_zero_attn=True, batch_first=True),
    ],
)
def test_equals_torch(options):
    mine, theirs = pair(**options)
    widths = {k: v for k, v in options.items() if k in ("batch_first", "kdim", "vdim")}
    same(mine, theirs, cross(**widths))
    same(mine, theirs, cross(**widths), key_padding_mask=padding("bool"), attn_mask=pairs("bool", False))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("planes", [False, True])
def test_masks(kind, planes):
    mine, theirs = pair()
    same(mine, theirs, cross(), attn_mask=pairs(kind, planes))
    same(mine, theirs, cross(), attn_mask=pairs(kind, planes), key_padding_mask=padding(kind))


def test_self_attention_causal_and_unbatched():
    mine, theirs = pair()
    x = torch.randn(6, 3, 8, device=DEVICE)
    hidden = torch.ones(6, 6, dtype=torch.bool, device=DEVICE).triu(1)
    same(mine, theirs, (x, x, x), attn_mask=hidden, is_causal=True)
    one = torch.randn(6, 8, device=DEVICE)
    same(mine, theirs, (one, one, one), attn_mask=hidden)
    same(mine, theirs, (one, one, one), key_padding_mask=hidden[2])


@pytest.mark.parametrize("options", [dict(add_zero_attn=True), dict(add_bias_kv=True)], ids=str)
def test_a_causal_hint_beside_added_keys_means_what_torch_means(options):
    mine, theirs = pair(batch_first=True, **options)
    x = torch.randn(BATCH, LENGTH, 8, device=DEVICE)
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=DEVICE).triu(1)
    same(mine, theirs, (x, x, x), attn_mask=hidden, is_causal=True)


def test_weights_are_torchs():
    mine, theirs = pair()
    tensors = cross()
    for a, b in zip(mine(*tensors), theirs(*tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_only_in_training():
    mine, _ = pair(dropout=0.5)
    tensors = cross()
    torch.manual_seed(0)
    assert not torch.equal(mine(*tensors, need_weights=False)[0], mine(*tensors, need_weights=False)[0])
    mine.eval()
    assert torch.equal(mine(*tensors, need_weights=False)[0], mine(*tensors, need_weights=False)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(is_causal=True), ValueError, "attn_mask, which must be given"),
        (dict(attn_mask=torch.zeros(3, 3)), ValueError, "attn_mask must have shape"),
        (dict(attn_mask=torch.zeros(LENGTH, SIZE, dtype=torch.int32)), TypeError, "attn_mask must be a boolean"),
        (dict(key_padding_mask=torch.zeros(3, SIZE)), ValueError, "key_padding_mask must have shape"),
        (dict(key=torch.zeros(SIZE, BATCH, 7)), ValueError, "expected last dimensions"),
        (dict(value=torch.zeros(SIZE + 1, BATCH, 8)), ValueError, "must agree"),
        (dict(query=torch.zeros(8)), ValueError, "expected 3 dimensions"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    mine, _ = pair()
    arguments = dict(zip(("query", "key", "value"), cross(), strict=True), need_weights=False)
    with pytest.raises(error, match=message):
        mine(**{**arguments, **{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}})
