"""The calls of cross_entropy and linear_cross_entropy, checked, each as one value."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn._reduction import legacy_get_string

from ..shared.autograd import autocasts
from ..shared.check import check_dense, check_flag, check_floating, check_integer, check_workspace, is_floating
from .loss import Loss, class_dim


class CrossEntropyCall(NamedTuple):
    """A call of :func:`fastllm.functional.cross_entropy`."""

    input: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None
    loss: Loss
    return_lse: bool = False
    inplace: bool = False

    def tensors(self):
        return self.input, self.target if self.target.is_floating_point() else None, self.weight

    @property
    def n_classes(self) -> int:
        return self.input.size(class_dim(self.input))


def _reduction(size_average, reduce, reduction: str) -> str:
    """``reduction``, or what torch's deprecated flags ask for (with torch's warning)."""
    if size_average is None and reduce is None:
        return reduction
    return legacy_get_string(size_average, reduce)


def cross_entropy_call(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
    label_smoothing=0.0, *, return_lse=False, inplace=False, **more,
) -> CrossEntropyCall:  # fmt: skip
    """The arguments of :func:`fastllm.functional.cross_entropy`, checked. ``more``: other fields of :class:`Loss`."""
    loss = Loss(
        ignore_index=ignore_index, label_smoothing=label_smoothing,
        reduction=_reduction(size_average, reduce, reduction), **more,
    )  # fmt: skip
    op = "cross_entropy"
    check_floating(op, "input", input)
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"{op}: target must be a tensor, got {type(target).__name__}")
    check_dense(op, "target", target)
    if input.dim() == 0:
        raise ValueError(f"{op}: input must be (C,), (N, C) or (N, C, d1, ...), got a scalar")
    positions = input.shape[:0] if input.dim() == 1 else (input.shape[0], *input.shape[2:])
    if target.shape == input.shape:
        if not is_floating(target):
            raise TypeError(
                f"{op}: a target of the input's shape {list(input.shape)} holds class probabilities and must be "
                f"floating point, got {target.dtype}"
            )
        if ignore_index >= 0:
            raise ValueError(f"{op}: ignore_index is for class indices, got {ignore_index} with class probabilities")
    elif tuple(target.shape) != tuple(positions) and not (input.dim() == 1 and tuple(target.shape) == (1,)):
        raise ValueError(
            f"{op}: for input of shape {list(input.shape)} target must be class indices of shape {list(positions)} or "
            f"class probabilities of the input's shape, got shape {list(target.shape)}"
        )
    elif target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(
            f"{op}: target must be class indices, int64 or uint8, or class probabilities of the input's shape "
            f"{list(input.shape)}; got {target.dtype} of shape {list(target.shape)}"
        )
    if target.device != input.device:
        raise ValueError(f"{op}: target is on {target.device}, input on {input.device}; they must be together")
    _check_class_weights(op, input, weight, input.shape[class_dim(input)])
    if input.dim() == 1 and not target.is_floating_point():
        target = target.reshape(())  # torch takes one of shape (1,) too, without label_smoothing
    if inplace and input.requires_grad and input.is_leaf:
        raise ValueError("cross_entropy: inplace=True would overwrite a leaf; logits must come from an operation")
    return CrossEntropyCall(input, as_indices(target), weight, loss.checked(op), return_lse, inplace)


def as_indices(target: torch.Tensor) -> torch.Tensor:
    """Class indices in int64; probabilities as they are.

    In 8 bits a comparison takes the ignore_index modulo 256: -100 would be class 156. And an index of 8 bits is a mask.
    """
    return target if target.dtype == torch.int64 or target.is_floating_point() else target.long()


def _check_class_weights(op: str, input, weight, n_classes) -> None:
    if weight is None:
        return
    check_floating(op, "weight", weight)
    if tuple(weight.shape) != (n_classes,):
        raise ValueError(f"{op}: weight must have one element per class, [{n_classes}], got {list(weight.shape)}")
    if weight.device != input.device:
        raise ValueError(f"{op}: weight is on {weight.device}, input on {input.device}; they must be together")


class Chunking(NamedTuple):
    """Which rows linear_cross_entropy computes, and how many of them at a time.

    ``max_workspace_mb``: MiB that a chunk may take, None for the device's default. ``skip_ignored``: rows of ignored
    targets are left out. On CUDA that needs ``max_targets``, the most targets that are not ignored, or else the host
    waits for the device. ``for_entropy``: the workspace holds what the entropy sums, in the backward too, whose chunks
    are the forward's.
    """

    max_workspace_mb: float | None
    max_targets: int | None
    skip_ignored: bool
    for_entropy: bool


class LinearCrossEntropyCall(NamedTuple):
    """A call of :func:`fastllm.functional.linear_cross_entropy` with class indices."""

    input: torch.Tensor
    linear_weight: torch.Tensor
    target: torch.Tensor
    linear_bias: torch.Tensor | None
    weight: torch.Tensor | None
    token_weight: torch.Tensor | None
    loss: Loss
    shift: int
    chunking: Chunking
    recompute: bool
    return_lse: bool
    return_accuracy: bool
    return_entropy: bool
    op: str = "linear_cross_entropy"

    def tensors(self):
        return self.input, self.linear_weight, self.linear_bias, self.weight

    def layer(self):
        """What gets a gradient: input, linear_weight, linear_bias."""
        return self.input, self.linear_weight, self.linear_bias

    def under_autocast(self) -> LinearCrossEntropyCall:
        """With the layer in autocast's dtype, where that is on. TypeError: its tensors' dtypes differ."""
        if not _is_autocasted(self.input):
            _check_dtypes(self.op, *self.layer())
            return self
        narrow = torch.get_autocast_dtype(self.input.device.type)
        bias = self.linear_bias
        return self._replace(
            input=self.input.to(narrow), linear_weight=self.linear_weight.to(narrow),
            linear_bias=None if bias is None else bias.to(narrow),
        )  # fmt: skip


def _is_autocasted(input) -> bool:
    """Whether autocast casts a layer of ``input``."""
    return autocasts(input.device.type) and input.dtype != torch.float64


def _check_dtypes(op: str, input, linear_weight, linear_bias) -> None:
    """TypeError: those of a layer differ."""
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, input {input.dtype}; they must agree")


_BESIDE = ("linear_weight", "target", "linear_bias", "token_weight")


def _check_devices(op: str, input, *beside) -> None:
    """ValueError: one of ``beside``, in the order of ``_BESIDE``, is elsewhere."""
    for name, tensor in zip(_BESIDE, beside, strict=False):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, input on {input.device}; they must be together")


def _check_tensors(op: str, input, linear_weight, target, linear_bias, token_weight) -> None:
    """TypeError or ValueError: a dtype, shape or device does not fit the others'."""
    check_floating(op, "input", input)
    check_floating(op, "linear_weight", linear_weight)
    if linear_bias is not None:
        check_floating(op, "linear_bias", linear_bias)
    if token_weight is not None:
        if not isinstance(token_weight, torch.Tensor):
            raise TypeError(f"{op}: token_weight must be a tensor, got {type(token_weight).__name__}")
        # A mask is one of ones and zeros.
        if token_weight.is_floating_point() or token_weight.is_complex() or token_weight.is_quantized:
            check_floating(op, "token_weight", token_weight)
        check_dense(op, "token_weight", token_weight)
    if not isinstance(target, torch.Tensor) or target.dtype not in (torch.int64, torch.uint8):
        got = str(target.dtype) if isinstance(target, torch.Tensor) else type(target).__name__
        raise TypeError(f"{op}: target must hold class indices, int64 or uint8, got {got}")
    check_dense(op, "target", target)
    if linear_weight.dim() != 2 or linear_weight.shape[0] == 0:
        raise ValueError(f"{op}: linear_weight must be (classes, features), got shape {list(linear_weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            f"{op}: input must end in linear_weight's {linear_weight.shape[1]} features, got shape {list(input.shape)}"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(f"{op}: target must be of shape {list(input.shape[:-1])}, got {list(target.shape)}")
    if linear_bias is not None and tuple(linear_bias.shape) != (linear_weight.shape[0],):
        raise ValueError(
            f"{op}: linear_bias must be of shape [{linear_weight.shape[0]}], got {list(linear_bias.shape)}"
        )
    if token_weight is not None:
        if tuple(token_weight.shape) != tuple(target.shape):
            raise ValueError(
                f"{op}: token_weight must be of the target's shape {list(target.shape)}, got {list(token_weight.shape)}"
            )
        if token_weight.requires_grad:
            raise ValueError(f"{op}: token_weight gets no gradient; multiply the losses of reduction='none' instead")
    _check_devices(op, input, linear_weight, target, linear_bias, token_weight)


def linear_cross_entropy_call(
    input, linear_weight, target, *, linear_bias=None, weight=None, token_weight=None, ignore_index=None, options=None,
    shift=0, max_workspace_mb=None, max_targets=None, recompute=False, return_lse=False, return_accuracy=False,
    return_entropy=False, op="linear_cross_entropy", **more,
) -> LinearCrossEntropyCall:  # fmt: skip
    """The arguments of :func:`fastllm.functional.linear_cross_entropy`, checked. ``more``: fields of :class:`Loss`.

    ``op``: the function that was called, for errors.
    """
    loss = Loss(ignore_index=-100 if ignore_index is None else ignore_index, **more)
    _check_tensors(op, input, linear_weight, target, linear_bias, token_weight)
    check_integer(op, "shift", shift)
    max_workspace_mb = check_workspace(op, max_workspace_mb)
    if max_targets is not None:
        check_integer(op, "max_targets", max_targets)
    for name, flag in (("return_accuracy", return_accuracy), ("return_entropy", return_entropy)):
        check_flag(op, name, flag)
    if shift < 0 or (shift and target.dim() == 0):
        raise ValueError(f"{op}: shift must not be negative, and needs a dimension to shift along; got {shift}")
    if max_targets is not None and max_targets < 1:
        raise ValueError(f"{op}: max_targets must be positive, got {max_targets}")
    _check_class_weights(op, input, weight, linear_weight.shape[0])
    if weight is not None and weight.requires_grad:
        raise ValueError(f"{op}: weight requires a gradient, and class weights get none")
    skip = not (return_lse or return_entropy) and (max_targets is not None or input.device.type == "cpu")
    return LinearCrossEntropyCall(
        input, linear_weight, as_indices(target), linear_bias, weight, token_weight, loss.checked(op),
        shift=int(shift), recompute=recompute, return_lse=return_lse, return_accuracy=bool(return_accuracy),
        return_entropy=bool(return_entropy), op=op,
        chunking=Chunking(
            max_workspace_mb, max_targets if skip else None, skip_ignored=skip, for_entropy=bool(return_entropy)
        ),
    )  # fmt: skip


def is_whole(linear_weight, target) -> bool:
    """Whether the call has one of torch's other forms, for which all logits are held: probabilities, a 3-D weight."""
    tensors = isinstance(linear_weight, torch.Tensor) and isinstance(target, torch.Tensor)
    return tensors and (target.is_floating_point() or linear_weight.dim() > 2)


def check_whole(input, linear_weight, target, linear_bias, ignore_index, refused):
    """Checks a call in one of torch's other forms; cross_entropy checks the rest.

    ``refused``: names of options that are for class indices and a weight (V, D) -> whether they were given.
    """
    op = "linear_cross_entropy"
    for name, tensor in (("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None or name != "linear_bias":
            check_floating(op, name, tensor)
    if input.dim() not in (1, 2) or linear_weight.dim() < 2 or input.shape[-1] != linear_weight.shape[-1]:
        raise ValueError(
            f"{op}: input must be (N, D) or (D,) and linear_weight (V, ..., D) here, got {list(input.shape)} and "
            f"{list(linear_weight.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise ValueError(f"{op}: a linear_weight of shape {list(linear_weight.shape)} needs an input (N, D)")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"{op}: linear_bias must be of shape {list(linear_weight.shape[:-1])}, got {list(linear_bias.shape)}"
        )
    positions = (*input.shape[:-1], *linear_weight.shape[1:-1])
    probabilities = (*input.shape[:-1], *linear_weight.shape[:-1])
    expected = probabilities if target.is_floating_point() else positions
    if tuple(target.shape) != expected:
        kind = "class probabilities" if target.is_floating_point() else "class indices"
        raise ValueError(f"{op}: target must be {kind} of shape {list(expected)} here, got {list(target.shape)}")
    if target.is_floating_point() and ignore_index is not None:
        raise ValueError(f"{op}: ignore_index is for class indices, got {ignore_index} with class probabilities")
    _check_devices(op, input, linear_weight, target, linear_bias)
    if not _is_autocasted(input):
        _check_dtypes(op, input, linear_weight, linear_bias)
    for name, given in refused.items():
        if given:
            raise ValueError(f"{op}: {name} is for class indices and a linear_weight (V, D)")
