"""linear_kl_div's registered operators and their gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...registry import define
from ..shared.autograd import gradients, scalable, unwatched, unwrapped, with_elements
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


def _in_their_dtypes(grads, call: LinearKLDivCall):
    """``grads`` in the dtypes of their tensors; None for one that is not there."""
    layers = zip(grads, call.layers(), strict=True)
    return tuple(None if g is None or t is None else g.to(t.dtype) for g, t in layers)


def _fwd_fake(*args):
    call, (_, with_gradient, needs) = LinearKLDivCall.of(args)
    x, wide = call.input, call.wide
    loss = x.new_empty(x.shape[0] if call.divergence.reduction == "none" else (), dtype=wide)
    return loss, *_blank(call, needs if with_gradient else _NOTHING)


def _factor(call: LinearKLDivCall, total, kept):
    """The derivative of the whole loss by each row's, (N,)."""
    if kept is None:
        share = 1 / max(total, 1)  # there may be no rows
        return torch.full((call.n_rows,), share, dtype=call.wide, device=call.input.device)
    return torch.where(kept, 1.0 / total, 0.0).to(call.wide)


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
    f"linear_kl_div_fwd({KL_SCHEMA}, str backend, bool with_gradient, bool[6] needs) -> (Tensor, {_SIX})",
    _fwd_fake,
)
def _linear_kl_div_fwd(*args):
    call, how = LinearKLDivCall.of(args)
    loss, *grads = _forward(call, *how)
    return loss, *with_elements(grads, _blank(call, _NOTHING))


def _forward(call: LinearKLDivCall, backend: str, with_gradient: bool, needs):
    kept = kept_positions(call)
    total = count_of(call, kept)
    if call.input.is_cpu:
        _check_values(call, total)
    factor = _factor(call, total, kept) if with_gradient else None
    losses, *grads = kl_in_chunks(call, factor, needs, backend)
    loss = losses if call.divergence.reduction == "none" else losses.sum() / total
    return loss, *_in_their_dtypes(grads, call)


def linear_kl_div_fwd(call: LinearKLDivCall, backend: str, with_gradient: bool, needs):
    """(loss, six gradients), None or empty where one is not needed.

    ``call`` has one leading dimension.
    """
    if unwatched(*call[:8]):
        return _forward(call, backend, with_gradient, needs)
    return _linear_kl_div_fwd(*call.flat(), backend, with_gradient, needs)


def _bwd_fake(dloss, *args):
    call, (_, needs) = LinearKLDivCall.of(args)
    return _blank(call, needs)


def _scale(grads, factor) -> None:
    """``grads`` times a scalar, in place, where that is not 1."""
    if factor.is_cuda or factor.item() != 1:
        for grad in grads:
            if grad is not None and grad.numel():
                grad.mul_(factor)


@define(
    "linear_kl_div_scale_(Tensor(a!) a, Tensor(b!) b, Tensor(c!) c, Tensor(d!) d, Tensor(e!) e, Tensor(f!) f,"
    " Tensor dloss) -> ()",
    lambda *args: None,
)
def _linear_kl_div_scale_(*args):
    *grads, dloss = args
    _scale(grads, dloss)


@define(f"linear_kl_div_bwd(Tensor dloss, {KL_SCHEMA}, str backend, bool[6] needs) -> ({_SIX})", _bwd_fake)
def _linear_kl_div_bwd(dloss, *args):
    call, (backend, needs) = LinearKLDivCall.of(args)
    # As the forward's own gradients: for a loss of 1, rounded, then scaled. So both lanes agree bit for bit. In fp16
    # the upstream gradient, a loss scale, comes first.
    scale_last = call.divergence.reduction != "none" and call.input.dtype != torch.float16
    kept = kept_positions(call)
    factor = _factor(call, count_of(call, kept), kept)
    _, *grads = kl_in_chunks(call, factor if scale_last else factor * dloss, needs, backend)
    grads = _in_their_dtypes(grads, call)
    if scale_last:
        _scale(grads, dloss)
    return with_elements(grads, _blank(call, _NOTHING))


def _call_of(layers, indices, target, divergence) -> LinearKLDivCall:
    x, weight, bias, teacher_x, teacher_weight, teacher_bias = layers
    return LinearKLDivCall(x, weight, bias, teacher_x, teacher_weight, teacher_bias, indices, target, divergence)


class LinearKLDiv(torch.autograd.Function):
    """(loss, six gradients left by the forward) of a student's layer, a teacher's, and a KLNode."""

    @staticmethod
    def forward(*args):
        *layers, node = args
        call = _call_of(layers, node.indices, node.target, node.divergence)
        return linear_kl_div_fwd(call, node.backend, node.with_gradient, node.needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *layers, node = inputs
        _, *grads = output
        ctx.mark_non_differentiable(*(grad for grad in grads if grad is not None))
        ctx.set_materialize_grads(False)
        ctx.has_gradient, ctx.divergence, ctx.backend = node.with_gradient, node.divergence, node.backend
        ctx.save_for_backward(*layers, node.indices, node.target, *grads)

    @staticmethod
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 7
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:6]
        # The last six are the gradients of the first six.
        (*layers, indices, target), ready = saved[: -len(needs)], saved[-len(needs) :]
        divergence, backend = ctx.divergence, ctx.backend
        if ctx.has_gradient and not torch.is_grad_enabled() and scalable(dloss):
            # Handed out once, scaled in place, as in cross_entropy; a second backward computes them again.
            ctx.has_gradient = False
            grads = [grad.data if need else None for grad, need in zip(ready, needs, strict=True)]
            if unwatched(dloss, *grads):
                _scale(grads, dloss)
            else:
                call = _call_of(layers, indices, target, divergence)
                _linear_kl_div_scale_(*with_elements(grads, _blank(call, _NOTHING)), dloss)
            return *grads, None

        def call_of(layers):
            kept, labels = unwrapped((indices, target))
            return _call_of(layers, kept, labels, divergence)

        def launch(inputs, outputs_grad, extras, needs):
            return _linear_kl_div_bwd(*outputs_grad, *call_of(inputs).flat(), backend, needs)

        def formula(*layers):
            return linear_kl_div_definition(call_of(layers))

        return *gradients(launch, formula, layers, needs, (dloss,)), None
