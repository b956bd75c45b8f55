"""Ordinary lookups on a CPU are the extension's, which is known at once. All checks and the choice take 8 us.

8 ids of a table of 1000 x 256 in float32 take PyTorch 2 us on one core of an AMD EPYC, and 27 forward and backward.
What is ordinary has dense ids and tables and no option but ``padding_idx``, and a sum of several neither that nor a
scale nor dropout. :func:`fastllm.backends.pick` decides the same of such a call, and says why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...backends import NATIVE_DTYPES, free_for_native, under_transform
from ..shared.autograd import PLAIN, apply_untransformed, unwrapped
from .operator import Lookup, embedding_bwd, embedding_fwd, embedding_sum_fwd, scatter

_IDS = (torch.int32, torch.int64)


def _gradient(grad, indices, rows: int, padding: int, repeats: int) -> torch.Tensor:
    """The gradient of a table of ``rows``, of ``repeats`` blocks of rows for the ids."""
    if not torch.is_grad_enabled() and not under_transform():
        return embedding_bwd(grad, indices, rows, padding, False, None, 1.0, False)
    lookup = Lookup(True, rows, padding, False, None, scale=1.0, repeats=repeats, positions=False)
    return scatter(grad, indices, lookup)


class _OrdinaryEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, indices, padding):
        ctx.settings = weight.shape[0], padding
        ctx.save_for_backward(indices)
        return embedding_fwd(weight, indices, None)

    @staticmethod
    def backward(ctx, grad):
        (indices,) = ctx.saved_tensors
        rows, padding = ctx.settings
        return _gradient(grad, indices, rows, padding, 1), None, None


class _OrdinarySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count, *tensors):
        tables = len(tensors) // 2
        indices, weights = tensors[:tables], tensors[tables:]
        ctx.rows = [weight.shape[0] for weight in weights]
        ctx.save_for_backward(*indices)
        return embedding_sum_fwd(weights, indices, count, [1.0] * tables, 0.0, None)

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[1 + len(ctx.rows) :]
        found = [
            _gradient(grad, ids, rows, -1, grad.shape[0] // ids.numel()) if need else None
            for ids, rows, need in zip(ctx.saved_tensors, ctx.rows, needs, strict=True)
        ]
        return None, *[None] * len(found), *found


def _free(weight) -> bool:
    """Whether an ordinary call may go to the extension. Asked first: a compiler would keep what is asked of sizes.

    Who looks at operators, to count or to record them, sees those of an ordinary call too, by the other way.
    """
    return type(weight) in PLAIN and free_for_native(weight) and not torch._C._len_torch_dispatch_stack()


def _is_table(weight) -> bool:
    return (
        type(weight) in PLAIN and weight.is_cpu and weight.dim() == 2 and weight.dtype in NATIVE_DTYPES
        and weight.layout is torch.strided and not weight.is_nested
    )  # fmt: skip


def _are_ids(indices) -> bool:
    return (
        type(indices) in PLAIN and indices.is_cpu and indices.dtype in _IDS and indices.layout is torch.strided
        and not indices.is_nested and indices.numel() > 0
    )  # fmt: skip


def ordinary_embedding(indices, weight, padding_idx) -> torch.Tensor | None:
    """The rows of an ordinary call, or None where a call is not that."""
    if not _free(weight) or not _are_ids(indices) or not _is_table(weight):
        return None
    padding = -1
    if padding_idx is not None:
        rows = weight.shape[0]
        if type(padding_idx) is not int or not -rows <= padding_idx < rows:
            return None
        padding = padding_idx % rows
    if weight.requires_grad and torch.is_grad_enabled():
        return apply_untransformed(_OrdinaryEmbedding, weight, indices, padding)
    return embedding_fwd(*unwrapped((weight, indices)), None)


def ordinary_embedding_sum(indices: Sequence, weights: Sequence) -> torch.Tensor | None:
    """The sum of an ordinary call, or None where a call is not that. Ids have one shape, or that of its last
    dimension."""
    if type(indices) not in (tuple, list) or type(weights) not in (tuple, list) or len(indices) != len(weights):
        return None
    if not weights or not _free(weights[0]) or not all(map(_are_ids, indices)) or not all(map(_is_table, weights)):
        return None
    first = weights[0]
    shape, columns, dtype = indices[0].shape, first.shape[1], first.dtype
    for ids, weight in zip(indices, weights, strict=True):
        if weight.shape[1] != columns or weight.dtype is not dtype or not ids.is_contiguous():
            return None
        if ids.shape != shape and not (ids.dim() == 1 and ids.shape == shape[-1:]):
            return None
    count = indices[0].numel()
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        rows = apply_untransformed(_OrdinarySum, count, *indices, *weights)
    else:
        rows = embedding_sum_fwd(unwrapped(weights), unwrapped(indices), count, [1.0] * len(weights), 0.0, None)
    return rows if len(shape) == 1 else rows.view(*shape, columns)
