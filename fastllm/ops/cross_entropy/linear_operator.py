"""linear_cross_entropy's registered operators and their gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...registry import define
from ..shared.autograd import gradients, scalable, traced, unwatched
from .at_once import AtOnce, at_once
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

    ``keep``: leave the logits for the backward, where :class:`.chunks.KeptLogits` can. ``turned``: the loss is to come
    with its sign turned, as a log-probability.
    """

    call: LayerLoss
    dtype: torch.dtype
    with_gradient: bool
    needs: tuple[bool, bool, bool]
    accuracy: bool
    entropy: bool
    keep: bool
    turned: bool = False


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
    """Gradients in their tensors' dtypes; None for one that is not needed."""
    x, w, bias = layer
    dtypes = x.dtype, w.dtype, x.dtype if bias is None else bias.dtype
    return tuple(g.to(dtype) if need else None for g, dtype, need in zip(grads, dtypes, needs, strict=True))


def _with_elements(tensors, blank):
    """``tensors`` with one of ``blank``, which have no elements, for each None: an operator returns tensors alone."""
    return tuple(b if t is None else t for t, b in zip(tensors, blank, strict=True))


def _of_every_row(call: LayerLoss, dtype) -> tuple[LayerLoss, torch.Tensor | None]:
    """``call``, which need not look for ignored rows as there are none, and its denominator where that is a count."""
    if call.chunking.max_targets is None:
        call = call._replace(chunking=call.chunking._replace(skip_ignored=False))
    weighed = call.loss.reduction == "mean" and (call.weight is not None or call.token_weight is not None)
    return call, None if weighed else _total(call, dtype)


def _divisor(call: LayerLoss) -> int:
    """:class:`.at_once.AtOnce`'s ``total``: 0 for a mean, which divides by the targets that count, else 1."""
    return 0 if call.loss.reduction == "mean" else 1


