"""Device functions that more than one kernel needs, written so that they also run in Triton's interpreter."""

import triton
import triton.language as tl

from .launch import keyed

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """tanh to at most 3.1 ulp of fp32: a continued fraction where |x| < 1, which does not cancel, exponentials beyond.

    Measured in numpy's fp32 at 8.6 million x from 1e-10 to 32, where the mean error is 0.25 ulp. A series for
    |x| < 0.25 saves a division and has 0.16 ulp in the mean, but 4.8 ulp at most; with it a kernel of attention spills.
    """
    square = x * x
    near = (
        x * (135135.0 + square * (17325.0 + square * (378.0 + square)))
        / (135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0)))
    )  # fmt: skip
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 1.0, near, tl.where(x < 0.0, -far, far))


@triton.jit
def is_kept(key, low, high, start, threshold, COLS: tl.constexpr):
    """(rows, COLS): which of the elements start .. start + COLS of the 64-bit rows (``low``, ``high``) dropout keeps.

    ``low`` is (rows,), ``high`` broadcasts to (rows, 1); ``start`` is a multiple of 4. Element j is kept where word
    j % 4 of Philox-4x32-10 with the 64-bit ``key`` and the counter (j // 4, low, high, 0) is at least ``threshold`` =
    p * 2^32, whatever the tile.
    """
    WIDTH: tl.constexpr = max(COLS, 4)
    groups = start // 4 + tl.arange(0, WIDTH // 4)
    zero = low[:, None].to(tl.uint32) * 0 + groups[None, :].to(tl.uint32) * 0
    c0 = zero + groups[None, :].to(tl.uint32)
    c1 = zero + low[:, None].to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, c0, c1, zero + high.to(tl.uint32), zero, 10)
    limit = tl.cast(threshold, tl.uint32)
    even = tl.join((w0 >= limit).to(tl.int8), (w2 >= limit).to(tl.int8))
    odd = tl.join((w1 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8))
    kept = tl.reshape(tl.join(even, odd), (low.shape[0], WIDTH))
    if COLS == 2:
        kept, _ = tl.split(tl.permute(tl.reshape(kept, (low.shape[0], 2, 2)), (0, 2, 1)))
    elif COLS == 1:
        kept = tl.sum(tl.where(tl.arange(0, 4)[None, :] == 0, kept, 0), axis=1)[:, None]
    return kept != 0


@triton.jit
def starts(rows, inner, stride_outer, stride_inner):
    """Where rows begin; see :class:`.launch.RowLayout`."""
    return (rows // inner) * stride_outer + (rows % inner) * stride_inner


@triton.jit
def block_count(n, BLOCK: tl.constexpr):
    """n / BLOCK rounded up, for n >= 1. Unlike tl.cdiv it does not overflow where n is the largest of its type."""
    return (n - 1) // BLOCK + 1


keyed(tanh)
