"""A call of linear_kl_div, checked, as one value."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..shared.autograd import autocasts
from ..shared.check import check_choice, check_dense, check_floating, check_integer, check_number, check_workspace
from .call import as_indices
from .loss import REDUCTIONS

DIRECTIONS = ("forward", "reverse", "jsd")
_NAME = "linear_kl_div"


class Divergence(NamedTuple):
    """What is taken of two rows of logits, and how many rows at a time."""

    direction: str
    beta: float
    temperature: float
    softcap: float | None
    teacher_softcap: float | None
    ignore_index: int
    reduction: str
    max_workspace_mb: float | None


class LinearKLDivCall(NamedTuple):
    """A call of :func:`fastllm.functional.linear_kl_div`.

    ``teacher_input``: hidden states where there is a ``teacher_weight``, probabilities where there are
    ``teacher_indices``, else logits.
    """

    input: torch.Tensor
    linear_weight: torch.Tensor
    linear_bias: torch.Tensor | None
    teacher_input: torch.Tensor
    teacher_weight: torch.Tensor | None
    teacher_bias: torch.Tensor | None
    teacher_indices: torch.Tensor | None
    target: torch.Tensor | None
    divergence: Divergence

    def tensors(self):
        return self.layers()

    def layers(self):
        """What may get a gradient: the student's layer and the teacher's."""
        return self[:6]

    def flat(self) -> tuple:
        """The arguments of an operator, in the order of :data:`KL_SCHEMA`."""
        return *self[:8], *self.divergence

    @staticmethod
    def of(args: tuple) -> tuple[LinearKLDivCall, tuple]:
        """What begins an operator's arguments, and the rest of them."""
        end = 8 + len(Divergence._fields)
        return LinearKLDivCall._make((*args[:8], Divergence(*args[8:end]))), args[end:]

    def rows(self) -> LinearKLDivCall:
        """With one leading dimension."""
        if self.input.dim() == 2:
            return self

        def flat(t, beside=1):
            return None if t is None else t.reshape(self.n_rows, *t.shape[t.dim() - beside :])

        return self._replace(
            input=flat(self.input), teacher_input=flat(self.teacher_input),
            teacher_indices=flat(self.teacher_indices), target=flat(self.target, 0),
        )  # fmt: skip

    @property
    def n_rows(self) -> int:
        return math.prod(self.input.shape[:-1])

    @property
    def wide(self) -> torch.dtype:
        """What rows are computed in."""
        return torch.promote_types(self.input.dtype, torch.float32)

    def under_autocast(self) -> LinearKLDivCall:
        """With the layers in autocast's dtype, where that is on. TypeError: the dtypes of a layer's tensors differ."""
        call = self
        if autocasts(self.input.device.type):
            narrow = torch.get_autocast_dtype(self.input.device.type)
            names = ["input", "linear_weight", "linear_bias"]
            if self.teacher_weight is not None:
                names += ["teacher_input", "teacher_weight", "teacher_bias"]
            given = ((name, getattr(self, name)) for name in names)
            call = self._replace(
                **{name: t.to(narrow) for name, t in given if t is not None and t.dtype != torch.float64}
            )
        teacher = call.teacher_input.dtype if call.teacher_weight is not None else None
        for name, tensor, beside, dtype in (
            ("linear_weight", call.linear_weight, "input", call.input.dtype),
            ("linear_bias", call.linear_bias, "input", call.input.dtype),
            ("teacher_weight", call.teacher_weight, "teacher_input", teacher),
            ("teacher_bias", call.teacher_bias, "teacher_input", teacher),
        ):
            if tensor is not None and tensor.dtype != dtype:
                raise TypeError(f"{_NAME}: {name} is {tensor.dtype}, {beside} {dtype}; they must agree")
        return call


KL_SCHEMA = (
    "Tensor x, Tensor w, Tensor? bias, Tensor teacher_x, Tensor? teacher_w, Tensor? teacher_bias,"
    " Tensor? teacher_indices, Tensor? target, str direction, float beta, float temperature, float? softcap,"
    " float? teacher_softcap, int ignore_index, str reduction, float? max_workspace_mb"
)


def _check_layer(name: str, rows: str, x, weight, bias) -> None:
    """``name``: the weight's."""
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[0] == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{_NAME}: {name} must be (classes, features) and {rows} end in its features, got shapes "
            f"{list(weight.shape)} and {list(x.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        of = name.replace("weight", "bias")
        raise ValueError(f"{_NAME}: {of} must be of shape [{weight.shape[0]}], got {list(bias.shape)}")


