"""One of two processes that train accelerated models under DDP or FSDP2: ``drop_in_worker.py RANK PORT OUT``."""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fastllm
from fastllm.drop_in.swap import Accelerated

V, D = 24, 8


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(16, D)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.RMSNorm(D)) for _ in range(2))
        self.head = nn.Linear(D, V)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def build():
    torch.manual_seed(0)
    return Model(), torch.randint(V, (4, 6)), torch.randint(V, (4, 6))


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


MODES = ("ddp", "ddp_unused", "fsdp", "fsdp_then_accelerate", "fsdp_reshard")


def run(mode: str, rank: int) -> dict[str, torch.Tensor]:
    """The gradients of one training step on this rank's half of the batch."""
    model, ids, labels = build()
    if mode.startswith("ddp"):
        fastllm.accelerate(model)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=mode == "ddp_unused")
    else:
        wrapped = sharded(
            model, accelerate_first=mode != "fsdp_then_accelerate", reshard=True if mode == "fsdp_reshard" else None
        )
    assert any(isinstance(m, Accelerated) for m in model.modules())
    half = slice(2 * rank, 2 * rank + 2)
    for _ in range(2):  # the second step meets what the first one left
        wrapped.zero_grad()
        loss_of(wrapped, ids[half], labels[half]).backward()
    grads = {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        for name, p in model.named_parameters()
    }
    assert fastllm.revert(model) > 0
    loss_of(wrapped, ids[half], labels[half]).backward()
    return grads


def with_dtensors() -> bool:
    """Whether accelerated modules with DTensor parameters give what they gave before."""
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.LayerNorm(D), nn.RMSNorm(D))
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    want = model(x)
    fastllm.accelerate(model)
    distribute_module(model, mesh)
    return torch.allclose(model(distribute_tensor(x, mesh, [Replicate()])).full_tensor(), want)


def main():
    rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {mode: run(mode, rank) for mode in MODES}
    results["dtensor"] = with_dtensors()
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
