"""Triton's interpreter, mended where its bfloat16 is wrong (it keeps bf16 as raw uint16 bits), and without idle work.

``tl.dot`` multiplies the bits as integers, a cast to bf16 truncates where the GPU rounds to nearest even, and
elementwise arithmetic on bf16 works on the bits. The first two are repaired; the third raises, since every kernel
here widens on load.

Half of its time went into work without effect, which :func:`hasten` leaves out.
"""

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType, ModuleType

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
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
    hasten()


class _Patches:
    """Puts the interpreter's functions into Triton's modules, once a launch for each module.

    The interpreter does so for the kernel, and anew at every call of a helper: it looks through the whole modules, in
    which by then there is nothing but its own functions.
    """

    def __init__(self, patch: Callable):
        self.patch = patch
        # By the launch in progress.
        self.patched: set[ModuleType] = set()

    def __call__(self, fn: FunctionType):
        used = {value for value in fn.__globals__.values() if value is tl or value is tl.core}
        if used and used <= self.patched:
            return interpreter._LangPatchScope()
        scope = self.patch(fn)
        if not self.patched:
            # The launch's own, and the only one that Triton restores.
            restore = scope.restore

            def restore_all():
                self.patched.clear()
                restore()

            scope.restore = restore_all
        self.patched |= used
        return scope


def hasten() -> None:
    """Leave out what has no effect. Every result stays as it is.

    The parity test of attention's kernels in float32 took 4.4 s of processor time on Triton 3.9 and takes 2.1.
    """
    interpreter._patch_lang = _Patches(interpreter._patch_lang)
    # For every tensor the interpreter makes a dictionary of all types.
    by_type = lru_cache(interpreter._get_np_dtype)

    def numpy_dtype(dtype):
        dtype = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return np.dtype(np.uint64) if isinstance(dtype, tl.pointer_type) else by_type(dtype)

    interpreter._get_np_dtype = numpy_dtype
    check = TritonSemantic.binary_op_sanitize_overflow_impl

    def check_overflow(self, lhs, rhs, binary_op):
        # Computes the result and two comparisons in 64 bits, for an assertion that only the debug mode makes.
        if self.builder.options.debug:
            check(self, lhs, rhs, binary_op)

    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow
