"""The shapes of an op, and one call of it with its gradients, as providers are timed on it."""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from ..registry import OPS, Op, Sample
from .timing import Workload, synchronize


def shapes_of(op: str, device: str = "cuda") -> dict[str, Callable[[torch.device, torch.dtype], Sample]]:
    """``shapes`` of bench/<op>.py, for a CPU its ``cpu_shapes`` before them; none for an op that has no such file."""
    try:
        module = importlib.import_module(f"{__package__}.{op}")
        return {**(cpu_shapes_of(op) if device == "cpu" else {}), **module.shapes}
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.{op}":
            raise
        return {}


def _declared(op: str, name: str, default: Any) -> Any:
    """What bench/<op>.py calls ``name``; ``default`` where it has nothing of that name."""
    return getattr(importlib.import_module(f"{__package__}.{op}"), name, default)


def cpu_shapes_of(op: str) -> dict[str, Callable[[torch.device, torch.dtype], Sample]]:
    """``cpu_shapes`` of bench/<op>.py."""
    return _declared(op, "cpu_shapes", {})


def code_hash(files: Iterable[Path], *more: str) -> str:
    """16 digits that change with the files' code, comments and empty lines apart, and with ``more``."""
    found = hashlib.sha256()
    for file in files:
        lines = (line.rstrip() for line in file.read_text(encoding="utf-8").splitlines())
        found.update("\n".join(line for line in lines if line and not line.lstrip().startswith("#")).encode())
    for text in more:
        found.update(text.encode())
    return found.hexdigest()[:16]


def sweep_of(op: str) -> tuple[str, dict[int, Callable[[torch.device, torch.dtype], Sample]]]:
    """``sweep`` of bench/<op>.py: the name of an axis, and size -> the call of that size; no sizes without one."""
    return _declared(op, "sweep", ("size", {}))


def reference_of(op: Op) -> Callable:
    """The op's reference; or ``reference`` of bench/<op>.py, the same in less memory."""
    return _declared(op.name, "reference", op.reference)


def rivals_of(op: str) -> dict[str, Callable[[], Callable]]:
    """``rivals`` of bench/<op>.py: name -> what imports that rival and returns a function as the op's own."""
    return _declared(op, "rivals", {})


def selected(names: Sequence[str]) -> list[Op]:
    """The records of ``names``, or of every op that has shapes when there are none.

    Raises:
        ValueError: a name that is no op, or an op without shapes.
    """
    for name in names:
        if name not in OPS:
            raise ValueError(f"no op {name!r}; the ops are {', '.join(OPS)}")
        if not shapes_of(name):
            raise ValueError(f"{name} has no shapes (bench/{name}.py)")
    return [op for name, op in OPS.items() if (name in names if names else shapes_of(name))]


@dataclass(frozen=True)
class Overwriting:
    """A rival that writes over its arguments: each call of it gets tensors of its own, outside the clock."""

    function: Callable

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def own_tensors(function: Callable, sample: Sample) -> Sample:
    """The sample; for a function that overwrites, a copy of it."""
    if not isinstance(function, Overwriting):
        return sample

    def copy(t: torch.Tensor) -> torch.Tensor:
        return t.detach().clone().requires_grad_(t.requires_grad)

    args, kwargs = tree_map_only(torch.Tensor, copy, (sample.args, dict(sample.kwargs)))
    return Sample(sample.name, args, kwargs)


def tensors_of(sample: Sample) -> list[torch.Tensor]:
    """The tensors of a call, in the order of its arguments."""
    return [t for t in tree_leaves((sample.args, dict(sample.kwargs))) if isinstance(t, torch.Tensor)]


def differentiable(sample: Sample) -> list[torch.Tensor]:
    """Those that require grad."""
    return [t for t in tensors_of(sample) if t.requires_grad]


def held_bytes(sample: Sample) -> int:
    """Bytes of a call's tensors."""
    return sum(t.numel() * t.element_size() for t in tensors_of(sample))


def forward(function: Callable, sample: Sample) -> list[torch.Tensor]:
    """Calls ``function`` on the sample; the tensors that it returns."""
    return [t for t in tree_leaves(function(*sample.args, **sample.kwargs)) if isinstance(t, torch.Tensor)]


def grad_outputs(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of the outputs as training gives them: 1 for a loss (a scalar); for others random multiples of 1/16."""
    return [
        torch.ones_like(y) if y.dim() == 0 else (torch.randint(-15, 16, y.shape, device=y.device) / 16).to(y.dtype)
        for y in outputs
    ]


def backward(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], outputs_grad: Sequence[torch.Tensor]):
    """Gradients of ``inputs``; outputs that are not differentiable are skipped, and so is their gradient."""
    pairs = [(y, dy) for y, dy in zip(outputs, outputs_grad, strict=True) if y.requires_grad]
    return torch.autograd.grad([y for y, _ in pairs], inputs, [dy for _, dy in pairs], allow_unused=True)


def calls_of(functions: dict[str, Callable], sample: Sample, direction: str) -> dict[str, Workload]:
    """Each provider's work in one direction. A backward has its own forward's graph, made before the clock starts."""
    grads = grad_outputs(forward(next(iter(functions.values())), sample))

    def call(name: str) -> Workload:
        function = functions[name]

        def own():
            return own_tensors(function, sample)

        def there(sample):
            return forward(function, sample)

        def graph():
            sample = own()
            return there(sample), sample

        def back(ready):
            outputs, sample = ready
            return backward(outputs, differentiable(sample), grads)

        if direction == "forward":
            return Workload(name, own, there)
        if direction == "backward":
            return Workload(name, graph, back)
        return Workload(name, own, lambda sample: back((there(sample), sample)))

    return {name: call(name) for name in functions}


def first_calls(function: Callable, sample: Sample, device: torch.device) -> dict[str, float]:
    """Direction -> seconds of a provider's first call, with what it compiles."""
    sample = own_tensors(function, sample)
    start = time.perf_counter()
    outputs = forward(function, sample)
    synchronize(device)
    found = {"forward": time.perf_counter() - start}
    leaves = differentiable(sample)
    if leaves:
        grads = grad_outputs(outputs)
        synchronize(device)
        start = time.perf_counter()
        backward(outputs, leaves, grads)
        synchronize(device)
        found["backward"] = time.perf_counter() - start
        found["both"] = found["forward"] + found["backward"]
    return found
