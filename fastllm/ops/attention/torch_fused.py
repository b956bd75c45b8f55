"""Plain calls on a GPU that torch's fused attention serves: those in which it was measured faster than our kernels.

A profile shows who ran: ``fastllm::attention_fwd`` is ours, ``aten::_scaled_dot_product_*`` torch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...backends import chosen_backend

# (architecture, head dim, causal, dtype, "forward" or "training") -> the name of the faster SDPBackend. "training" is
# forward and backward together, since one library must do both. An entry says on which GPU it was measured, when, and
# both times. Nothing has been measured yet.
FASTER: dict[tuple[int, int, bool, torch.dtype, str], str] = {}


def architecture(device_type: str) -> int | None:
    """10 * major + minor of the current GPU, None on other devices."""
    if device_type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def faster_in_torch(q, k, v, causal: bool) -> str | None:
    """The SDPBackend for a call of (B, H, S, D) tensors with nothing but causal, or None where the kernels serve it.

    Only ``auto`` leaves the kernels. torch's must be able to take the layout, whose start cannot be seen while a call
    is compiled; and its backward sums in no fixed order.
    """
    if not FASTER or chosen_backend() != "auto" or torch.compiler.is_compiling():
        return None
    arch = architecture(q.device.type)
    if arch is None or q.shape[:2] != k.shape[:2] or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        return None
    if q.numel() == 0 or k.numel() == 0 or (causal and q.shape[2] != k.shape[2]):
        return None
    size = 16 // q.element_size()
    if any(x.stride(3) != 1 or any(n % size for n in (x.storage_offset(), *x.stride()[:3])) for x in (q, k, v)):
        return None
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if training and torch.are_deterministic_algorithms_enabled():
        return None
    return FASTER.get((arch, q.shape[-1], causal, q.dtype, "training" if training else "forward"))


def torch_attention(name: str, q, k, v, causal: bool, scale: float):
    """The call by torch's SDPBackend ``name``."""
    with sdpa_kernel(getattr(SDPBackend, name)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def torch_exception(device_type: str) -> str | None:
    """What ``info`` says of it."""
    arch = architecture(device_type) if chosen_backend() == "auto" else None
    if arch is None:
        return None
    cases = [
        f"head dim {dim}{' causal' if causal else ''} {str(dtype).removeprefix('torch.')} {direction}: {name}"
        for (of, dim, causal, dtype, direction), name in FASTER.items()
        if of == arch
    ]
    if not cases:
        return f"no plain call has been measured faster in torch's fused attention on sm_{arch}"
    return f"plain calls measured faster in torch's: {', '.join(cases)}"
