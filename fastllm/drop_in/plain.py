"""When a swapped forward may take a call; every other one goes to the forward that it replaced."""

from __future__ import annotations

import torch
from torch.nn.modules import module as torch_modules

from ..ops.shared.autograd import PLAIN

_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]  # not in torch's stubs


def plain(first, *others) -> bool:
    """Whether all are ordinary dense tensors on a CPU or GPU, outside vmap, jvp and forward-mode differentiation.

    Each of ``others`` may be None, as an optional parameter is; ``first`` may not.
    DTensors, quantised, nested and fake tensors are not: what they mean is their own class's affair. Nor is anything
    within torch.jit.trace: a trace is saved, and loaded where there are torch's operators alone. No module is left out.
    """
    if first is None:
        return False
    for tensor in (first, *others):
        if tensor is None:
            continue
        if type(tensor) not in PLAIN or not (tensor.is_cpu or tensor.is_cuda):
            return False
        if tensor.layout != torch.strided or tensor.is_nested:
            return False
    if torch.compiler.is_compiling():
        return True
    if torch._C._get_tracing_state() is not None:  # what torch.jit.is_tracing() asks
        return False
    return _functorch.peek_interpreter_stack() is None and torch.autograd.forward_ad._current_level < 0


def only_input(args: tuple, kwargs: dict, name: str):
    """The one input of a forward, given by place or by its ``name``; None where anything else is given."""
    if len(args) == 1 and not kwargs:
        return args[0]
    return kwargs.get(name) if not args and len(kwargs) == 1 else None


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether somebody looks at the inputs or outputs of ``module`` alone."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def hooked(module: torch.nn.Module) -> bool:
    """Whether somebody looks at ``module``'s inputs or outputs, or at every module's: they get what they expect."""
    return has_hooks(module) or bool(
        torch_modules._global_forward_hooks
        or torch_modules._global_forward_pre_hooks
        or torch_modules._global_backward_hooks
        or torch_modules._global_backward_pre_hooks
    )


def recorded() -> bool:
    """Whether operators are traced or counted as they run (compilers, make_fx, FlopCounterMode): then none may wait."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _holds(info, module: torch.nn.Module) -> bool:
    """Whether FSDP2's parameter of ``info`` is one of ``module``'s, its own or tied to another module's."""
    return info.module is module or any(shared is module for shared in info.shared_modules)


def freed_after_forward(module: torch.nn.Module) -> bool:
    """Whether FSDP frees ``module``'s parameters at the end of the forward of the module that they are sharded with.

    What is computed later, outside that forward, would find them gone. True also where FSDP2's own record of it, which
    is not public, cannot be read, and for weights that are no parameters at the time: FSDP1's views.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    if module._parameters.get("weight") is None:
        return True
    try:
        from torch.distributed._composable_state import _module_state_mapping

        for reference in list(_module_state_mapping.values()):
            state = reference()
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:
                groups = [getattr(state, "_fsdp_param_group", None)]
            for group in groups:
                if group is not None and any(_holds(p._module_info, module) for p in group.fsdp_params):
                    return group.post_forward_mesh_info is not None
    except (ImportError, AttributeError):
        return True
    return False