def _total(call: LayerLoss, dtype) -> torch.Tensor:
    """What a mean divides by where each row that is not ignored counts as one, 1 for the other reductions; in at least
    fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    if call.loss.reduction != "mean":
        return torch.ones((), dtype=wide)
    return (call.target != call.loss.ignore_index).sum(dtype=wide)


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
    call, how = LayerLoss.of(args)
    layer = Layer(x, w, bias)
    loss, lse, accuracy, entropy, total, logits, *grads = _forward(layer, LinearLossNode(call, *how))
    total = _total(call, x.dtype) if total is None else total
    extras = _with_elements((accuracy, entropy, logits), (lse.new_empty(0), lse.new_empty(0), x.new_empty(0)))
    return loss, lse, *extras[:2], total, extras[2], *_with_elements(grads, _outputs(layer, _NOTHING))


def _forward(layer: Layer, node: LinearLossNode):
    """What :class:`LinearCrossEntropy` returns, None for what was not asked for."""
    call, dtype, with_gradient, needs, accuracy, entropy, keep, turned = node
    mean = None if call.loss.reduction == "none" else dtype
    needs = needs[:2] if with_gradient else _NOTHING[:2]
    # The gradients that are left for the backward are the loss's own.
    there = turned and not with_gradient
    total = -1 if there else _divisor(call)
    found = at_once(layer, call, AtOnce(total, mean, keep, Extras(accuracy, entropy), needs))
    if found is None:
        loss, lse, *rest = _forward_in_chunks(layer, node)
    else:
        loss, lse, *rest = found.loss.to(dtype), found.lse, *found[2:4], None, *found[4:], None
    return _turned(loss) if turned and not (there and found) else loss, lse, *rest


def _turned(loss):
    return 0.0 - loss  # an ignored target's is 0, not -0


def _forward_in_chunks(layer: Layer, node: LinearLossNode):
    call, dtype, with_gradient, needs, *wanted, keep, _ = node
    (x, w, _), reduction = layer, call.loss.reduction
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
    if call.token_weight is not None:
        losses = losses * call.token_weight
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / total
    logits = None if kept is None else kept.logits
    return loss.to(dtype), lse, accuracy, entropy, total, logits, *_given(grads, layer, needs)


def _bwd_fake(dloss, dlse, dentropy, total, *args):
    return _outputs(Layer(*args[:3]), args[-1])


@define(
    "linear_cross_entropy_bwd(Tensor? dloss, Tensor? dlse, Tensor? dentropy, Tensor total, Tensor x, Tensor w,"
    f" Tensor? bias, {LAYER_LOSS_SCHEMA}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
def _linear_cross_entropy_bwd(*args):
    call, (needs,) = LayerLoss.of(args[7:])
    layer = Layer(*args[4:7])
    return _with_elements(_layer_gradients(args[:3], args[3], layer, call, needs), _outputs(layer, _NOTHING))


def _layer_gradients(
    outputs_grad, total, layer: Layer, call: LayerLoss, needs, kept: KeptLogits | None = None, *, turned: bool = False
):
    """Gradients in the layer's dtypes, None where not needed. ``outputs_grad``: those of loss, lse and entropy.

    ``total``: the denominator, or None where every row that is not ignored counted as one. ``turned``: the first of
    ``outputs_grad`` is the one of the loss with its sign turned.
    """
    (dloss, dlse, dentropy), x = outputs_grad, layer.x
    wide = torch.promote_types(x.dtype, torch.float32)
    # As the forward's own gradients: for a loss of 1, rounded, then scaled. So both lanes agree bit for bit. In fp16
    # the upstream gradient, a loss scale, comes first.
    alone = dlse is None and dentropy is None
    scale_last = alone and (call.loss.reduction != "none" or scales_rows(needs)) and x.dtype != torch.float16
    others = [None if t is None else t.to(wide).contiguous() for t in (dlse, dentropy)]
    found = None
    if scale_last or (dloss is not None and dloss.dim()):
        rows = LossGradients(None if scale_last else dloss.to(wide).contiguous(), *others)
        count = -1 if turned and not scale_last else _divisor(call)
        wanted = AtOnce(total=count, mean=None, keep=False, extras=Extras(), needs=needs[:2])
        found = at_once(layer, call, wanted, rows, None if kept is None else kept.logits)
    if turned and dloss is not None and (scale_last or found is None):
        dloss = -dloss
    if found is not None:
        grads = found.dx, found.dw, None
    else:
        total = _total(call, x.dtype) if total is None else total
        factor = _unit_factor(call, total, wide)
        if not scale_last:
            factor = factor * dloss.to(wide) if dloss is not None else torch.zeros_like(factor)
        upstream = LossGradients(factor, *others)
        *_, dx, dw, db = in_chunks(layer, call, upstream, needs, Extras(entropy=dentropy is not None), kept)
        grads = _given((dx, dw, db), layer, needs)
    if scale_last:
        _scale_all(grads, _of_kept(dloss, call), call.backend)
    return grads


class LinearCrossEntropy(torch.autograd.Function):
    """(loss, lse, accuracy, entropy, denominator, logits and three gradients for the backward) of a layer's outputs.

    What was not asked for is None or has no elements.
    """

    @staticmethod
    def forward(x, w, bias, node: LinearLossNode):
        call, *how, turned = node
        if unwatched(x, w, bias, *call[:3]):
            return _forward(Layer(x, w, bias), node)
        loss, *rest = _linear_cross_entropy_fwd(x, w, bias, *call.flat(), *how)
        return _turned(loss) if turned else loss, *rest

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, bias, node = inputs
        _, _, accuracy, entropy, *rest = output
        call = node.call
        constants = accuracy, None if node.entropy else entropy, *rest
        ctx.mark_non_differentiable(*(t for t in constants if t is not None))
        ctx.set_materialize_grads(False)
        logits = rest[1]
        ctx.has_gradient, ctx.has_logits = node.with_gradient, logits is not None and logits.numel() > 0
        ctx.has_entropy, ctx.dtype, ctx.turned = node.entropy, node.dtype, node.turned
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
        outputs_grad = dloss, dlse, dentropy
        if ctx.has_logits and not torch.is_grad_enabled() and scalable(*outputs_grad) and not traced(logits):
            # Overwritten with their gradient; a second backward computes them again.
            ctx.has_logits = False
            kept = KeptLogits(logits.data)
            grads = _layer_gradients(outputs_grad, total, Layer(x, w, bias), call, needs, kept, turned=ctx.turned)
            return *grads, None
        if ctx.turned and dloss is not None:
            dloss = -dloss
        if ctx.has_gradient and dlse is dentropy is None and not torch.is_grad_enabled() and scalable(dloss):
            # Handed out once, scaled in place, as in cross_entropy; a second backward computes them again.
            ctx.has_gradient = False
            grads = [grad.data if need else None for grad, need in zip(ready, needs, strict=True)]
            factor = _of_kept(dloss, call)
            if unwatched(factor, *grads):
                _scale_all(grads, factor, call.backend)
            else:
                _linear_cross_entropy_scale_(
                    *_with_elements(grads, _outputs(Layer(x, w, bias), _NOTHING)), factor, call.backend
                )
            return *grads, None
        outputs_grad = dloss, dlse, dentropy

        def launch(inputs, outputs_grad, extras, needs):
            (total,) = extras
            total = _total(call, inputs[0].dtype) if total is None else total
            return _linear_cross_entropy_bwd(*outputs_grad, total, *inputs, *call.flat(), needs)

        def formula(x, w, bias):
            loss, lse, _, entropy = linear_definition(
                LinearCrossEntropyCall(
                    x, w, y, bias, weight, token_weight, call.loss, shift=0, chunking=call.chunking, recompute=True,
                    return_lse=True, return_accuracy=False, return_entropy=True,
                )
            )  # fmt: skip
            return loss.to(ctx.dtype), lse, entropy

        return *gradients(launch, formula, (x, w, bias), needs, outputs_grad, (total,)), None
