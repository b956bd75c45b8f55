"""One of two processes that train accelerated models under DDP or FSDP2: ``drop_in_worker.py RANK OUT``."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fastllm
from fastllm import functional as FF
from fastllm.drop_in.swap import Accelerated
from fastllm.functional import linear_log_probs
from fastllm.models.head import Head
from fastllm.ops.cross_entropy.kl_call import DIRECTIONS

V, D = 24, 8


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(16, D)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.RMSNorm(D)) for _ in range(2))
        self.head = nn.Linear(D, V)

    def forward(self, ids, labels=None):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(x)
        return logits if labels is None else (F.cross_entropy(logits.view(-1, V), labels.view(-1)), logits)


def build(tied=False):
    torch.manual_seed(0)
    model = Model()
    if tied:
        # Without a bias the head has no parameter of its own.
        model.head = nn.Linear(D, V, bias=False)
        model.head.weight = model.tokens.weight
    return model, torch.randint(V, (4, 6)), torch.randint(V, (4, 6))


def loss_of(model, ids, labels):
    return F.cross_entropy(model(ids).view(-1, V), labels.view(-1))


def sharded(model, *, accelerate_first: bool, reshard):
    from torch.distributed.fsdp import fully_shard

    if accelerate_first:
        fastllm.accelerate(model)
    for part in (*model.blocks, model.positions):
        fully_shard(part)
    fully_shard(model, reshard_after_forward=reshard)
    if not accelerate_first:
        fastllm.accelerate(model)
    return model


def sharded_by_fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    # Each rank keeps whole gradients, which can be compared.
    return FullyShardedDataParallel(
        model, use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD, device_id=torch.device("cpu")
    )


MODES = ("ddp", "ddp_unused", "fsdp", "fsdp_then_accelerate", "fsdp_reshard", "fsdp_tied", "fsdp1")


def run(mode: str, rank: int) -> dict[str, torch.Tensor]:
    """The gradients of one training step on this rank's half of the batch."""
    model, ids, labels = build(tied=mode == "fsdp_tied")
    if mode == "fsdp1":
        fastllm.accelerate(model)
        wrapped = sharded_by_fsdp1(model)
    elif mode.startswith("ddp"):
        fastllm.accelerate(model)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=mode == "ddp_unused")
    else:
        wrapped = sharded(
            model, accelerate_first=mode != "fsdp_then_accelerate",
            reshard=True if mode in ("fsdp_reshard", "fsdp_tied") else None,
        )  # fmt: skip
    assert any(isinstance(m, Accelerated) for m in model.modules())
    half = slice(2 * rank, 2 * rank + 2)
    for inside in (False, True):  # the second step meets what the first one left
        wrapped.zero_grad()
        loss = wrapped(ids[half], labels[half])[0] if inside else loss_of(wrapped, ids[half], labels[half])
        loss.backward()
    grads = {
        name.removeprefix("_fsdp_wrapped_module."): (
            p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        ).clone()
        for name, p in model.named_parameters()
    }
    assert fastllm.revert(model) > 0
    loss_of(wrapped, ids[half], labels[half]).backward()
    return grads


def with_dtensors() -> bool:
    """Whether accelerated modules with DTensor parameters give what they gave before; functions of DTensors do."""
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.LayerNorm(D), nn.RMSNorm(D))
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    want = model(x)
    fastllm.accelerate(model)
    distribute_module(model, mesh)
    ids = torch.tensor([1, 0, 3, 2])
    for place in (Replicate(), Shard(0)):
        rows, numbers = (distribute_tensor(t, mesh, [place]) for t in (x, ids))
        table = distribute_tensor(x, mesh, [Replicate()])
        for found, expected in (
            (FF.rms_norm(rows, (D,)), F.rms_norm(x, (D,))),
            (FF.add_rms_norm(rows, rows, (D,))[0], F.rms_norm(x + x, (D,))),
            (FF.cross_entropy(rows, numbers), F.cross_entropy(x, ids)),
            (FF.embedding(numbers, table), x[ids]),
            (FF.embedding_sum([numbers, None], [table, table]), x[ids] + x),
        ):
            torch.testing.assert_close(found.full_tensor(), expected)
        # The ranks' generators differ, and the mask is that of the first one's.
        torch.manual_seed(dist.get_rank())
        dropped = [
            FF.add_rms_norm(rows, rows, (D,), dropout_p=0.5)[1],
            FF.embedding_sum([numbers, None], [table, table], dropout_p=0.5),
        ]
        torch.manual_seed(0)
        wanted = [
            FF.add_rms_norm(x, x, (D,), dropout_p=0.5)[1], FF.embedding_sum([ids, None], [x, x], dropout_p=0.5)
        ]  # fmt: skip
        for found, expected in zip(dropped, wanted, strict=True):
            torch.testing.assert_close(found.full_tensor(), expected)
    return torch.allclose(model(distribute_tensor(x, mesh, [Replicate()])).full_tensor(), want)


