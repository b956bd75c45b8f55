"""The norms' forward for 16-bit rows that fill a multiprocessor's registers only if they stay 16-bit.

65536 columns are 128 KB of its 256 KB of registers, in fp32 all of them. So a row is held as pairs of columns in 32-bit
words, widened anew in each of the three passes over it: mean, variance, result. Formulas as in _norm.py.
"""

import torch
import triton
import triton.language as tl

from ..launch import OPTIONS, next_power_of_2
from ..math import starts

# Parts of a row: few enough words of weight and bias at a time. No spills on sm_80, sm_90, sm_100.
PARTS = 8


@triton.jit
def _words(ptr):
    return ptr.to(tl.pointer_type(tl.int32))


@triton.jit
def _low(word, T: tl.constexpr):
    """The pair's first column in fp32."""
    return (word & 0xFFFF).to(tl.int16).to(T, bitcast=True).to(tl.float32)


@triton.jit
def _high(word, T: tl.constexpr):
    return (word >> 16).to(tl.int16).to(T, bitcast=True).to(tl.float32)


@triton.jit
def _paired(low, high, T: tl.constexpr):
    """Both rounded to T, in one word."""
    low = low.to(T).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (high.to(T).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _norm_fwd_packed_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    x_inner, stride_xo, stride_xi, r_inner, stride_ro, stride_ri, n_cols, eps, offset, zero,
    CENTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``zero`` is 0, which the compiler does not know: it makes each pass widen the row again, where it would else keep
    the fp32 values of the pass before and spill them."""
    T: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    n_pairs = n_cols // 2
    pairs = tl.arange(0, BLOCK)
    x_words = _words(x_ptr + starts(row, x_inner, stride_xo, stride_xi))
    y_words = _words(y_ptr + row * n_cols)
    if HAS_RESIDUAL:
        residual_words = _words(residual_ptr + starts(row, r_inner, stride_ro, stride_ri))
        h_words = _words(h_ptr + row * n_cols)
    held = ()
    for part in tl.static_range(PARTS):
        at = part * BLOCK + pairs
        word = tl.load(x_words + at, mask=at < n_pairs, other=0, eviction_policy="evict_first")
        if HAS_RESIDUAL:
            more = tl.load(residual_words + at, mask=at < n_pairs, other=0)
            word = _paired(_low(word, T) + _low(more, T), _high(word, T) + _high(more, T), T)
            tl.store(h_words + at, word, mask=at < n_pairs)
        held = held + (word,)  # noqa: RUF005
    mean = 0.0
    again = zero
    if CENTER:
        total = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            total += _low(held[part], T) + _high(held[part], T)
        mean = tl.sum(total, axis=0) / n_cols
        tl.store(mean_ptr + row, mean)
        again = zero & mean.to(tl.int32, bitcast=True)
    square = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        low = _low(held[part] ^ again, T) - mean
        # The tail lanes hold 0, not mean.
        inside = part * BLOCK + pairs < n_pairs
        square += tl.where(inside, low * low, 0.0)
        high = _high(held[part] ^ again, T) - mean
        square += tl.where(inside, high * high, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(square, axis=0) / n_cols + eps)
    tl.store(rstd_ptr + row, rstd)
    again = zero & rstd.to(tl.int32, bitcast=True)
    for part in tl.static_range(PARTS):
        at = part * BLOCK + pairs
        word = held[part] ^ again
        low, high = (_low(word, T) - mean) * rstd, (_high(word, T) - mean) * rstd
        if HAS_WEIGHT:
            word = tl.load(_words(weight_ptr) + at, mask=at < n_pairs, other=0)
            low *= _low(word, weight_ptr.dtype.element_ty) + offset
            high *= _high(word, weight_ptr.dtype.element_ty) + offset
        if HAS_BIAS:
            word = tl.load(_words(bias_ptr) + at, mask=at < n_pairs, other=0)
            low += _low(word, bias_ptr.dtype.element_ty)
            high += _high(word, bias_ptr.dtype.element_ty)
        tl.store(y_words + at, _paired(low, high, T), mask=at < n_pairs)


def packable(tensors, layouts, n_cols: int) -> bool:
    """Whether rows and parameters can be read as 32-bit pairs: 16-bit, rows of one dtype, an even place to begin."""
    even = n_cols % 2 == 0 and all(n % 2 == 0 for n in (*layouts[1:3], *layouts[4:6]))
    given = [t for t in tensors if t is not None]
    x, residual, _, bias = tensors
    if residual is not None and bias is not None and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 10:
        return False  # sm_100: 16 spills
    alike = residual is None or residual.dtype == x.dtype
    return even and alike and all(t.dtype.itemsize == 2 and t.data_ptr() % 4 == 0 for t in given)


def norm_fwd_packed(n_rows: int, args, layouts, n_cols: int, eps: float, offset: float, flags) -> None:
    """As the launches in :func:`._norm.norm_fwd`, one row to a program, without dropout (which would spill)."""
    block = max(1, next_power_of_2(n_cols) // (2 * PARTS))
    _norm_fwd_packed_kernel[(n_rows,)](
        *args, *layouts, n_cols, eps, offset, 0, **flags, PARTS=PARTS, BLOCK=block,
        num_warps=max(1, min(32, block * PARTS // 512)), **OPTIONS,
    )  # fmt: skip
