"""Counts the bytes that Triton kernels load and store, lane by lane, in Triton's interpreter.

    with count_traffic() as traffic:
        kernel[grid](...)
    traffic.total, traffic.table()

Only lanes whose mask is true count. Each access is put to the tensor argument whose storage holds the address. An
atomic counts as a load and a store. Plain, masked, block-pointer, descriptor and atomic accesses all end in the four
builder methods wrapped here.

A cache holds a small tensor that several programs read (a weight, a bias, a row of statistics). Of a tensor of which
at most CACHED bytes are read, and some of them by more than one program of the launch, each byte counts once; the rest
are listed as rereads. A tensor that no two programs share, such as the rows of the input, has every load counted,
however small it is: so a kernel that reads its rows twice shows it on the small shapes that the interpreter can run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from ..backends import backend, interpreting
from ..registry import LAUNCHERS, Cost, Op, Sample
from . import cases

# Bytes of a tensor that a cache holds, so that its rereads are free. A guess, far below the L2 of any GPU here.
CACHED = 1 << 20
UNMAPPED = "(no tensor argument)"


@dataclass(frozen=True)
class Access:
    """One tensor in one launch. Bytes: ``loaded`` from memory, ``reread`` from a cache, ``stored``."""

    kernel: str
    tensor: str
    loaded: int
    reread: int
    stored: int


@dataclass
class Traffic:
    """Every launch's accesses in order, and the number of launches; filled while :func:`count_traffic` is open."""

    accesses: list[Access] = field(default_factory=list)
    launches: int = 0
    in_kernel: bool = field(default=False, repr=False)

    @property
    def loaded(self) -> int:
        return sum(a.loaded for a in self.accesses)

    @property
    def stored(self) -> int:
        return sum(a.stored for a in self.accesses)

    @property
    def reread(self) -> int:
        """Bytes that a cache serves; in no other sum."""
        return sum(a.reread for a in self.accesses)

    @property
    def total(self) -> int:
        """Bytes loaded and stored."""
        return self.loaded + self.stored

    def table(self) -> str:
        """One line per launch and tensor, in bytes."""
        lines = [("kernel", "tensor", "loaded", "stored", "reread")]
        lines += [(a.kernel, a.tensor, f"{a.loaded:,}", f"{a.stored:,}", f"{a.reread:,}") for a in self.accesses]
        lines.append(("total", "", f"{self.loaded:,}", f"{self.stored:,}", f"{self.reread:,}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        )


class _Span:
    """The bytes of one storage, named after the first argument that lies in it, and what a launch does with them."""

    def __init__(self, name: str, tensor: torch.Tensor | None):
        self.name = name
        storage = None if tensor is None else tensor.untyped_storage()
        self.start = 0 if storage is None else storage.data_ptr()
        self.size = 0 if storage is None else storage.nbytes()
        # At an element's first byte: 1 + the last program to load it. Zeros are not paged in until they are written.
        self.reader = np.zeros(self.size, np.int32)
        self.loads = self.distinct = self.stores = 0
        self.shared = False

    def load(self, addresses: np.ndarray, itemsize: int, program: int) -> None:
        self.loads += addresses.size * itemsize
        if not self.size:
            return
        offsets = (addresses - np.uint64(self.start)).astype(np.int64)
        before = self.reader[offsets]
        self.shared |= bool(np.any((before != 0) & (before != program + 1)))
        self.distinct += np.unique(offsets[before == 0]).size * itemsize
        self.reader[offsets] = program + 1

    def access(self, kernel: str, scale: float) -> Access:
        cached = self.shared and self.distinct <= CACHED
        loads = round(self.loads * scale)
        loaded = self.distinct if cached else loads
        return Access(kernel, self.name, loaded, loads - loaded, round(self.stores * scale))


def _leaves(name: str, arg) -> Iterator[tuple[str, object]]:
    """A kernel argument as (name, value); a tuple's fields as ``name.field``."""
    if not isinstance(arg, tuple):
        yield name, arg
        return
    for part, value in zip(getattr(arg, "_fields", range(len(arg))), arg, strict=True):
        yield from _leaves(f"{name}.{part}", value)


class _Launch:
    """The storages of one launch's arguments."""

    def __init__(self, names: Sequence[str], args: Sequence, kwargs: dict):
        spans: dict[int, _Span] = {}
        for name, arg in [*zip(names, args, strict=False), *kwargs.items()]:
            for path, leaf in _leaves(name, arg):
                tensor = leaf.base if isinstance(leaf, TensorDescriptor) else leaf
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                    spans.setdefault(tensor.untyped_storage().data_ptr(), _Span(path, tensor))
        self.spans = [spans[start] for start in sorted(spans)]
        self.starts = np.array([span.start for span in self.spans], np.uint64)
        self.unmapped = _Span(UNMAPPED, None)
        self.grid: tuple[int, ...] = ()
        self.chosen: Sequence[int] = ()
        self.program = 0

    def choose(self, whole: tuple | Callable, most: int | None) -> Callable[[dict], tuple[int]]:
        """The grid to run in place of ``whole``: one dimension of at most ``most`` programs, evenly spread over it."""

        def grid(arguments: dict) -> tuple[int]:
            sizes = whole(arguments) if callable(whole) else whole
            self.grid = (*map(int, sizes), 1, 1)[:3]
            programs = math.prod(self.grid)
            parts = programs if most is None else min(programs, most)
            self.chosen = [(2 * i + 1) * programs // (2 * parts) for i in range(parts)]
            return (len(self.chosen),)

        return grid

    def split(self, addresses: np.ndarray) -> Iterator[tuple[_Span, np.ndarray]]:
        """The addresses by the storage that holds them."""
        index = np.searchsorted(self.starts, addresses, side="right") - 1
        for i in np.unique(index):
            span = self.spans[i] if i >= 0 else self.unmapped
            here = addresses[index == i]
            inside = here < np.uint64(span.start + span.size)
            if inside.any():
                yield span, here[inside]
            if not inside.all():
                yield self.unmapped, here[~inside]

    def accesses(self, kernel: str) -> Iterator[Access]:
        scale = math.prod(self.grid) / max(len(self.chosen), 1)
        for span in [*self.spans, self.unmapped]:
            if span.loads or span.stores:
                yield span.access(kernel, scale)


class _Counter:
    """What counts inside the interpreter: a method for each of its methods, called with that and its arguments."""

    def __init__(self, traffic: Traffic, programs: int | None):
        self.traffic, self.programs = traffic, programs
        self.launch: _Launch | None = None

    def patches(self) -> Iterator[contextlib.AbstractContextManager]:
        """Each puts one counting method in its place while it is open."""
        executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
        for owner, name, counting in (
            (executor, "__call__", self._run),
            (builder, "set_grid_dim", self._set_grid),
            (builder, "set_grid_idx", self._set_program),
            (builder, "create_masked_load", self._load),
            (builder, "create_masked_store", self._store),
            (builder, "create_atomic_rmw", self._read_modify_write),
            (builder, "create_atomic_cas", self._compare_and_swap),
        ):
            yield mock.patch.object(owner, name, _with(getattr(owner, name), counting))

    def _run(self, original, executor, *args, **kwargs):
        self.launch = _Launch(executor.arg_names, args, kwargs)
        self.traffic.in_kernel = True
        executor.grid = self.launch.choose(executor.grid, self.programs)
        try:
            original(executor, *args, **kwargs)
            self.traffic.accesses.extend(self.launch.accesses(executor.fn.__name__))
            self.traffic.launches += 1
        finally:
            self.launch, self.traffic.in_kernel = None, False

    def _present(self) -> _Launch:
        assert self.launch is not None, "the interpreter runs a program of a launch"
        return self.launch

    def _set_grid(self, original, builder, *sampled):
        return original(builder, *self._present().grid)

    def _set_program(self, original, builder, sampled, *zeros):
        launch = self._present()
        launch.program = launch.chosen[sampled]
        return original(builder, *map(int, np.unravel_index(launch.program, launch.grid)))

    def _touched(self, pointers, mask) -> Iterator[tuple[_Span, np.ndarray, int]]:
        """The addresses of the lanes whose mask is true, by storage, and the bytes of an element."""
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        active = True if mask is None else np.broadcast_to(np.asarray(getattr(mask, "data", mask)), pointers.data.shape)
        chosen = np.atleast_1d(pointers.data)[np.atleast_1d(active)].reshape(-1)
        for span, addresses in self._present().split(chosen):
            yield span, addresses, itemsize

    def _count_load(self, pointers, mask) -> None:
        for span, addresses, itemsize in self._touched(pointers, mask):
            span.load(addresses, itemsize, self._present().program)

    def _count_store(self, pointers, mask) -> None:
        for span, addresses, itemsize in self._touched(pointers, mask):
            span.stores += addresses.size * itemsize

    def _load(self, original, builder, pointers, mask, *rest, **options):
        self._count_load(pointers, mask)
        return original(builder, pointers, mask, *rest, **options)

    def _store(self, original, builder, pointers, value, mask, *rest):
        self._count_store(pointers, mask)
        return original(builder, pointers, value, mask, *rest)

    def _read_modify_write(self, original, builder, op, pointers, value, mask, *rest):
        self._count_load(pointers, mask)
        self._count_store(pointers, mask)
        return original(builder, op, pointers, value, mask, *rest)

    def _compare_and_swap(self, original, builder, pointers, *rest):
        self._count_load(pointers, None)
        self._count_store(pointers, None)
        return original(builder, pointers, *rest)


def _with(original: Callable, counting: Callable) -> Callable:
    """A method that calls ``counting`` with ``original``, its own object and its arguments."""

    def method(self, *args, **kwargs):
        return counting(original, self, *args, **kwargs)

    return method


@contextlib.contextmanager
def count_traffic(programs: int | None = None) -> Iterator[Traffic]:
    """Counts the kernels launched within the block; see the module's docstring.

    Args:
        programs: run and count at most this many programs of each launch, and scale what they load and store to the
            whole grid. The results of such kernels are then incomplete.

    Raises:
        RuntimeError: Triton's interpreter is off (TRITON_INTERPRET=1 must be set before Python starts).
    """
    if not interpreting():
        raise RuntimeError("traffic is counted in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts")
    traffic = Traffic()
    with contextlib.ExitStack() as stack:
        if programs is not None:
            stack.enter_context(np.errstate(all="ignore"))  # what was left out was never written
        for patch in _Counter(traffic, programs).patches():
            stack.enter_context(patch)
        yield traffic


class _TorchTraffic(TorchDispatchMode):
    """Adds what PyTorch's own operators move inside a launcher (a copy, a fill): each tensor in and out once."""

    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic = traffic
        self.inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastllm":
            outer, self.inside = self.inside, True
            try:
                with self:
                    return LAUNCHERS[func._schema.name.removeprefix("fastllm::")](*args, **kwargs)
            finally:
                self.inside = outer
        out = func(*args, **kwargs)
        # The interpreter's own copies are none of the kernel's.
        if self.inside and not self.traffic.in_kernel and func._schema.name not in _MOVE_NOTHING:
            self._add(func, tree_leaves((args, kwargs)), tree_leaves(out))
        return out

    def _add(self, func, inputs, outputs):
        read = {id(t): t for t in inputs if isinstance(t, torch.Tensor)}
        written = {id(t): t for t in outputs if isinstance(t, torch.Tensor)}
        if func._schema.is_mutable:
            read = {key: t for key, t in read.items() if key not in written}
        else:  # a view, or a reshape that needed no copy, moves nothing
            storages = {t.untyped_storage().data_ptr() for t in read.values()}
            written = {key: t for key, t in written.items() if t.untyped_storage().data_ptr() not in storages}
        if written:
            loaded, stored = (sum(map(_held_bytes, tensors.values())) for tensors in (read, written))
            self.traffic.accesses.append(Access(func._schema.name, "", loaded, 0, stored))
            self.traffic.launches += 1


_MOVE_NOTHING = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided")


def _held_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements: an expanded dimension counts once."""
    distinct = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        distinct *= size if stride else min(size, 1)
    return distinct * tensor.element_size()


@dataclass(frozen=True)
class OpTraffic:
    """One call's traffic beside the least that its record says it must move."""

    cost: Cost
    forward: Traffic
    backward: Traffic

    @property
    def forward_ratio(self) -> float:
        """Bytes moved over the least bytes."""
        return self.forward.total / self.cost.forward_bytes

    @property
    def backward_ratio(self) -> float:
        return self.backward.total / self.cost.backward_bytes


def measure(
    op: Op, sample: Sample, *, backward: bool = True, function: Callable | None = None, programs: int | None = None
) -> OpTraffic:
    """Runs ``op`` on a sample of CPU tensors in the interpreter and counts what its kernels and launchers move.

    Args:
        op: a record that has the triton backend.
        sample: a call; the inputs that require grad are differentiated.
        backward: whether to run the gradient too; else that traffic is empty.
        function: what to run in place of ``op.function``.
        programs: see :func:`count_traffic`.
    """
    function = function or op.function
    with backend("triton"):
        with count_traffic(programs) as forward_traffic, _TorchTraffic(forward_traffic):
            outputs = cases.forward(function, sample)
        leaves = cases.differentiable(sample) if backward else []
        grads = cases.grad_outputs(outputs)
        with count_traffic(programs) as backward_traffic, _TorchTraffic(backward_traffic):
            if leaves:
                cases.backward(outputs, leaves, grads)
    return OpTraffic(op.cost(*sample.args, **sample.kwargs), forward_traffic, backward_traffic)