def linear_losses(place=None) -> dict[str, tuple]:
    """name -> (value, gradient of the hidden states, of the head) of the linear losses, each a scalar.

    ``place``: of the head's DTensor, whole or split, in a mesh that has the other tensors whole. None: no DTensors.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    g = torch.Generator().manual_seed(2)
    x, weight, y = torch.randn(2, 3, D, generator=g), torch.randn(V, D, generator=g), torch.arange(6).view(2, 3)
    y[0, 1] = -100
    teacher = 1.5 * x, weight.flip(0)
    if place is not None:
        mesh = init_device_mesh("cpu", (2,))
        x, y, *teacher = (distribute_tensor(t, mesh, [Replicate()]) for t in (x, y, *teacher))
        weight = distribute_tensor(weight, mesh, [place])
    losses = {
        "cross_entropy": lambda x, w: FF.linear_cross_entropy(x, w, y, shift=1),
        "more": lambda x, w: sum(
            each.sum()
            for each in FF.linear_cross_entropy(
                x, w, y, reduction="none", softcap=3.0, label_smoothing=0.1, return_lse=True, return_accuracy=True,
                return_entropy=True,
            )
        ),
        "log_probs": lambda x, w: sum(each.sum() for each in linear_log_probs(x, w, y, return_entropy=True)),
        "kl_div": lambda x, w: FF.linear_kl_div(x, w, *teacher, temperature=2.0),
    }  # fmt: skip
    found = {}
    for name, loss in losses.items():
        leaves = [t.clone().detach().requires_grad_() for t in (x, weight)]
        value = loss(*leaves)
        grads = torch.autograd.grad(value, leaves)
        found[name] = tuple(t.full_tensor() if place is not None else t for t in (value.detach(), *grads))
    return found


def linear_losses_of_dtensors() -> list[dict]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    found = [linear_losses(place) for place in (Replicate(), Shard(0), Shard(1))]
    with loss_parallel():
        return [*found, linear_losses(Shard(0))]


def _posts(head, x, y, teacher):
    """A scalar of log-probabilities, and of entropies where the head gives them, and one of each divergence."""
    tx, tw = teacher
    found = {
        direction: head.divergence(x, tx, tw, y, direction=direction, temperature=2.0, beta=0.3)
        for direction in DIRECTIONS
    }
    factors = 1 + y / V
    if hasattr(head, "_parts"):
        log_probs, entropy = head.log_probs(x, y, 0.7, return_entropy=True)
    else:
        log_probs, entropy = linear_log_probs(x, head.weight, y, temperature=1 / 0.7, return_entropy=True)
    return found | {"log_probs": (factors * log_probs).sum(), "entropy": (factors * entropy).sum()}


class _Posts(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, *args):
        return _posts(self.head, *args)


def post_training(way: str, rank: int = 0) -> dict[str, tuple]:
    """name -> (value, gradient of the hidden states, of the head) of the losses of :func:`_posts`.

    ``way``: "alone"; "vocabulary", the head split over the ranks; "fsdp", the parameters split and each rank with half
    of the rows.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    from fastllm.training.parallel.vocab_parallel import VocabParallelHead

    torch.manual_seed(1)
    head, x, y = Head(D, V + 1, bias=False), torch.randn(4, 3, D), torch.randint(V, (4, 3))
    y[::2, 1] = -100
    teacher = torch.randn(4, 3, 5), torch.randn(V + 1, 5)
    if way == "vocabulary":
        mesh = init_device_mesh("cpu", (2,))
        split = VocabParallelHead(D, V + 1, bias=False, device="meta")
        split.weight = nn.Parameter(distribute_tensor(head.weight.data, mesh, [Shard(0)]))
        head = split
    model = _Posts(head)
    if way == "fsdp":
        fully_shard(model)
        half = slice(2 * rank, 2 * rank + 2)
        x, y, teacher = x[half], y[half], (teacher[0][half], teacher[1])
    found = {}
    for name in (*DIRECTIONS, "log_probs", "entropy"):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        value = model(leaf, y, teacher)[name]
        value.backward()
        grad = model.head.weight.grad
        found[name] = value.detach(), leaf.grad, grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def main():
    rank, out = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    # They meet in a file: a port that was free may be another program's by now.
    dist.init_process_group("gloo", init_method=out.with_name("meeting").as_uri(), rank=rank, world_size=2)
    results = {mode: run(mode, rank) for mode in MODES}
    results["dtensor"] = with_dtensors()
    results["linear losses"] = linear_losses_of_dtensors()
    results["split vocabulary"], results["halves"] = post_training("vocabulary"), [None, None]
    dist.all_gather_object(results["halves"], post_training("fsdp", rank))
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
