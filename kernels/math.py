"""Device functions that more than one kernel needs, written so that they also run in Triton's interpreter."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh to at most 4.8 ulp of fp32. Below 0.25 it is a series, to 1 ulp, since (1 - e) / (1 + e) cancels near 0.

    Measured in numpy's fp32 at 8.6 million x from 1e-10 to 32, where the mean error is 0.16 ulp. A continued fraction
    for |x| < 1 has 3.1 ulp at most and 0.25 ulp in the mean, and needs a second division.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0, -large, large)
    q = tl.minimum(x * x, 0.0625)
    # Fused where the launch fuses nothing by itself, too: kernels that must agree bit for bit switch that off.
    series = tl.fma(q, tl.fma(q, -1382 / 155925, 62 / 2835), -17 / 315)
    series = tl.fma(q, tl.fma(q, tl.fma(q, series, 2 / 15), -1 / 3), 1.0)
    return tl.where(tl.abs(x) < 0.25, x * series, large)


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
