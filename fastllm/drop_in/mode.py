"""accelerated(): functional calls of any code inside the block go to fastllm's functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from .. import functional
from ..backends import BackendError
from .deferred import Deferred
from .fused import SteppingAside, stepping_aside
from .plain import plain

ROUTES: dict[Callable, Callable] = {
    F.layer_norm: functional.layer_norm,
    torch.layer_norm: functional.layer_norm,
    F.rms_norm: functional.rms_norm,
    torch.rms_norm: functional.rms_norm,
    F.cross_entropy: functional.cross_entropy,
    F.embedding: functional.embedding,
    F.linear: functional.linear,
    F.scaled_dot_product_attention: functional.scaled_dot_product_attention,
}
if hasattr(F, "linear_cross_entropy"):
    ROUTES[F.linear_cross_entropy] = functional.linear_cross_entropy


class _Accelerated(SteppingAside):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ours = ROUTES.get(func)
        if ours is not None and _serves(func, args, kwargs):
            try:
                return ours(*args, **kwargs)
            except BackendError:
                raise
            except (TypeError, ValueError, NotImplementedError):
                pass  # torch's own function takes it, or says in its own words why not
        return func(*args, **kwargs)


def _serves(func, args, kwargs) -> bool:
    leaves = pytree.arg_tree_leaves(*args, **kwargs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if any(isinstance(t, Deferred) for t in tensors) or not all(map(plain, tensors)):
        return False
    # torch.layer_norm has one argument more than F's.
    return func is not torch.layer_norm or (len(args) < 6 and "cudnn_enable" not in kwargs)


@contextlib.contextmanager
def accelerated() -> Iterator[None]:
    """Within the block, ``F.layer_norm``, ``rms_norm``, ``linear``, ``cross_entropy``, ``embedding``,
    ``scaled_dot_product_attention`` and ``linear_cross_entropy`` are fastllm's, whatever code calls them.

    Nothing outside the block changes, nor any other thread. A call that fastllm does not serve goes to torch. Calls
    that torch makes inside another overridable function (the attention within ``F.multi_head_attention_forward``) stay
    torch's: :func:`fastllm.accelerate` serves that module. So does the fused inference of ``nn.TransformerEncoder``,
    its layers and ``nn.MultiheadAttention``. A backend that was chosen explicitly and cannot run raises
    :class:`fastllm.BackendError`.
    """
    with stepping_aside(_Accelerated()):
        yield
