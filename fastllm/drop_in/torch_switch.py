"""torch's own switch: ``torch.nn.attention.activate_flash_attention_impl("fastllm")``.

While it is on, ``torch.nn.functional.scaled_dot_product_attention`` of the whole process is
:func:`fastllm.functional.scaled_dot_product_attention`, whatever its mask, dtype or head dim; nested tensors keep
torch's. ``torch.nn.attention.restore_flash_attention_impl()`` turns it off. Importing fastllm only makes the name
known.
"""

from __future__ import annotations

import contextlib
import threading

import torch
import torch.nn.attention

from ..functional import scaled_dot_product_attention

NAME = "fastllm"
# Tensors that need a gradient or may need one, and those of inference mode.
KEYS = ("AutogradCPU", "CPU", "AutogradCUDA", "CUDA")
_sdpa = torch.ops.aten.scaled_dot_product_attention.default


class _Inside(threading.local):
    """Whether this thread is in a call that is ours already: what that asks of torch is torch's own."""

    active = False


_inside = _Inside()


def _serve(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    if _inside.active:
        return _sdpa._op_dk(
            torch._C.DispatchKey.CompositeImplicitAutograd,
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    _inside.active = True
    try:
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    finally:
        _inside.active = False


class _Handle:
    """What torch keeps while the switch is on."""

    def __init__(self):
        self.library = torch.library.Library("aten", "IMPL")
        for key in KEYS:
            self.library.impl("scaled_dot_product_attention", _serve, key)
        _sdpa._dispatch_cache.clear()

    def remove(self) -> None:
        self.library._destroy()
        # Tracing keeps which kernel each key led to, and would go on looking for those that were just taken out.
        _sdpa._dispatch_cache.clear()


def register_switch() -> None:
    """Makes the name known to torch; does nothing on a torch without the registry, whose activation is missing too."""
    with contextlib.suppress(AttributeError):
        torch.nn.attention.register_flash_attention_impl(NAME, register_fn=_Handle)
