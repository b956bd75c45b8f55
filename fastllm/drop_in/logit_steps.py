"""What code does to logits before their loss, without computing them: reshapes, casts, scales, a soft cap."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch.utils import _pytree as pytree


def _number(value) -> float | None:
    """``value`` as a factor that kernels take, or None."""
    if type(value) not in (int, float):
        return None
    try:
        return float(value) if math.isfinite(value) and value != 0 else None
    except OverflowError:
        return None


def step_after(plan, tensor, func, args, kwargs):
    """The deferred tensor of ``func(tensor, *args, **kwargs)``, or NotImplemented where that needs the values.

    ``plan``: the :class:`~.logits.Logits` of ``tensor``.
    """
    step = _STEPS.get(getattr(func, "__name__", ""))
    return NotImplemented if step is None else step(plan, tensor, func, args, kwargs)


def _contiguous(plan, tensor, func, args, kwargs):
    if args or kwargs:
        return NotImplemented
    if plan.layout.is_contiguous():
        return tensor
    return plan.derive(tensor, lambda x: x.contiguous(), plan.form)


def _cast(plan, tensor, func, args, kwargs):
    if kwargs:
        return NotImplemented
    named = {"float": torch.float32, "double": torch.float64}.get(func.__name__)
    dtype = named or (args[0] if len(args) == 1 else None)
    if dtype is plan.dtype or dtype == plan.form.rows.device:
        return tensor
    if dtype is torch.float32 and plan.dtype.itemsize < 4:
        return plan.derive(tensor, lambda x: x.to(dtype), plan.form)
    return NotImplemented


def _scaled(plan, tensor, func, args, kwargs):
    form, number = plan.form, _number(args[0]) if len(args) == 1 else None
    if number is None or kwargs or form.softcap is not None:
        return NotImplemented
    factor = number if "mul" in func.__name__ else 1.0 / number
    if form.pending is not None:  # a soft cap ends with the number that tanh's argument was divided by
        if not math.isclose(factor, form.pending, rel_tol=1e-9):
            return NotImplemented
        scaled = form._replace(softcap=form.pending, pending=None, last=1.0)
    elif _number(form.scale * factor) is None:
        return NotImplemented
    else:
        scaled = form._replace(scale=form.scale * factor, last=factor)
    return plan.derive(tensor, lambda x: func(x, args[0]), scaled)


def _shifted(plan, tensor, func, args, kwargs):
    if len(args) != 1 or kwargs or not _is_shift(plan, args[0]):
        return NotImplemented
    layout = plan.layout + torch.empty_like(args[0], device="meta")
    shift = args[0].clone()  # as it is now, whatever becomes of it before the logits are made
    return plan.derive(tensor, lambda x: func(x, shift), plan.form._replace(shift=shift, last=1.0), layout)


def _bent(plan, tensor, func, args, kwargs):
    form = plan.form
    if args or kwargs or form.softcap is not None or form.pending is not None:
        return NotImplemented
    # tanh(z / cap), and cap to come: the scale before the division is the logits' own.
    return plan.derive(tensor, func, form._replace(scale=form.scale / form.last, pending=1.0 / form.last, last=1.0))


def _with_classes_last(step: Callable) -> Callable:
    """``step`` where the last dimension of the logits is that of the classes; NotImplemented elsewhere."""

    @functools.wraps(step)
    def checked(plan, *arguments):
        return step(plan, *arguments) if plan.form.class_dim == len(plan.shape) - 1 else NotImplemented

    return checked


@_with_classes_last
def _reshaped(plan, tensor, func, args, kwargs):
    sizes = args[0] if len(args) == 1 and isinstance(args[0], tuple | list | torch.Size) else args
    if kwargs or not sizes or not all(type(s) is int for s in sizes) or sizes[-1] != plan.shape[-1]:
        return NotImplemented
    rows = plan.form.rows
    form = plan.form.of_rows(rows.reshape(*sizes[:-1], rows.shape[-1]))
    return plan.derive(tensor, lambda x: func(x, *args), form)


@_with_classes_last
def _flattened(plan, tensor, func, args, kwargs):
    last = len(plan.shape) - 1
    if last < 2 or (tuple(args), dict(kwargs)) not in (((0, last - 1), {}), ((0, -2), {})):
        return NotImplemented
    return plan.derive(tensor, lambda x: func(x, *args), plan.form.of_rows(plan.form.rows.flatten(0, -2)))


@_with_classes_last
def _indexed(plan, tensor, func, args, kwargs):
    if not _keeps_classes(args[0], len(plan.shape)):
        return NotImplemented
    # A mask or numbers as they are now, whatever becomes of them before the logits are made.
    index = pytree.tree_map_only(torch.Tensor, torch.clone, args[0])
    rows = plan.form.rows[index]
    if rows.dim() < 2:
        return NotImplemented
    shape = (*rows.shape[:-1], plan.shape[-1])
    layout = None if _is_basic(index) else torch.empty(shape, dtype=plan.dtype, device="meta")
    return plan.derive(tensor, lambda x: func(x, index), plan.form.of_rows(rows), layout)


@_with_classes_last
def _transposed(plan, tensor, func, args, kwargs):
    if len(plan.shape) != 3 or not _swaps_the_last_two(func.__name__, args):
        return NotImplemented
    return plan.derive(tensor, lambda x: func(x, *args), plan.form._replace(class_dim=1, last=1.0))


# The name of a tensor's method -> the deferred step that it is: (plan, tensor, method, arguments, named arguments) to a
# deferred tensor, or to NotImplemented where the values are needed.
_STEPS: dict[str, Callable] = {
    "contiguous": _contiguous,
    **dict.fromkeys(("float", "to", "double", "half", "bfloat16"), _cast),
    **dict.fromkeys(("mul", "div", "true_divide", "__mul__", "__rmul__", "__truediv__", "__div__"), _scaled),
    **dict.fromkeys(("add", "__add__", "__radd__"), _shifted),
    "tanh": _bent,
    **dict.fromkeys(("view", "reshape"), _reshaped),
    "flatten": _flattened,
    "__getitem__": _indexed,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "permute"), _transposed),
}


def _is_shift(plan, other) -> bool:
    """Whether ``other`` is one constant for each class, as BART adds it, before any scale."""
    form = plan.form
    return (
        type(other) is torch.Tensor
        and not other.requires_grad
        and other.numel() == other.shape[-1] == plan.shape[-1]
        and other.dim() <= len(plan.shape)
        and (other.dtype, other.device) == (plan.product.weight.dtype, plan.product.weight.device)
        and plan.dtype == other.dtype
        and (form.scale, form.softcap, form.pending, form.shift) == (1.0, None, None, None)
        and form.class_dim == len(plan.shape) - 1
    )


def _swaps_the_last_two(name: str, args) -> bool:
    """Whether a method called so turns (B, T, V) to (B, V, T), as cross_entropy wants it."""
    if name in ("transpose", "swapaxes", "swapdims"):
        return all(type(a) is int for a in args) and sorted(a % 3 for a in args) == [1, 2]
    return name == "permute" and [tuple(a) if isinstance(a, list) else a for a in args] in ([0, 2, 1], [(0, 2, 1)])


def _is_basic(index) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(p, slice | int) or p is Ellipsis for p in parts)


def _keeps_classes(index, dims: int) -> bool:
    """Whether ``index`` leaves the last of ``dims`` dimensions whole, so that it may as well select hidden states."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(p is None or isinstance(p, bool | list) for p in parts):
        return False
    if not all(isinstance(p, slice | int) or p is Ellipsis or type(p) is torch.Tensor for p in parts):
        return False
    taken = sum(p.dim() if isinstance(p, torch.Tensor) and p.dtype == torch.bool else p is not Ellipsis for p in parts)
    if parts[-1] is Ellipsis or (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
        return taken <= dims
    return taken < dims and not any(p is Ellipsis for p in parts)
