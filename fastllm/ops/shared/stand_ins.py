"""Arguments that stand for tensors without being any, such as the proxies that torch.fx traces with.

PyTorch's functions let ``__torch_function__`` of such an argument say what becomes of the call; so do the public ops.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.overrides import handle_torch_function


def stands_in(value) -> bool:
    """Whether ``value`` stands for a tensor."""
    if value is None or isinstance(value, torch.Tensor):
        return False
    return hasattr(type(value), "__torch_function__")


def any_stands_in(*values) -> bool:
    """Whether one of ``values``, or of a sequence among them, stands for a tensor."""
    for value in values:
        if isinstance(value, list | tuple):
            if any_stands_in(*value):
                return True
        elif stands_in(value):
            return True
    return False


def overridden(function: Callable, *args, **options):
    """What the arguments that stand for tensors make of a call of ``function``. torch.fx records it as one node."""
    flat = [value for arg in args for value in (arg if isinstance(arg, list | tuple) else (arg,))]
    given = [value for value in (*flat, *options.values()) if stands_in(value)]
    return handle_torch_function(function, given, *args, **options)


def as_leaf(module: torch.nn.Module, *args, **options):
    """A call of ``module`` as one node of what torch.fx records, as it records calls of torch.nn's modules.

    None where ``module`` is itself what is traced, or the arguments are no proxies.
    """
    proxies = [value for value in (*args, *options.values()) if isinstance(value, torch.fx.Proxy)]
    if not proxies:
        return None
    tracer = proxies[0].tracer
    if not isinstance(tracer, torch.fx.Tracer) or module is tracer.root:
        return None
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, options)
