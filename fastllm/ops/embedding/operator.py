"""The extension's operators of embedding, their gradients, and the lookup that embedding_sum shares."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...backends import under_transform
from ...extension import operator
from ..shared.autograd import apply
from .call import normalised_padding
from .eager import gather_eager, scatter_eager


def _fwd_fake(weight, indices, vocab_start):
    return weight.new_empty((*indices.shape, weight.shape[1]))


def _bwd_fake(grad, indices, num_rows, *options):
    return grad.new_empty((num_rows, grad.shape[-1]))


def _bwd_into_fake(*args):
    return None


def _sum_fake(weights, indices, rows, *options):
    return weights[0].new_empty((rows, weights[0].shape[1]))


embedding_fwd = operator("embedding_fwd", _fwd_fake)
embedding_bwd = operator("embedding_bwd", _bwd_fake)
embedding_bwd_into = operator("embedding_bwd_", _bwd_into_fake)
embedding_sum_fwd = operator("embedding_sum_fwd", _sum_fake)


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
    repeats: int  # how many blocks of rows the gradient has; each block has these ids
    positions: bool  # the ids are 0, 1, 2, ...: nothing to sort

    def gather(self, weight, indices):
        if self.native:
            return embedding_fwd(weight, indices, self.start)
        return gather_eager("embedding: input", indices, weight, self.start)

    def scatter(self, grad, indices):
        if self.native:
            return embedding_bwd(
                grad, indices, self.num_rows, self.padding, self.by_freq, self.start, self.scale, self.positions
            )
        keys = self.keys(indices).flatten().repeat(self.repeats)
        return scatter_eager(grad.reshape(keys.numel(), grad.shape[-1]), keys, self.num_rows, self.by_freq, self.scale)

    def scatter_into(self, table, grad, indices):
        """Add what scatter gives to ``table``."""
        if self.native:
            embedding_bwd_into(table, grad, indices, self.padding, self.by_freq, self.start, self.scale, True)
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


class LookupOptions(NamedTuple):
    """What a lookup takes besides tensors."""

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


def differentiable_rows(weight, indices, options: LookupOptions, main_grad) -> torch.Tensor:
    """Rows of ``weight`` by id. The backward adds the gradient to ``main_grad``, or gives it where that is None."""
    return apply(_Embedding, weight, indices, options, main_grad)
