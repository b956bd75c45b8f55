"""Device functions that more than one kernel needs, written so that they also run in Triton's interpreter."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """To about 2 ulp of fp32 everywhere; near 0 by its series, where (1 - e) / (1 + e) would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0, -large, large)
    q = tl.minimum(x * x, 0.0625)
    series = 1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835 - q * (1382 / 155925)))))
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
