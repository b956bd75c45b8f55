"""One rule of dropout's masks (fastllm/ops/shared/philox.py) for kernels, C++ and eager: the same bits."""

import functools

import pytest
import torch
import torch.utils.checkpoint
import triton
import triton.language as tl
from conftest import DEVICE

import fastllm
from fastllm.backends import why_not
from fastllm.functional import add_layer_norm, add_rms_norm, embedding_sum
from fastllm.kernels.math import is_kept
from fastllm.ops.norm.call import NormBackward, NormForward
from fastllm.ops.norm.operator import backward_by, forward_by
from fastllm.ops.shared.dropout import dropout, dropped
from fastllm.ops.shared.philox import draw_seed, dropout_mask, philox, rows_kept
from fastllm.training.dropout import RowDropout, key_dropout, set_first_row

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

NOT_NATIVE = why_not("native", DEVICE.type)
# A key and a first row: of few bits, of all bits, and so that rows pass 2^32, and 2^63 - 1.
SEEDS = [(5, 0), (-(2**62) + 12345, 2**32 - 2), (2**61 + 7, 2**63 - 2)]
# Less than a vector of every instruction set, whole vectors, and their rests.
COLUMNS = [1, 2, 3, 4, 31, 64, 129, 515]


def seed_of(key, first):
    return torch.tensor([key, first], device=DEVICE)


@pytest.mark.runs_on("anywhere")
def test_philox_is_the_published_function():
    # Known answers of the authors' Random123 (kat_vectors, philox4x32 10): counter and key all zero.
    zero = torch.zeros(1, dtype=torch.int64)
    assert [f"{int(w):08x}" for w in philox(zero, zero, zero)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@triton.jit
def _mask_kernel(out, seed, start, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.arange(0, ROWS).to(tl.int64) + tl.load(seed + 1)
    high = (rows >> 32).to(tl.uint32)[:, None]
    kept = is_kept(tl.load(seed), rows.to(tl.uint32), high, start, threshold, COLS)
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out + at, kept.to(tl.int8))


@pytest.mark.parametrize("columns", [1, 2, 4, 64])
def test_a_kernels_words_are_the_rules(columns):
    for (key, first), p in zip(SEEDS, (0.0, 0.3, 0.999), strict=True):
        seed, start = seed_of(key, first), 4 * (key % 7)
        out = torch.empty(4, columns, dtype=torch.int8, device=DEVICE)
        _mask_kernel[(1,)](out, seed, start, int(p * 2**32), 4, columns)
        rows = torch.arange(4, device=DEVICE) + seed[1]
        assert torch.equal(out.bool(), rows_kept(seed[0], rows, start + columns, p)[:, start:])


@pytest.mark.cpu_level
@pytest.mark.skipif(NOT_NATIVE is not None, reason=f"native: {NOT_NATIVE}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_extensions_words_are_the_rules(dtype):
    for key, first in SEEDS:
        seed = seed_of(key, first)
        for columns in COLUMNS:
            x = torch.randn(5, columns, device=DEVICE).to(dtype)
            x[2] = torch.nan  # what is dropped is 0, whatever it was
            for p in (0.0, 2**-32, 0.1, 0.75, 1.0):
                got = torch.ops.fastllm.dropout_rows(x, p, seed)
                scaled = (x.to(torch.promote_types(dtype, torch.float32)) * (1 / (1 - p) if p < 1 else 0)).to(dtype)
                expected = torch.where(dropout_mask(seed, x.shape, p), scaled, 0)
                torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.cpu_level
@pytest.mark.parametrize("shape", [(3, 1), (4, 7), (2, 3, 70), (2, 130)])
def test_every_backend_drops_the_same_elements(shape):
    backends = ["eager", "triton", *(["native"] if NOT_NATIVE is None and DEVICE.type == "cpu" else [])]
    x, zero = torch.rand(shape, device=DEVICE) + 1, torch.zeros(shape, device=DEVICE)
    for function in (add_rms_norm, add_layer_norm):
        found = []
        for backend in backends:
            torch.manual_seed(3)
            with fastllm.backend(backend):
                found.append(function(x, zero, shape[-1:], dropout_p=0.4)[1])
        torch.manual_seed(3)
        mask = dropout_mask(draw_seed(DEVICE), shape, 0.4)
        for h in found:
            assert torch.equal(h != 0, mask)
            torch.testing.assert_close(h, dropped(x, seed_of(0, 0), 0.0) * mask / 0.6)


@pytest.mark.cpu_level
@pytest.mark.parametrize("backend", ["triton", pytest.param("native", marks=pytest.mark.runs_on("interpreter"))])
@pytest.mark.parametrize(("key", "first"), SEEDS)
def test_a_norms_rows_are_numbers_of_64_bits(backend, key, first):
    if backend == "native" and NOT_NATIVE is not None:
        pytest.skip(f"native: {NOT_NATIVE}")
    x, seed, none = torch.rand(5, 12, device=DEVICE) + 1, seed_of(key, first), torch.empty(0, device=DEVICE)
    mask = dropout_mask(seed, x.shape, 0.4)
    _, h, _, rstd = forward_by(
        NormForward(
            x=x, residual=torch.zeros_like(x), weight=None, bias=None, seed=seed, eps=1e-5, offset=0.0, dropout_p=0.4,
            center=False, backend=backend,
        )
    )  # fmt: skip
    assert torch.equal(h != 0, mask)
    dinput, dresidual, *_ = backward_by(
        NormBackward(
            dy=torch.zeros_like(x), dh=torch.ones_like(x), x=h, weight=None, seed=seed, mean=none, rstd=rstd,
            input_dtype=x.dtype, bias_dtype=x.dtype, offset=0.0, dropout_p=0.4, center=False,
            needs=(True, True, False, False), backend=backend,
        )
    )  # fmt: skip
    assert torch.equal(dinput != 0, mask)
    assert dresidual.all()


def test_dropout_has_gradients_of_any_order_and_a_mask_for_each_sample():
    x = torch.randn(4, 6, device=DEVICE, dtype=torch.float64, requires_grad=True)
    seed = draw_seed(DEVICE)
    assert torch.autograd.gradcheck(lambda x: dropout(x, seed, 0.5), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, seed, 0.5).square(), x)
    assert torch.equal(
        torch.func.grad(lambda x: dropout(x, seed, 0.5).sum())(x), 2.0 * dropout_mask(seed, x.shape, 0.5)
    )
    module = RowDropout(0.5, torch.zeros((), dtype=torch.int64, device=DEVICE))
    out = torch.func.vmap(module, randomness="different")(torch.ones(8, 3, 20, device=DEVICE))
    assert len({tuple(sample.flatten().tolist()) for sample in out}) == 8
    for p, expected in ((0.0, x), (1.0, torch.zeros_like(x))):
        module.p = p
        assert torch.equal(module(x), expected)


class Fused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = fastllm.nn.EmbeddingSum([9, 6], 10, dropout=0.3)
        self.norm = fastllm.nn.AddRMSNorm(10, dropout_p=0.4)
        self.layer_norm = fastllm.nn.AddLayerNorm((5, 10), dropout_p=0.4)
        self.dropout = torch.nn.Dropout(0.2)

    def forward(self, tokens):
        x = self.embed(tokens)
        x, h = self.norm(x, x)
        x, h = self.layer_norm(self.dropout(x), h)
        return x + h


@pytest.mark.parametrize(
    "backend", ["eager", "triton", pytest.param("native", marks=pytest.mark.runs_on("interpreter"))]
)
def test_fused_dropout_follows_the_row_of_the_whole_batch(backend):
    model = key_dropout(Fused().to(DEVICE))
    tokens = torch.randint(9, (6, 5), device=DEVICE)

    def outputs(rows):
        parts = []
        for first in range(0, 6, rows):
            set_first_row(model, first)
            torch.manual_seed(1)
            parts.append(model(tokens[first : first + rows]))
        return torch.cat(parts)

    with fastllm.backend(backend):
        whole = outputs(6)
        for rows in (1, 2, 4):
            torch.testing.assert_close(outputs(rows), whole)
        set_first_row(model, 3)
        assert not torch.equal(model(tokens[:1]), model(tokens[:1]))
    assert embedding_sum([tokens], [model.embed.tables[0].weight], dropout_p=1.0).count_nonzero() == 0


@pytest.mark.parametrize("backend", ["triton", pytest.param("native", marks=pytest.mark.runs_on("interpreter"))])
def test_the_dropout_of_a_layers_attention_follows_the_row_of_the_whole_batch(backend):
    layer = key_dropout(fastllm.nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True, device=DEVICE))
    x = torch.randn(3, 5, 16, device=DEVICE)

    def output(first, rows):
        set_first_row(layer, first)
        torch.manual_seed(1)
        return layer(rows, rows, rows, need_weights=False)[0]

    with fastllm.backend(backend), torch.no_grad():
        whole = output(0, x)
        torch.testing.assert_close(torch.cat([output(row, x[row : row + 1]) for row in range(3)]), whole)
        assert not torch.allclose(output(1, x), whole)


