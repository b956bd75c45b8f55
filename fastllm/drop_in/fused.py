"""torch's fused inference of nn.TransformerEncoder, its layers and nn.MultiheadAttention, within accelerated().

torch takes that path only while no function mode is active, and accelerated() is one. So while a block is open, the
forwards of these three classes put the mode aside for the calls that torch serves by its fused kernels.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from .plain import has_hooks

CLASSES = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class SteppingAside(TorchFunctionMode):
    """A mode that is put aside where torch's fused inference serves."""


def _attention_is_fused(attention) -> bool:
    return (
        isinstance(attention, nn.MultiheadAttention)
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.num_heads % 2 == 0
        and attention.bias_k is None
        and attention.bias_v is None
        and not attention.add_zero_attn
    )


def _is_fused(module: nn.Module) -> bool:
    """Whether torch has a fused inference for ``module``, by what is fixed when it is built."""
    if isinstance(module, nn.TransformerEncoder):
        return all(isinstance(layer, nn.TransformerEncoderLayer) and _is_fused(layer) for layer in module.layers)
    if isinstance(module, nn.TransformerEncoderLayer):
        attention = module.self_attn
        return (
            _attention_is_fused(attention)
            and attention.in_proj_bias is not None
            and bool(module.activation_relu_or_gelu)
            and module.norm1.eps == module.norm2.eps
            and not any(has_hooks(part) for part in module.modules())
        )
    return _attention_is_fused(module)


def _takes_fused_inference(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    if torch.compiler.is_compiling() or module.training or torch.is_autocast_enabled():
        return False
    if not torch.backends.mha.get_fastpath_enabled():
        return False
    stack = _get_current_function_mode_stack()
    if not stack or not all(isinstance(mode, SteppingAside) for mode in stack):
        return False
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    if not tensors or tensors[0].dim() != 3:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *module.parameters())):
        return False
    return _is_fused(module)


@contextlib.contextmanager
def _no_modes() -> Iterator[None]:
    modes = [_pop_mode() for _ in _get_current_function_mode_stack()]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


def fused_inference(forward: Callable, module: nn.Module, *args, **kwargs):
    """``forward(module, ...)``, with accelerated() put aside where torch then takes its fused inference."""
    if not _takes_fused_inference(module, args, kwargs):
        return forward(module, *args, **kwargs)
    with _no_modes():
        return forward(module, *args, **kwargs)


class _Blocks:
    """Gives the classes such forwards while at least one block is open, in whatever thread."""

    def __init__(self):
        self.open = 0
        self.lock = threading.Lock()
        self.before: dict[type, tuple[Callable, Callable]] = {}

    def enter(self) -> None:
        with self.lock:
            self.open += 1
            if self.open == 1:
                self.before = {cls: (cls.forward, _aside(cls.forward)) for cls in CLASSES}
                for cls, (_, made) in self.before.items():
                    cls.forward = made

    def leave(self) -> None:
        with self.lock:
            self.open -= 1
            if self.open == 0:
                for cls, (forward, made) in self.before.items():
                    if cls.forward is made:  # else somebody has replaced it within the block
                        cls.forward = forward


def _aside(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def aside(self, *args, **kwargs):
        return fused_inference(forward, self, *args, **kwargs)

    return aside


_blocks = _Blocks()


@contextlib.contextmanager
def stepping_aside(mode: SteppingAside) -> Iterator[None]:
    """Within the block ``mode`` is active, but for torch's fused inference."""
    if torch.compiler.is_compiling():  # a compiler takes no fused inference
        with mode:
            yield
        return
    stack = _get_current_function_mode_stack()
    if stack and type(stack[-1]) is type(mode):  # a block within a block: twice would serve its own calls again
        yield
        return
    _blocks.enter()
    try:
        with mode:
            yield
    finally:
        _blocks.leave()
