"""Dropout of a whole tensor by the rule of :mod:`.philox`: what norms, embeddings and training share."""

from __future__ import annotations

import torch

from ...backends import chosen_backend, device_type_of, is_sharded, operators_alone, why_not
from ...extension import operator
from .autograd import apply
from .philox import dropout_mask, dropout_scale
from .sharded import replicated


def _rows_fake(x, p, seed):
    return x.new_empty(x.shape)


# (x (rows, columns), p, seed) -> x with dropout.
_dropout_rows = operator("dropout_rows", _rows_fake)


def _native(x: torch.Tensor) -> bool:
    """Whether the extension serves ``x``: where it can, unless another backend is asked for."""
    if chosen_backend() not in ("auto", "native") or is_sharded(x):
        return False
    index = None if x.is_cpu else x.device.index
    return why_not("native", device_type_of(x), (x.dtype,), index=index) is None


def dropped(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """What dropout leaves of ``x``, of one dimension at least: its own transpose."""
    if x.numel() and not operators_alone() and _native(x):
        return _dropout_rows(x.reshape(-1, x.shape[-1]), p, seed).view(x.shape)
    return torch.where(replicated(dropout_mask(seed, x.shape, p), x), x * dropout_scale(p), 0.0)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(x, seed, p):
        return dropped(x, seed, p)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, seed, ctx.p = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, grad):
        (seed,) = ctx.saved_tensors
        return dropped_gradient(grad, seed, ctx.p), None, None


def dropout(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """:func:`dropped`, differentiable to any order; nothing of the size of ``x`` is kept for the backward."""
    return dropped(x, seed, p) if operators_alone() else apply(_Dropout, x, seed, p)


def dropped_gradient(grad: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """The gradient of dropout's input from that of its output, within a backward."""
    again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return dropout(grad, seed, p) if again else dropped(grad, seed, p)
