"""Embedding: rows of a table by id, and the table's gradient as fp32 sums in a fixed order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...backends import pick, plain_eager, under_transform
from ...extension import operator
from ...registry import Op, Sample, register
from ..shared.autograd import apply
from .table import (
    check_indices,
    check_table,
    embedding_cost,
    embedding_samples,
    gather_eager,
    named_errors,
    normalised_padding,
    scatter_eager,
)


def embedding_reference(
    input,
    weight,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
    *,
    main_grad=None,
    vocab_range=None,
):
    """The definition, with gradients summed in at least fp32 and rounded once to the table's dtype."""
    if max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(weight, input.contiguous(), max_norm, norm_type)
    start, end = (0, weight.shape[0]) if vocab_range is None else vocab_range
    padding = normalised_padding("embedding", padding_idx, weight.shape[0], partial=vocab_range is not None)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    held = (input >= start) & (input < end)
    rows = F.embedding(input if vocab_range is None else torch.where(held, input - start, 0), wide)
    rows = torch.where(held[..., None], rows, 0)
    rows = torch.where((input == padding)[..., None], rows.detach(), rows)
    if scale_grad_by_freq:
        counts = (input.reshape(-1, 1) == input.reshape(1, -1)).sum(1).view(*input.shape, 1)
        rows = rows.detach() + (rows - rows.detach()) / counts
    return rows.to(weight.dtype)


def _fwd_fake(weight, indices, vocab_start):
    return weight.new_empty((*indices.shape, weight.shape[1]))


def _bwd_fake(grad, indices, num_rows, *options):
    return grad.new_empty((num_rows, grad.shape[-1]))


def _bwd_into_fake(*args):
    return None


_embedding_fwd = operator("embedding_fwd", _fwd_fake)
_embedding_bwd = operator("embedding_bwd", _bwd_fake)
_embedding_bwd_into = operator("embedding_bwd_", _bwd_into_fake)


class EmbeddingCall(NamedTuple):
    """A call of the op."""

    input: torch.Tensor
    weight: torch.Tensor
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    by_freq: bool
    sparse: bool
    main_grad: torch.Tensor | None
    vocab_range: tuple[int, int] | None

    def tensors(self):
        return (self.weight,)


class Lookup(NamedTuple):
    """A lookup's options, and its two linear maps: gather (table -> rows) and scatter (rows -> table).

    Each is the other's gradient, so both can be differentiated to any order.
    """

    native: bool
    num_rows: int
    padding: int  # -1: none
    by_freq: bool
    start: int | None  # the table's first id, where it holds a range of a larger vocabulary; None: it holds all ids
    scale: float  # of the gradient
    repeats: int  # the gradient has so many blocks of rows, one after the other, and each has these ids
    positions: bool  # the ids are 0, 1, 2, ...: nothing to sort

    def gather(self, weight, indices):
        if self.native:
            return _embedding_fwd(weight, indices, self.start)
        return gather_eager("embedding: indices", indices, weight, self.start)

    def scatter(self, grad, indices):
        if self.native:
            return _embedding_bwd(
                grad, indices, self.num_rows, self.padding, self.by_freq, self.start, self.scale, self.positions
            )
        keys = self.keys(indices).flatten().repeat(self.repeats)
        return scatter_eager(grad.reshape(keys.numel(), grad.shape[-1]), keys, self.num_rows, self.by_freq, self.scale)

    def scatter_into(self, table, grad, indices):
        """Add what scatter gives to ``table``."""
        if self.native:
            _embedding_bwd_into(table, grad, indices, self.padding, self.by_freq, self.start, self.scale, True)
        else:
            table.add_(self.scatter(grad.to(table.dtype), indices))

    def keys(self, indices):
        """Row numbers; num_rows for an id that gets no gradient."""
        start = 0 if self.start is None else self.start
        dropped = (indices < start) | (indices >= start + self.num_rows) | (indices == self.padding)
        return torch.where(dropped, self.num_rows, indices - start)

    def adjoint_of_scatter(self, table, indices, shape):
        """The gradient of scatter, of the ``shape`` of what it takes: gather with scatter's own drops and factors."""
        keys = self.keys(indices)
        rows = self.gather(table, indices).masked_fill((keys == self.num_rows)[..., None], 0)
        if self.by_freq:
            flat = keys.flatten().long()
            counts = flat.new_zeros(self.num_rows + 1).scatter_add_(0, flat, torch.ones_like(flat))
            rows = (rows / counts[flat].view(*keys.shape, 1)).to(rows.dtype)
        return (rows * self.scale).expand(self.repeats, *rows.shape).reshape(shape)


