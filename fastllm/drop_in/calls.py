"""What served each call of an accelerated model: counted while somebody asks, and free otherwise."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch.utils import _pytree as pytree

from .. import backends
from .columns import aligned
from .deferred import Deferred


@dataclass(frozen=True)
class Served:
    """Calls of one module that one backend served.

    ``path`` is the module's name in the model, ``what`` its class, ``op`` the op, ``backend`` one of
    :data:`fastllm.backends.BACKENDS`, or "own" for the forward or attention that was there before; ``why`` what the
    choice rests on. ``forward`` and ``backward`` are numbers of calls; a backward runs on its forward's backend.
    """

    path: str
    what: str
    op: str
    backend: str
    why: str
    forward: int
    backward: int


class _Key(NamedTuple):
    """The fields of :class:`Served` that tell one from another."""

    path: str
    what: str
    op: str
    backend: str
    why: str


class Calls:
    """Counts of the calls of one model; see :meth:`fastllm.drop_in.Report.calls`. Iterating gives :class:`Served`."""

    def __init__(self, model: torch.nn.Module):
        self._names = {id(module): (path, type(module).__name__) for path, module in model.named_modules()}
        self._by_op: dict[str, tuple[str, str]] = {}  # of calls outside any module
        for path, module in model.named_modules():
            kind = getattr(module, "fastllm_kind", None)
            if kind is not None and kind.name == "linear_cross_entropy":
                self._by_op.setdefault(kind.name, (path, type(module).__name__))
            if kind is not None and kind.name == "embedding" and kind.options:
                for op in ("embedding", "embedding_sum"):  # looked up when they are read: named after the first
                    self._by_op.setdefault(op, (path, type(module).__name__))
        self._forward: Counter[_Key] = Counter()
        self._backward: Counter[_Key] = Counter()
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Served]:
        with self._lock:
            return iter([Served(*key, n, self._backward[key]) for key, n in self._forward.items()])

    def name(self, module: torch.nn.Module | None, op: str) -> tuple[str, str] | None:
        """(path, class) under which a call of ``op`` in ``module`` is counted; None for another model's."""
        return self._by_op.get(op, ("", "(no module)")) if module is None else self._names.get(id(module))

    def count_forward(self, key: _Key) -> None:
        with self._lock:
            self._forward[key] += 1

    def count_backward(self, key: _Key) -> None:
        with self._lock:
            self._backward[key] += 1

    @property
    def backends(self) -> dict[str, int]:
        """Forward calls by backend, those of the model's own forwards under "own"."""
        total: dict[str, int] = {}
        for served in self:
            total[served.backend] = total.get(served.backend, 0) + served.forward
        return total

    def __str__(self):
        rows = [("backend", "op", "forward", "backward", "modules", "what", "why", "first")]
        groups: dict[tuple[str, str, str, str], list[Served]] = {}
        for served in self:
            groups.setdefault((served.backend, served.op, served.what, served.why), []).append(served)
        for (backend, op, what, why), alike in sorted(groups.items()):
            forward, backward = (str(sum(getattr(s, name) for s in alike)) for name in ("forward", "backward"))
            first = alike[0].path or "(the model)"
            rows.append((backend, op, forward, backward, str(len({s.path for s in alike})), what, why, first))
        if len(rows) == 1:
            return "no call has reached fastllm"
        return aligned(rows)

    def to_json(self, **options) -> str:
        """A list of the fields of :class:`Served`; options are json.dumps's."""
        return json.dumps([asdict(served) for served in self], **options)


class _Work:
    """One call of one module: what has served it."""

    def __init__(self, module: torch.nn.Module | None):
        self.module = module
        self.keys: list[tuple[Calls, _Key]] = []

    def note(self, op: str, backend: str, why: str) -> None:
        for calls in list(_watching):
            name = calls.name(self.module, op)
            if name is not None:
                key = _Key(*name, op, backend, why)
                calls.count_forward(key)
                self.keys.append((calls, key))

    def note_torch(self) -> None:
        """For an op that leaves a call to PyTorch before it picks a backend."""
        kind = getattr(self.module, "fastllm_kind", None)
        if kind is not None and kind.name != "attention_interface":
            self.note(
                getattr(kind.options, "op", kind.name), "eager", "the op leaves such calls to PyTorch's operators"
            )

    def count_backward(self, output) -> None:
        """Counts a backward of what has served this call whenever one runs from its ``output``."""
        keys = list(self.keys)

        def hook(_):
            for calls, key in keys:
                if calls in _watching:
                    calls.count_backward(key)

        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(hook)
                return


class _Stack(threading.local):
    """This thread's calls at work, the innermost last."""

    def __init__(self):
        self.works: list[_Work] = []


_watching: list[Calls] = []
_stack = _Stack()


def watched() -> bool:
    """Whether somebody counts calls."""
    # The compiler of torch 2.11 does not take the bool of a list.
    return len(_watching) > 0 and not torch.compiler.is_compiling()


def _observe(op: str, choice: backends.Choice) -> None:
    work = _stack.works[-1] if _stack.works else _Work(None)
    work.note(op, choice.backend, choice.why)


def serve(module: torch.nn.Module | None, function: Callable, *args, **kwargs):
    """``function(*args, **kwargs)``, whose ops count as ``module``'s while somebody watches."""
    if not watched():
        return function(*args, **kwargs)
    work = _Work(module)
    _stack.works.append(work)
    try:
        output = function(*args, **kwargs)
    finally:
        _stack.works.pop()
    if not work.keys and not isinstance(output, Deferred):
        work.note_torch()
    work.count_backward(output)
    return output


def own(op: str, why: str) -> None:
    """Note that the call at work takes the forward that was there before, and why."""
    if watched() and _stack.works:
        _stack.works[-1].note(op, "own", why)


@contextlib.contextmanager
def counted(model: torch.nn.Module) -> Iterator[Calls]:
    """Counts the calls of ``model`` within the block."""
    calls = Calls(model)
    _watching.append(calls)
    try:
        with backends.observed(_observe):
            yield calls
    finally:
        _watching.remove(calls)
