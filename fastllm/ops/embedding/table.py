"""What embedding and embedding_sum share: checks, eager scatter, samples, least bytes."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F

from ...registry import Cost, Sample
from ..shared.check import check_integer


def check_table(op: str, name: str, weight) -> None:
    """``weight`` is a table: (rows, columns)."""
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(weight).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"{op}: {name} must have shape (rows, columns), got {list(weight.shape)}")


def check_indices(op: str, name: str, indices, weight: torch.Tensor) -> None:
    """``indices`` are ids for a lookup in ``weight``."""
    if not isinstance(indices, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(indices).__name__}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {str(indices.dtype).removeprefix('torch.')}")
    if indices.device != weight.device:
        raise ValueError(f"{op}: {name} is on {indices.device}, the table on {weight.device}; they must be together")


def normalised_padding(op: str, padding_idx: int | None, rows: int, *, partial: bool = False) -> int:
    """``padding_idx`` as an id, negative ones counted from the end of a whole table; -1 for None."""
    if padding_idx is None:
        return -1
    check_integer(op, "padding_idx", padding_idx)
    if partial:
        if padding_idx < 0:
            raise ValueError(
                f"{op}: beside vocab_range padding_idx is an id of the whole vocabulary, got {padding_idx}"
            )
        return padding_idx
    if not -rows <= padding_idx < rows:
        raise ValueError(f"{op}: padding_idx must lie within a table of {rows} rows, got {padding_idx}")
    return padding_idx + rows if padding_idx < 0 else padding_idx


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
        why = f"and ids are not negative (a part of {rows} rows)" if partial else f"outside the table of {rows} rows"
        where = ", ".join(map(str, position))
        raise IndexError(f"{name}[{where}] is {indices[tuple(position)].item()}, {why}") from None


def gather_eager(name: str, indices: torch.Tensor, weight: torch.Tensor, start: int | None = None) -> torch.Tensor:
    """Rows of ``weight`` by PyTorch's own operators. With ``start``, zeros for ids outside the part that it holds."""
    if start is not None:
        with named_errors(name, indices, weight, partial=True):
            torch._assert_async((indices >= 0).all())
        foreign = (indices < start) | (indices >= start + weight.shape[0])
        # A row of zeros behind the table: what foreign ids read, and there is one even where the table has no rows.
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


def distinct(indices: torch.Tensor) -> int:
    return int(torch.unique(indices).numel())


def embedding_cost(input, weight, *args, **kwargs) -> Cost:
    """Ids and each distinct row in, all rows out; backward: all rows in, the table's gradient written once."""
    row = weight.shape[1] * weight.element_size()
    ids = input.numel() * input.element_size()
    rows = input.numel() * row
    return Cost(ids + distinct(input) * row + rows, ids + rows + weight.shape[0] * row)


def make_table(device, dtype, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, device=device, dtype=torch.float32).to(dtype).requires_grad_()


def zipf(device, rows: int, *shape: int) -> torch.Tensor:
    """Ids as text has them: id k with a probability proportional to 1 / (k + 1)."""
    weights = 1 / torch.arange(1, rows + 1, device=device, dtype=torch.float32)
    n = int(torch.tensor(shape).prod())
    return torch.multinomial(weights, n, replacement=True).view(shape)


def embedding_samples(device, dtype):
    """Distributions of ids, options and layouts that have broken embeddings elsewhere."""

    def table(rows, columns):
        return make_table(device, dtype, rows, columns)

    def ids(*shape, rows):
        return torch.randint(rows, shape, device=device)

    yield Sample("zipf", (zipf(device, 100, 4, 70), table(100, 33)))
    yield Sample("all_equal", (torch.full((200,), 3, device=device), table(5, 65)))
    yield Sample("all_distinct", (torch.randperm(40, device=device).view(5, 8), table(40, 8)))
    yield Sample("both_ends", (torch.tensor([[0, 9], [9, 0]], device=device), table(10, 127)))
    yield Sample("int32", (ids(3, 5, 2, rows=17).int(), table(17, 24)))
    yield Sample("padding", (ids(6, 6, rows=4), table(4, 20)), {"padding_idx": 2})
    yield Sample("padding_negative", (ids(30, rows=7), table(7, 16)), {"padding_idx": -1})
    yield Sample("by_frequency", (zipf(device, 9, 40), table(9, 12)), {"scale_grad_by_freq": True, "padding_idx": 1})
    yield Sample("part", (ids(5, 7, rows=30), table(11, 18)), {"vocab_range": (9, 20), "padding_idx": 12})
    yield Sample("no_ids", (ids(2, 0, rows=3), table(3, 16)))
    yield Sample("one_id", (ids(rows=6), table(6, 10)))
    yield Sample("one_column", (ids(50, rows=4), table(4, 1)))
    yield Sample("no_columns", (ids(4, rows=4), table(4, 0)))
    yield Sample("wide", (ids(3, 3, rows=5), table(5, 1000)))
    yield Sample("row_stride", (ids(20, rows=12), table(12, 64)[:, 7:40]))
    yield Sample("transposed", (ids(20, rows=12), table(30, 12).transpose(0, 1)))
    yield Sample("strided_ids", (ids(8, 6, rows=9).t()[::2], table(9, 14)))
    yield Sample("expanded_ids", (ids(1, 6, rows=9).expand(4, 6), table(9, 14)))