class _Options(NamedTuple):
    native: bool
    padding_idx: int | None
    by_freq: bool
    start: int | None

    def lookup(self, weight) -> Lookup:
        """The call's. torch.compile wants a symbolic number of rows read where it is used."""
        rows = weight.shape[0]
        padding = normalised_padding("embedding", self.padding_idx, rows, partial=self.start is not None)
        return Lookup(self.native, rows, padding, self.by_freq, self.start, scale=1.0, repeats=1, positions=False)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(weight, indices, options, main_grad):
        return options.lookup(weight).gather(weight, indices)

    @staticmethod
    def setup_context(ctx, inputs, output):
        # main_grad is not saved: the calls of other micro-batches change it in between, as they should.
        weight, indices, options, ctx.main_grad = inputs
        ctx.lookup = options.lookup(weight)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx, grad):
        table = None
        if grad is not None and ctx.needs_input_grad[0]:
            (indices,) = ctx.saved_tensors
            if ctx.main_grad is not None:
                with torch.no_grad():
                    ctx.lookup.scatter_into(ctx.main_grad, grad, indices)
            else:
                table = scatter(grad, indices, ctx.lookup)
        return table, None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(grad, indices, lookup):
        return lookup.scatter(grad, indices)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, indices, ctx.lookup = inputs
        ctx.shape = grad.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx, table):
        if table is None:
            return None, None, None
        (indices,) = ctx.saved_tensors
        return _AdjointOfScatter.apply(table, indices, ctx.lookup, ctx.shape), None, None


