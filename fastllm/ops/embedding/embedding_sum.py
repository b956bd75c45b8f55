"""Sum of several embeddings, as a model's input needs it: token + position + segment, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...backends import pick, plain_eager
from ...registry import Cost, Op, Sample, register
from ..shared.autograd import apply
from ..shared.check import check_floating, check_number
from ..shared.dropout import dropped, dropped_gradient
from ..shared.philox import draw_seed, dropout_mask, dropout_scale, first_row_of
from ..shared.sharded import agreed, replicated
from ..shared.stand_ins import any_stands_in, overridden
from .call import check_indices, check_table, normalised_padding
from .eager import gather_eager
from .embedding import Embedding
from .operator import Lookup, embedding_sum_fwd, scatter
from .ordinary import ordinary_embedding_sum
from .samples import distinct, make_table, zipf

# The tables are arguments of one kernel: kMaxTables in csrc/cuda/embedding_forward_kernels.cuh.
MAX_TABLES_ON_A_GPU = 8


def _per_table(op_argument: str, value, default, tables: int) -> tuple:
    """``value`` as one entry for each table: a single one is the first table's."""
    if isinstance(value, Sequence):
        if len(value) != tables:
            raise ValueError(f"embedding_sum: {op_argument} has {len(value)} entries for {tables} tables")
        return tuple(value)
    return (value, *[default] * (tables - 1))


def _scales(scale, tables: int) -> tuple[float, ...]:
    scales = _per_table("scale", scale, 1.0, tables) if isinstance(scale, Sequence) else (scale,) * tables
    for factor in scales:
        check_number("embedding_sum", "scale", factor)
    return tuple(float(factor) for factor in scales)


def _filled(indices, device) -> list[torch.Tensor]:
    """The ids of each table; None becomes the positions along the last dimension of the first ids given."""
    given = next((i for i in indices if i is not None), None)
    if given is not None and not isinstance(given, torch.Tensor):
        raise TypeError(f"embedding_sum: indices must be tensors or None, got {type(given).__name__}")
    if given is None or given.dim() == 0:
        raise ValueError("embedding_sum: positions (None) need ids of another table with at least one dimension")
    positions = replicated(torch.arange(given.shape[-1], device=device), given)
    return [positions if i is None else i for i in indices]


