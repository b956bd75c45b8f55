"""The gradients of linear_cross_entropy's layer, for those of its outputs."""

from __future__ import annotations

import torch

from .at_once import AtOnce, at_once
from .chunks import KeptLogits, LayerLoss, in_chunks
from .operator import LossGradients
from .products import Layer
from .rows import Extras


def in_their_dtypes(grads, layer: Layer, needs) -> tuple[torch.Tensor | None, ...]:
    """``grads`` in the dtypes of the layer's tensors; None for one that is not needed."""
    x, w, bias = layer
    dtypes = x.dtype, w.dtype, x.dtype if bias is None else bias.dtype
    return tuple(g.to(dtype) if need else None for g, dtype, need in zip(grads, dtypes, needs, strict=True))


def number_of_targets(call: LayerLoss, dtype) -> torch.Tensor:
    """What a mean divides by where each row that is not ignored counts as one, 1 for the other reductions; in at least
    fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    if call.loss.reduction != "mean":
        return torch.ones((), dtype=wide)
    return (call.target != call.loss.ignore_index).sum(dtype=wide)


def unit_factor(call: LayerLoss, total: torch.Tensor, dtype) -> torch.Tensor:
    """The derivative of the whole loss by each row's, (N,)."""
    share = total.reciprocal().to(dtype)
    if call.token_weight is not None:
        return call.token_weight * share
    if share.is_cpu:
        return torch.full(call.target.shape, share.item(), dtype=dtype)  # a third of what the next line takes
    return share.expand(len(call.target)).contiguous()


def scales_rows(needs) -> bool:
    """Whether the gradients of row losses, for upstream gradients of 1, need only be multiplied row by row.

    This holds where the input alone gets a gradient: the weight's is a sum over the rows.
    """
    return tuple(needs) == (True, False, False)


def _scale(grad, factor, backend: str) -> None:
    """``grad`` times a scalar in place, or times a factor a row (N,)."""
    if grad is None or grad.numel() == 0:
        return
    if factor.dim():
        grad.mul_(factor.unsqueeze(1))
        return
    if backend == "triton":
        from ...kernels.cross_entropy.backward import scale_gradient

        scale_gradient(grad, factor)
    else:
        grad.mul_(factor)


def scale_all(grads, factor, backend: str) -> None:
    """Gradients times a scalar in place, or times a factor a row (N,); those that are None or empty stay."""
    if factor.is_cuda or factor.dim() or factor.item() != 1:  # a tensor takes 5 us to compare
        for grad in grads:
            _scale(grad, factor, backend)


def without_ignored(dloss, call: LayerLoss):
    """The upstream gradient. For row losses it is 0 at ignored targets, so that a NaN there has no effect."""
    return dloss if call.loss.reduction != "none" else torch.where(call.target == call.loss.ignore_index, 0, dloss)


def layer_gradients(
    upstream: LossGradients, total: torch.Tensor | None, layer: Layer, call: LayerLoss, needs,
    kept: KeptLogits | None = None,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """Gradients in the layer's dtypes, None where not needed.

    ``total``: the denominator, or None where every row that is not ignored counted as one. ``kept``: the logits that
    the forward left; the gradient is written over them.
    """
    x, (dloss, *others) = layer.x, upstream
    wide = torch.promote_types(x.dtype, torch.float32)
    # As the forward's own gradients: for a loss of 1, rounded, then scaled. So both lanes agree bit for bit. In fp16
    # the upstream gradient, a loss scale, comes first.
    alone = all(grad is None for grad in others)
    scale_last = alone and (call.loss.reduction != "none" or scales_rows(needs)) and x.dtype != torch.float16
    others = [None if grad is None else grad.to(wide).contiguous() for grad in others]
    given = None if scale_last or dloss is None else dloss.to(wide).contiguous()
    found = None
    if scale_last or (given is not None and given.dim()):
        rows = LossGradients(given, *others)
        wanted = AtOnce.of(call, needs[:2])
        found = at_once(layer, call, wanted, rows, None if kept is None else kept.logits)
    if found is not None:
        grads = found.dx, found.dw, None
    else:
        total = number_of_targets(call, x.dtype) if total is None else total
        factor = unit_factor(call, total, wide)
        if not scale_last:
            factor = factor * given if given is not None else torch.zeros_like(factor)
        rows, wanted = LossGradients(factor, *others), Extras(entropy=upstream.entropy is not None)
        *_, dx, dw, db = in_chunks(layer, call, rows, needs, wanted, kept)
        grads = in_their_dtypes((dx, dw, db), layer, needs)
    if scale_last:
        scale_all(grads, without_ignored(dloss, call), call.backend)
    return grads
