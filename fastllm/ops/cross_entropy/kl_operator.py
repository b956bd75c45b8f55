"""linear_kl_div's registered operators and their gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...registry import define
from ..shared.autograd import gradients, scalable
from .kl_call import KL_SCHEMA, Divergence, LinearKLDivCall
from .kl_chunks import kl_in_chunks
from .kl_rows import count_of, kept_positions, linear_kl_div_definition

_NOTHING = (False,) * 6
_SIX = ", ".join(["Tensor"] * 6)


class KLNode(NamedTuple):
    """What the gradient's node is given beside the two layers. ``needs``: which of the six gradients are wanted."""

    indices: torch.Tensor | None
    target: torch.Tensor | None
    divergence: Divergence
    backend: str
    with_gradient: bool
    needs: tuple[bool, ...]


def _blank(call: LinearKLDivCall, needs):
    """Tensors for the six gradients, without elements where one is not needed."""
    x = call.input
    layers = zip(call.layers(), needs, strict=True)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape if need else 0) for t, need in layers)


def _given(grads, call: LinearKLDivCall):
    """Gradients in their tensors' dtypes; an empty tensor for one that is not there."""
    blank = _blank(call, _NOTHING)
    return tuple(b if g is None else g.to(b.dtype) for g, b in zip(grads, blank, strict=True))


def _fwd_fake(*args):
    call, (_, with_gradient, needs) = LinearKLDivCall.of(args)
    x, wide = call.input, call.wide
    loss = x.new_empty(x.shape[0] if call.divergence.reduction == "none" else (), dtype=wide)
    return loss, x.new_empty((), dtype=wide), *_blank(call, needs if with_gradient else _NOTHING)


def _factor(call: LinearKLDivCall, total):
    """The derivative of the whole loss by each row's, (N,)."""
    kept = kept_positions(call)
    share = (1 / total).expand(call.n_rows)
    return share.contiguous() if kept is None else torch.where(kept, share, 0.0)


def _check_values(call: LinearKLDivCall, total) -> None:
    """On a CPU, where they can be read: that something counts, and that probabilities are some of the classes.

    Raises:
        ValueError: a mean of nothing, or a probability below 0 or not finite.
        IndexError: a class of ``teacher_indices`` is not in the vocabulary.
    """
    if call.divergence.reduction == "mean" and not total > 0:
        raise ValueError("linear_kl_div: no position counts: there is none, or target is ignore_index everywhere")
    if call.teacher_indices is None or call.teacher_indices.numel() == 0:
        return
    least, most = call.teacher_indices.aminmax()
    if not (least >= 0 and most < len(call.linear_weight)):
        raise IndexError(
            f"linear_kl_div: teacher_indices must be classes in [0, {len(call.linear_weight)}), got from "
            f"{least.item()} to {most.item()}"
        )
    least, most = call.teacher_input.aminmax()
    if not (least >= 0 and most < torch.inf):
        raise ValueError(
            f"linear_kl_div: teacher_input must hold probabilities where there are teacher_indices, got values from "
            f"{least.item()} to {most.item()}"
        )


@define(
    f"linear_kl_div_fwd({KL_SCHEMA}, str backend, bool with_gradient, bool[6] needs) -> (Tensor, Tensor, {_SIX})",
    _fwd_fake,
)
def linear_kl_div_fwd(*args):
    """(loss, number of positions that count, six gradients, empty where not needed)."""
    call, (backend, with_gradient, needs) = LinearKLDivCall.of(args)
    total = count_of(call)
    if total.device.type == "cpu":
        _check_values(call, total)
    losses, *grads = kl_in_chunks(call, _factor(call, total) if with_gradient else None, needs, backend)
    loss = losses if call.divergence.reduction == "none" else losses.sum() / total
    return loss, total, *_given(grads, call)


def _bwd_fake(dloss, total, *args):
    call, (_, needs) = LinearKLDivCall.of(args)
    return _blank(call, needs)


def _scale(grads, factor) -> None:
    """``grads`` times a scalar, in place, where that is not 1."""
    if factor.is_cuda or factor.item() != 1:
        for grad in grads:
            if grad.numel():
                grad.mul_(factor)


@define(
    "linear_kl_div_scale_(Tensor(a!) a, Tensor(b!) b, Tensor(c!) c, Tensor(d!) d, Tensor(e!) e, Tensor(f!) f,"
    " Tensor dloss) -> ()",
    lambda *args: None,
)
def _linear_kl_div_scale_(*args):
    *grads, dloss = args
    _scale(grads, dloss)


@define(
    f"linear_kl_div_bwd(Tensor dloss, Tensor total, {KL_SCHEMA}, str backend, bool[6] needs) -> ({_SIX})", _bwd_fake
)
def _linear_kl_div_bwd(dloss, total, *args):
    call, (backend, needs) = LinearKLDivCall.of(args)
    # As the forward's own gradients: for a loss of 1, rounded, then scaled. So both lanes agree bit for bit. In fp16
    # the upstream gradient, a loss scale, comes first.
    scale_last = call.divergence.reduction != "none" and call.input.dtype != torch.float16
    factor = _factor(call, total)
    _, *grads = kl_in_chunks(call, factor if scale_last else factor * dloss, needs, backend)
    grads = _given(grads, call)
    if scale_last:
        _scale(grads, dloss)
    return grads


def _call_of(layers, indices, target, divergence) -> LinearKLDivCall:
    x, weight, bias, teacher_x, teacher_weight, teacher_bias = layers
    return LinearKLDivCall(x, weight, bias, teacher_x, teacher_weight, teacher_bias, indices, target, divergence)


class LinearKLDiv(torch.autograd.Function):
    """(loss, denominator, six gradients left by the forward) of a student's layer, a teacher's, and a KLNode."""

    @staticmethod
    def forward(*args):
        *layers, node = args
        call = _call_of(layers, node.indices, node.target, node.divergence)
        return linear_kl_div_fwd(*call.flat(), node.backend, node.with_gradient, node.needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *layers, node = inputs
        _, total, *grads = output
        ctx.mark_non_differentiable(total, *grads)
        ctx.set_materialize_grads(False)
        ctx.has_gradient, ctx.divergence, ctx.backend = node.with_gradient, node.divergence, node.backend
        ctx.save_for_backward(*layers, node.indices, node.target, total, *grads)

    @staticmethod
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 7
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:6]
        # The last six are the gradients of the first six.
        (*layers, indices, target, total), ready = saved[: -len(needs)], saved[-len(needs) :]
        if ctx.has_gradient and not torch.is_grad_enabled() and scalable(dloss):
            # Handed out once, scaled in place, as in cross_entropy; a second backward computes them again.
            ctx.has_gradient = False
            grads = [grad.data for grad in ready]
            _linear_kl_div_scale_(*grads, dloss)
            return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None
        divergence, backend = ctx.divergence, ctx.backend

        def call_of(layers):
            return _call_of(layers, indices, target, divergence)

        def launch(inputs, outputs_grad, extras, needs):
            return _linear_kl_div_bwd(*outputs_grad, *extras, *call_of(inputs).flat(), backend, needs)

        def formula(*layers):
            return linear_kl_div_definition(call_of(layers))

        return *gradients(launch, formula, layers, needs, (dloss,), (total,)), None
