"""Small ordinary calls of attention on a CPU: they are PyTorch's, which is known at once. All checks, the form and the
choice take 12 to 18 us.

4 heads of 8 x 64 in float32 take PyTorch 8 us on one core of an AMD EPYC, and 45 forward and backward. What is ordinary
has float32, heads and lengths that are the same for query, key and value, and no option but a causal edge and a scale.
:func:`fastllm.backends.pick` decides the same of such a call, and says why.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...backends import free_for_torch
from ..shared.autograd import PLAIN, autocasts
from .forms import MIN_NORMAL
from .native import is_small


def _is_ordinary(x, shape) -> bool:
    return type(x) in PLAIN and x.dtype is torch.float32 and x.is_cpu and x.layout is torch.strided and x.shape == shape


def ordinary_attention(query, key, value, causal, scale) -> torch.Tensor | None:
    """The output of a small ordinary call (B, H, S, D), or None where a call is not that."""
    # First: a compiler would keep what is asked of sizes below.
    if torch.compiler.is_compiling() or not free_for_torch() or autocasts("cpu"):
        return None
    if type(query) not in PLAIN or query.is_nested or query.dim() != 4 or query.numel() == 0:
        return None
    if type(key) not in PLAIN or type(value) not in PLAIN or key.is_nested or value.is_nested:
        return None
    shape = query.shape
    # One query may be the extension's.
    if shape[2] == 1 or not (_is_ordinary(query, shape) and _is_ordinary(key, shape) and _is_ordinary(value, shape)):
        return None
    if type(causal) is not bool or not is_small(shape, shape[2], causal):
        return None
    if scale is not None and not (type(scale) is float and MIN_NORMAL <= scale <= 1 / MIN_NORMAL):
        return None
    # Forward mode is one of them, or at work without them.
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return None
    return F.scaled_dot_product_attention(query, key, value, None, 0.0, causal, scale=scale)
