"""The random words of the compiled code (csrc/order.h) and of the kernels, in PyTorch's own operators; and their seeds.

Philox 4x32-10 of J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011) is a function of a seed and of
a counter alone. So a mask is not stored: backward computes it again.
"""

from __future__ import annotations

import torch

_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device) -> torch.Tensor:
    """A seed, (1,) int64, from PyTorch's generator of ``device``.

    It follows manual_seed and activation checkpointing. It stays on the device: nothing waits for the host, and each
    replay of a CUDA graph draws anew.
    """
    return torch.randint(2**62, (1,), device=device, dtype=torch.int64)


def _high(product: torch.Tensor) -> torch.Tensor:
    # An int64 product of two 32-bit words wraps, which leaves all 64 bits in place; the shift is arithmetic.
    return (product >> 32) & _LOW


def philox(
    seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """The four 32-bit words, as int64, at the counter (c0, c1, c2 or 0, 0), which are 32-bit words too.

    The tensors are int64 and broadcast together. ``seed`` is one int64: the key.
    """
    k0, k1 = seed & _LOW, _high(seed)
    c3 = torch.zeros_like(c0)
    c2 = c3 if c2 is None else c2
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = _high(p1) ^ c1 ^ k0, p1 & _LOW, _high(p0) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _words(seed: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    return torch.stack(philox(seed, counter & _LOW, _high(counter)), -1)


def rows_kept(seed: torch.Tensor, n_rows: int, n_cols: int, p: float) -> torch.Tensor:
    """(n_rows, n_cols): the mask of kernels/math.py's ``is_kept``, bit for bit. ``seed``: one int64."""
    rows, cols = (torch.arange(n, device=seed.device) for n in (n_rows, n_cols))
    word, *_ = philox(seed, cols.expand(n_rows, n_cols), rows[:, None].expand(n_rows, n_cols))
    # Triton's uint_to_uniform_float.
    return torch.where(word >= 2**31, _LOW - word, word).float() * 4.6566127342e-10 >= p


def dropout_mask(seed: torch.Tensor, shape, p: float) -> torch.Tensor:
    """True where dropout with probability ``p`` keeps an element of a contiguous tensor of ``shape``.

    Args:
        seed: one int64, on the device of the mask.
        p: in [0, 1]; the words are compared with floor(p * 2^32).
    """
    n = 1
    for size in shape:
        n = n * size
    if p >= 1.0:
        return torch.zeros(shape, dtype=torch.bool, device=seed.device)
    words = _words(seed, torch.arange((n + 3) // 4, device=seed.device))
    return (words.flatten()[:n] >= min(int(p * 2**32), 2**32 - 1)).view(shape)
