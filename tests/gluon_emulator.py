"""Runs a Gluon kernel's own source in Python: what Gluon lacks, an interpreter, for the part of it that we use.

The kernel's functions run unchanged on torch tensors; ``gl``, ``tl``, ``mbarrier``, copies and the warpgroup products
are replaced. Each partition of ``warp_specialize`` is a thread, of which one runs at a time; at every operation that
others can see, a seeded choice decides which partition goes on or which copy lands. So one seed is one schedule, and
these are errors whatever the schedule:

- all partitions wait (a deadlock); a barrier that gets more arrivals than its count;
- a product of shared memory that no copy has filled, that is being filled, or that is filled anew before the product
  is waited for; a copy into a buffer that some product still reads;
- an accumulator that is used before it is waited for; generic stores that no fence separates from a product, or into
  what a product still reads.

Programs run one after the other, so that one which waits for a later one is a deadlock; ``Emulated(..., together=n)``
runs n of them side by side. Copies poison their buffer when issued and land later. Layouts and registers are not
modelled.
"""

from __future__ import annotations

import random
import threading
import types

import torch
import triton
from gluon_machine import Barrier, Buffer, Descriptor, EmulationError, Pointer, Product, Scalar, View
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


class _Stop(BaseException):
    """Ends a partition whose launch has failed."""


class Launch:
    """Programs that run side by side: their partitions, copies on their way, and the choice of who goes on."""

    # Turns without an end to the launch, after which a loop that waits for global memory is taken for a deadlock.
    MOST_TURNS = 200_000

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self._favour()
        self.copies: list = []
        self.waiting: dict[int, tuple] = {}
        self.turn = threading.Condition()
        self.active = None
        self.alive: list[int] = []
        self.failed: BaseException | None = None
        self.products = threading.local()
        self.turns = 0

    def _favour(self):
        """Makes some partitions fast and others slow, for a while."""
        self.weights = [10 ** self.random.uniform(-2, 2) for _ in range(64)]

    def run(self, partitions):
        threads = [threading.Thread(target=self._partition, args=(i, *p)) for i, p in enumerate(partitions)]
        self.alive = list(range(len(threads)))
        for thread in threads:
            thread.start()
        with self.turn:
            self._choose()
        for thread in threads:
            thread.join()
        if self.failed is not None:
            raise self.failed
        if self.copies:
            raise EmulationError("the kernel ends while copies are on their way")

    def _partition(self, i, function, args):
        self.products.queue = []
        self.products.number = i
        try:
            self._resume(i)
            function(*args)
        except _Stop:
            pass
        except BaseException as error:
            self.failed = self.failed or error
        with self.turn:
            self.alive.remove(i)
            self._choose()

    def _choose(self):
        """Lands some copies and gives the turn to a partition that can go on; called with the lock held."""
        self.turns += 1
        if self.turns > self.MOST_TURNS:
            self.failed = self.failed or EmulationError("deadlock: a partition waits for global memory")
        while True:
            ready = [i for i in self.alive if i not in self.waiting or self.waiting[i][0].passed(self.waiting[i][1])]
            if self.failed is not None:
                ready = self.alive
            elif self.copies and (not ready or self.random.random() < 0.3):
                self.copies.pop(self.random.randrange(len(self.copies)))()
                continue
            elif self.alive and not ready:
                self.failed = EmulationError("deadlock: every partition waits")
                continue
            if self.random.random() < 0.02:
                self._favour()
            weights = [self.weights[i] for i in ready]
            self.active = self.random.choices(ready, weights)[0] if ready else None
            self.turn.notify_all()
            return

    def _resume(self, i):
        with self.turn:
            self.turn.wait_for(lambda: self.active == i)
        if self.failed is not None:
            raise _Stop

    def pause(self, barrier=None, parity=0):
        i = self.products.number
        with self.turn:
            if barrier is not None:
                self.waiting[i] = (barrier, parity)
            self._choose()
        self._resume(i)
        self.waiting.pop(i, None)


class _Language(types.SimpleNamespace):
    """What the kernels use of ``gl`` and ``tl``."""

    def __init__(self, program: int, programs: int, launch: Launch, shared: list[View]):
        dtypes = {name: getattr(torch, name) for name in ("int32", "int64", "float32", "float16", "bfloat16", "uint32")}
        super().__init__(**dtypes)
        self.program, self.programs, self.launch, self.shared = program, programs, launch, shared
        self.partitions: list = []

    constexpr = staticmethod(lambda x: x)
    static_range = staticmethod(range)

    def __getattr__(self, name):
        if name.endswith("Layout"):
            return lambda *args, **kwargs: None
        raise AttributeError(f"the emulator has no gl.{name}")

    def program_id(self, axis):
        return Scalar(self.program)

    def num_programs(self, axis):
        return Scalar(self.programs)

    def allocate_shared_memory(self, dtype, shape, layout):
        if dtype == torch.int64:
            return View([Barrier() for _ in range(shape[0])])
        self.shared.append(View([Buffer(shape[1:], dtype) for _ in range(shape[0])]))
        return self.shared[-1]

    def warp_specialize(self, partitions, warps, registers):
        if len(partitions) != len(warps) + 1 or len(warps) != len(registers):
            raise EmulationError("warp_specialize needs warps and registers for each worker")
        self.partitions = partitions

    arange = staticmethod(lambda low, high, layout=None: torch.arange(low, high))
    zeros = staticmethod(lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype))
    full = staticmethod(lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype))
    convert_layout = staticmethod(lambda x, layout: x)
    exp2, log2 = staticmethod(torch.exp2), staticmethod(torch.log2)
    sum = staticmethod(lambda x, axis: x.sum(axis))

    @staticmethod
    def max(x, axis):
        """As on the GPU, a NaN loses."""
        return x.masked_fill(x.isnan(), float("-inf")).amax(axis)

    where = staticmethod(torch.where)

    @staticmethod
    def _pick(function, torch_function, a, b):
        if isinstance(a, torch.Tensor):
            return torch_function(a, torch.as_tensor(b, dtype=a.dtype))
        return Scalar(function(int(a), int(b)))

    def maximum(self, a, b):
        return self._pick(max, torch.maximum, a, b)

    def minimum(self, a, b):
        return self._pick(min, torch.minimum, a, b)

    def cdiv(self, a, b):
        return (a + b - 1) // b

    def load(self, pointer):
        return Scalar(int(pointer.flat[pointer.at]))

    def atomic_add(self, pointer, value, sem):
        """The old number of one place; None of many."""
        self.launch.pause()
        if isinstance(pointer.at, torch.Tensor):
            pointer.flat.index_put_((pointer.at.expand_as(value),), value, accumulate=True)
            return None
        old = Scalar(int(pointer.flat[pointer.at]))
        pointer.flat[pointer.at] += value
        return old

    def store(self, pointer, value, mask):
        mask = mask.expand_as(value)
        pointer.flat[pointer.at.expand_as(value)[mask]] = value[mask].to(pointer.flat.dtype)


