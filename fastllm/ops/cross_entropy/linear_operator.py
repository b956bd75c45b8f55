"""linear_cross_entropy's registered operators and their gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...registry import define
from ..shared.autograd import gradients, scalable, traced, unwatched, unwrapped, with_elements
from .at_once import AtOnce, at_once
from .call import LinearCrossEntropyCall
from .chunks import LAYER_LOSS_SCHEMA, KeptLogits, LayerLoss, in_chunks
from .linear_gradients import (
    in_their_dtypes,
    layer_gradients,
    number_of_targets,
    scale_all,
    unit_factor,
    without_ignored,
)
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

    @property
    def forward_needs(self) -> tuple[bool, bool, bool]:
        """Which gradients the forward computes."""
        return self.needs if self.with_gradient else _NOTHING


def _outputs(layer: Layer, needs):
    x, w, bias = layer
    return (
        x.new_empty(x.shape if needs[0] else 0),
        w.new_empty(w.shape if needs[1] else 0),
        x.new_empty(w.shape[0] if needs[2] else 0, dtype=x.dtype if bias is None else bias.dtype),
    )


def _fwd_fake(x, w, bias, *args):
    call, how = LayerLoss.of(args)
    layer, node = Layer(x, w, bias), LinearLossNode(call, *how)
    kept = KeptLogits.of(layer, call) if node.keep else None
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape[0] if call.loss.reduction == "none" else (), dtype=node.dtype),
        x.new_empty(x.shape[0], dtype=wide),
        x.new_empty(x.shape[0] if node.accuracy else 0, dtype=wide),
        x.new_empty(x.shape[0] if node.entropy else 0, dtype=wide),
        x.new_empty((), dtype=wide),
        x.new_empty(0) if kept is None else kept.logits,
        *_outputs(layer, node.forward_needs),
    )


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
    total = number_of_targets(call, x.dtype) if total is None else total
    extras = with_elements((accuracy, entropy, logits), (lse.new_empty(0), lse.new_empty(0), x.new_empty(0)))
    return loss, lse, *extras[:2], total, extras[2], *with_elements(grads, _outputs(layer, _NOTHING))


def _forward(layer: Layer, node: LinearLossNode):
    """What :class:`LinearCrossEntropy` returns, None for what was not asked for."""
    call = node.call
    mean = None if call.loss.reduction == "none" else node.dtype
    wanted = AtOnce.of(call, node.forward_needs[:2], mean, Extras(node.accuracy, node.entropy), keep=node.keep)
    found = at_once(layer, call, wanted)
    if found is None:
        return _forward_in_chunks(layer, node)
    return found.loss.to(node.dtype), found.lse, found.accuracy, found.entropy, None, *found[4:], None


def _forward_in_chunks(layer: Layer, node: LinearLossNode):
    call, needs = node.call, node.forward_needs
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
    if total is None:
        total = denominator(x.new_empty(0, dtype=wide), call.target, call.weight, call.token_weight, call.loss)
    upstream = LossGradients(unit_factor(call, total, wide) if node.with_gradient else None)
    kept = KeptLogits.of(layer, call) if node.keep else None
    wanted = Extras(node.accuracy, node.entropy)
    losses, lse, accuracy, entropy, *grads = in_chunks(layer, call, upstream, needs, wanted, kept)
    if call.token_weight is not None:
        losses = losses * call.token_weight
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / total
    logits = None if kept is None else kept.logits
    return loss.to(node.dtype), lse, accuracy, entropy, total, logits, *in_their_dtypes(grads, layer, needs)


def _of_every_row(call: LayerLoss, dtype) -> tuple[LayerLoss, torch.Tensor | None]:
    """``call``, which need not look for ignored rows as there are none, and its denominator where that is a count."""
    if call.chunking.max_targets is None:
        call = call._replace(chunking=call.chunking._replace(skip_ignored=False))
    weighed = call.loss.reduction == "mean" and (call.weight is not None or call.token_weight is not None)
    return call, None if weighed else number_of_targets(call, dtype)


@define(
    "linear_cross_entropy_scale_(Tensor(a!) dx, Tensor(b!) dw, Tensor(c!) db, Tensor dloss, str backend) -> ()",
    lambda *args: None,
)
def _linear_cross_entropy_scale_(dx, dw, db, dloss, backend):
    scale_all((dx, dw, db), dloss, backend)


def _bwd_fake(*args):
    _, _, _, _, x, w, bias, *how = args
    _, (needs,) = LayerLoss.of(tuple(how))
    return _outputs(Layer(x, w, bias), needs)


@define(
    "linear_cross_entropy_bwd(Tensor? dloss, Tensor? dlse, Tensor? dentropy, Tensor total, Tensor x, Tensor w,"
    f" Tensor? bias, {LAYER_LOSS_SCHEMA}, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
def _linear_cross_entropy_bwd(*args):
    dloss, dlse, dentropy, total, x, w, bias, *how = args
    call, (needs,) = LayerLoss.of(tuple(how))
    layer = Layer(x, w, bias)
    grads = layer_gradients(LossGradients(dloss, dlse, dentropy), total, layer, call, needs)
    return with_elements(grads, _outputs(layer, _NOTHING))


def _scaled(grads, layer: Layer, call: LayerLoss, needs, dloss):
    """The forward's gradients times ``dloss``, in place."""
    grads = [grad.data if need else None for grad, need in zip(grads, needs, strict=True)]
    factor = without_ignored(dloss, call)
    if unwatched(factor, *grads):
        scale_all(grads, factor, call.backend)
    else:
        _linear_cross_entropy_scale_(*with_elements(grads, _outputs(layer, _NOTHING)), factor, call.backend)
    return grads


