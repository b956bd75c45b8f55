"""The norms' forward for 16-bit rows that fill a multiprocessor's registers only if they stay in 16 bits.

65536 columns take 128 KB of its 256 KB of registers, and in fp32 all of them. So a row is held as pairs of columns in
32-bit words, and each of the three passes over it widens them anew: mean, variance, result. The formulas are those in
forward.py.
"""

import triton
import triton.language as tl

from ..device import device_info
from ..launch import launch_options, next_power_of_2, tuned
from .arguments import NormForwardPass, row_starts

# Segments of a row. With so few words of weight and bias at a time nothing spills on sm_80, sm_90 and sm_100.
SEGMENTS = 8


@triton.jit
def _as_words(ptr):
    return ptr.to(tl.pointer_type(tl.int32))


@triton.jit
def _low_half(word, T: tl.constexpr):
    """The pair's first column in fp32."""
    return (word & 0xFFFF).to(tl.int16).to(T, bitcast=True).to(tl.float32)


@triton.jit
def _high_half(word, T: tl.constexpr):
    return (word >> 16).to(tl.int16).to(T, bitcast=True).to(tl.float32)


@triton.jit
def _pair(low, high, T: tl.constexpr):
    """Both rounded to T, in one word."""
    low = low.to(T).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (high.to(T).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _norm_fwd_packed_kernel(
    inputs, outputs, places, n_cols, numbers, zero,
    CENTER: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``zero`` is 0, which the compiler does not know: it makes each pass widen the row again. Else the compiler would
    keep the fp32 values of the pass before, and spill them."""
    T: tl.constexpr = outputs.y.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    n_pairs = n_cols // 2
    pairs = tl.arange(0, BLOCK)
    x_words = _as_words(inputs.x + row_starts(row, places.x))
    y_words = _as_words(outputs.y + row * n_cols)
    if inputs.residual is not None:
        residual_words = _as_words(inputs.residual + row_starts(row, places.residual))
        h_words = _as_words(outputs.h + row * n_cols)
    held = ()
    for segment in tl.static_range(SEGMENTS):
        at = segment * BLOCK + pairs
        word = tl.load(x_words + at, mask=at < n_pairs, other=0, eviction_policy="evict_first")
        if inputs.residual is not None:
            other = tl.load(residual_words + at, mask=at < n_pairs, other=0)
            word = _pair(
                _low_half(word, T) + _low_half(other, T), _high_half(word, T) + _high_half(other, T), T
            )  # fmt: skip
            tl.store(h_words + at, word, mask=at < n_pairs)
        held = held + (word,)  # noqa: RUF005
    mean = 0.0
    again = zero
    if CENTER:
        # The mean of the distances from the row's first number: exact where all are equal, and without forward.py's
        # second pass, for which there are no registers. That number may lie sqrt(n_cols) deviations from the mean; fp32
        # still has 2^-16 of a deviation then, a fifth of what a 16-bit result can show.
        word = tl.load(x_words)
        if inputs.residual is not None:
            other = tl.load(residual_words)
            word = _pair(_low_half(word, T) + _low_half(other, T), _high_half(word, T) + _high_half(other, T), T)
        first = _low_half(word, T)
        again = zero & first.to(tl.int32, bitcast=True)
        total = tl.zeros((BLOCK,), tl.float32)
        for segment in tl.static_range(SEGMENTS):
            word = held[segment] ^ again
            off = (_low_half(word, T) - first) + (_high_half(word, T) - first)
            total += tl.where(segment * BLOCK + pairs < n_pairs, off, 0.0)
        mean = first + tl.sum(total, axis=0) / n_cols
        tl.store(outputs.mean + row, mean)
        again = zero & mean.to(tl.int32, bitcast=True)
    square = tl.zeros((BLOCK,), tl.float32)
    for segment in tl.static_range(SEGMENTS):
        low = _low_half(held[segment] ^ again, T) - mean
        # The lanes past the row hold 0, not the mean.
        inside = segment * BLOCK + pairs < n_pairs
        square += tl.where(inside, low * low, 0.0)
        high = _high_half(held[segment] ^ again, T) - mean
        square += tl.where(inside, high * high, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(square, axis=0) / n_cols + numbers.eps)
    tl.store(outputs.rstd + row, rstd)
    again = zero & rstd.to(tl.int32, bitcast=True)
    for segment in tl.static_range(SEGMENTS):
        at = segment * BLOCK + pairs
        word = held[segment] ^ again
        low, high = (_low_half(word, T) - mean) * rstd, (_high_half(word, T) - mean) * rstd
        if inputs.weight is not None:
            word = tl.load(_as_words(inputs.weight) + at, mask=at < n_pairs, other=0)
            low *= _low_half(word, inputs.weight.dtype.element_ty) + numbers.offset
            high *= _high_half(word, inputs.weight.dtype.element_ty) + numbers.offset
        if inputs.bias is not None:
            word = tl.load(_as_words(inputs.bias) + at, mask=at < n_pairs, other=0)
            low += _low_half(word, inputs.bias.dtype.element_ty)
            high += _high_half(word, inputs.bias.dtype.element_ty)
        tl.store(y_words + at, _pair(low, high, T), mask=at < n_pairs)


def packable(work: NormForwardPass) -> bool:
    """Whether rows and parameters can be read as 32-bit pairs: 16 bits, rows of one dtype from an even element on."""
    x, residual, weight, bias, _ = work.inputs
    strides = (*work.places.x[1:], *work.places.residual[1:])
    even = work.n_cols % 2 == 0 and all(n % 2 == 0 for n in strides)
    given = [t for t in (x, residual, weight, bias) if t is not None]
    if work.center and device_info(x.device).arch >= 100:
        return False  # sm_100: 6 to 10 spills, 16 with a residual and a bias
    alike = residual is None or residual.dtype == x.dtype
    return even and alike and all(t.dtype.itemsize == 2 and t.data_ptr() % 4 == 0 for t in given)


def norm_fwd_packed(work: NormForwardPass) -> None:
    """As the launches in forward.py: one row to a program, without dropout, which would spill."""
    x, width = work.inputs.x, next_power_of_2(work.n_cols)
    settings = dict(SEGMENTS=SEGMENTS, num_warps=max(1, min(32, width // 1024)))
    settings = tuned("norm_fwd_packed", x.device, (width, work.inputs.residual is not None), settings)
    segments, n_warps = settings["SEGMENTS"], settings["num_warps"]
    _norm_fwd_packed_kernel[(work.n_rows,)](
        work.inputs, work.outputs, work.places, work.n_cols, work.numbers, 0,
        CENTER=work.center, SEGMENTS=segments, BLOCK=max(1, width // (2 * segments)),
        **launch_options(x.device, num_warps=n_warps, maxnreg=min(255, 2048 // n_warps)),
    )  # fmt: skip
