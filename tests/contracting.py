"""Triton's interpreter as a GPU rounds: ``a * b + c`` once, wherever a product meets a sum with nothing in between.

A compiler with ``enable_fp_fusion`` contracts the two, unless a select, a cast or a reduction lies between them. A
launch that switches the option off is interpreted as it stands. So results that two kernels must share bit for bit,
and would not share on a GPU, differ here too.
"""

import contextlib
from unittest import mock

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


class Contractions:
    """How many products were contracted while :func:`contracting` was open."""

    def __init__(self):
        self.count = 0


@contextlib.contextmanager
def contracting():
    """Within the block, launches that do not switch ``enable_fp_fusion`` off contract fp32 products and sums."""
    builder, run = InterpreterBuilder, GridExecutor.__call__
    multiply, add, subtract = builder.create_fmul, builder.create_fadd, builder.create_fsub
    found = Contractions()
    fuses = False

    def launch(self, *args, **kwargs):
        nonlocal fuses
        before, fuses = fuses, kwargs.get("enable_fp_fusion", True)
        try:
            return run(self, *args, **kwargs)
        finally:
            fuses = before

    def create_fmul(self, a, b):
        product = multiply(self, a, b)
        if fuses and product.data.dtype == np.float32:
            product.factors = (a.data, b.data)
        return product

    def once(product, sign, other, other_sign):
        """sign * product + other_sign * other, rounded once: an fp64 product of fp32 numbers is exact."""
        found.count += 1
        a, b = (np.asarray(factor, np.float64) for factor in product.factors)
        with np.errstate(all="ignore"):
            value = sign * (a * b) + other_sign * np.asarray(other.data, np.float64)
            return TensorHandle(value.astype(np.float32), product.dtype.scalar)

    def create_fadd(self, a, b):
        if hasattr(a, "factors"):
            return once(a, 1, b, 1)
        return once(b, 1, a, 1) if hasattr(b, "factors") else add(self, a, b)

    def create_fsub(self, a, b):
        if hasattr(a, "factors"):
            return once(a, 1, b, -1)
        return once(b, -1, a, 1) if hasattr(b, "factors") else subtract(self, a, b)

    with (
        mock.patch.object(GridExecutor, "__call__", launch),
        mock.patch.object(builder, "create_fmul", create_fmul),
        mock.patch.object(builder, "create_fadd", create_fadd),
        mock.patch.object(builder, "create_fsub", create_fsub),
    ):
        yield found
