"""Triton's interpreter, mended where its bfloat16 is wrong (it keeps bf16 as raw uint16 bits).

``tl.dot`` multiplies the bits as integers, a cast to bf16 truncates where the GPU rounds to nearest even, and
elementwise arithmetic on bf16 works on the bits. The first two are repaired; the third raises, since every kernel
here widens on load.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(handle: TensorHandle) -> TensorHandle:
    """``handle``, in float32 if it holds the bits of bfloat16."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _round(data: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


def _is_rounding(source: TensorHandle, target) -> bool:
    return source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16


def repair() -> None:
    """Patch the interpreter of this process; a second call changes nothing."""
    if getattr(InterpreterBuilder, "bf16_repaired", False):
        return
    dot, cast, fp_to_fp = (
        InterpreterBuilder.create_dot,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_fp_to_fp,
    )
    binary = InterpreterBuilder.binary_op

    def create_dot(self, a, b, d, *options):
        return dot(self, widen(a), widen(b), d, *options)

    def cast_impl(self, source, target):
        if _is_rounding(source, target):
            return TensorHandle(_round(source.data), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(self, source, target, rounding_mode):
        if _is_rounding(source, target):
            return TensorHandle(_round(source.data), tl.bfloat16)
        return fp_to_fp(self, source, target, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise TypeError("bfloat16 arithmetic is wrong in Triton's interpreter: widen to float32 on load")
        return binary(self, lhs, rhs, op)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.bf16_repaired = True
