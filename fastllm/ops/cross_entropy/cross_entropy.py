"""Cross-entropy between logits and class indices or probabilities, with soft cap, logit scale and z-loss."""

from __future__ import annotations

from typing import Any

import torch

from ...backends import pick
from ...registry import Op, register
from ..shared.autograd import apply
from ..shared.signature import keyword_options, keywords_of
from ..shared.stand_ins import any_stands_in, overridden
from .call import CrossEntropyCall, cross_entropy_call
from .loss import loss_dtype, out_of_range
from .operator import CrossEntropy, LossNode
from .ordinary import ordinary_cross_entropy
from .reference import cross_entropy_reference, eager_cross_entropy
from .samples import cross_entropy_cost, cross_entropy_samples


def _refuses(backend: str, call: CrossEntropyCall) -> str | None:
    if backend == "eager":
        return None
    if call.n_classes == 0:
        return f"input of shape {list(call.input.shape)} has no classes"
    if backend == "triton":
        from ...kernels.sizes import CROSS_ENTROPY_CLASSES

        if call.n_classes > CROSS_ENTROPY_CLASSES:
            return f"the kernels take up to {CROSS_ENTROPY_CLASSES:,} classes, input has {call.n_classes:,}"
    if call.weight is not None and call.weight.requires_grad:
        return "the kernels give no gradient for class weights, and weight requires one"
    return None


# Classes up to which PyTorch serves positions that lie side by side on a CPU, as in a map of 2 classes of pixels: it
# takes vectors of positions, the extension a position at a time. Processor time of PyTorch's over the extension's,
# forward and backward, one thread of an AMD EPYC with AVX-512, 2, 21, 150 and 1000 classes: in float32 0.10, 0.33,
# 0.32, 0.35, in float64 0.07, 0.18, 0.32, 0.45, and with class weights, smoothing, probabilities, a soft cap or the
# logsumexp 0.04 to 0.88; with z_loss 0.20, 0.69, 0.84, 1.12.
MAX_MAP_CLASSES = 1024
# The same in 16 bits, where PyTorch computes in float32 what it is given in float32, which takes memory for that:
# AVX-512 and AVX2 0.12 to 0.18, 0.23 to 0.47, 0.32 to 0.62, 0.69 to 0.87; with the options 0.03 to 0.24, 0.10 to 1.0,
# 0.31 to 1.0, 0.67 to 1.9, with z_loss 0.35 to 0.44, 0.67 to 1.6, 1.0 to 1.7, 1.1 to 2.1. 256 is a guess between.
MAX_NARROW_MAP_CLASSES = 256


def _is_map(call: CrossEntropyCall) -> bool:
    x = call.input
    return x.is_cpu and x.dim() > 2 and x.stride(1) != 1


def _prefers_torch(call: CrossEntropyCall) -> str | None:
    if call.n_classes == 0:
        return "there are no classes to compute"
    most = MAX_NARROW_MAP_CLASSES if call.input.dtype.itemsize == 2 else MAX_MAP_CLASSES
    if call.n_classes <= most and _is_map(call):
        return "PyTorch's operators take vectors of positions that lie side by side"
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
        reduction: "mean" (over the class weights of the targets that are not ignored), "sum" or "none".
        label_smoothing: in [0, 1], the share of the target that is spread over all classes (arXiv:1512.00567).
        softcap: bound on the logits, positive, or None.
        logit_scale: factor on the logits (an inverse temperature).
        z_loss: factor of the penalty on logsumexp(z)^2.
        return_lse: also return logsumexp(z) of every position.
        inplace: permission for the backward to overwrite the logits with their gradient, which saves their size in
            memory. They must come from an operation that does not need them itself, such as a linear layer. Another
            backward that needs them after this one raises (their version counter has moved). Kernels use this
            permission. The eager backend and compiled code do not.

    Returns:
        The loss in torch's dtype: a scalar, or the target's positions for "none". A mean over no targets is NaN. With
        ``return_lse`` a pair (loss, lse); lse is at least fp32, of the target's positions, differentiable.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, device or option does not fit.
        IndexError: on CPU, a class index is neither in [0, C) nor ignore_index. On CUDA a device-side assert, as
            in torch.
        BackendError: the backend asked for cannot serve the call.
    """
    if (
        weight is None and size_average is None and reduce is None and softcap is None and not return_lse
        and not inplace and type(label_smoothing) is type(logit_scale) is type(z_loss) is float
        and label_smoothing == z_loss == 0.0 and logit_scale == 1.0
    ):  # fmt: skip
        value = ordinary_cross_entropy(input, target, ignore_index, reduction)
        if value is not None:
            return value
    given: tuple[Any, ...] = (input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    options: dict[str, Any] = dict(
        softcap=softcap, logit_scale=logit_scale, z_loss=z_loss, return_lse=return_lse, inplace=inplace
    )  # fmt: skip
    if any_stands_in(input, target, weight):
        return overridden(cross_entropy, *given, **options)
    call = cross_entropy_call(*given, **options)
    choice = pick("cross_entropy", call)
    try:
        return eager_cross_entropy(call) if choice.backend == "eager" else _by_kernels(call, choice.backend)
    except IndexError:
        # An operator has the target in one dimension or two, and PyTorch's names no position.
        probabilities = call.target.is_floating_point()
        error = None if probabilities else out_of_range(call.target, call.loss.ignore_index, call.n_classes)
        if error is None:
            raise
        raise error from None


def _by_kernels(call: CrossEntropyCall, backend: str):
    input, target, weight, loss, return_lse, inplace = call
    probabilities = target.is_floating_point()
    x = input.reshape(1, -1, 1) if input.dim() == 1 else input.unsqueeze(-1) if input.dim() == 2 else input.flatten(2)
    q = target.reshape(x.shape) if probabilities else target.reshape(x.shape[0], x.shape[2]).long()
    needs = input.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    inplace = inplace and needs and 0 not in input.stride()
    # A scalar's upstream gradient is mostly 1, and then the forward's gradient needs no second pass. Not so for rows.
    # fp16 would lose the gradient of a mean to underflow before a loss scale reaches it.
    rows_adjacent = input.dim() == 2 and input.stride(1) == 1
    in_forward = (
        needs and not inplace and not probabilities and loss.reduction != "none" and x.dtype != torch.float16
        and rows_adjacent
    )  # fmt: skip
    node = LossNode(
        None if weight is None else weight.contiguous(), loss, loss_dtype(input, target, weight), in_forward, inplace,
        backend,
    )  # fmt: skip
    value, lse, *_ = apply(CrossEntropy, x, q, node)
    positions = () if input.dim() == 1 else (input.shape[0], *input.shape[2:])
    if loss.reduction == "none":
        value = value.view(positions)
    return (value, lse.view(positions)) if return_lse else value


# Found once: to ask a function for its signature takes 18 us.
_KEYWORDS = tuple(keyword_options(cross_entropy))


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss``, with the same arguments, on :func:`cross_entropy`, which documents the additional
    ones."""

    @keywords_of(cross_entropy)
    def __init__(
        self, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0,
        **options,
    ):  # fmt: skip
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        for name, value in options.items():
            setattr(self, name, value)

    def forward(self, input, target):
        options = {name: getattr(self, name) for name in _KEYWORDS}
        return cross_entropy(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, **options,
        )  # fmt: skip


register(
    Op(
        name="cross_entropy",
        summary="logits against class indices or probabilities; soft cap, scale, z-loss, logsumexp",
        function=cross_entropy,
        reference=cross_entropy_reference,
        samples=cross_entropy_samples,
        cost=cross_entropy_cost,
        backends=("eager", "triton", "native"),
        module=CrossEntropyLoss,
        call=cross_entropy_call,
        refuses=_refuses,
        prefers_torch=_prefers_torch,
    )
)