def embedding_sum_reference(
    indices, weights, *, padding_idx=None, scale: float | Sequence[float] = 1.0, dropout_p=0.0, first_row=None
):
    """The definition, in at least fp32, rounded once to the tables' dtype. ``first_row``: as in the call."""
    dtype = weights[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    padding = _per_table("padding_idx", padding_idx, None, len(weights))
    scales = _scales(scale, len(weights))
    if any(i is None for i in indices):
        indices = _filled(indices, weights[0].device)
    parts = [s * F.embedding(i, w.to(wide), p) for i, w, p, s in zip(indices, weights, padding, scales, strict=True)]
    total = sum(parts[1:], parts[0])
    if dropout_p > 0.0:
        seed = agreed(draw_seed(total.device, first_row_of(total.shape[:-1], first_row)), total)
        kept = replicated(dropout_mask(seed, total.shape, dropout_p), total)
        total = torch.where(kept, total * dropout_scale(dropout_p), 0.0)
    return total.to(dtype)


class EmbeddingSumCall(NamedTuple):
    """A call of the op."""

    indices: Sequence[torch.Tensor]
    weights: Sequence[torch.Tensor]
    shape: tuple[int, ...]  # of the ids, broadcast together
    scales: tuple[float, ...]
    padding: tuple[int | None, ...]
    dropout_p: float
    positions: tuple[bool, ...]  # of each table: the ids are 0, 1, 2, ...
    first_row: torch.Tensor | None = None  # one int64: entries of dimension 0 before these ids', for the dropout mask

    def tensors(self):
        return tuple(self.weights)

    def by_torch(self):
        return embedding_sum_reference(
            self.indices, self.weights, padding_idx=self.padding, scale=self.scales, dropout_p=self.dropout_p,
            first_row=self.first_row,
        )  # fmt: skip


class _Sum(NamedTuple):
    """What a call does with ids, tables and a seed, and its linear maps."""

    native: bool
    shape: tuple[int, ...]
    scales: tuple[float, ...]
    padding: tuple[int | None, ...]
    dropout_p: float
    positions: tuple[bool, ...]

    def forward(self, indices, weights, seed):
        rows = 1
        for size in self.shape:
            rows = rows * size
        if self.native:
            return embedding_sum_fwd(list(weights), list(indices), rows, list(self.scales), self.dropout_p, seed)
        wide = torch.promote_types(weights[0].dtype, torch.float32)

        def part(t):
            return gather_eager(f"embedding_sum: indices[{t}]", indices[t], weights[t]).to(wide) * self.scales[t]

        total = part(0)
        for t in range(1, len(weights)):
            total = total + part(t)
        total = total.expand(*self.shape, total.shape[-1]).reshape(rows, total.shape[-1])
        total = total if seed is None else dropped(total, seed, self.dropout_p)
        # Where torch 2.11 compiles, a result that is the same tensor as one before it gets no gradient.
        return total if total.dtype == weights[0].dtype else total.to(weights[0].dtype)

    def table_grad(self, grad, indices, weight_rows, t):
        """The gradient of table ``t`` from that of the sum, once through dropout."""
        repeats = grad.shape[0] // max(indices.numel(), 1)
        padding = normalised_padding("embedding_sum", self.padding[t], weight_rows)
        lookup = Lookup(
            self.native, weight_rows, padding, by_freq=False, start=None, scale=self.scales[t], repeats=repeats,
            positions=self.positions[t] and padding < 0,
        )  # fmt: skip
        return scatter(grad, indices, lookup)


class _EmbeddingSum(torch.autograd.Function):
    @staticmethod
    def forward(call, seed, *tensors):
        tables = len(tensors) // 2
        return call.forward(tensors[:tables], tensors[tables:], seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, seed, *tensors = inputs
        tables = len(tensors) // 2
        ctx.rows = [weight.shape[0] for weight in tensors[tables:]]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seed, *tensors[:tables])

    @staticmethod
    def backward(ctx, grad):
        tables = len(ctx.rows)
        grads = [None] * tables
        if grad is not None:
            seed, *indices = ctx.saved_tensors
            grad = grad if seed is None else dropped_gradient(grad, seed, ctx.call.dropout_p)
            for t in range(tables):
                if ctx.needs_input_grad[2 + tables + t]:
                    grads[t] = ctx.call.table_grad(grad, indices[t], ctx.rows[t], t)
        return None, None, *[None] * tables, *grads


def _check(indices, weights, dropout_p):
    for name, value in (("indices", indices), ("weights", weights)):
        if isinstance(value, torch.Tensor) or not isinstance(value, Sequence):
            raise TypeError(f"embedding_sum: {name} must be a sequence of tensors, got {type(value).__name__}")
    if not weights or len(indices) != len(weights):
        raise ValueError(
            f"embedding_sum: indices and weights must be sequences of one length, at least 1; got {len(indices)} and "
            f"{len(weights)}"
        )
    first = weights[0]
    for t, weight in enumerate(weights):
        check_table("embedding_sum", f"weights[{t}]", weight)
        check_floating("embedding_sum", f"weights[{t}]", weight)
        if (weight.shape[1], weight.dtype, weight.device) != (first.shape[1], first.dtype, first.device):
            raise ValueError(
                f"embedding_sum: the tables must share columns, dtype and device; weights[{t}] has {weight.shape[1]}, "
                f"{weight.dtype}, {weight.device}, weights[0] {first.shape[1]}, {first.dtype}, {first.device}"
            )
    check_number("embedding_sum", "dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"embedding_sum: dropout_p must lie in [0, 1], got {dropout_p}")


def _laid_out(ids: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """``ids`` so that its flat elements, repeated, are those of ``ids.expand(shape)``: leading ones dropped."""
    while ids.dim() and ids.shape[0] == 1:
        ids = ids.squeeze(0)
    if tuple(ids.shape) != tuple(shape[len(shape) - ids.dim() :]):
        ids = ids.expand(shape)
    return ids.contiguous()


def _call(indices, weights, *, padding_idx=None, scale=1.0, dropout_p=0.0) -> EmbeddingSumCall:
    _check(indices, weights, dropout_p)
    tables = len(weights)
    positions = tuple(i is None for i in indices)
    if any(positions):
        indices = _filled(indices, weights[0].device)
    for t in range(tables):
        check_indices("embedding_sum", f"indices[{t}]", indices[t], weights[t])
    try:
        # torch.broadcast_shapes imports torch._refs and sympy the first time: 1 to 2 s of a command's start.
        shape = tuple(torch.broadcast_tensors(*indices)[0].shape)
    except RuntimeError:
        shapes = [list(i.shape) for i in indices]
        raise ValueError(f"embedding_sum: the shapes of indices do not broadcast together: {shapes}") from None
    padding = _per_table("padding_idx", padding_idx, None, tables)
    for given, weight in zip(padding, weights, strict=True):
        normalised_padding("embedding_sum", given, weight.shape[0])
    return EmbeddingSumCall(
        indices, weights, shape, scales=_scales(scale, tables), padding=padding, dropout_p=float(dropout_p),
        positions=positions,
    )  # fmt: skip


def _refuses(backend: str, call: EmbeddingSumCall) -> str | None:
    tables = len(call.weights)
    if backend == "native" and call.weights[0].is_cuda and tables > MAX_TABLES_ON_A_GPU:
        return f"at most {MAX_TABLES_ON_A_GPU} tables on a GPU, got {tables}"
    return None


def embedding_sum(indices, weights, *, padding_idx=None, scale=1.0, dropout_p=0.0):
    """``dropout(sum of scale * weights[t][indices[t]])``: token, position and segment embeddings in one pass.

    The sum is taken in fp32 (fp64 for fp64), in the order of the tables, and rounded once. Each table's gradient is a
    fp32 sum in a fixed order, as :func:`embedding`'s. The dropout mask is a pure function of a seed and the element's
    number. The backward computes it again, so no tensor of the output's size is stored.

    Args:
        indices: for each table its ids, int32 or int64, of shapes that broadcast together, such as (B, S) tokens and
            (S,) positions. None: the positions 0 .. S-1 along the last dimension of the first ids that are given.
        weights: for each table (rows, embedding_dim); one dtype and device for all.
        padding_idx: the id in the first table whose row gets no gradient, or a sequence, one (or None) for each table.
        scale: multiplies the sum, or a sequence, one for each table, as in ``(sqrt(embedding_dim), 1)`` of Vaswani et
            al. 2017.
        dropout_p: in [0, 1]; applied whenever positive. The seed comes from PyTorch's generator.

    Returns:
        (*broadcast shape of the ids, embedding_dim), in the tables' dtype.

    Raises:
        TypeError: an argument is not a tensor or a sequence of tensors, or has the wrong dtype.
        ValueError: a count, shape, device or option does not fit.
        IndexError: on CPU, an id is outside its table; the message has table and position. On CUDA a device-side
            assertion, as in torch.
        BackendError: the backend asked for cannot serve the call.
    """
    if padding_idx is None and type(scale) is type(dropout_p) is float and scale == 1.0 and dropout_p == 0.0:
        rows = ordinary_embedding_sum(indices, weights)
        if rows is not None:
            return rows
    options: dict[str, Any] = dict(padding_idx=padding_idx, scale=scale, dropout_p=dropout_p)
    if any_stands_in(indices, weights):
        return overridden(embedding_sum, indices, weights, **options)
    return _served(_call(indices, weights, **options))


def _served(call: EmbeddingSumCall) -> torch.Tensor:
    backend = pick("embedding_sum", call).backend
    if plain_eager(backend, call.weights):
        return call.by_torch()
    indices, weights, shape, scales, padding, dropout_p, positions, _ = call
    total = _Sum(backend == "native", shape, scales, padding, dropout_p, positions)
    first_row = first_row_of(shape, call.first_row)
    seed = draw_seed(weights[0].device, first_row) if call.dropout_p > 0.0 else None
    ids = [_laid_out(i, shape) for i in indices]
    needs = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    if torch.compiler.is_compiling() and not needs:
        # torch.compile would call forward with a ctx, since its arguments are not each named.
        rows = total.forward(ids, weights, seed)
    else:
        rows = apply(_EmbeddingSum, total, seed, *ids, *weights)
    return rows.view(*shape, weights[0].shape[1])


class EmbeddingSum(torch.nn.Module):
    """Token, position, segment, ... embeddings, added, scaled and dropped out in one pass: :func:`embedding_sum`.

    Args:
        num_embeddings: rows of each table.
        embedding_dim: columns of every table.
        padding_idx: an id of the first table, or one (or None) for each table; these rows start as zeros and get no
            gradient.
        scale: a factor of the sum, or a sequence with one for each table.
        dropout: probability, in training.
        device, dtype: of the tables.

    The tables are ``tables``, a ModuleList of :class:`Embedding`: state_dict keys ``tables.0.weight``, ...

    Shape:
        forward(*indices): ids for each table, of shapes that broadcast together. The last ones may be left out or None,
        which means positions 0 .. S-1. Returns (*shape, embedding_dim).

    Raises:
        ValueError, TypeError, IndexError: there are more ids than tables, or as for :func:`embedding_sum`.
    """

    def __init__(
        self, num_embeddings, embedding_dim, *, padding_idx=None, scale=1.0, dropout=0.0, device=None, dtype=None
    ):
        super().__init__()
        padding = _per_table("padding_idx", padding_idx, None, len(num_embeddings))
        self.tables = torch.nn.ModuleList(
            Embedding(rows, embedding_dim, p, device=device, dtype=dtype)
            for rows, p in zip(num_embeddings, padding, strict=True)
        )
        self.scale = scale
        self.dropout = dropout
        self.first_row: torch.Tensor | None = None  # set by fastllm.training.dropout.key_dropout

    def forward(self, *indices):
        if len(indices) > len(self.tables):
            raise ValueError(f"EmbeddingSum: got {len(indices)} indices for {len(self.tables)} tables")
        operands = (
            [*indices, *[None] * (len(self.tables) - len(indices))],
            [table.weight for table in self.tables],
        )
        options: dict[str, Any] = dict(
            padding_idx=[table.padding_idx for table in self.tables], scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        if any_stands_in(*operands):
            return overridden(embedding_sum, *operands, **options)
        return _served(_call(*operands, **options)._replace(first_row=self.first_row))

    def extra_repr(self):
        return f"scale={self.scale}, dropout={self.dropout}"


def _samples(device, dtype):
    def tables(columns, *rows):
        return [make_table(device, dtype, r, columns) for r in rows]

    def ids(*shape, rows):
        return torch.randint(rows, shape, device=device)

    three = [zipf(device, 50, 3, 40), torch.arange(40, device=device), ids(3, 40, rows=2)]
    yield Sample("token_position_segment", (three, tables(33, 50, 64, 2)))
    yield Sample("positions", ([ids(2, 3, 9, rows=20), None], tables(16, 20, 12)))
    yield Sample("one_table", ([ids(7, rows=5)], tables(8, 5)))
    yield Sample("scales", ([ids(4, 6, rows=9), None], tables(24, 9, 6)), {"scale": (24**0.5, 1.0)})
    yield Sample(
        "scale_padding", ([ids(30, rows=4), ids(30, rows=3)], tables(20, 4, 3)), {"scale": 0.5, "padding_idx": 2}
    )
    yield Sample("padding_each", ([ids(30, rows=4), ids(30, rows=3)], tables(9, 4, 3)), {"padding_idx": (-1, 0)})
    yield Sample("alike", ([ids(4, 7, rows=5), ids(4, 7, rows=5)], tables(9, 5, 5)))
    yield Sample("column_ids", ([ids(5, 1, rows=8), ids(6, rows=7).int()], tables(12, 8, 7)))
    yield Sample("no_ids", ([ids(0, 6, rows=8), None], tables(12, 8, 7)))
    yield Sample("wide", ([ids(2, 3, rows=8), None], tables(1000, 8, 7)))
    yield Sample(
        "strided", ([ids(6, 4, rows=8).t(), ids(6, rows=9)], [tables(40, 8)[0][:, 3:30], tables(9, 27)[0].t()])
    )


def _cost(indices, weights, **kwargs) -> Cost:
    indices = _filled(indices, weights[0].device) if any(i is None for i in indices) else indices
    row = weights[0].shape[1] * weights[0].element_size()
    rows = int(torch.broadcast_shapes(*[i.shape for i in indices]).numel()) * row
    ids = sum(i.numel() * i.element_size() for i in indices)
    return Cost(
        ids + sum(distinct(i) for i in indices) * row + rows, ids + rows + sum(w.shape[0] for w in weights) * row
    )


register(
    Op(
        name="embedding_sum",
        summary="token + position + segment embeddings in one pass, with scale and dropout",
        function=embedding_sum,
        reference=embedding_sum_reference,
        samples=_samples,
        cost=_cost,
        backends=("eager", "native"),
        native_on=("cpu", "cuda"),
        module=EmbeddingSum,
        call=_call,
        refuses=_refuses,
    )
)
