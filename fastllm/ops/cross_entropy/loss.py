"""The loss as a value: the options that cross_entropy and linear_cross_entropy share."""

from __future__ import annotations

import math
from typing import NamedTuple, get_type_hints

import torch

from ...backends import device_type_of
from ..shared.autograd import autocasts
from ..shared.check import check_choice, check_integer, check_number

REDUCTIONS = ("none", "mean", "sum")


class Loss(NamedTuple):
    """What is taken of the logits ``x``: the options of :func:`fastllm.functional.cross_entropy`, under their names.

    A field is an option. It reaches the operators by :data:`LOSS_SCHEMA`, and the kernels by its name.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    z_loss: float = 0.0
    reduction: str = "mean"

    def checked(self, op: str) -> Loss:
        """The same with plain floats. A value out of range: ValueError, or TypeError for ``ignore_index``."""
        floats = self.label_smoothing, 0.0 if self.softcap is None else self.softcap, self.logit_scale, self.z_loss
        plain = type(self.ignore_index) is int and all(type(x) is float for x in floats)
        check_integer(op, "ignore_index", self.ignore_index)
        if not plain:
            for name, value in zip(("label_smoothing", "softcap", "logit_scale", "z_loss"), floats, strict=True):
                check_number(op, name, value)
        check_choice(op, "reduction", self.reduction, REDUCTIONS)
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"{op}: label_smoothing must be between 0 and 1, got {self.label_smoothing}")
        if self.softcap is not None and not (0.0 < self.softcap < math.inf):
            raise ValueError(f"{op}: softcap must be positive and finite, or None; got {self.softcap}")
        if not -math.inf < self.logit_scale < math.inf:
            raise ValueError(f"{op}: logit_scale must be finite, got {self.logit_scale}")
        if not 0.0 <= self.z_loss < math.inf:
            raise ValueError(f"{op}: z_loss must be finite and not negative, got {self.z_loss}")
        if plain:
            return self
        return self._replace(
            ignore_index=int(self.ignore_index), label_smoothing=float(self.label_smoothing),
            softcap=None if self.softcap is None else float(self.softcap), logit_scale=float(self.logit_scale),
            z_loss=float(self.z_loss),
        )  # fmt: skip

    @property
    def is_torchs(self) -> bool:
        """Whether PyTorch's own cross-entropy has all of it."""
        return self.softcap is None and self.logit_scale == 1.0 and not self.has_penalty

    def of_logits(self, x: torch.Tensor) -> torch.Tensor:
        """The logits that the loss is taken of, scaled and soft-capped, in at least fp32."""
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.logit_scale != 1.0:
            z = z * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def divisor(self, total: torch.Tensor) -> torch.Tensor:
        """What a mean divides by where the targets' weights add up to ``total``: beside label smoothing NaN for 0.

        PyTorch takes the mean of the targets' own losses alone, which is 0 / 0 then, and adds the smoothing's.
        """
        return total if self.label_smoothing == 0.0 else torch.where(total == 0, math.nan, total)

    @property
    def has_penalty(self) -> bool:
        """Whether :meth:`penalty` adds anything."""
        return self.z_loss != 0.0

    def penalty(self, mass: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """What the z-loss adds to rows whose targets have the class weight ``mass``."""
        return self.z_loss * mass * lse.square()

    def penalty_slope(self, mass: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """The derivative of :meth:`penalty` by ``lse``."""
        return 2 * self.z_loss * mass * lse


_SCHEMA_TYPES = {int: "int", float: "float", float | None: "float?", str: "str"}
LOSS_SCHEMA = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(Loss).items())


class Labelled(NamedTuple):
    """Rows of logits, what they are held against, and the loss: what the kernels and the extension take.

    ``logits`` (B, C, S) with ``target`` (B, S) int64 class indices or (B, C, S) class probabilities; a chunk of
    linear_cross_entropy is (N, C) with (N,). ``weight``: (C,) contiguous class weights, or None.
    """

    logits: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None
    loss: Loss

    def flat(self) -> tuple:
        """The arguments of an operator, in the order of :data:`LABELLED_SCHEMA`."""
        return *self[:3], *self.loss

    @staticmethod
    def of(args: tuple) -> tuple[Labelled, tuple]:
        """What begins an operator's arguments, and the rest of them."""
        end = 3 + len(Loss._fields)
        logits, target, weight = args[:3]
        return Labelled(logits, target, weight, Loss(*args[3:end])), args[end:]


LABELLED_SCHEMA = f"Tensor logits, Tensor target, Tensor? weight, {LOSS_SCHEMA}"


def class_dim(input: torch.Tensor) -> int:
    """The dimension of the classes in ``input`` (C,) or (N, C, ...)."""
    return 0 if input.dim() == 1 else 1


def loss_dtype(input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.dtype:
    """torch's dtype of the loss: the input's, widened by floating targets and their weights; under autocast fp32."""
    dtype = input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
    if autocasts(device_type_of(input)):
        dtype = torch.promote_types(dtype, torch.float32)
    return dtype


def out_of_range(
    target: torch.Tensor, ignore_index: int, n_classes: int, op: str = "cross_entropy", *, shift: int = 0
) -> IndexError | None:
    """An error that names the first target that is not a class by its position in the caller's tensor, or None.

    The first ``shift`` targets along the last dimension are no input's.
    """
    position = _first_bad(target[..., shift:] if shift else target, ignore_index, n_classes)
    if position is None:
        return None
    if shift:
        position[-1] += shift
    where = f" at position {position}" if position else ""
    return _not_a_class(f"{op}: target {target[tuple(position)].item()}{where} is", ignore_index, n_classes)


def row_out_of_range(target: torch.Tensor, ignore_index: int, n_classes: int, op: str) -> IndexError | None:
    """The same where ``target`` no longer has the caller's shape: it names the row of logits."""
    target = target.flatten()
    position = _first_bad(target, ignore_index, n_classes)
    if position is None:
        return None
    (row,) = position
    return _not_a_class(f"{op}: target {target[row].item()} of row {row} of the logits is", ignore_index, n_classes)


def every_counts(target: torch.Tensor, ignore_index: int, n_classes: int) -> bool:
    """Whether all targets are classes and, what one look at the smallest and the largest can tell, none is ignored."""
    if target.numel() == 0:
        return False
    least, most = map(int, target.aminmax())
    return least >= 0 and most < n_classes and not least <= ignore_index <= most


def _first_bad(target: torch.Tensor, ignore_index: int, n_classes: int) -> list[int] | None:
    """The position of the first target that is not a class."""
    if target.numel() > 0:
        # One pass, and enough where nothing is ignored; a number compares 3 us faster than a tensor.
        least, most = map(int, target.aminmax())
        if least >= 0 and most < n_classes:
            return None
    bad = (target != ignore_index) & ((target < 0) | (target >= n_classes))
    return bad.nonzero()[0].tolist() if bad.any() else None


def _not_a_class(what: str, ignore_index: int, n_classes: int) -> IndexError:
    return IndexError(f"{what} out of range: expected a class in [0, {n_classes}) or ignore_index {ignore_index}")
