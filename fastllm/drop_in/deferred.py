"""Tensors that are computed when somebody looks: the logits of a head, the rows of an embedding.

A head that is followed by cross-entropy need not compute its logits, and two embeddings that are added need not each
be written. Neither module sees what becomes of its output. So each gives a :class:`Deferred`: a tensor of the right
shape, dtype and device that remembers how it is made. ``F.cross_entropy`` of deferred logits is
``linear_cross_entropy``, the sum of deferred rows is ``embedding_sum``, and everything else that anyone does with one
computes its values first and goes on with those. Autograd knows it as the output of its own node, so it has a gradient
wherever it goes, also through code that never asks Python.

Reading a deferred tensor after its weights have changed (logits after the optimizer's step) cannot give what the
forward would have given, and raises; so does asking for the gradient at logits whose loss has been taken already, and
at rows whose sum has been.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils import _pytree as pytree

# Functions of a tensor that do not look at its values.
METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_sparse",
                 "is_nested", "is_quantized", "is_leaf", "grad_fn", "itemsize", "nbytes", "is_meta", "is_mkldnn")
} | {
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.numel, torch.Tensor.nelement,
    torch.Tensor.stride, torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.get_device,
    torch.Tensor.element_size, torch.Tensor.__len__, torch.is_floating_point, torch.is_complex, torch.numel,
    torch.Tensor.is_contiguous,
}  # fmt: skip
DIFFERENTIATE = {torch.autograd.backward, torch.autograd.grad, torch.Tensor.backward}
WATCH = {torch.Tensor.register_hook, torch.Tensor.retain_grad}
_grad = vars(torch._C.TensorBase)["grad"].__get__


class Deferred(torch.Tensor):
    """A tensor whose values come from ``plan`` when they are needed; see the module's docstring.

    ``plan.consumed``: its use was computed without its values, so no gradient passes through them. ``plan.too_late`` is
    what the error says that answers whoever asks for one.
    """

    plan: Any  # a Logits or a Rows

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in METADATA:
            return _unread(func, *pytree.tree_map_only(Deferred, _known_of, (args, kwargs)))
        if func == _grad and not _keeps_its_gradient(args[0].plan.value):
            return _unread(func, args, kwargs)  # where a backward's ``inputs`` have put it
        if func in WATCH and _by_distributed(args):
            return _unread(func, args, kwargs)
        for tensor in _differentiated(func, args, kwargs):
            if tensor.plan.consumed:
                raise RuntimeError(tensor.plan.too_late)
        for tensor in pytree.arg_tree_leaves(*args, **kwargs):
            if isinstance(tensor, Deferred) and tensor.plan.value is None:
                result = tensor.plan.handle(tensor, func, args, kwargs)
                if result is not NotImplemented:
                    return result
        # A backward within a backward runs without recording, and still needs the values' place in the graph.
        with torch.set_grad_enabled(torch.is_grad_enabled() or func in DIFFERENTIATE):
            args, kwargs = pytree.tree_map_only(Deferred, value_of, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Code below Python's reach; autograd has recorded the call already, on the node that made this tensor.
        args, kwargs = pytree.tree_map_only(Deferred, lambda t: value_of(t).detach(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **kwargs):
        return repr(value_of(self))


def _known_of(tensor: Deferred) -> torch.Tensor:
    """The values where they are there, which may have been changed in place, or ``tensor``."""
    return tensor if tensor.plan.value is None else tensor.plan.value


def _keeps_its_gradient(value) -> bool:
    return value is not None and (value.is_leaf or value.retains_grad)


def _unread(func, args, kwargs):
    """What ``func`` gives of the tensor that stands for values."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _by_distributed(args) -> bool:
    """Whether a hook is that of FSDP or DDP, which want to know of the backward and not of its gradients."""
    hook = args[1] if len(args) > 1 else None
    # FSDP1's is a partial function. It has to run, so logits whose loss is still to come are read for it.
    if isinstance(hook, functools.partial) and args[0].plan.consumed:
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def _differentiated(func, args, kwargs) -> list[Deferred]:
    """The deferred tensors whose gradient ``func`` asks for."""
    if func in WATCH:
        asked = args[:1]
    elif func in DIFFERENTIATE:
        asked = inspect.signature(func).bind(*args, **kwargs).arguments.get("inputs")
    else:
        return []
    return [tensor for tensor in pytree.tree_leaves(asked) if isinstance(tensor, Deferred)]


def value_of(tensor):
    """``tensor`` itself, or what a :class:`Deferred` stands for, with its place in the graph."""
    return tensor.plan.read(tensor) if type(tensor) is Deferred else tensor


@contextlib.contextmanager
def as_in_the_forward(grad: bool) -> Iterator[None]:
    """For computing values where they are read as the forward would have, ``grad``: whether autograd records it.

    Outside inference mode, whose tensors have no gradient; outside vmap and grad, which the forward was no part of; and
    without the hooks on saved tensors that are set by now: a checkpoint around the reader would count what is saved
    here, and find less when it runs the reader again.
    """
    autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]  # not in torch's stubs
    hooks = []
    with torch.inference_mode(False), temporarily_clear_interpreter_stack(), torch.set_grad_enabled(grad):
        while (pair := autograd._top_saved_tensors_default_hooks(True)) is not None:
            hooks.append(pair)
            autograd._pop_saved_tensors_default_hooks()
        try:
            yield
        finally:
            for pair in reversed(hooks):
                autograd._push_saved_tensors_default_hooks(*pair)


class _Defer(torch.autograd.Function):
    """A :class:`Deferred` as the output of a node: ``plan`` gives its shape and dtype, and its gradient."""

    @staticmethod
    def forward(ctx, plan, *inputs):
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        # What is derived from a deferred tensor finds it in its plan; hooks on saved tensors would read its values.
        ctx.save_for_backward(*(t for t in inputs if type(t) is not Deferred))
        tensor: Any = torch.Tensor._make_wrapper_subclass(
            Deferred, plan.shape, strides=plan.strides, dtype=plan.dtype, device=inputs[0].device, requires_grad=False
        )
        tensor.plan = plan
        return tensor

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, *ctx.plan.gradients(grad, ctx.saved_tensors, ctx.needs_input_grad[1:])


def defer(plan, *inputs) -> Deferred:
    """The deferred tensor of ``plan``, a function of ``inputs`` as far as autograd is concerned."""
    return _Defer.apply(plan, *inputs)
