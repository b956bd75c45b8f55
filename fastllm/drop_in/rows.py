"""Embeddings that are looked up when somebody reads them, and whose sum is one op."""

from __future__ import annotations

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


class Rows:
    """The plan of the sum of rows of tables, each by its ids; ``tables`` are (ids, weight, padding_idx)."""

    too_late = f"these embeddings were summed without looking them up one by one; {SKIP}"

    def __init__(self, tables, shape):
        self.tables = tables
        self.shape = torch.Size(shape)
        self.strides = None  # contiguous
        self.dtype = tables[0][1].dtype
        self.value = None
        self.consumed = False
        self.versions = [weight._version for _, weight, _ in tables]

    @staticmethod
    def of(ids, weight, padding_idx) -> Deferred:
        """Deferred ``F.embedding(ids, weight, padding_idx)``."""
        return defer(Rows([(_own(ids), weight, padding_idx)], (*ids.shape, weight.shape[1])), weight)

    def read(self, tensor: Deferred) -> torch.Tensor:
        if self.value is None:
            with as_in_the_forward(tensor.requires_grad):
                self.value = self._compute([weight for _, weight, _ in self.tables])
        return self.value if torch.is_grad_enabled() else self.value.detach()

    def _compute(self, weights):
        for (_, weight, _), version in zip(self.tables, self.versions, strict=True):
            if weight._version != version:
                raise RuntimeError(
                    f"these embeddings were not computed in the forward, and their table has changed since; {SKIP}"
                )
        if len(weights) == 1:
            ids, _, padding = self.tables[0]
            return serve(None, embedding, ids, weights[0], padding)
        indices = [ids for ids, _, _ in self.tables]
        paddings = [padding for _, _, padding in self.tables]
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
        if name == "to" and not kwargs and len(args) == 2 and args[1] in (self.dtype, self.tables[0][1].device):
            return tensor
        if name not in ("add", "__add__", "__radd__") or kwargs or len(args) != 2:
            return NotImplemented
        plans = [other.plan if type(other) is Deferred else None for other in args]
        first, second = plans
        if not (isinstance(first, Rows) and isinstance(second, Rows) and first.value is None is second.value):
            return NotImplemented
        if first.dtype != second.dtype or first.shape[-1] != second.shape[-1]:
            return NotImplemented
        tables = [*first.tables, *second.tables]
        if len({weight.device for _, weight, _ in tables}) > 1:
            return NotImplemented
        shape = torch.broadcast_shapes(*(ids.shape for ids, _, _ in tables))
        plan = Rows(tables, (*shape, first.shape[-1]))
        plan.versions = [*first.versions, *second.versions]
        first.consumed = second.consumed = True
        return defer(plan, *(weight for _, weight, _ in tables))
