"""Gather and scatter of a table's rows by PyTorch's own operators."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F


@contextlib.contextmanager
def named_errors(name: str, indices: torch.Tensor, weight: torch.Tensor, *, partial: bool = False):
    """Words PyTorch's error for an id out of range as the extension does; other errors pass."""
    try:
        yield
    except (IndexError, RuntimeError):
        rows = weight.shape[0]
        bad = ((indices < 0) if partial else (indices < 0) | (indices >= rows)).nonzero()
        if indices.device.type != "cpu" or not len(bad):
            raise
        position = bad[0].tolist()
        why = (
            f"and ids are not negative (a table of {rows} rows of a larger vocabulary)"
            if partial
            else f"outside the table of {rows} rows"
        )
        where = ", ".join(map(str, position))
        raise IndexError(f"{name}[{where}] is {indices[tuple(position)].item()}, {why}") from None


def gather_eager(name: str, indices: torch.Tensor, weight: torch.Tensor, start: int | None = None) -> torch.Tensor:
    """Rows of ``weight`` by PyTorch's own operators. With ``start``, zeros for ids outside its range."""
    if start is not None:
        with named_errors(name, indices, weight, partial=True):
            torch.ops.aten._assert_async((indices >= 0).all())
        foreign = (indices < start) | (indices >= start + weight.shape[0])
        # Foreign ids read a row of zeros behind the table, which exists even where the table has no rows.
        table = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
        return F.embedding(torch.where(foreign, weight.shape[0], indices - start), table)
    with named_errors(name, indices, weight):
        return F.embedding(indices, weight)


def scatter_eager(grad: torch.Tensor, keys: torch.Tensor, rows: int, by_freq: bool, scale: float) -> torch.Tensor:
    """Sums of ``grad``'s rows by key times ``scale``, in grad's dtype; keys equal to ``rows`` are dropped.

    PyTorch's CPU operator adds 16-bit gradients in 16 bits, where 1000 ones make 256: here it gets them widened.
    """
    wide = torch.promote_types(grad.dtype, torch.float32) if grad.device.type == "cpu" else grad.dtype
    table = torch.ops.aten.embedding_dense_backward(grad.to(wide), keys, rows + 1, rows, by_freq)
    return (table[:rows] * scale).to(grad.dtype)
