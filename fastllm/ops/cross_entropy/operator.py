"""cross_entropy's registered operators and their gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...registry import define
from ..shared.autograd import frozen, gradients, scalable, unwrapped
from .loss import LABELLED_SCHEMA, LOSS_SCHEMA, Labelled, Loss, row_out_of_range
from .native import native_cross_entropy_bwd, native_cross_entropy_fwd, native_scale_gradient
from .reference import loss_and_lse


class LossGradients(NamedTuple):
    """The gradients that came in for a loss's outputs; None for one that was not used."""

    loss: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    def of(self, at) -> LossGradients:
        """Those of the rows ``at``."""
        return LossGradients(*(None if t is None else t[at] for t in self))


class RowStatistics(NamedTuple):
    """What a forward leaves for the backward: (3, rows) of the kernels, the mean's denominator, rows of entropy."""

    rows: torch.Tensor
    total: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


class LossNode(NamedTuple):
    """What the gradient's node is given beside logits and target."""

    weight: torch.Tensor | None
    loss: Loss
    dtype: torch.dtype
    with_gradient: bool
    inplace: bool
    backend: str


class _Launchers(NamedTuple):
    """What a backend computes with; ``scale`` is that of a gradient by a scalar, in place."""

    forward: Callable
    backward: Callable
    scale: Callable


def _launchers(backend: str) -> _Launchers:
    """Those of the backend that was picked."""
    if backend == "native":
        return _Launchers(native_cross_entropy_fwd, native_cross_entropy_bwd, native_scale_gradient)
    from ...kernels.cross_entropy.backward import cross_entropy_bwd, scale_gradient
    from ...kernels.cross_entropy.forward import cross_entropy_fwd

    return _Launchers(cross_entropy_fwd, cross_entropy_bwd, scale_gradient)


def _fwd_fake(*args):
    (x, _, _, loss), (dtype, with_gradient, backend) = Labelled.of(args)
    rows = x.shape[0] * x.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(rows if loss.reduction == "none" else (), dtype=dtype),
        x.new_empty(rows, dtype=wide),
        x.new_empty((3, 0 if backend == "native" else rows), dtype=torch.float32),
        x.new_empty(() if loss.reduction == "mean" else 0, dtype=wide),
        x.new_empty(x.shape if with_gradient else 0),
    )


