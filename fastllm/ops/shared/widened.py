"""Products of 16-bit matrices on a CPU whose hardware has none: blocks are widened to fp32 and multiplied there.

The matrices stay in 16 bits in memory. One block of each is held in fp32 at a time. Products and sums are in fp32, and
a result is rounded once. PyTorch's own product of such operands takes up to 30 times as long on such a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...cpu import multiplies

NARROW = (torch.bfloat16, torch.float16)
# A block has BLOCK elements, 1 MB in fp32, which a core's L2 cache holds. It has at least MIN_ROWS rows (or columns),
# so that each widened element of the other matrix takes part in at least MIN_ROWS products.
BLOCK, MIN_ROWS = 2**18, 256


def widens(x: torch.Tensor) -> bool:
    """Whether products of ``x``'s dtype are to be taken in fp32: 16 bits on a CPU that does not multiply them."""
    return x.dtype in NARROW and x.is_cpu and not multiplies(x.dtype)


def blocks(count: int, depth: int) -> Iterator[slice]:
    """Slices of ``count`` rows of ``depth`` elements each: the blocks that are widened one after the other."""
    step = max(MIN_ROWS, BLOCK // max(depth, 1))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def widened_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """``out`` (M, N) = x (M, K) @ weight (N, K).T + bias (N,)."""
    depth = x.shape[1]
    for rows in blocks(len(x), depth):
        wide = x[rows].float()
        for columns in blocks(len(weight), depth):
            part = torch.mm(wide, weight[columns].float().t())
            out[rows, columns] = part if bias is None else part.add_(bias[columns])
    return out


def widened_input_grad(dy: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out`` (M, K) = dy (M, N) @ weight (N, K)."""
    depth = weight.shape[1]
    for rows in blocks(len(dy), depth):
        total = torch.zeros(rows.stop - rows.start, depth)
        for columns in blocks(len(weight), depth):
            total.addmm_(dy[rows, columns].float(), weight[columns].float())
        out[rows] = total
    return out


def widened_weight_grad(dy: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out`` (N, K) = dy (M, N).T @ x (M, K)."""
    depth = x.shape[1]
    for columns in blocks(dy.shape[1], depth):
        total = torch.zeros(columns.stop - columns.start, depth)
        for rows in blocks(len(dy), depth):
            total.addmm_(dy[rows, columns].float().t(), x[rows].float())
        out[columns] = total
    return out
