"""Embedding and head split by vocabulary over ranks, with the loss computed from parts of the logits.

As in Megatron-LM (Shoeybi et al. 2019, section 3): a rank looks up the ids that it has and the rows are added up; each
rank computes the log-sum-exp of its own logits and the target's logit where it has it, N numbers each, which are all
that ranks exchange.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from ...data.batches import IGNORE
from ...functional import embedding, linear_cross_entropy, linear_kl_div
from ...models.head import Head
from ...ops.cross_entropy.chunks import chunk_plan
from ...ops.cross_entropy.kl_call import Divergence
from ...ops.cross_entropy.kl_chunks import DEFAULT_WORKSPACE_MB
from ...ops.cross_entropy.kl_rows import divergence_of


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


class _Parts(NamedTuple):
    """A student's hidden states (..., D) and a teacher's, and a rank's rows of their heads (V / ranks, D)."""

    x: torch.Tensor
    weight: torch.Tensor
    teacher_x: torch.Tensor
    teacher_weight: torch.Tensor


def _divergence_of_parts(parts: _Parts, whole_q, whole_p, how: Divergence) -> torch.Tensor:
    """What a rank's classes add to the divergence (...), of logits divided by the temperature.

    ``whole_q``, ``whole_p``: the log-sum-exp (...) of the student's and of the teacher's logits of all ranks.
    """
    wide, (x, weight, teacher_x, teacher_weight) = whole_q.dtype, parts

    def of_rows(x, teacher_x, lse_q, lse_p):
        log_q = linear(x, weight).to(wide) / how.temperature - lse_q.unsqueeze(-1)
        log_p = linear(teacher_x, teacher_weight).to(wide) / how.temperature - lse_p.unsqueeze(-1)
        return divergence_of(log_p, log_q, how)

    each = x.flatten(0, -2), teacher_x.flatten(0, -2), whole_q.flatten(), whole_p.flatten()
    workspace = DEFAULT_WORKSPACE_MB.get(x.device.type, DEFAULT_WORKSPACE_MB["cpu"])
    # Autograd keeps about ten tensors of a chunk's logits in fp32. A guess.
    rows = chunk_plan(len(each[0]), 10 * len(weight) * wide.itemsize, workspace).rows
    chunks = zip(*(t.split(rows) for t in each), strict=True)
    found = [checkpoint(of_rows, *some, use_reentrant=False, preserve_rng_state=False) for some in chunks]
    return torch.cat(found).view_as(whole_q)


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
            part = linear(_Copy.apply(input, group), local)
            mesh = self.weight.device_mesh
            logits = DTensor.from_local(
                part, mesh, [Shard(part.dim() - 1)], run_check=False,
                shape=torch.Size((*part.shape[:-1], self.out_features)),
                stride=torch.empty((*part.shape[:-1], self.out_features), device="meta").stride(),
            )  # fmt: skip
            return logits.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
        return -self.log_probs(input, target).sum() / (target != IGNORE).sum()

    def _parts(self):
        """(this rank's rows of the weight, the number of the first, the group of the ranks that have the others)."""
        return self.weight.to_local(), _first_row(self.weight), self.weight.device_mesh.get_group()

    def log_probs(self, hidden, targets, logit_scale=1.0, *, return_entropy=False) -> Any:
        """As :meth:`Head.log_probs`; with ``return_entropy`` a pair of it and the entropies."""
        local, start, group = self._parts()
        counts = targets != IGNORE
        here = counts & (targets >= start) & (targets < start + local.shape[0])
        losses, lse, *entropy = linear_cross_entropy(
            _Copy.apply(hidden, group), local, torch.where(here, targets - start, IGNORE), reduction="none",
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
        these shares. In "jsd" the share of the teacher in a part's mixture differs from row to row. There the classes
        of each part are summed up under the whole's normalisers, in checkpointed chunks of rows.

        Raises:
            ValueError: ``targets`` has none that counts.
        """
        local, start, group = self._parts()
        parts = _Parts(_Copy.apply(hidden, group), local, teacher_hidden, teacher_weight[start : start + len(local)])
        counts = targets != IGNORE
        if not counts.is_cuda and not counts.any():
            raise ValueError(f"divergence: no position counts: targets are {IGNORE} everywhere")
        temperature = options.get("temperature", 1.0)

        def normalisers(x, weight):
            """The log-sum-exp (...) of this rank's logits, and of all ranks'."""
            nothing = torch.full_like(targets, IGNORE)
            _, lse = linear_cross_entropy(
                x, weight, nothing, reduction="none", logit_scale=1 / temperature, return_lse=True
            )
            return lse, _Copy.apply(_LogSumExp.apply(lse, group), group)

        (lse_q, whole_q), (lse_p, whole_p) = normalisers(*parts[:2]), normalisers(*parts[2:])
        if options.get("direction") == "jsd":
            how = Divergence(
                direction="jsd", beta=options.get("beta", 0.5), temperature=temperature, softcap=None,
                teacher_softcap=None, ignore_index=IGNORE, reduction="none", max_workspace_mb=None,
            )  # fmt: skip
            mine = temperature**2 * _divergence_of_parts(parts, whole_q, whole_p, how)
        else:
            apart = linear_kl_div(*parts, target=targets, reduction="none", **options)
            q, p = lse_q - whole_q, lse_p - whole_p
            over, under = (q, p) if options.get("direction") == "reverse" else (p, q)
            mine = over.exp() * (apart + temperature**2 * (over - under))
        return torch.where(counts, _Sum.apply(mine, group), 0.0).sum() / counts.sum()

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


def split_vocabulary(model: Any, mesh: DeviceMesh) -> nn.Module:
    """Split the token embedding and the head of ``model``, in place; a weight that both share stays shared.

    Args:
        model: a Transformer without an encoder, with rotary positions.
    """
    old_table, old_head = model.token_embedding, model.head
    tied = old_head.weight is old_table.weight
    rows, columns = old_table.weight.shape
    table = VocabParallelEmbedding(rows, columns, device="meta")
    head = VocabParallelHead(columns, rows, bias=False, device="meta")
    table.weight = nn.Parameter(distribute_tensor(old_table.weight.data, mesh, [Shard(0)]))
    head.weight = table.weight if tied else nn.Parameter(distribute_tensor(old_head.weight.data, mesh, [Shard(0)]))
    model.token_embedding, model.head = table, head
    return model