@define(
    f"cross_entropy_fwd({LABELLED_SCHEMA}, ScalarType dtype, bool with_gradient, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
def _cross_entropy_fwd(*args):
    labelled, (dtype, with_gradient, backend) = Labelled.of(args)
    x, target, _, loss = labelled
    # The extension looks at the classes itself.
    if backend != "native" and target.device.type == "cpu" and not target.is_floating_point():
        error = row_out_of_range(target, loss.ignore_index, x.shape[1], "cross_entropy")
        if error is not None:
            raise error
    return _launchers(backend).forward(labelled, dtype, with_gradient)


def _bwd_fake(dloss, dlse, stats, total, *args):
    (x, target, *_), (needs, _) = Labelled.of(args)
    return (
        torch.empty_like(x) if needs[0] else x.new_empty(0),
        torch.empty_like(target) if needs[1] else target.new_empty(0),
    )


@define(
    f"cross_entropy_bwd(Tensor? dloss, Tensor? dlse, Tensor stats, Tensor total, {LABELLED_SCHEMA}, bool[2] needs,"
    " str backend) -> (Tensor, Tensor)",
    _bwd_fake,
)
def _cross_entropy_bwd(dloss, dlse, stats, total, *args):
    labelled, (needs, backend) = Labelled.of(args)
    return _launchers(backend).backward(LossGradients(dloss, dlse), labelled, RowStatistics(stats, total), needs)


@define(
    "cross_entropy_bwd_(Tensor? dloss, Tensor? dlse, Tensor stats, Tensor total, Tensor(a!) logits, Tensor target,"
    f" Tensor? weight, {LOSS_SCHEMA}, str backend) -> ()",
    lambda *args: None,
)
def _cross_entropy_bwd_(dloss, dlse, stats, total, *args):
    labelled, (backend,) = Labelled.of(args)
    backward = _launchers(backend).backward
    backward(LossGradients(dloss, dlse), labelled, RowStatistics(stats, total), (True, False), out=labelled.logits)


@define("cross_entropy_scale_(Tensor(a!) dlogits, Tensor dloss, str backend) -> ()", lambda *args: None)
def _cross_entropy_scale_(dx, dloss, backend):
    _launchers(backend).scale(dx, dloss)


def loss_gradients(
    labelled: Labelled, node: LossNode, needs, upstream: LossGradients, statistics: RowStatistics
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of logits (B, C, S) and of probabilities, where ``needs`` has them: right to any order."""
    x, target, weight, loss = labelled
    probabilities = target.is_floating_point()
    inputs = (x, target) if probabilities else (x,)

    def launch(inputs, outputs_grad, extras, needs):
        labelled = Labelled(inputs[0], inputs[1] if probabilities else target, weight, loss)
        needs = (needs[0], probabilities and needs[1])
        return _cross_entropy_bwd(*outputs_grad, *extras, *labelled.flat(), needs, node.backend)[: len(inputs)]

    def formula(x, q=None):
        labels, class_weight = unwrapped((target if q is None else q, weight))
        value, lse = loss_and_lse(Labelled(x, labels, class_weight, loss))
        value = value.to(node.dtype)
        return value.reshape(-1) if loss.reduction == "none" else value, lse.reshape(-1)

    extras = (statistics.rows, statistics.total)
    return gradients(launch, formula, inputs, needs[: len(inputs)], (upstream.loss, upstream.lse), extras)


class CrossEntropy(torch.autograd.Function):
    """(loss, lse, statistics, denominator, gradient left by the forward) of logits (B, C, S) and their target."""

    @staticmethod
    def forward(x, target, node: LossNode):
        labelled = Labelled(x, target, node.weight, node.loss)
        return _cross_entropy_fwd(*labelled.flat(), node.dtype, node.with_gradient, node.backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, target, node = inputs
        _, lse, stats, total, dlogits = output
        ctx.mark_non_differentiable(stats, total, dlogits, *frozen(lse, (x,)))
        ctx.set_materialize_grads(False)
        # The class weights are saved as a tensor.
        ctx.has_gradient, ctx.node = node.with_gradient, node._replace(weight=None)
        ctx.save_for_backward(x, target, node.weight, stats, total, dlogits)

    @staticmethod
    def backward(ctx, dloss, dlse, _dstats, _dtotal, _ddlogits):
        if dloss is None and dlse is None:
            return None, None, None
        x, target, weight, stats, total, dlogits = ctx.saved_tensors
        loss, backend = ctx.node.loss, ctx.node.backend
        needs = ctx.needs_input_grad[:2] if target.is_floating_point() else ctx.needs_input_grad[:1]
        if ctx.has_gradient and dlse is None and not torch.is_grad_enabled() and scalable(dloss):
            # The forward's gradient is handed out once, scaled in place: nobody else has seen it. A second backward
            # takes the other way, to the same bits.
            ctx.has_gradient = False
            dx = dlogits.data
            _cross_entropy_scale_(dx, dloss, backend)
            return dx, None, None
        if ctx.node.inplace and needs == (True,) and not torch.is_grad_enabled() and scalable(dloss, dlse):
            _cross_entropy_bwd_(dloss, dlse, stats, total, x.detach(), target, weight, *loss, backend)
            torch.autograd.graph.increment_version(x)
            return x.detach(), None, None
        labelled, statistics = Labelled(x, target, weight, loss), RowStatistics(stats, total)
        grads = loss_gradients(labelled, ctx.node, needs, LossGradients(dloss, dlse), statistics)
        return grads[0], grads[1] if len(grads) > 1 else None, None
