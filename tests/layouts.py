"""Triton's interpreter, with sums in the order that a GPU gives them.

NumPy sums a tile in one order, whatever the launch. On a GPU each thread sums the elements that it holds, the lanes of
a warp meet in a butterfly, then the warps do; which elements a thread holds follows from the tile's shape, the number
of warps and the widest load. So a sum that owes its order to the number of rows shows here, and does not in NumPy's.

The layout is that of Triton's ``BlockedEncodingAttr`` with the last dimension first, after its coalescing pass. A
product sums along its inner dimension in order; a BLAS would order it by the row's place in the tile.
"""

import contextlib
import math
from unittest import mock

import numpy as np
from interpreter import widen
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, TensorHandle

LANES = 32
# Bytes that a thread loads or stores at a time.
WIDEST = 16


def blocked(shape, num_warps, itemsize):
    """(elements of a thread side by side, lanes, warps) along the last dimension of a tile."""
    columns = shape[-1]
    each = max(1, min(WIDEST // itemsize, math.prod(shape) // (LANES * num_warps), columns))
    lanes = min(LANES, columns // each)
    return each, lanes, min(num_warps, max(1, columns // (each * lanes)))


def _butterfly(x):
    """Sums of the last dimension, a power of 2: each half added to the other."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def ordered_sum(x, num_warps, itemsize):
    """The fp32 sums along the last dimension of ``x``, all of whose dimensions are powers of 2."""
    each, lanes, warps = blocked(x.shape, num_warps, itemsize)
    held = x.reshape(*x.shape[:-1], -1, warps, lanes, each)
    total = held[..., 0, :, :, 0]
    for turn in range(held.shape[-4]):
        for i in range(each):
            if turn or i:
                total = total + held[..., turn, :, :, i]
    return _butterfly(_butterfly(total))


@contextlib.contextmanager
def layout_sums():
    """Within the block, kernels sum fp32 along the last dimension as the layouts of their launch would, and products in
    order."""
    run, load, total = GridExecutor.__call__, InterpreterBuilder.create_masked_load, ReduceOps.sum
    launch = {"num_warps": 4, "elements": 0, "itemsize": 4}

    def call(self, *args, **kwargs):
        launch.update(num_warps=kwargs.get("num_warps", 4), elements=0, itemsize=4)
        return run(self, *args, **kwargs)

    def masked_load(self, pointers, *args):
        if pointers.data.size > launch["elements"]:
            bits = pointers.get_element_ty().primitive_bitwidth
            launch.update(elements=pointers.data.size, itemsize=max(1, bits // 8))
        return load(self, pointers, *args)

    def sum_(self, input):
        x = input[0] if isinstance(input, tuple) else input
        data = x.handle.data
        last = self.axis is not None and data.ndim > 0 and self.axis == data.ndim - 1
        if not last or data.dtype != np.float32 or data.shape[-1] & (data.shape[-1] - 1):
            return total(self, input)
        found = np.asarray(ordered_sum(data, launch["num_warps"], launch["itemsize"]), np.float32)
        return self.to_tensor(np.expand_dims(found, self.axis) if self.keep_dims else found, x.dtype)

    def create_dot(self, a, b, d, *options):
        product = d.data
        for column, row in zip(widen(a).data.T, widen(b).data, strict=True):
            product = product + np.multiply.outer(column, row, dtype=product.dtype)
        return TensorHandle(product, d.dtype.scalar)

    with (
        mock.patch.object(GridExecutor, "__call__", call),
        mock.patch.object(InterpreterBuilder, "create_dot", create_dot),
        mock.patch.object(InterpreterBuilder, "create_masked_load", masked_load),
        mock.patch.object(ReduceOps, "sum", sum_),
    ):
        yield
