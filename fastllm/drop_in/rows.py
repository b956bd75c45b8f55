"""Embeddings that are looked up when somebody reads them, and whose sum is one op."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..functional import embedding, embedding_sum
from .calls import serve
from .deferred import Deferred, as_in_the_forward, defer

SKIP = 'fastllm.accelerate(model, skip="embedding_sum") keeps embeddings as they were'
# When the rows of a table may wait until they are read.
ALWAYS, IN_TRAINING = "always", "in training"


def _own(ids: torch.Tensor) -> torch.Tensor:
    """A copy of ``ids``, which their owner may change before the rows are read; expanded dimensions stay expanded."""
    kept = ids[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in ids.stride())]
    return kept.clone().expand(ids.shape)


class _Lookup(NamedTuple):
    """Rows of a table: ``ids`` (...) of integers, ``weight`` (rows, columns), and the row that gets no gradient."""

    ids: torch.Tensor
    weight: torch.Tensor
    padding_idx: int | None


class Rows:
    """The plan of the sum of ``lookups``; their ids broadcast to ``shape`` without its last dimension."""

    too_late = f"these embeddings were summed without looking them up one by one; {SKIP}"

    def __init__(self, lookups: list[_Lookup], shape, versions: list[int] | None = None):
        self.lookups = lookups
        self.shape = torch.Size(shape)
        self.strides = None  # contiguous
        self.dtype = lookups[0].weight.dtype
        self.value = None
        self.consumed = False
        # Of the weights, when the forward would have looked up.
        self.versions = [one.weight._version for one in lookups] if versions is None else versions

    @staticmethod
    def of(ids, weight, padding_idx) -> Deferred:
        """Deferred ``F.embedding(ids, weight, padding_idx)``."""
        return defer(Rows([_Lookup(_own(ids), weight, padding_idx)], (*ids.shape, weight.shape[1])), weight)

    def read(self, tensor: Deferred) -> torch.Tensor:
        if self.value is None:
            with as_in_the_forward(tensor.requires_grad):
                self.value = self._compute([one.weight for one in self.lookups])
        return self.value if torch.is_grad_enabled() else self.value.detach()

    def _compute(self, weights):
        for one, version in zip(self.lookups, self.versions, strict=True):
            if one.weight._version != version:
                raise RuntimeError(
                    f"these embeddings were not computed in the forward, and their table has changed since; {SKIP}"
                )
        indices = [one.ids for one in self.lookups]
        paddings = [one.padding_idx for one in self.lookups]
        if len(weights) == 1:
            return serve(None, embedding, indices[0], weights[0], paddings[0])
        return serve(None, embedding_sum, indices, weights, padding_idx=paddings)

    def gradients(self, grad, inputs, needs):
        weights = [weight.detach().requires_grad_(need) for weight, need in zip(inputs, needs, strict=True)]
        with torch.enable_grad():
            value = self._compute(weights)
        wanted = [w for w in weights if w.requires_grad]
        grads = iter(torch.autograd.grad(value, wanted, grad))
        return [next(grads) if need else None for need in needs]

    def handle(self, tensor, func, args, kwargs):
        name = getattr(func, "__name__", "")
        if name == "to" and not kwargs and len(args) == 2 and args[1] in (self.dtype, self.lookups[0].weight.device):
            return tensor
        if name not in ("add", "__add__", "__radd__") or kwargs or len(args) != 2:
            return NotImplemented
        plans = [other.plan if type(other) is Deferred else None for other in args]
        first, second = plans
        if not (isinstance(first, Rows) and isinstance(second, Rows) and first.value is None is second.value):
            return NotImplemented
        if first.dtype != second.dtype or first.shape[-1] != second.shape[-1]:
            return NotImplemented
        lookups = [*first.lookups, *second.lookups]
        if len({one.weight.device for one in lookups}) > 1:
            return NotImplemented
        shape = torch.broadcast_shapes(*(one.ids.shape for one in lookups))
        plan = Rows(lookups, (*shape, first.shape[-1]), [*first.versions, *second.versions])
        first.consumed = second.consumed = True
        return defer(plan, *(one.weight for one in lookups))
