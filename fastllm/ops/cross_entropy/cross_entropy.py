"""Cross-entropy between logits and class indices or probabilities, with soft cap, logit scale and z-loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...backends import chosen_backend, pick_by_tensors
from ...registry import Cost, Op, define, register
from ..shared.autograd import apply, gradients, scalable
from .loss import check_cross_entropy, class_dim, cross_entropy_samples, legacy, loss_dtype, out_of_range, transformed


def _is_plain(softcap, logit_scale: float, z_loss: float) -> bool:
    return softcap is None and logit_scale == 1.0 and z_loss == 0.0


def cross_entropy_reference(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
    label_smoothing=0.0, *, softcap=None, logit_scale=1.0, z_loss=0.0, return_lse=False,
):  # fmt: skip
    """The definition, in at least fp32, rounded once to the loss's dtype."""
    reduction = legacy(size_average, reduce, reduction)
    if input.dim() == 1 and not target.is_floating_point():
        target = target.reshape(())
    dim = class_dim(input)
    z = transformed(input, softcap, logit_scale)
    n_classes = input.shape[dim]
    lse = torch.logsumexp(z, dim)
    log_p = torch.log_softmax(z, dim)
    w = z.new_ones(n_classes) if weight is None else weight.to(z.dtype)
    w_along = w.view(-1, *[1] * (z.dim() - dim - 1))
    if target.is_floating_point():
        q = target.to(z.dtype)
        mass = (w_along * q).sum(dim)
        rows = -(w_along * q * log_p).sum(dim)
        count = max(input.numel() // max(n_classes, 1), 0)
        kept = None
    else:
        kept = target != ignore_index
        index = torch.where(kept, target, 0).long()
        mass = torch.where(kept, w[index], 0.0)
        rows = -mass * log_p.gather(dim, index.unsqueeze(dim).view(*index.shape[:dim], 1, *index.shape[dim:])).view(
            index.shape
        )
        count = mass.sum()
    if label_smoothing != 0.0:
        rows = (1 - label_smoothing) * rows - label_smoothing / n_classes * (w_along * log_p).sum(dim).view(rows.shape)
    if z_loss != 0.0:
        rows = rows + z_loss * mass * lse.view(rows.shape).square()
    if kept is not None:
        rows = torch.where(kept, rows, 0.0)
    loss = rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.sum() / count
    loss = loss.to(loss_dtype(input, target, weight))
    return (loss, lse) if return_lse else loss


def _eager(input, target, weight, ignore_index, reduction, label_smoothing, softcap, logit_scale, z_loss, return_lse):
    """PyTorch's own operator, on transformed logits where there is something to transform."""
    out_dtype = loss_dtype(input, target, weight)
    plain = _is_plain(softcap, logit_scale, z_loss) and (weight is None or weight.dtype == input.dtype)
    z = input if plain else transformed(input, softcap, logit_scale)
    if weight is not None:
        weight = weight.to(z.dtype)
    if z_loss == 0.0:
        loss = F.cross_entropy(
            z, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    else:
        loss = F.cross_entropy(
            z, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
        )
    if z_loss == 0.0 and not return_lse:
        return loss.to(out_dtype)
    dim = class_dim(input)
    lse = torch.logsumexp(z.to(torch.promote_types(z.dtype, torch.float32)), dim)
    if z_loss != 0.0:
        if target.is_floating_point():
            q = target if weight is None else target * weight.view(-1, *[1] * (z.dim() - dim - 1))
            mass = q.to(lse.dtype).sum(dim)
            count = mass.numel()
        else:
            kept = target != ignore_index
            mass = kept.to(lse.dtype) if weight is None else torch.where(kept, weight[torch.where(kept, target, 0)], 0)
            count = mass.sum()
        penalty = z_loss * mass * lse.view(mass.shape).square()
        if not target.is_floating_point():
            penalty = torch.where(kept, penalty, 0)
        loss = loss + penalty.view(loss.shape)
        if reduction != "none":
            loss = loss.sum() / count if reduction == "mean" else loss.sum()
    loss = loss.to(out_dtype)
    return (loss, lse) if return_lse else loss


_OPTIONS = "int ignore_index, float smoothing, float? softcap, float scale, float z_loss, str reduction"


def _rows_of(backend: str):
    """(forward, backward, scale) of the backend that was picked."""
    if backend == "native":
        from . import native

        return native.cross_entropy_fwd, native.cross_entropy_bwd, native.scale
    from ...kernels.cross_entropy.backward import cross_entropy_bwd, scale
    from ...kernels.cross_entropy.forward import cross_entropy_fwd

    return cross_entropy_fwd, cross_entropy_bwd, scale


def _fwd_fake(
    x, target, weight, ignore_index, smoothing, softcap, scale, z_loss, reduction, dtype, with_gradient, backend
):  # fmt: skip
    rows = x.shape[0] * x.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(rows if reduction == "none" else (), dtype=dtype),
        x.new_empty(rows, dtype=wide),
        x.new_empty((3, 0 if backend == "native" else rows), dtype=torch.float32),
        x.new_empty(() if reduction == "mean" else 0, dtype=wide),
        x.new_empty(x.shape if with_gradient else 0),
    )


@define(
    f"cross_entropy_fwd(Tensor x, Tensor target, Tensor? weight, {_OPTIONS}, ScalarType dtype,"
    " bool with_gradient, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
def _cross_entropy_fwd(x, target, weight, ignore_index, *options):
    *options, backend = options
    if target.device.type == "cpu" and not target.is_floating_point():
        error = out_of_range(target, ignore_index, x.shape[1])
        if error is not None:
            raise error
    return _rows_of(backend)[0](x, target, weight, ignore_index, *options)


def _bwd_fake(dloss, dlse, x, target, weight, stats, total, *options_and_needs):
    need_dx, need_dtarget = options_and_needs[-2]
    return (
        torch.empty_like(x) if need_dx else x.new_empty(0),
        torch.empty_like(target) if need_dtarget else target.new_empty(0),
    )


@define(
    "cross_entropy_bwd(Tensor? dloss, Tensor? dlse, Tensor x, Tensor target, Tensor? weight, Tensor stats,"
    f" Tensor total, {_OPTIONS}, bool[2] needs, str backend) -> (Tensor, Tensor)",
    _bwd_fake,
)
def _cross_entropy_bwd(*args):
    *args, backend = args
    return _rows_of(backend)[1](*args)


@define(
    "cross_entropy_bwd_(Tensor? dloss, Tensor? dlse, Tensor(a!) x, Tensor target, Tensor? weight, Tensor stats,"
    f" Tensor total, {_OPTIONS}, str backend) -> ()",
    lambda *args: None,
)
def _cross_entropy_bwd_(dloss, dlse, x, *args):
    *args, backend = args
    _rows_of(backend)[1](dloss, dlse, x, *args, (True, False), out=x)


@define("cross_entropy_scale_(Tensor(a!) dlogits, Tensor dloss, str backend) -> ()", lambda *args: None)
def _cross_entropy_scale_(dx, dloss, backend):
    _rows_of(backend)[2](dx, dloss)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        x, target, weight, dtype, ignore_index, smoothing, softcap, scale, z_loss, reduction, with_gradient, inplace,
        backend,
    ):  # fmt: skip
        options = (ignore_index, smoothing, softcap, scale, z_loss, reduction)
        return _cross_entropy_fwd(x, target, weight, *options, dtype, with_gradient, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, target, weight, ctx.dtype, *ctx.options, with_gradient, ctx.inplace, ctx.backend = inputs
        _, _, stats, total, dlogits = output
        ctx.mark_non_differentiable(stats, total, dlogits)
        ctx.set_materialize_grads(False)
        ctx.has_gradient = with_gradient
        ctx.save_for_backward(x, target, weight, stats, total, dlogits)

    @staticmethod
    def backward(ctx, dloss, dlse, _dstats, _dtotal, _ddlogits):
        none = (None,) * (5 + len(ctx.options))
        if dloss is None and dlse is None:
            return None, None, *none
        x, target, weight, stats, total, dlogits = ctx.saved_tensors
        ignore_index, smoothing, softcap, scale, z_loss, reduction = ctx.options
        probabilities = target.is_floating_point()
        inputs = (x, target) if probabilities else (x,)
        needs = ctx.needs_input_grad[: len(inputs)]
        if ctx.has_gradient and dlse is None and not torch.is_grad_enabled() and scalable(dloss):
            # The forward's gradient is handed out once, scaled in place: nobody else has seen it. A second backward
            # takes the other way, to the same bits.
            ctx.has_gradient = False
            dx = dlogits.data
            _cross_entropy_scale_(dx, dloss, ctx.backend)
            return dx, None, *none
        if ctx.inplace and needs == (True,) and not torch.is_grad_enabled() and scalable(dloss, dlse):
            _cross_entropy_bwd_(dloss, dlse, x.detach(), target, weight, stats, total, *ctx.options, ctx.backend)
            torch.autograd.graph.increment_version(x)
            return x.detach(), None, *none

        def launch(inputs, outputs_grad, extras, needs):
            q = inputs[1] if probabilities else target
            needs = (needs[0], probabilities and needs[1])
            grads = _cross_entropy_bwd(*outputs_grad, inputs[0], q, weight, *extras, *ctx.options, needs, ctx.backend)
            return grads[: len(inputs)]

        def formula(x, q=None):
            loss, lse = cross_entropy_reference(
                x, q if probabilities else target, weight, ignore_index=ignore_index, reduction=reduction,
                label_smoothing=smoothing, softcap=softcap, logit_scale=scale, z_loss=z_loss, return_lse=True,
            )  # fmt: skip
            return loss.reshape(-1) if reduction == "none" else loss, lse.reshape(-1)

        grads = gradients(launch, formula, inputs, needs, (dloss, dlse), (stats, total))
        return grads[0], grads[1] if probabilities else None, *none


def _kernel_refuses(input: torch.Tensor, weight) -> str | None:
    if input.shape[class_dim(input)] == 0:
        return f"input of shape {list(input.shape)} has no classes"
    if weight is not None and weight.requires_grad:
        return "the kernels give no gradient for class weights, and weight requires one"
    return None


def cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
    label_smoothing=0.0, *, softcap=None, logit_scale=1.0, z_loss=0.0, return_lse=False, inplace=False,
):  # fmt: skip
    """``torch.nn.functional.cross_entropy``, fused, and more.

    The loss is taken of ``z = softcap * tanh(logit_scale * input / softcap)`` (Gemma 2, arXiv:2408.00118; without
    ``softcap`` of ``logit_scale * input``), plus ``z_loss * logsumexp(z)^2`` (PaLM, arXiv:2204.02311, section 5)
    times the class weight of the target.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...), floating point, any strides. Not written to
            unless ``inplace`` permits it.
        target: class indices, int64 or uint8, shape () or (N,) or (N, d1, ...); or class probabilities, floating
            point, of the input's shape, which then receive a gradient too.
        weight: (C,) class weights or None; its dtype may differ from the input's.
        size_average, reduce: deprecated, as in torch.
        ignore_index: class index whose positions contribute neither loss nor gradient.
        reduction: "mean" (over the class weights of the targets that count), "sum" or "none".
        label_smoothing: in [0, 1], the share of the target that is spread over all classes (arXiv:1512.00567).
        softcap: bound on the logits, positive, or None.
        logit_scale: factor on the logits (an inverse temperature).
        z_loss: factor of the penalty on logsumexp(z)^2.
        return_lse: also return logsumexp(z) of every position.
        inplace: permission for the backward to put the gradient where the logits were, which saves their size in
            memory. They must come from an operation that does not need them itself, such as a linear layer. Another
            backward that needs them after this one raises (their version counter has moved). Kernels take it up;
            the eager backend and compiled code do not.

    Returns:
        The loss in torch's dtype: a scalar, or the target's positions for "none". A mean over nothing is NaN.
        With ``return_lse`` a pair (loss, lse); lse is at least fp32, of the target's positions, differentiable.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device or option does not fit.
        IndexError: on CPU, a class index is neither in [0, C) nor ignore_index. On CUDA a device-side assert, as
            in torch.
        BackendError: the backend asked for cannot serve the call.
    """
    reduction = legacy(size_average, reduce, reduction)
    check_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing, softcap, logit_scale, z_loss)
    if inplace and input.requires_grad and input.is_leaf:
        raise ValueError("cross_entropy: inplace=True would overwrite a leaf; logits must come from an operation")
    probabilities = target.is_floating_point()
    refuses = _kernel_refuses(input, weight)
    if input.shape[class_dim(input)] == 0 and chosen_backend() == "auto":
        chosen = "eager"
    else:
        chosen = pick_by_tensors(
            "cross_entropy", input, target if probabilities else None, weight,
            refused={"triton": refuses, "native": refuses},
        )  # fmt: skip
    if chosen == "eager":
        options = (weight, ignore_index, reduction, label_smoothing, softcap, logit_scale, z_loss, return_lse)
        if torch.compiler.is_compiling():
            return _eager(input, target, *options)
        try:
            return _eager(input, target, *options)
        except IndexError:
            error = None if probabilities else out_of_range(target, ignore_index, input.shape[class_dim(input)])
            if error is None:
                raise
            raise error from None
    x = input.reshape(1, -1, 1) if input.dim() == 1 else input.unsqueeze(-1) if input.dim() == 2 else input.flatten(2)
    q = target.reshape(x.shape) if probabilities else target.reshape(x.shape[0], x.shape[2]).long()
    needs = input.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    inplace = inplace and needs and 0 not in input.stride()
    # A scalar's upstream gradient is mostly 1, and then the forward's gradient needs no second pass. Not so for rows.
    # fp16 would lose the gradient of a mean to underflow before a loss scale reaches it.
    in_forward = needs and not inplace and not probabilities and reduction != "none" and x.dtype != torch.float16
    loss, lse, *_ = apply(
        _CrossEntropy, x, q, None if weight is None else weight.contiguous(), loss_dtype(input, target, weight),
        int(ignore_index), float(label_smoothing), None if softcap is None else float(softcap), float(logit_scale),
        float(z_loss), reduction, in_forward and input.dim() == 2 and input.stride(1) == 1, inplace,
        chosen,
    )  # fmt: skip
    positions = () if input.dim() == 1 else (input.shape[0], *input.shape[2:])
    if reduction == "none":
        loss = loss.view(positions)
    return (loss, lse.view(positions)) if return_lse else loss


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss``, with the same arguments, on :func:`cross_entropy`; see there for the others."""

    def __init__(
        self, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0,
        *, softcap=None, logit_scale=1.0, z_loss=0.0, return_lse=False, inplace=False,
    ):  # fmt: skip
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.z_loss = z_loss
        self.return_lse = return_lse
        self.inplace = inplace

    def forward(self, input, target):
        return cross_entropy(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, softcap=self.softcap, logit_scale=self.logit_scale,
            z_loss=self.z_loss, return_lse=self.return_lse, inplace=self.inplace,
        )  # fmt: skip


def _cost(input, target, *args, **options) -> Cost:
    """Logits in, nothing of their size out; backward: logits in, their gradient out. Probabilities the same."""
    logits = input.numel() * input.element_size()
    targets = target.numel() * target.element_size()
    gradient = targets if target.is_floating_point() and target.requires_grad else 0
    rows = input.numel() // max(input.shape[class_dim(input)], 1)
    return Cost(logits + targets + 20 * rows, 2 * logits + targets + gradient + 16 * rows)


register(
    Op(
        name="cross_entropy",
        summary="logits against class indices or probabilities; soft cap, scale, z-loss, logsumexp",
        function=cross_entropy,
        reference=cross_entropy_reference,
        samples=cross_entropy_samples,
        cost=_cost,
        backends=("eager", "triton", "native"),
        module=CrossEntropyLoss,
    )
)