def _machine(launch: Launch, shared: list[View]):
    """Name in the kernels' modules -> what stands for it."""

    def wait(barrier, parity):
        launch.pause(barrier.buffer, int(parity))

    def expect(barrier, size):
        launch.pause()
        barrier.buffer.bytes += size
        barrier.buffer.arrive()

    def arrive(barrier, count=1):
        launch.pause()
        barrier.buffer.arrive(count)

    def init(barrier, count):
        barrier.buffer.count = barrier.buffer.pending = count

    def async_load(descriptor, at, barrier, view):
        launch.pause()
        buffer, barrier = view.buffer, barrier.buffer
        if buffer.readers:
            raise EmulationError("a copy into shared memory that a product reads")
        buffer.data.fill_(float("nan"))
        buffer.filled = False
        buffer.copies += 1
        copies = buffer.copies

        def land():
            if buffer.copies != copies:
                raise EmulationError("two copies into one buffer")
            buffer.data.copy_(descriptor.read([int(x) for x in at]))
            buffer.filled = True
            barrier.bytes -= descriptor.block_type.nbytes
            barrier.settle()

        launch.copies.append(land)

    def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False):
        launch.pause()
        product = Product(a, b, acc, use_acc)
        if not is_async:
            raise EmulationError("only asynchronous products are emulated")
        launch.products.queue.append(product)
        return product

    def warpgroup_mma_wait(outstanding=0, deps=None):
        launch.pause()
        queue = launch.products.queue
        while len(queue) > outstanding:
            product = queue.pop(0)
            product.result = product.finish()
        if any(dep in queue for dep in deps):
            raise EmulationError("an accumulator is used before it is waited for")
        results = [dep.result for dep in deps]
        return results[0] if len(results) == 1 else tuple(results)

    def fence_async_shared():
        for view in shared:
            for buffer in view.buffers:
                buffer.unfenced.discard(threading.get_ident())

    return dict(
        mbarrier=types.SimpleNamespace(init=init, wait=wait, expect=expect, arrive=arrive, MBarrierLayout=lambda: None),
        async_load=async_load,
        warpgroup_mma=warpgroup_mma,
        warpgroup_mma_wait=warpgroup_mma_wait,
        fence_async_shared=fence_async_shared,
        group_barrier=lambda: None,
    )


class _Module:
    """Functions of kernels as plain Python, with the machine's names replaced; made once for a launch."""

    def __init__(self, names: dict):
        self.names = names
        self.made: dict = {}

    def __call__(self, kernel):
        function = kernel.fn
        if function in self.made:
            return self.made[function]
        scope = dict(function.__globals__)
        twin = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
        twin.__kwdefaults__ = function.__kwdefaults__
        self.made[function] = twin
        for name in function.__code__.co_names:
            value = scope.get(name)
            if name in self.names:
                scope[name] = self.names[name]
            elif hasattr(value, "fn"):
                scope[name] = self(value)
            elif isinstance(value, triton.language.constexpr):
                scope[name] = value.value
        return twin


def _argument(value):
    if isinstance(value, TensorDescriptor):
        return Descriptor(value)
    if isinstance(value, torch.Tensor):
        return Pointer.of(value)
    if isinstance(value, tuple):
        return type(value)(*map(_argument, value))
    return Scalar(value) if type(value) is int else value


class Emulated:
    """Stands for a kernel: ``emulated[grid](...)`` runs its programs by the emulator, each group under the next seed.

    ``together`` programs are side by side in a group.
    """

    OPTIONS = ("num_warps", "enable_fp_fusion", "maxnreg")

    def __init__(self, kernel, seed: int = 0, together: int = 1):
        self.kernel, self.seed, self.together = kernel, seed, together
        self.launches: list[int] = []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            (programs,) = grid
            self.launches.append(programs)
            values = [_argument(x) for x in args]
            options = {name: _argument(x) for name, x in kwargs.items() if name not in self.OPTIONS}
            for first in range(0, programs, self.together):
                run = Launch(self.seed)
                self.seed += 1
                partitions = []
                for program in range(first, min(first + self.together, programs)):
                    shared: list[View] = []
                    language = _Language(program, programs, run, shared)
                    names = dict(gl=language, tl=language, **_machine(run, shared))
                    _Module(names)(self.kernel)(*values, **options)
                    partitions += language.partitions
                run.run(partitions)

        return launch
