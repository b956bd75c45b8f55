"""Device functions that more than one kernel needs, written so that they also run in Triton's interpreter."""

import triton
import triton.language as tl

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
def is_kept(seed, rows, cols, p):
    """A (rows, cols) mask that is True with probability 1 - p, a function of seed and position alone (Philox-4x32-10).

    ``rows`` (M,) below 2^31 and ``cols`` (N,). Forward and backward draw the same, whatever their tiles.
    """
    zero = tl.zeros((rows.shape[0], cols.shape[0]), tl.int32)
    bits, _, _, _ = tl.philox(seed, zero + cols.to(tl.int32)[None, :], zero + rows.to(tl.int32)[:, None], zero, zero)
    return tl.uint_to_uniform_float(bits) >= p


@triton.jit
def starts(rows, inner, stride_outer, stride_inner):
    """Where rows begin; see :class:`.launch.RowLayout`."""
    return (rows // inner) * stride_outer + (rows % inner) * stride_inner
