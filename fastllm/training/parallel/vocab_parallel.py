"""Embedding and head split by vocabulary over ranks, with the loss computed from parts of the logits.

As in Megatron-LM (Shoeybi et al. 2019, section 3): a rank looks up the ids that it has and the rows are added up; each
rank computes the log-sum-exp of its own logits and the target's logit where it has it, N numbers each, which are all
that ranks exchange.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ...config import InputError
from ...functional import embedding, linear_cross_entropy
from ...models import Transformer
from ...models.head import Head


class _Copy(torch.autograd.Function):
    """The input to every rank; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum over the ranks; what follows is computed by each of them alike, so its gradient is every term's."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _LogSumExp(torch.autograd.Function):
    """log of the sum over the ranks of exp(x)."""

    @staticmethod
    def forward(ctx, x, group):
        largest = x.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        total = (x - largest).exp()
        dist.all_reduce(total, group=group)
        result = largest + total.log()
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx, grad):
        x, result = ctx.saved_tensors
        return grad * (x - result).exp(), None


def _first_row(weight: DTensor) -> int:
    return compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)[1][0]


class VocabParallelEmbedding(nn.Embedding):
    """``torch.nn.Embedding`` with ``weight`` split by rows: a DTensor, ``Shard(0)``."""

    weight: Any

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        local, start = self.weight.to_local(), _first_row(self.weight)
        rows = embedding(input, local, vocab_range=(start, start + local.shape[0]))
        return _Sum.apply(rows, self.weight.device_mesh.get_group())


class VocabParallelHead(Head):
    """A :class:`~fastllm.models.head.Head` with ``weight`` split by rows: a DTensor, ``Shard(0)``."""

    weight: Any

    def forward(self, input, target=None, **options):
        """Logits of the whole vocabulary, gathered; with ``target``, the mean loss, for which nothing is gathered.

        Raises:
            ValueError: there are options, or ``target`` has none that counts.
        """
        if options:
            raise ValueError(f"a head split by vocabulary takes no options, got {', '.join(options)}")
        local = self.weight.to_local()
        group = self.weight.device_mesh.get_group()
        x = _Copy.apply(input, group)
        if target is None:
            part = torch.nn.functional.linear(x, local)
            mesh = self.weight.device_mesh
            logits = DTensor.from_local(
                part, mesh, [Shard(part.dim() - 1)], run_check=False,
                shape=torch.Size((*part.shape[:-1], self.out_features)),
                stride=torch.empty((*part.shape[:-1], self.out_features), device="meta").stride(),
            )  # fmt: skip
            return logits.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
        start = _first_row(self.weight)
        counts = target != -100
        here = counts & (target >= start) & (target < start + local.shape[0])
        losses, lse = linear_cross_entropy(
            x, local, torch.where(here, target - start, -100), reduction="none", return_lse=True
        )
        logit = _Sum.apply(torch.where(here, lse - losses.float(), 0.0), group)
        rows = torch.where(counts, _LogSumExp.apply(lse, group) - logit, 0.0)
        return rows.sum() / counts.sum()

    def loss(self, hidden, targets, logit_scale=1.0, label_smoothing=0.0):
        """As :meth:`Head.loss`, never by way of whole logits, which would have to be gathered.

        Raises:
            ValueError: ``logit_scale`` is not 1 or ``label_smoothing`` not 0.
        """
        if logit_scale != 1.0 or label_smoothing != 0.0:
            raise ValueError(
                "a head split by vocabulary has no logit_scale and no label_smoothing, got "
                f"{logit_scale} and {label_smoothing}"
            )
        return self(hidden, targets).float()


def split_vocabulary(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split the token embedding and the head of ``model``, in place; a weight that both share stays shared.

    Raises:
        InputError: the model looks its tokens up in another way.
    """
    if not isinstance(model, Transformer):
        raise InputError(f"tensor_parallel: splits the vocabulary of a decoder, not of a {type(model).__name__}")
    if model.config.positions != "rotary":
        raise InputError("tensor_parallel: needs rotary positions; learned ones are looked up together with the tokens")
    old_table, old_head = model.token_embedding, model.head
    tied = old_head.weight is old_table.weight
    rows, columns = old_table.weight.shape
    table = VocabParallelEmbedding(rows, columns, device="meta")
    head = VocabParallelHead(columns, rows, bias=False, device="meta")
    table.weight = nn.Parameter(distribute_tensor(old_table.weight.data, mesh, [Shard(0)]))
    head.weight = table.weight if tied else nn.Parameter(distribute_tensor(old_head.weight.data, mesh, [Shard(0)]))
    model.token_embedding, model.head = table, head
    return model
