"""linear_cross_entropy's registered operators and their gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...registry import define
from ..shared.autograd import gradients, scalable, traced
from .call import LinearCrossEntropyCall
from .chunks import LAYER_LOSS_SCHEMA, KeptLogits, LayerLoss, in_chunks
from .linear_reference import denominator, linear_definition
from .loss import every_counts, row_out_of_range
from .operator import LossGradients
from .products import Layer
from .rows import Extras

_NOTHING = (False, False, False)


class LinearLossNode(NamedTuple):
    """What the gradient's node is given beside the layer. ``needs``: which of the layer's gradients are wanted.

    ``keep``: leave the logits for the backward, where :class:`.chunks.KeptLogits` can.
    """

    call: LayerLoss
    dtype: torch.dtype
    with_gradient: bool
    needs: tuple[bool, bool, bool]
    accuracy: bool
    entropy: bool
    keep: bool


def _outputs(layer: Layer, needs):
    x, w, bias = layer
    return (
        x.new_empty(x.shape if needs[0] else 0),
        w.new_empty(w.shape if needs[1] else 0),
        x.new_empty(w.shape[0] if needs[2] else 0, dtype=x.dtype if bias is None else bias.dtype),
    )


def _fwd_fake(x, w, bias, *args):
    call, (dtype, with_gradient, needs, *wanted, keep) = LayerLoss.of(args)
    kept = KeptLogits.of(Layer(x, w, bias), call) if keep else None
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape[0] if call.loss.reduction == "none" else (), dtype=dtype),
        x.new_empty(x.shape[0], dtype=wide),
        *(x.new_empty(x.shape[0] if want else 0, dtype=wide) for want in wanted),
        x.new_empty((), dtype=wide),
        x.new_empty(0) if kept is None else kept.logits,
        *_outputs(Layer(x, w, bias), needs if with_gradient else _NOTHING),
    )


def _given(grads, layer: Layer, needs):
    """Gradients in their tensors' dtypes; an empty tensor for one that is not needed."""
    if not any(needs):
        return _outputs(layer, _NOTHING)
    x, w, bias = layer
    dtypes = x.dtype, w.dtype, x.dtype if bias is None else bias.dtype
    return tuple(
        g.to(dtype) if need else x.new_empty(0, dtype=dtype)
        for g, dtype, need in zip(grads, dtypes, needs, strict=True)
    )


def _of_every_row(call: LayerLoss, dtype) -> tuple[LayerLoss, torch.Tensor | None]:
    """``call``, which need not look for ignored rows as there are none, and its denominator where that is a count."""
    if call.chunking.max_targets is None:
        call = call._replace(chunking=call.chunking._replace(skip_ignored=False))
    weighed = call.loss.reduction == "mean" and (call.weight is not None or call.token_weight is not None)
    count = len(call.target) if call.loss.reduction == "mean" else 1
    return call, None if weighed else torch.full((), count, dtype=dtype)


def _unit_factor(call: LayerLoss, total, dtype):
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
    if grad.numel() == 0:
        return
    if factor.dim():
        grad.mul_(factor.unsqueeze(1))
        return
    if backend == "triton":
        from ...kernels.cross_entropy.backward import scale_gradient

        scale_gradient(grad, factor)
    else:
        grad.mul_(factor)


def _scale_all(grads, factor, backend: str) -> None:
    """:func:`_scale`, where the factor is not 1 or only the device knows it."""
    if factor.is_cuda or factor.dim() or factor.item() != 1:  # a tensor takes 5 us to compare
        for grad in grads:
            _scale(grad, factor, backend)


def _of_kept(dloss, call: LayerLoss):
    """The upstream gradient. For row losses it is 0 at ignored targets, so that a NaN there has no effect."""
    return dloss if call.loss.reduction != "none" else torch.where(call.target == call.loss.ignore_index, 0, dloss)


@define(
    "linear_cross_entropy_scale_(Tensor(a!) dx, Tensor(b!) dw, Tensor(c!) db, Tensor dloss, str backend) -> ()",
    lambda *args: None,
)
def _linear_cross_entropy_scale_(dx, dw, db, dloss, backend):
    _scale_all((dx, dw, db), dloss, backend)


