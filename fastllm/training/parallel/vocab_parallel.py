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
from ...functional import embedding, linear_cross_entropy, linear_kl_div
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
        if target is None:
            local, _, group = self._parts()
            part = torch.nn.functional.linear(_Copy.apply(input, group), local)
            mesh = self.weight.device_mesh
            logits = DTensor.from_local(
                part, mesh, [Shard(part.dim() - 1)], run_check=False,
                shape=torch.Size((*part.shape[:-1], self.out_features)),
                stride=torch.empty((*part.shape[:-1], self.out_features), device="meta").stride(),
            )  # fmt: skip
            return logits.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
        return -self.log_probs(input, target).sum() / (target != -100).sum()

    def _parts(self):
        """(this rank's rows of the weight, the number of the first, the group of the ranks that have the others)."""
        return self.weight.to_local(), _first_row(self.weight), self.weight.device_mesh.get_group()

    def log_probs(self, hidden, targets, logit_scale=1.0, *, return_entropy=False) -> Any:
        """As :meth:`Head.log_probs`; with ``return_entropy`` a pair of it and the entropies."""
        local, start, group = self._parts()
        counts = targets != -100
        here = counts & (targets >= start) & (targets < start + local.shape[0])
        losses, lse, *entropy = linear_cross_entropy(
            _Copy.apply(hidden, group), local, torch.where(here, targets - start, -100), reduction="none",
            logit_scale=logit_scale, return_lse=True, return_entropy=return_entropy,
        )  # fmt: skip
        logit = _Sum.apply(torch.where(here, lse - losses.to(lse.dtype), 0.0), group)
        whole = _LogSumExp.apply(lse, group)
        log_probs = torch.where(counts, logit - whole, 0.0)
        if not return_entropy:
            return log_probs
        # A part's mean logit is its lse less its entropy; the whole's is their mean by the parts' probabilities.
        mean = _Sum.apply((lse - _Copy.apply(whole, group)).exp() * (lse - entropy[0]), group)
        return log_probs, torch.where(counts, whole - mean, 0.0)

    def divergence(self, hidden, teacher_hidden, teacher_weight, targets, **options):
        """As :meth:`Head.divergence`, of a teacher that gets no gradient.

        By the chain rule: the divergence of the ranks' shares of the probability, and the mean of each part's own over
        these shares.

        Raises:
            ValueError: ``direction`` is "jsd", whose mixture has no such parts; ``targets`` has none that counts.
        """
        direction, temperature = options.get("direction", "forward"), options.get("temperature", 1.0)
        if direction == "jsd":
            raise ValueError("a head split by vocabulary has the directions forward and reverse, got 'jsd'")
        local, start, group = self._parts()
        of_teacher, x = teacher_weight[start : start + local.shape[0]], _Copy.apply(hidden, group)
        counts = targets != -100
        if not counts.is_cuda and not counts.any():
            raise ValueError("divergence: no position counts: targets are -100 everywhere")
        apart = linear_kl_div(x, local, teacher_hidden, of_teacher, target=targets, reduction="none", **options)

        def log_shares(x, weight):
            _, lse = linear_cross_entropy(
                x,
                weight,
                torch.full_like(targets, -100),
                reduction="none",
                logit_scale=1 / temperature,
                return_lse=True,
            )
            return lse - _Copy.apply(_LogSumExp.apply(lse, group), group)

        q, p = log_shares(x, local), log_shares(teacher_hidden, of_teacher)
        over, under = (p, q) if direction == "forward" else (q, p)
        rows = _Sum.apply(over.exp() * (apart + temperature**2 * (over - under)), group)
        return torch.where(counts, rows, 0.0).sum() / counts.sum()

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
