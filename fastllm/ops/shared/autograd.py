"""Second order for kernels: a gradient's own gradient, through the op's eager formula. Autocast's state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch._C._functorch import is_legacy_batchedtensor, unwrap_if_dead

from ...backends import device_type_of, under_transform

Tensors = Sequence[torch.Tensor | None]


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for tensors of this type of device; False for one that has none, like meta."""
    # A CPU has it: to ask takes 0.3 us.
    available = device_type == "cpu" or torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str):
    """A context in which autocast is off for this type of device. Where it is off, torch's own would take 3 us."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else contextlib.nullcontext()


def autocasted(*tensors) -> tuple:
    """What torch's autocast does to the arguments of an operator that it runs in its dtype; None is passed over."""
    device_type = device_type_of(tensors[0])
    if not autocasts(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def apply(function: type[torch.autograd.Function], *args):
    """``function.apply(*args)``, all arguments given in order.

    torch's own binds them to the signature of ``forward`` at every call, for defaults that are not needed here: on one
    core of an AMD EPYC 60 of the 106 us that rms_norm of 8 x 64 took.

    Where torch.compile traces, a tensor that is given twice goes in as itself and as a view of itself, since torch 2.13
    refuses it twice. That holds for tensors inside a NamedTuple too.
    """
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(args, []))
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if not torch.is_grad_enabled() and torch.autograd.forward_ad._current_level < 0:
        return function.forward(*unwrapped(args))  # no graph: 3 us less
    return apply_untransformed(function, *args)


def apply_untransformed(function: type[torch.autograd.Function], *args):
    """:func:`apply` where neither torch.compile nor a transform of torch.func is at work.

    ``forward`` may take the context itself then, so that what the backward alone needs is no output of it.
    """
    # The next class after torch.autograd.Function.
    return super(torch.autograd.Function, function).apply(*unwrapped(args))  # pyright: ignore[reportAttributeAccessIssue]  # no stub


def unwrapped(args: Sequence) -> list:
    """``args``, and tensors that outlived a transform without it, as in torch's own unwrap_dead_wrappers()."""
    return [unwrap_if_dead(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]


def with_elements(tensors: Tensors, blank: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """``tensors`` with one of ``blank``, which have no elements, for each None: an operator returns tensors alone."""
    return tuple(b if t is None else t for t, b in zip(tensors, blank, strict=True))


def frozen(output: torch.Tensor, sources: Tensors) -> Tensors:
    """``(output,)`` where none of the ``sources`` that it depends on requires a gradient, else ``()``.

    autograd lets every output of a function require one where any input does, and PyTorch's own operators do not: a
    function marks these as not differentiable.
    """
    return () if any(source is not None and source.requires_grad for source in sources) else (output,)


def _distinct(args: Sequence, found: list) -> list:
    """``args`` with a view in place of each tensor that has come before; ``found``: those that have."""
    result = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            arg = arg.view_as(arg) if any(arg is other for other in found) else arg
            found.append(arg)
        elif isinstance(arg, tuple) and hasattr(arg, "_fields"):
            arg = type(arg)(*_distinct(arg, found))
        result.append(arg)
    return result


def _pulled(formula: Callable, inputs: Tensors, wanted: Sequence[int], outputs_grad: Tensors):
    """The gradients of ``formula`` for the inputs numbered ``wanted``, by PyTorch's operators."""

    def of_wanted(*values):
        merged = list(inputs)
        for i, value in zip(wanted, values, strict=True):
            merged[i] = value
        outputs = formula(*merged)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    outputs, pull, *_ = torch.func.vjp(of_wanted, *[inputs[i] for i in wanted])
    return pull(tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, outputs_grad, strict=True)))


def traced(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has no values, or a tracer records what becomes of it: then operators alone may look at it."""
    modes = torch._C._TorchDispatchModeKey
    return type(tensor) is not torch.Tensor or torch._C._get_dispatch_mode(modes.PROXY) is not None


# Subclasses that change nothing of what operators do.
PLAIN = (torch.Tensor, torch.nn.Parameter)


def unwatched(*tensors: torch.Tensor | None) -> bool:
    """Whether an operator's launcher may be called itself on CPU ``tensors``, without PyTorch's dispatcher.

    They have values then, and no mode, transform or tracer looks at operators. The dispatcher takes 20 us to hand 30
    arguments to Python and 9 results back.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return all(tensor is None or (type(tensor) in PLAIN and tensor.is_cpu) for tensor in tensors)


def scalable(*grads: torch.Tensor | None) -> bool:
    """Whether gradients may be multiplied in place by the upstream gradients ``grads``: not where those are batched."""
    return not under_transform() and not any(grad is not None and is_legacy_batchedtensor(grad) for grad in grads)


class _Gradients(torch.autograd.Function):
    """The wanted gradients from ``launch``, themselves differentiable in the inputs and in the output gradients."""

    @staticmethod
    def forward(launch, formula, needs, n_outputs, *tensors):
        n = len(needs)
        grads = launch(tensors[:n], tensors[n : n + n_outputs], tensors[n + n_outputs :], needs)
        return tuple(grad for grad, need in zip(grads, needs, strict=True) if need)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.formula, ctx.needs, ctx.n_outputs, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *second_grads):
        n = len(ctx.needs)
        tensors = ctx.saved_tensors
        primals = tensors[: n + ctx.n_outputs]
        given = [i for i, tensor in enumerate(primals) if tensor is not None]
        wanted = [i for i in range(n) if ctx.needs[i]]

        def first_order(*values):
            full = [None] * len(primals)
            for i, value in zip(given, values, strict=True):
                full[i] = value

            return _pulled(ctx.formula, full[:n], wanted, full[n:])

        _, pull, *_ = torch.func.vjp(first_order, *[primals[i] for i in given])
        result = [None] * len(tensors)
        for i, grad in zip(given, pull(tuple(second_grads)), strict=True):
            result[i] = grad
        return (None, None, None, None, *result)


def gradients(
    launch: Callable,
    formula: Callable,
    inputs: Tensors,
    needs: Sequence[bool],
    outputs_grad: Tensors,
    extras: Tensors = (),
) -> tuple[torch.Tensor | None, ...]:
    """What a kernel-backed ``backward`` returns for ``inputs``: right to any order, None where not needed.

    Args:
        launch: ``launch(inputs, outputs_grad, extras, needs)`` -> a gradient for each input, by kernels; what it
            returns for an input that needs none is dropped.
        formula: the op in eager PyTorch, ``formula(*inputs)`` -> its differentiable outputs, one for each of
            ``outputs_grad``. It runs only where the gradients themselves are differentiated (double
            backward), or under vmap and in forward mode.
        inputs: the op's floating-point inputs as saved; None for an absent one.
        needs: for each input, whether its gradient is wanted.
        outputs_grad: the incoming gradients; None for an output that was not used.
        extras: tensors that the forward saved for the kernel alone (mean, lse, ...).
    """
    needs = tuple(needs)
    if under_transform():
        wanted = [i for i, need in enumerate(needs) if need]
        grads = iter(_pulled(formula, inputs, wanted, outputs_grad))
        return tuple(next(grads) if need else None for need in needs)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        grads = iter(apply(_Gradients, launch, formula, needs, len(outputs_grad), *inputs, *outputs_grad, *extras))
        return tuple(next(grads) if need else None for need in needs)
    grads = launch(inputs, outputs_grad, extras, needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