def _check_teacher(call: LinearKLDivCall) -> None:
    """Its kind, vocabulary and positions."""
    teacher, indices, classes = call.teacher_input, call.teacher_indices, call.linear_weight.shape[0]
    if call.teacher_weight is not None:
        if indices is not None:
            raise ValueError(f"{_NAME}: teacher_indices are for probabilities, which have no teacher_weight; give one")
        _check_layer("teacher_weight", "teacher_input", teacher, call.teacher_weight, call.teacher_bias)
        if call.teacher_weight.shape[0] != classes:
            raise ValueError(
                f"{_NAME}: the teacher has another vocabulary: teacher_weight has {call.teacher_weight.shape[0]} "
                f"classes, linear_weight {classes}"
            )
    elif call.teacher_bias is not None:
        raise ValueError(f"{_NAME}: teacher_bias needs a teacher_weight")
    elif indices is not None:
        if indices.dtype not in (torch.int64, torch.int32) or indices.shape != teacher.shape or teacher.dim() == 0:
            raise ValueError(
                f"{_NAME}: teacher_indices must be int64 or int32 of teacher_input's shape {list(teacher.shape)}, got "
                f"{indices.dtype} of {list(indices.shape)}"
            )
        if call.divergence.direction == "reverse":
            raise ValueError(
                f"{_NAME}: direction 'reverse' is infinite where the teacher has probability 0, as all classes but "
                "those of teacher_indices have; 'forward' and 'jsd' are finite"
            )
        if call.divergence.teacher_softcap is not None or teacher.requires_grad:
            raise ValueError(f"{_NAME}: the teacher's probabilities take no teacher_softcap and get no gradient")
    elif teacher.dim() == 0 or teacher.shape[-1] != classes:
        raise ValueError(
            f"{_NAME}: without teacher_weight teacher_input must be logits of linear_weight's {classes} classes, or "
            f"probabilities with teacher_indices; got shape {list(teacher.shape)}"
        )
    if teacher.shape[:-1] != call.input.shape[:-1]:
        raise ValueError(
            f"{_NAME}: teacher_input must have input's positions {list(call.input.shape[:-1])}, got "
            f"{list(teacher.shape[:-1])}"
        )


def _checked_divergence(divergence: Divergence) -> Divergence:
    direction, beta, temperature, softcap, teacher_softcap, ignore_index, reduction, workspace = divergence
    check_integer(_NAME, "ignore_index", ignore_index)
    check_choice(_NAME, "direction", direction, DIRECTIONS)
    check_choice(_NAME, "reduction", reduction, REDUCTIONS)
    numbers = {"beta": beta, "temperature": temperature, "softcap": softcap, "teacher_softcap": teacher_softcap}
    for name, value in numbers.items():
        if value is not None or name in ("beta", "temperature"):
            check_number(_NAME, name, value)
        if name != "beta" and value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"{_NAME}: {name} must be positive and finite, got {value}")
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f"{_NAME}: beta must be between 0 and 1, both excluded, got {beta}; at 0 and 1 the divergence of 'jsd' is "
            "0, and what it tends to is direction 'forward' and 'reverse'"
        )
    workspace = check_workspace(_NAME, workspace)
    softcap, teacher_softcap = (None if value is None else float(value) for value in (softcap, teacher_softcap))
    return Divergence(
        direction, float(beta), float(temperature), softcap, teacher_softcap, ignore_index, reduction, workspace
    )


def linear_kl_div_call(
    input, linear_weight, teacher_input, teacher_weight=None, *, target=None, direction="forward", beta=0.5,
    temperature=1.0, ignore_index=-100, reduction="mean", max_workspace_mb=None, linear_bias=None, teacher_bias=None,
    teacher_indices=None, softcap=None, teacher_softcap=None,
) -> LinearKLDivCall:  # fmt: skip
    """The arguments of :func:`fastllm.functional.linear_kl_div`, checked."""
    floating = dict(
        input=input, linear_weight=linear_weight, teacher_input=teacher_input, teacher_weight=teacher_weight,
        linear_bias=linear_bias, teacher_bias=teacher_bias,
    )  # fmt: skip
    for name, tensor in floating.items():
        if tensor is not None or name in ("input", "linear_weight", "teacher_input"):
            check_floating(_NAME, name, tensor)
    others = dict(teacher_indices=teacher_indices, target=target)
    for name, tensor in others.items():
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{_NAME}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor is not None:
            check_dense(_NAME, name, tensor)
    for name, tensor in {**floating, **others}.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{_NAME}: {name} is on {tensor.device}, input on {input.device}; they must be together")
    divergence = _checked_divergence(
        Divergence(
            direction=direction, beta=beta, temperature=temperature, softcap=softcap, teacher_softcap=teacher_softcap,
            ignore_index=ignore_index, reduction=reduction, max_workspace_mb=max_workspace_mb,
        )
    )  # fmt: skip
    _check_layer("linear_weight", "input", input, linear_weight, linear_bias)
    if target is not None and target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TypeError(f"{_NAME}: target must hold integers, int64, int32 or uint8, got {target.dtype}")
    if target is not None and target.shape != input.shape[:-1]:
        raise ValueError(f"{_NAME}: target must be of shape {list(input.shape[:-1])}, got {list(target.shape)}")
    call = LinearKLDivCall(
        input, linear_weight, linear_bias, teacher_input, teacher_weight, teacher_bias,
        teacher_indices, None if target is None else as_indices(target), divergence,
    )  # fmt: skip
    _check_teacher(call)
    return call.under_autocast()
