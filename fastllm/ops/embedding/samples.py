"""Samples of embedding, and the least bytes that a call must move."""

from __future__ import annotations

import torch

from ...registry import Cost, Sample


def distinct(indices: torch.Tensor) -> int:
    """The number of different ids."""
    return int(torch.unique(indices).numel())


def embedding_cost(input, weight, *args, **kwargs) -> Cost:
    """Ids and each distinct row in, all rows out; backward: all rows in, the table's gradient written once."""
    row = weight.shape[1] * weight.element_size()
    ids = input.numel() * input.element_size()
    rows = input.numel() * row
    return Cost(ids + distinct(input) * row + rows, ids + rows + weight.shape[0] * row)


def make_table(device, dtype, rows: int, columns: int) -> torch.Tensor:
    """A table (rows, columns) of normal numbers that requires a gradient."""
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


def embedding_examples(device):
    """The samples that ``fastllm info`` asks about."""
    ids = torch.empty(4, device=device, dtype=torch.int64)
    tables = {dtype: torch.empty(2, 8, device=device, dtype=dtype) for dtype in (torch.float32, torch.int64)}
    yield Sample("a dense gradient", (ids, tables[torch.float32]))
    yield Sample("a sparse gradient", (ids, tables[torch.float32]), {"sparse": True})
    yield Sample("an integer table", (ids, tables[torch.int64]))