def _of_any_order(upstream: LossGradients, total, layer: Layer, call: LayerLoss, needs, dtype):
    """The layer's gradients, themselves differentiable. ``dtype``: the loss's."""

    def launch(inputs, outputs_grad, extras, needs):
        (total,) = extras
        total = number_of_targets(call, inputs[0].dtype) if total is None else total
        return _linear_cross_entropy_bwd(*outputs_grad, total, *inputs, *call.flat(), needs)

    def formula(x, w, bias):
        target, weight, token_weight = unwrapped((call.target, call.weight, call.token_weight))
        loss, lse, _, entropy = linear_definition(
            LinearCrossEntropyCall(
                input=x, linear_weight=w, target=target, linear_bias=bias, weight=weight, token_weight=token_weight,
                loss=call.loss, shift=0, chunking=call.chunking, recompute=True,
                return_lse=True, return_accuracy=False, return_entropy=True,
            )
        )  # fmt: skip
        return loss.to(dtype), lse, entropy

    return gradients(launch, formula, layer, needs, upstream, (total,))


class Saved(NamedTuple):
    """What the forward leaves to the backward; the last five are None or have no elements where it leaves none."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    class_weight: torch.Tensor | None
    token_weight: torch.Tensor | None
    total: torch.Tensor | None
    logits: torch.Tensor | None
    dx: torch.Tensor | None
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None


class LinearCrossEntropy(torch.autograd.Function):
    """(loss, lse, accuracy, entropy, denominator, logits and three gradients for the backward) of a layer's outputs.

    What was not asked for is None or has no elements.
    """

    @staticmethod
    def forward(x, w, bias, node: LinearLossNode):
        call, *how = node
        if unwatched(x, w, bias, *call[:3]):
            return _forward(Layer(x, w, bias), node)
        return _linear_cross_entropy_fwd(x, w, bias, *call.flat(), *how)

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
        ctx.has_entropy, ctx.dtype = node.entropy, node.dtype
        ctx.call = call.without_tensors()
        ctx.save_for_backward(*Saved(x, w, bias, call.target, call.weight, call.token_weight, *rest))

    @staticmethod
    def backward(ctx, dloss, dlse, _daccuracy, dentropy, *_):
        # Compiled code makes gradients of outputs that have none.
        upstream = LossGradients(dloss, dlse, dentropy if ctx.has_entropy else None)
        if all(grad is None for grad in upstream):
            return None, None, None, None
        saved = Saved(*ctx.saved_tensors)
        layer, needs = Layer(saved.x, saved.weight, saved.bias), ctx.needs_input_grad[:3]
        call = ctx.call._replace(target=saved.target, weight=saved.class_weight, token_weight=saved.token_weight)
        # Nobody else has seen what the forward left, so it is overwritten. A second backward computes it again.
        if (ctx.has_logits or ctx.has_gradient) and not torch.is_grad_enabled() and scalable(*upstream):
            if saved.logits is not None and ctx.has_logits and not traced(saved.logits):
                ctx.has_logits = False
                kept = KeptLogits(saved.logits.data)
                return *layer_gradients(upstream, saved.total, layer, call, needs, kept), None
            if ctx.has_gradient and dloss is not None and upstream.lse is upstream.entropy is None:
                ctx.has_gradient = False
                ready = saved.dx, saved.dweight, saved.dbias
                return *_scaled(ready, layer, call, needs, dloss), None
        return *_of_any_order(upstream, saved.total, layer, call, needs, ctx.dtype), None
