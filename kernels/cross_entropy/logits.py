"""What the kernels of cross-entropy share: their arguments, the logits and their gradient, layouts and tiles.

A launch passes few small tuples. What is absent or off in them is None, which the compiler knows: the code for it is
left out. The loss comes as the op's ``Loss`` value, read by its fields' names.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import keyed, launch_options, next_power_of_2, tuned
from ..math import tanh

# 16 fp32 values a thread at 8 warps; chosen from compiled register counts (sm_90), not yet from timings.
TILE = 4096
# Positions of a tile where they are adjacent in memory, not the classes. A guess.
ADJACENT_POSITIONS = 32
# The gradient that the forward leaves and the backward's are the same bits. Both come from dlogits below. Whether the
# compiler fuses a product with the sum after it would depend on the code around them. So it fuses none in these
# kernels, except where the code says tl.fma.
EXACT = {"enable_fp_fusion": False}


class LogitPlane(NamedTuple):
    """A (B, C, S) tensor: its pointer and its strides."""

    ptr: Any
    outer: int
    classes: int
    inner: int


class LogitSizes(NamedTuple):
    """Positions to one element of the batch, positions in all, classes."""

    inner: int
    rows: int
    classes: int


class KernelLoss(NamedTuple):
    """The loss as kernels take it; smoothing, scale and cap are None where they change nothing."""

    ignore_index: int
    smoothing: float | None
    scale: float | None
    cap: float | None
    z_loss: float


def kernel_loss(loss) -> KernelLoss:
    scale = None if loss.logit_scale == 1.0 else loss.logit_scale
    return KernelLoss(loss.ignore_index, loss.label_smoothing or None, scale, loss.softcap, loss.z_loss)


@triton.jit
def effective(x, loss):
    """The logits that the loss is taken of, scaled and soft-capped, in fp32."""
    z = x.to(tl.float32)
    if loss.scale is not None:
        z *= loss.scale
    if loss.cap is not None:
        z = loss.cap * tanh(z / loss.cap)
    return z


@triton.jit
def class_weights(weight_ptr, cols, in_cols):
    """The classes' weights as a row of fp32, or None where there are none."""
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    else:
        weight = None
    return weight


@triton.jit
def penalty(mass, lse, loss):
    """What the z-loss adds to rows whose targets have the class weight ``mass``."""
    return loss.z_loss * mass * lse * lse


@triton.jit
def penalty_slope(mass, lse, loss):
    """The derivative of :func:`penalty` by ``lse``."""
    return 2.0 * loss.z_loss * mass * lse


@triton.jit
def negative_log_softmax(z, base, rel):
    """lse - z, from the statistics of the rows: ``base`` and lse less it, so that large logits lose nothing."""
    return rel[:, None] - (z - base[:, None])


@triton.jit
def dlogits(p, q, z, slope, weight, factor, n_classes, loss):
    """The gradient of a row's loss, times ``factor``. The target's own element is folded in here, in fp32."""
    if loss.smoothing is not None:
        q = tl.fma(q, 1.0 - loss.smoothing, loss.smoothing / n_classes)
    if weight is not None:
        q *= weight
    return through_transform(tl.fma(p, slope, -q) * factor, z, loss)


@triton.jit
def through_transform(dz, z, loss):
    """The gradient in the logits that were given, from that in the ones that the loss is taken of."""
    if loss.cap is not None:
        ratio = z / loss.cap
        dz *= tl.fma(-ratio, ratio, 1.0)
    if loss.scale is not None:
        dz *= loss.scale
    return dz


@triton.jit
def along(cols, stride, ADJACENT: tl.constexpr):
    """Offsets along the classes: 32 bits suffice only where the stride is 1."""
    return cols if ADJACENT else cols.to(tl.int64) * stride


def merge_positions(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, C, S) tensors as (1, C, B * S) where all of them have their positions at one stride.

    The stride of the dimension of size 1 is 0, which the compiler knows to be divisible: loads stay wide.
    """
    b, c, s = tensors[0].shape
    if s == 1:
        return tuple(t.as_strided((1, c, b), (0, t.stride(1), t.stride(0))) for t in tensors)
    if all(b == 1 or t.stride(0) == s * t.stride(2) for t in tensors):
        return tuple(t.as_strided((1, c, b * s), (0, t.stride(1), t.stride(2))) for t in tensors)
    return tensors


def logit_tile(x: torch.Tensor) -> tuple[bool, int, int]:
    """(classes are adjacent in memory, BLOCK_M positions, BLOCK_N classes) for (B, C, S).

    Whatever the number of positions: the tile orders a position's sums.
    """
    n_classes = x.shape[1]
    if x.stride(1) == 1:
        block_n = min(next_power_of_2(n_classes), TILE)
        return True, max(1, min(TILE // block_n, 32)), block_n
    # Half a tile: with class weights and probabilities 64-bit offsets along both sides would spill. ADJACENT_POSITIONS
    # fill 64 bytes in 16 bits, two sectors of memory.
    return False, ADJACENT_POSITIONS, min(next_power_of_2(n_classes), TILE // 2 // ADJACENT_POSITIONS)


def block_launch(kernel: str, x: torch.Tensor, most: int) -> tuple[int, dict]:
    """(BLOCK, options) of a kernel that takes ``x`` as one row, up to ``most`` elements at a time."""
    block = min(next_power_of_2(x.numel()), most)
    settings = tuned(kernel, x.device, (block, x.element_size()), dict(BLOCK=block, num_warps=warps_for(block)))
    return settings["BLOCK"], launch_options(x.device, num_warps=settings["num_warps"], **EXACT)


def warps_for(elements: int) -> int:
    """Warps for a tile: 16 elements to a thread, at most 8."""
    return max(1, min(8, elements // 512))


keyed(effective)
