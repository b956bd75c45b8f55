"""What the kernels of cross-entropy share: the transform of the logits, their gradient, layouts and tiles."""

import torch
import triton
import triton.language as tl

from ..launch import next_power_of_2
from ..math import tanh

# 16 fp32 values a thread at 8 warps; chosen from compiled register counts (sm_90), not yet from timings.
TILE = 4096


@triton.jit
def scaled(x, scale, cap, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr):
    """The logits that the loss is taken of, in fp32."""
    z = x.to(tl.float32)
    if HAS_SCALE:
        z *= scale
    if HAS_CAP:
        z = cap * tanh(z / cap)
    return z


@triton.jit
def dlogits(
    p, q, z, slope, weight, factor, smoothing, n_classes, scale, cap,
    HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The gradient of a row's loss, times ``factor``. The target's own element is folded in here, in fp32."""
    if SMOOTHING:
        q = (1.0 - smoothing) * q + smoothing / n_classes
    if HAS_WEIGHT:
        q *= weight
    return through_transform((p * slope - q) * factor, z, scale, cap, HAS_SCALE, HAS_CAP)


@triton.jit
def through_transform(dz, z, scale, cap, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr):
    if HAS_CAP:
        ratio = z / cap
        dz *= 1.0 - ratio * ratio
    if HAS_SCALE:
        dz *= scale
    return dz


@triton.jit
def along(cols, stride, ADJACENT: tl.constexpr):
    """Offsets along the classes: 32 bits suffice only where the stride is 1."""
    return cols if ADJACENT else cols.to(tl.int64) * stride


def merged(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, C, S) tensors as (1, C, B * S) where all of them have their positions at one stride.

    The stride of the dimension of size 1 is 0, which the compiler knows to be divisible: loads stay wide.
    """
    b, c, s = tensors[0].shape
    if s == 1:
        return tuple(t.as_strided((1, c, b), (0, t.stride(1), t.stride(0))) for t in tensors)
    if all(b == 1 or t.stride(0) == s * t.stride(2) for t in tensors):
        return tuple(t.as_strided((1, c, b * s), (0, t.stride(1), t.stride(2))) for t in tensors)
    return tensors


def tile(x: torch.Tensor) -> tuple[bool, int, int]:
    """(classes are adjacent in memory, BLOCK_M positions, BLOCK_N classes) for (B, C, S)."""
    _, n_classes, n_inner = x.shape
    if x.stride(1) == 1:
        block_n = min(next_power_of_2(n_classes), TILE)
        return True, max(1, min(TILE // block_n, next_power_of_2(n_inner), 32)), block_n
    # Half a tile: with class weights and probabilities 64-bit offsets along both sides would spill.
    block_m = min(next_power_of_2(n_inner), 64)
    return False, block_m, min(next_power_of_2(n_classes), TILE // 2 // block_m)


def warps(elements: int) -> int:
    return max(1, min(8, elements // 512))
