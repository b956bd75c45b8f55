"""Dropout's masks: the rule that the compiled code (csrc/order.h) and the kernels (kernels/math.py) follow bit for bit.

A mask has rows: a tensor's are those along its last dimension, numbered through; the probabilities of attention have
the rows (batch * heads + head) * 2^32 + query. Element j of row r is kept where word j % 4 of Philox at the counter
(j / 4, r's low word, r's high word, 0) is at least floor(p * 2^32). A seed is two int64: Philox's key, and the number
of the first row. So whoever computes a part of a batch names the row of the whole batch that it begins with, and has
the mask of the whole.

Philox 4x32-10 of J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011) is a function of a key and of a
counter alone. So a mask is not stored: backward computes it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device, first_row: torch.Tensor | None = None) -> torch.Tensor:
    """A seed, (2,) int64: a key from PyTorch's generator of ``device``, and ``first_row``, one int64, or another draw.

    It follows manual_seed and activation checkpointing. It stays on the device: nothing waits for the host, and each
    replay of a CUDA graph draws anew. A first row that nobody names is drawn since a 0 beside the key would be a second
    launch.
    """
    seed = torch.randint(2**62, (2,), device=device, dtype=torch.int64)
    return seed if first_row is None else torch.cat((seed[:1], first_row.view(1)))


def first_row_of(shape: Sequence[int], first: torch.Tensor | None) -> torch.Tensor | None:
    """The number of a mask's first row, of whose dimension 0 ``first`` entries come before; None where that is.

    ``shape``: of the mask without its last dimension.
    """
    rows = 1
    for size in shape[1:]:
        rows = rows * size
    return first if first is None or not shape else first * rows


def _high(product: torch.Tensor) -> torch.Tensor:
    # An int64 product of two 32-bit words wraps, which leaves all 64 bits in place; the shift is arithmetic.
    return (product >> 32) & _LOW


def philox(
    key: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """The four 32-bit words, as int64, at the counter (c0, c1, c2 or 0, 0), which are 32-bit words too.

    The tensors are int64 and broadcast together. ``key`` is one int64.
    """
    k0, k1 = key & _LOW, _high(key)
    c3 = torch.zeros_like(c0)
    c2 = c3 if c2 is None else c2
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = _high(p1) ^ c1 ^ k0, p1 & _LOW, _high(p0) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def rows_kept(key: torch.Tensor, rows: torch.Tensor, cols: int, p: float) -> torch.Tensor:
    """(*rows.shape, cols) bool: which of the first ``cols`` elements of each row dropout with probability ``p`` keeps.

    Args:
        key: one int64, on the device of ``rows``.
        rows: int64, the rows' numbers.
    """
    groups = torch.arange((cols + 3) // 4, device=rows.device)
    shape = (*rows.shape, groups.numel())
    rows = rows.unsqueeze(-1).expand(shape)
    words = philox(key, groups.expand(shape), rows & _LOW, _high(rows))
    kept = torch.stack([word >= dropout_threshold(p) for word in words], -1).flatten(-2)[..., :cols]
    return kept if p < 1.0 else torch.zeros_like(kept)


def dropout_threshold(p: float) -> int:
    """What a random word is at least where dropout with probability ``p`` keeps an element."""
    return min(int(p * 2**32), 2**32 - 1)


def dropout_scale(p: float) -> float:
    """What dropout multiplies the elements with that it keeps."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def dropout_mask(seed: torch.Tensor, shape, p: float) -> torch.Tensor:
    """True where dropout with probability ``p``, in [0, 1], keeps an element of a tensor of ``shape``.

    ``seed``: as of :func:`draw_seed`, on the device of the mask.
    """
    count = 1
    for size in shape[:-1]:
        count = count * size
    rows = torch.arange(count, device=seed.device) + seed[1]
    return rows_kept(seed[0], rows, shape[-1], p).view(shape)