@define(
    f"linear_cross_entropy_fwd(Tensor x, Tensor w, Tensor? bias, {LAYER_LOSS_SCHEMA}, ScalarType dtype,"
    " bool with_gradient, bool[3] needs, bool accuracy, bool entropy, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
def _linear_cross_entropy_fwd(x, w, bias, *args):
    call, (dtype, with_gradient, needs, *wanted, keep) = LayerLoss.of(args)
    layer, reduction = Layer(x, w, bias), call.loss.reduction
    wide = torch.promote_types(x.dtype, torch.float32)
    total = None
    if x.is_cpu:
        if every_counts(call.target, call.loss.ignore_index, w.shape[0]):
            call, total = _of_every_row(call, wide)
        else:
            error = row_out_of_range(call.target, call.loss.ignore_index, w.shape[0], call.op)
            if error is not None:
                raise error
    needs = needs if with_gradient else _NOTHING
    if total is None:
        total = denominator(x.new_empty(0, dtype=wide), call.target, call.weight, call.token_weight, call.loss)
    upstream = LossGradients(_unit_factor(call, total, wide) if with_gradient else None)
    kept = KeptLogits.of(layer, call) if keep else None
    losses, lse, accuracy, entropy, *grads = in_chunks(layer, call, upstream, needs, Extras(*wanted), kept)
    extras = [lse.new_empty(0) if t is None else t for t in (accuracy, entropy)]
    if call.token_weight is not None:
        losses = losses * call.token_weight
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / total
    logits = x.new_empty(0) if kept is None else kept.logits
    return loss.to(dtype), lse, *extras, total, logits, *_given(grads, layer, needs)


def _bwd_fake(dloss, dlse, dentropy, total, *args):
    return _outputs(Layer(*args[:3]), args[-1])


@define(
    "linear_cross_entropy_bwd(Tensor? dloss, Tensor? dlse, Tensor? dentropy, Tensor total, Tensor x, Tensor w,"
    f" Tensor? bias, {LAYER_LOSS_SCHEMA}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
def _linear_cross_entropy_bwd(*args):
    call, (needs,) = LayerLoss.of(args[7:])
    return _layer_gradients(args[:3], args[3], Layer(*args[4:7]), call, needs)


def _layer_gradients(outputs_grad, total, layer: Layer, call: LayerLoss, needs, kept: KeptLogits | None = None):
    """Gradients in the layer's dtypes, empty where not needed. ``outputs_grad``: those of loss, lse and entropy."""
    (dloss, dlse, dentropy), x = outputs_grad, layer.x
    wide = torch.promote_types(x.dtype, torch.float32)
    # As the forward's own gradients: for a loss of 1, rounded, then scaled. So both lanes agree bit for bit. In fp16
    # the upstream gradient, a loss scale, comes first.
    alone = dlse is None and dentropy is None
    scale_last = alone and (call.loss.reduction != "none" or scales_rows(needs)) and x.dtype != torch.float16
    factor = _unit_factor(call, total, wide)
    if not scale_last:
        factor = factor * dloss.to(wide) if dloss is not None else torch.zeros_like(factor)
    upstream = LossGradients(factor, *(None if t is None else t.to(wide).contiguous() for t in (dlse, dentropy)))
    *_, dx, dw, db = in_chunks(layer, call, upstream, needs, Extras(entropy=dentropy is not None), kept)
    grads = _given((dx, dw, db), layer, needs)
    if scale_last:
        _scale_all(grads, _of_kept(dloss, call), call.backend)
    return grads


class LinearCrossEntropy(torch.autograd.Function):
    """(loss, lse, accuracy, entropy, denominator, logits and three gradients for the backward) of a layer's outputs."""

    @staticmethod
    def forward(x, w, bias, node: LinearLossNode):
        call, *how = node
        return _linear_cross_entropy_fwd(x, w, bias, *call.flat(), *how)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, bias, node = inputs
        _, _, accuracy, entropy, *rest = output
        call = node.call
        ctx.mark_non_differentiable(accuracy, *(() if node.entropy else (entropy,)), *rest)
        ctx.set_materialize_grads(False)
        ctx.has_gradient, ctx.has_logits = node.with_gradient, rest[1].numel() > 0
        ctx.has_entropy, ctx.dtype = node.entropy, node.dtype
        ctx.call = call._replace(target=None, weight=None, token_weight=None)
        ctx.save_for_backward(x, w, bias, call.target, call.weight, call.token_weight, *rest)

    @staticmethod
    def backward(ctx, dloss, dlse, _daccuracy, dentropy, *_):
        # Compiled code makes gradients of outputs that have none.
        dentropy = dentropy if ctx.has_entropy else None
        if dloss is None and dlse is None and dentropy is None:
            return None, None, None, None
        x, w, bias, y, weight, token_weight, total, logits, *ready = ctx.saved_tensors
        call = ctx.call._replace(target=y, weight=weight, token_weight=token_weight)
        needs = ctx.needs_input_grad[:3]
        if ctx.has_gradient and dlse is dentropy is None and not torch.is_grad_enabled() and scalable(dloss):
            # Handed out once, scaled in place, as in cross_entropy; a second backward computes them again.
            ctx.has_gradient = False
            grads = [grad.data for grad in ready]
            _linear_cross_entropy_scale_(*grads, _of_kept(dloss, call), call.backend)
            return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None
        outputs_grad = dloss, dlse, dentropy
        if ctx.has_logits and not torch.is_grad_enabled() and scalable(*outputs_grad) and not traced(logits):
            # Overwritten with their gradient; a second backward computes them again.
            ctx.has_logits = False
            grads = _layer_gradients(outputs_grad, total, Layer(x, w, bias), call, needs, KeptLogits(logits.data))
            return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None

        def launch(inputs, outputs_grad, extras, needs):
            return _linear_cross_entropy_bwd(*outputs_grad, *extras, *inputs, *call.flat(), needs)

        def formula(x, w, bias):
            loss, lse, _, entropy = linear_definition(
                LinearCrossEntropyCall(
                    x, w, y, bias, weight, token_weight, call.loss, 0, call.chunking, True, True, False, True
                )
            )
            return loss.to(ctx.dtype), lse, entropy

        return *gradients(launch, formula, (x, w, bias), needs, outputs_grad, (total,)), None
