"""What accelerate() did: a table for people, JSON for programs, and what it is worth for a given input."""

from __future__ import annotations

import contextlib
import json
import math
import weakref
from dataclasses import asdict, dataclass, field

import torch

from ..registry import OPS
from .calls import Calls, counted
from .columns import aligned


@dataclass(frozen=True)
class Entry:
    """One module that was considered.

    ``path`` is its name in the model ("" for the model itself), ``what`` its class, ``by`` what serves it now (an op's
    name; "" if it was left alone), ``why`` the reason.
    """

    path: str
    what: str
    by: str
    why: str


@dataclass(frozen=True)
class Size:
    """What :meth:`Report.estimate` must know of a swapped module: its parameters' shape and dtype."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: str


@dataclass(frozen=True)
class Estimate:
    """The least that the swapped modules move and compute in one training step, by the registry's formulas.

    ``seconds`` is the larger of bytes / bandwidth and flops / rate of each module, summed: a lower bound, not a
    measurement. ``logits_bytes`` is the memory that a deferred head saves: logits, their log-softmax and their
    gradient.
    """

    bytes: int
    flops: int
    seconds: float
    logits_bytes: int
    modules: int

    def __str__(self):
        text = (
            f"{self.modules} modules: at least {self.bytes / 2**20:,.1f} MiB moved and {self.flops / 1e9:,.2f} GFLOP a "
            f"step, {self.seconds * 1e3:,.3f} ms"
        )
        return text + (f"; {self.logits_bytes / 2**20:,.1f} MiB of logits not held" if self.logits_bytes else "")


@dataclass
class Report:
    """What :func:`fastllm.accelerate` swapped and what it left, each an :class:`Entry`."""

    swapped: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list, repr=False)
    # A weak reference: a report keeps no model alive.
    model: weakref.ref[torch.nn.Module] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self):
        return {**vars(self), "model": None}

    def calls(self) -> contextlib.AbstractContextManager[Calls]:
        """A context that counts, for each module and backend, what serves its calls, forward and backward, and why.

        ``with report.calls() as calls: model(x).sum().backward()``, then ``print(calls)``. Calls that take the original
        forward count as "own". Outside the context nothing is counted, and calls cost nothing extra. Calls in a
        compiled graph are not seen.

        Raises:
            RuntimeError: the model that the report is about is gone.
        """
        model = None if self.model is None else self.model()
        if model is None:
            raise RuntimeError("Report.calls: the model that this report is about is gone, or the report is a copy")
        return counted(model)

    def __str__(self):
        return self.table()

    def table(self) -> str:
        """Columns of text, with equal modules on one line: how many, what, by what, why, and the path of the first
        one."""
        rows = [("", "modules", "what", "by", "why", "first")]
        for title, entries in (("swapped", self.swapped), ("left", self.left)):
            groups: dict[tuple[str, str, str], list[str]] = {}
            for entry in entries:
                groups.setdefault((entry.what, entry.by, entry.why), []).append(entry.path or "(the model)")
            for (what, by, why), paths in groups.items():
                rows.append((title, str(len(paths)), what, by or "-", why, paths[0]))
        if len(rows) == 1:
            return "nothing in this model that fastllm serves"
        return aligned(rows)

    def to_json(self, **options) -> str:
        """``{"swapped": [...], "left": [...]}`` with the fields of :class:`Entry`; options are json.dumps's."""
        lists = {"swapped": self.swapped, "left": self.left}
        return json.dumps({name: [asdict(e) for e in entries] for name, entries in lists.items()}, **options)

    def estimate(self, batch: int, length: int = 1, *, bandwidth: float = 4.3e12, flops: float = 7.9e14) -> Estimate:
        """What one training step on (batch, length) tokens must move and compute in the swapped modules.

        Args:
            batch, length: the input's shape, in tokens. It is assumed that every module sees all of them.
            bandwidth: bytes per second of the device; by default an H200's, measured with a copy.
            flops: floating-point operations per second; by default an H200's in bf16, measured with a product.

        Norms, tables and heads count. Attention does not, because the report does not know its heads and masks.
        """
        for name, value in (("batch", batch), ("length", length)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Report.estimate: {name} must be a positive integer, got {value!r}")
        moved = work = logits = 0
        seconds = 0.0
        counted = 0
        for size in self.sizes:
            cost = _cost(size, batch * length)
            if cost is None:
                continue
            counted += 1
            step_bytes = cost.forward_bytes + cost.backward_bytes
            step_flops = cost.forward_flops + cost.backward_flops
            moved, work = moved + step_bytes, work + step_flops
            seconds += max(step_bytes / bandwidth, step_flops / flops)
            if size.op == "linear_cross_entropy":
                wide = max(size.dtype.itemsize, 4)
                logits += batch * length * size.shape[0] * (2 * size.dtype.itemsize + wide)
        return Estimate(moved, work, seconds, logits, counted)


def _cost(size: Size, rows: int):
    op = OPS[size.op]

    def make(*shape, dtype=size.dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    if size.op in ("layer_norm", "rms_norm"):
        return op.cost(make(rows, math.prod(size.shape)), (math.prod(size.shape),), make(math.prod(size.shape)))
    if size.op == "embedding":
        # Its cost looks at the ids: as many different ones as there can be.
        return op.cost(torch.arange(rows) % size.shape[0], make(*size.shape))
    if size.op == "linear_cross_entropy":
        target = torch.empty(rows, dtype=torch.int64, device="meta")
        return op.cost(make(rows, size.shape[1]).requires_grad_(), make(*size.shape).requires_grad_(), target)
    return None
