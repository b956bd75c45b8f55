"""A row has the same bits in any batch, at any place in it and packed: on a GPU as in the interpreter.

layouts.py sums as a GPU's layouts do, contracting.py rounds a product and a sum as a GPU's compiler does.
"""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contracting import contracting
from layouts import blocked, layout_sums, ordered_sum
from triton.runtime.interpreter import GridExecutor

import fastllm
from fastllm import functional
from fastllm.kernels.attention import decode

pytestmark = pytest.mark.runs_on("interpreter")


def _bits(function, *leaves, **kwargs):
    """The outputs and the gradients of the leaves, for an upstream gradient that is a function of each row alone."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    with layout_sums(), contracting(), fastllm.backend("triton"):
        outs = function(*leaves, **kwargs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        grads = torch.autograd.grad(outs, leaves, [y.detach() for y in outs])
    return [*(y.detach() for y in outs), *grads]


def _same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


ROWS = [slice(0, 1), slice(5, 6), slice(3, 12), slice(6, 37)]


@pytest.mark.parametrize(
    ("cols", "dtype"),
    [(24, torch.float32), (512, torch.float32), (512, torch.bfloat16), (1000, torch.bfloat16), (4112, torch.bfloat16)],
)
def test_norms(cols, dtype):
    x, residual = torch.randn(2, 37 if cols < 4096 else 7, cols).to(dtype)
    weight = torch.randn(cols).to(dtype)
    for name, leaves, options in (
        ("layer_norm", (x,), (weight, weight)),
        ("rms_norm", (x,), (weight,)),
        ("add_layer_norm", (x, residual), (weight, weight)),
    ):

        def norm(*tensors, name=name, options=options):
            return getattr(functional, name)(*tensors, (cols,), *options)

        whole = _bits(norm, *leaves)
        for rows in ROWS:
            if rows.stop <= len(x):
                _same(_bits(norm, *(t[rows] for t in leaves)), [t[rows] for t in whole])


@pytest.mark.parametrize("classes", [10, 512, 5000])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "label_smoothing": 0.1}], ids=["plain", "capped"])
def test_losses_of_rows(classes, options):
    x, y = torch.randn(37, classes), torch.randint(classes, (37,))
    whole = _bits(lambda z: functional.cross_entropy(z, y, reduction="none", return_lse=True, **options), x)
    for rows in ROWS:
        part = _bits(
            lambda z, rows=rows: functional.cross_entropy(z, y[rows], reduction="none", return_lse=True, **options),
            x[rows],
        )
        _same(part, [t[rows] for t in whole])


@pytest.mark.parametrize("classes", [10, 300])
def test_losses_of_adjacent_positions(classes):
    x, y = torch.randn(2, classes, 70), torch.randint(classes, (2, 70))
    whole = _bits(lambda z: functional.cross_entropy(z, y, reduction="none"), x)
    for at in (slice(0, 2), slice(3, 40), slice(30, 70)):
        part = _bits(lambda z, at=at: functional.cross_entropy(z, y[:, at], reduction="none"), x[..., at])
        _same(part, [t[..., at] for t in whole])


FEATURES = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.linspace(-1, 1, 4)},
    "window": {"window": (20, 0)},
    "slopes": {"alibi_slopes": torch.linspace(0.1, 0.5, 4)},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_queries_beside_any_others(feature):
    """The last queries alone see the same keys: other rows of their tile decide which scores are masked."""
    dtype = torch.float32 if feature in ("softcap", "sinks") else torch.bfloat16
    q, k, v = (torch.randn(1, heads, 150, 16).to(dtype) for heads in (4, 2, 2))
    kwargs = {"causal": True, **FEATURES[feature]}

    def attend(q):
        return functional.attention(q, k, v, return_lse=True, **kwargs)

    whole = _bits(attend, q)
    for count in (5, 77):
        _same(_bits(attend, q[:, :, -count:]), [t[:, :, -count:] for t in whole])


def test_sequences_alone_in_a_batch_and_packed():
    lengths = (40, 17)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = (torch.randn(sum(lengths), heads, 16) for heads in (4, 2, 2))
    kwargs = {"causal": True, "softcap": 3.0}
    packed = _bits(
        lambda *t: functional.attention(*t, cu_seqlens_q=starts, cu_seqlens_k=starts, **kwargs), q, k, v
    )  # fmt: skip
    for i, length in enumerate(lengths):
        own = slice(starts[i], starts[i] + length)
        dense = [t[own].transpose(0, 1)[None] for t in (q, k, v)]
        alone = _bits(lambda *t: functional.attention(*t, **kwargs), *dense)
        twice = _bits(lambda *t: functional.attention(*t, **kwargs), *(torch.cat([t.flip(2), t]) for t in dense))
        _same(alone, [t[own].transpose(0, 1)[None] for t in packed])
        _same(alone, [t[1:] for t in twice])


@pytest.mark.parametrize("heads", [2, 6])
def test_decoding_steps(heads, monkeypatch):
    tile = dict(CHUNK=32, SPLIT_FROM=48, BLOCK_N=16, num_warps=4, num_stages=2)
    monkeypatch.setattr(decode, "split_tile", lambda *_: tile)
    monkeypatch.setattr(decode, "TILE_ROWS", 4)  # so that several tiles hold a sequence's queries
    q, k, v = (torch.randn(2, h, n, 16) for h, n in ((heads, 3), (2, 70), (2, 70)))

    def attend(q, k, v):
        with layout_sums(), contracting(), fastllm.backend("triton"):
            return functional.attention(q, k, v, causal=True, softcap=3.0)

    whole = attend(q, k, v)
    for count in (1, 2):
        assert torch.equal(attend(q[:, :, -count:], k, v), whole[:, :, -count:])
    assert torch.equal(attend(q[1:2], k[1:2], v[1:2]), whole[1:2])


@pytest.mark.parametrize("interleaved", [False, True])
def test_elementwise_ops(interleaved):
    x, up = torch.randn(2, 37, 24)
    whole = _bits(functional.swiglu, x, up)
    angles = torch.rand(37, 12)
    q = torch.randn(1, 3, 37, 24)

    def turn(q, rows=slice(None)):
        cos, sin = angles.cos()[rows], angles.sin()[rows]
        return functional.rotary_embedding(q, None, cos, sin, interleaved=interleaved)[0]

    turned = _bits(turn, q)
    for rows in ROWS:
        _same(_bits(functional.swiglu, x[rows], up[rows]), [t[rows] for t in whole])
        _same(_bits(turn, q[:, :, rows], rows=rows), [t[:, :, rows] for t in turned])


# Their sums are over the rows themselves, or they have none.
OF_ALL_ROWS = {"_sum_kernel", "_mass_kernel", "_scale_kernel"}


def _launches(function, *leaves):
    """(kernel, constants and options) of every launch of a forward and a backward; nothing is computed."""
    found = []

    def record(self, *args, **kwargs):
        constants = {name: value for name, value in kwargs.items() if not isinstance(value, torch.Tensor)}
        if self.fn.__name__ not in OF_ALL_ROWS:
            found.append((self.fn.__name__, repr(sorted(constants.items(), key=lambda item: item[0]))))

    leaves = [x.requires_grad_() for x in leaves]
    with mock.patch.object(GridExecutor, "__call__", record), fastllm.backend("triton"):
        out = function(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    return found


@pytest.mark.parametrize("cols", [8, 96, 1000, 4096, 5000, 20000, 40000])
def test_no_launch_of_norms_and_losses_reads_the_number_of_rows(cols):
    seen = {"norm": set(), "loss": set(), "positions": set()}
    for n in (2, 3, 16, 37, 129, 1000):
        x = torch.empty(n, cols)
        seen["norm"].add(tuple(_launches(lambda z: functional.layer_norm(z, (cols,), torch.ones(cols)), x)))
        y = torch.zeros(n, dtype=torch.int64)
        seen["loss"].add(tuple(_launches(lambda z, y=y: functional.cross_entropy(z, y), torch.empty(n, cols))))
        seen["positions"].add(
            tuple(_launches(lambda z, y=y: functional.cross_entropy(z, y[None]), torch.empty(1, cols, n)))
        )
    for launches in seen.values():
        assert len(launches) == 1
        assert launches.pop()


@pytest.mark.parametrize("dim", [16, 128])
def test_no_launch_of_attention_reads_the_number_of_queries_or_sequences(dim):
    seen = {"many": set(), "few": set()}
    for kind, counts in (("many", (70, 128, 300)), ("few", (1, 2, 5, 16))):
        for batch in (1, 3, 64):
            for rows in counts:
                q, k, v = (torch.empty(batch, h, n, dim) for h, n in ((4, rows), (2, 512), (2, 512)))
                launches = _launches(lambda q, k, v: functional.attention(q, k, v, causal=True), q, k, v)
                # The merge's grid alone follows from the number of queries.
                seen[kind].add(tuple(launches))
    assert [len(launches) for launches in seen.values()] == [1, 1]


def test_sums_follow_the_layout():
    rng = np.random.default_rng(0)
    assert blocked((1, 4096), 8, 4) == (4, 32, 8)
    assert blocked((32, 128), 8, 2) == (8, 16, 1)
    assert blocked((4, 16), 4, 4) == (1, 16, 1)
    for shape in ((1, 4096), (32, 128), (4, 16), (2, 1)):
        x = rng.standard_normal(shape).astype(np.float32)
        np.testing.assert_allclose(ordered_sum(x, 4, 4), x.sum(-1), rtol=1e-5, atol=1e-5)
    x = rng.standard_normal((8, 512)).astype(np.float32)
    alone = np.concatenate([ordered_sum(row[None], 1, 4) for row in x])
    assert not np.array_equal(ordered_sum(x, 8, 4), alone)
    assert np.array_equal(ordered_sum(x, 8, 4)[:2], ordered_sum(x[[0, 1] * 4], 8, 4)[:2])


def test_a_tile_that_follows_the_rows_would_show(monkeypatch):
    from fastllm.kernels.norm import forward

    x = torch.randn(37, 512)
    whole = _bits(lambda z: functional.layer_norm(z, (512,)), x)
    monkeypatch.setattr(forward, "rows_and_columns", lambda cols, tile: (1, 512))
    alone = _bits(lambda z: functional.layer_norm(z, (512,)), x)
    assert not torch.equal(whole[0], alone[0])
    torch.testing.assert_close(F.layer_norm(x, (512,)), alone[0])
