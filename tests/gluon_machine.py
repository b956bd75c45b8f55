"""What the emulated kernels compute with: integers, pointers, shared memory, barriers, asynchronous products."""

from __future__ import annotations

import threading
import types

import torch


class EmulationError(AssertionError):
    """The kernel broke a rule of the machine."""


class Scalar(int):
    """An integer register: division truncates as in C."""

    def to(self, dtype):
        return self

    def _binary(name):
        def operate(self, other):
            if not isinstance(other, int):
                return NotImplemented
            return Scalar(getattr(int, name)(int(self), int(other)))

        return operate

    for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "and", "rand", "or", "ror", "xor", "rxor"):
        locals()[f"__{_name}__"] = _binary(f"__{_name}__")

    def __neg__(self):
        return Scalar(-int(self))

    def __floordiv__(self, other):
        return Scalar(int(abs(int(self)) // abs(int(other))) * (1 if (int(self) < 0) == (int(other) < 0) else -1))

    def __mod__(self, other):
        return Scalar(int(self) - int(self // other) * int(other))

    def __rfloordiv__(self, other):
        return Scalar(other) // self

    def __rmod__(self, other):
        return Scalar(other) % self


class Pointer:
    """An address in a tensor's storage, or a tensor of them."""

    def __init__(self, flat: torch.Tensor, at=0):
        self.flat, self.at = flat, at

    @classmethod
    def of(cls, tensor: torch.Tensor):
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        return cls(tensor.as_strided((size,), (1,), 0), tensor.storage_offset())

    @property
    def dtype(self):
        return types.SimpleNamespace(element_ty=self.flat.dtype)

    def __add__(self, offset):
        return Pointer(self.flat, self.at + (offset if isinstance(offset, torch.Tensor) else int(offset)))


class Buffer:
    """Shared memory that a copy fills: its values, how often it was filled, who reads it."""

    def __init__(self, shape, dtype):
        self.data = torch.full(shape, float("nan"), dtype=dtype)
        self.filled = False
        self.copies = 0
        self.readers: list[Product] = []
        self.unfenced: set[int] = set()


class View:
    """A memory descriptor: buffers, or a view of one."""

    def __init__(self, buffers, data=None):
        self.buffers, self.own = buffers, data

    @property
    def dtype(self):
        return self.buffers[0].data.dtype

    @property
    def buffer(self) -> Buffer:
        (buffer,) = self.buffers
        return buffer

    @property
    def data(self):
        return self.buffer.data if self.own is None else self.own

    def index(self, i):
        if not 0 <= i < len(self.buffers):
            raise EmulationError(f"buffer {i} of {len(self.buffers)}")
        return View([self.buffers[i]])

    def reshape(self, shape):
        return View(self.buffers, self.data.view(*shape))

    def permute(self, order):
        return View(self.buffers, self.data.permute(*order))

    def load(self, layout):
        self.buffer_must_be_full()
        return self.data.clone()

    def slice(self, start, length, dim=0):
        return View(self.buffers, self.data.narrow(dim, int(start), length))

    def store(self, value):
        """Of a whole buffer or a part; a buffer that no copy fills is full once a partition has stored to it."""
        buffer = self.buffer
        # Two partitions may both clear what both read: the second writes what is there already.
        if buffer.readers and not torch.equal(self.data.nan_to_num(), value.to(self.dtype).nan_to_num()):
            raise EmulationError("a store into shared memory that a product reads")
        if buffer.copies > 0:
            self.buffer_must_be_full()
        self.data.copy_(value)
        buffer.filled = True
        buffer.unfenced.add(threading.get_ident())

    def buffer_must_be_full(self):
        if not self.buffer.filled:
            raise EmulationError("shared memory is read before it was filled")


class Product:
    """An asynchronous product: computed when it is waited for, from what shared memory holds then."""

    def __init__(self, a, b, acc, use_acc):
        if isinstance(acc, Product):
            raise EmulationError("an accumulator is used before it is waited for")
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.views = [x for x in (a, b) if isinstance(x, View)]
        for view in self.views:
            view.buffer_must_be_full()
            if threading.get_ident() in view.buffer.unfenced:
                raise EmulationError("no fence between a store to shared memory and the product that reads it")
            view.buffer.readers.append(self)
        self.copies = [view.buffer.copies for view in self.views]

    def finish(self):
        for view, copies in zip(self.views, self.copies, strict=True):
            if view.buffer.copies != copies:
                raise EmulationError("shared memory was filled anew under a product")
            view.buffer.readers.remove(self)
        a, b = (x.data if isinstance(x, View) else x for x in (self.a, self.b))
        product = a.float() @ b.float()
        return product + self.acc if self.use_acc else product


class Barrier:
    """An mbarrier: phases complete when ``count`` arrivals and all announced bytes have come."""

    def __init__(self):
        self.count = None
        self.phases = 0
        self.pending = 0
        self.bytes = 0

    def arrive(self, n=1):
        if self.count is None or self.pending < n:
            raise EmulationError("a barrier gets more arrivals than its count")
        self.pending -= n
        self.settle()

    def settle(self):
        if self.pending == 0 and self.bytes == 0:
            self.phases += 1
            self.pending = self.count

    def passed(self, parity) -> bool:
        return self.phases & 1 != parity


class Descriptor:
    """A TensorDescriptor in the kernel: block copies with zeros past the end."""

    def __init__(self, host):
        base = host.base
        self.tensor = base.as_strided(list(host.shape), list(host.strides), base.storage_offset())
        self.block = list(host.block_shape)
        self.layout = host.layout
        self.dtype = base.dtype
        size = base.element_size()
        for n in self.block:
            size *= n
        self.block_type = types.SimpleNamespace(nbytes=size)

    def read(self, at):
        out = torch.zeros(self.block, dtype=self.tensor.dtype)
        part = tuple(slice(max(x, 0), min(x + n, s)) for x, n, s in zip(at, self.block, self.tensor.shape, strict=True))
        if any(x < 0 for x in at):
            raise EmulationError(f"a copy from {at}")
        if all(p.start < p.stop for p in part):
            out[tuple(slice(0, p.stop - p.start) for p in part)] = self.tensor[part]
        return out