@pytest.mark.skipif(NOT_NATIVE is not None, reason=f"native: {NOT_NATIVE}")
def test_masks_are_the_same_compiled_and_recomputed():
    model = key_dropout(Fused().to(DEVICE))
    set_first_row(model, 3)
    tokens = torch.randint(9, (6, 5), device=DEVICE)
    results = []
    recomputed = functools.partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=False)
    for call in (model, recomputed, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        out = call(tokens)
        results.append((out, *torch.autograd.grad(out.square().sum(), model.parameters())))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])


def test_masks_keep_the_right_share_and_are_independent():
    """Of rows, of columns, of keys that follow one another, and of rows that are alike in their low 32 bits."""
    p, columns = 0.25, 1003
    rows = torch.arange(100, device=DEVICE)
    parts = [rows_kept(torch.tensor(3, device=DEVICE), rows, columns, p)]
    parts.append(rows_kept(torch.tensor(4, device=DEVICE), rows, columns, p))
    parts.append(rows_kept(torch.tensor(3, device=DEVICE), rows + 2**32, columns, p))
    keep = torch.cat(parts).double()
    assert abs(keep.mean() - (1 - p)) < 5 * (p * (1 - p) / keep.numel()) ** 0.5
    for view in (keep, keep[:, :300].t()):
        correlation = torch.corrcoef(view).fill_diagonal_(0)
        assert correlation.abs().max() < 6 / view.shape[1] ** 0.5
        assert correlation.std() < 1.1 / view.shape[1] ** 0.5