class _AdjointOfScatter(torch.autograd.Function):
    @staticmethod
    def forward(table, indices, lookup, shape):
        return lookup.adjoint_of_scatter(table, indices, shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, indices, ctx.lookup, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None, None
        (indices,) = ctx.saved_tensors
        return _Scatter.apply(grad, indices, ctx.lookup), None, None, None


def scatter(grad, indices, lookup):
    """``lookup.scatter``, differentiable where a backward is itself differentiated."""
    if under_transform():
        return lookup._replace(native=False).scatter(grad, indices)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Scatter.apply(grad, indices, lookup)
    return lookup.scatter(grad, indices)


def _check_main_grad(main_grad, weight):
    if not isinstance(main_grad, torch.Tensor):
        raise TypeError(f"embedding: main_grad must be a tensor, got {type(main_grad).__name__}")
    if main_grad.shape != weight.shape or main_grad.device != weight.device:
        raise ValueError(
            f"embedding: main_grad must have the table's shape {list(weight.shape)} on {weight.device}, "
            f"got {list(main_grad.shape)} on {main_grad.device}"
        )
    if main_grad.dtype not in (weight.dtype, torch.float32) or weight.dtype == torch.float64 != main_grad.dtype:
        raise ValueError(
            f"embedding: main_grad must be {weight.dtype} or, beside 16 bits, float32; got {main_grad.dtype}"
        )
    if main_grad.shape[1] > 1 and main_grad.stride(1) != 1:
        raise ValueError(f"embedding: main_grad's columns must be contiguous, got strides {list(main_grad.stride())}")
    if torch.compiler.is_compiling():
        raise ValueError("embedding: main_grad is changed in backward, which torch.compile cannot trace; leave it out")


def _torchs_own(input, weight, *options):
    with named_errors("embedding: indices", input, weight):
        return F.embedding(input, weight, *options)


def _call(
    input,
    weight,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
    *,
    main_grad=None,
    vocab_range=None,
) -> EmbeddingCall:
    check_table("embedding", "weight", weight)
    check_indices("embedding", "input", input, weight)
    num_rows = weight.shape[0]
    normalised_padding("embedding", padding_idx, num_rows, partial=vocab_range is not None)
    if vocab_range is not None:
        start, end = vocab_range
        if start < 0 or end - start != num_rows:
            raise ValueError(f"embedding: vocab_range {(start, end)} does not fit a table of {num_rows} rows")
        if max_norm is not None or sparse:
            raise ValueError("embedding: vocab_range goes with neither max_norm nor sparse")
    if main_grad is not None:
        _check_main_grad(main_grad, weight)
        if sparse:
            raise ValueError("embedding: main_grad does not go with sparse")
    return EmbeddingCall(
        input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, main_grad, vocab_range
    )


def _prefers_torch(call: EmbeddingCall) -> str | None:
    if call.sparse:
        return "PyTorch alone makes sparse gradients"
    if not call.weight.is_floating_point():
        return "an integer table has no gradient, so PyTorch's lookup is all there is to do"
    return None


def embedding(
    input,
    weight,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
    *,
    main_grad=None,
    vocab_range=None,
):
    """``torch.nn.functional.embedding``: row ``input[...]`` of ``weight``.

    Forward copies rows bit for bit. The table's gradient is summed in fp32 (fp64 for fp64), in an order that depends
    on the ids alone: the same bits for any number of threads and on every run, without atomics.

    Args:
        input: ids, int32 or int64, any shape and strides.
        weight: (num_embeddings, embedding_dim), any strides.
        padding_idx: an id whose row gets no gradient; negative ones count from the end.
        max_norm: rows of ``input`` with a larger ``norm_type`` norm are first scaled down to it, in place, as in torch.
        norm_type: see ``max_norm``.
        scale_grad_by_freq: divide each row's gradient by the number of its ids in ``input``.
        sparse: a sparse gradient, by torch's own operators.
        main_grad: (num_embeddings, embedding_dim), in the table's dtype or float32. Backward adds the gradient to it
            and gives ``weight`` none: there is no second buffer of the table's size. ``weight.grad`` will do once it
            exists (micro-batches, weights tied to a head). Not under torch.compile, and not differentiable again.
        vocab_range: (start, end) where ``weight`` holds these ids of a larger vocabulary (vocabulary parallelism). Any
            other id gives a row of zeros and no gradient; ``padding_idx`` is then an id of the whole vocabulary.

    Returns:
        (*input.shape, embedding_dim), in the table's dtype.

    Raises:
        TypeError: an argument is not a tensor, or the ids are neither int32 nor int64.
        ValueError: a shape, device or option does not fit.
        IndexError: an id is negative or not below num_embeddings, on CPU; the message has its position. On CUDA a
            device-side assertion, as in torch.
        BackendError: the backend asked for cannot serve the call.
    """
    call = _call(
        input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
        main_grad=main_grad, vocab_range=vocab_range,
    )  # fmt: skip
    if _prefers_torch(call) is not None:  # whatever backend was asked for
        return _torchs_own(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    backend = pick("embedding", call).backend
    if plain_eager(backend) and main_grad is None:
        return embedding_reference(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, vocab_range=vocab_range
        )
    if max_norm is not None:
        # torch's lookup checks the ids and renormalises the rows; its output is not needed.
        with torch.no_grad():
            _torchs_own(input, weight, None, max_norm, norm_type, False, False)
    options = _Options(
        backend == "native", padding_idx, scale_grad_by_freq, None if vocab_range is None else vocab_range[0]
    )
    return apply(_Embedding, weight, input, options, main_grad)


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding``, with the same arguments and state_dict keys, on :func:`embedding`.

    Args:
        accumulate_grad: keyword-only. Backward adds to ``weight.grad`` itself once that exists, instead of handing
            autograd a second buffer of the table's size to add. It then bypasses hooks on ``weight`` and
            ``torch.autograd.grad``. Outside torch.compile only.
    """

    def __init__(self, *args, accumulate_grad: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.accumulate_grad = accumulate_grad

    def forward(self, input):
        grad = self.weight.grad if self.accumulate_grad and not torch.compiler.is_compiling() else None
        return embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse,
            main_grad=grad,
        )  # fmt: skip


def _examples(device):
    ids = torch.empty(4, device=device, dtype=torch.int64)
    tables = {dtype: torch.empty(2, 8, device=device, dtype=dtype) for dtype in (torch.float32, torch.int64)}
    yield Sample("a dense gradient", (ids, tables[torch.float32]))
    yield Sample("a sparse gradient", (ids, tables[torch.float32]), {"sparse": True})
    yield Sample("an integer table", (ids, tables[torch.int64]))


register(
    Op(
        name="embedding",
        summary="rows of a table by id; the gradient as fp32 sums in a fixed order",
        function=embedding,
        reference=embedding_reference,
        samples=embedding_samples,
        cost=embedding_cost,
        backends=("eager", "native"),
        native_on=("cpu", "cuda"),
        module=Embedding,
        call=_call,
        prefers_torch=_prefers_torch,
        examples=_examples,
    )
)
