"""DTensors, which PyTorch's operators alone take."""

from __future__ import annotations

import torch

from ...backends import is_sharded


def log_softmax(z: torch.Tensor, dim: int) -> torch.Tensor:
    """``torch.log_softmax``, for a DTensor by other operators.

    Within torch's ``loss_parallel()`` the gradient of a DTensor's log_softmax is right for ``F.cross_entropy`` alone.
    """
    if not is_sharded(z):
        return torch.log_softmax(z, dim)
    z = z - z.detach().amax(dim, keepdim=True)
    return z - z.exp().sum(dim, keepdim=True).log()


def gather(z: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """``z.gather(dim, index)``; of a DTensor as whole values.

    PyTorch leaves sums over ranks to be taken later, where ``dim`` is split, and takes them wrongly after a view.
    """
    values = z.gather(dim, index)
    if not is_sharded(values):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(values, DTensor)
    places = [Replicate() if place.is_partial() else place for place in values.placements]
    return values.redistribute(placements=places)


def replicated(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``values``, which every rank has: beside a DTensor ``like`` a DTensor too, whole on each rank of its mesh."""
    if not is_sharded(like):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(like, DTensor)
    mesh = like.device_mesh
    return DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)


def agreed(seed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``seed``; beside a DTensor ``like`` that of the mesh's first rank, since the ranks' generators may differ."""
    if not is_sharded(like):
        return seed
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    assert isinstance(like, DTensor)
    mesh = like.device_mesh
    return distribute_tensor(seed, mesh, [Replicate()] * mesh.ndim).to_local()
