"""Which tokens a training step sees: a pure function of the data, the seed and the step, without a cursor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..config import InputError, check_whole_number
from .concatenated import Concatenated
from .token_file import TokenFile

if TYPE_CHECKING:
    import torch

# A target that no loss counts: PyTorch's default ignore_index.
IGNORE = -100


def derive_seed(*key: object) -> int:
    """A 63-bit seed from ``key``, so that every use of randomness has a stream of its own."""
    text = "/".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed permutation of range(size) sends ``index``: any element alone, without a table.

    A Feistel network of four rounds over the next even power of two; values outside the range walk on until they
    are inside (cycle walking, Black and Rogaway 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(derive_seed(key, round_)) for round_ in range(4)]
    result = np.asarray(index, np.uint64)
    todo = np.ones(result.shape, bool)
    while todo.any():
        left, right = result[todo] >> half, result[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        result[todo] = left << half | right
        todo &= result >= np.uint64(size)
    return result.astype(np.int64)


def shuffled(sample: np.ndarray, count: int, *key: object) -> np.ndarray:
    """Which of ``count`` items each of the numbers ``sample`` is: every item once an epoch, in a permuted order.

    Sample number s lies in epoch s // count, whose order depends on ``key`` and the epoch alone.
    """
    epochs, index = np.divmod(sample, count)
    result = np.empty_like(index)
    for epoch in np.unique(epochs):
        rows = epochs == epoch
        result[rows] = permute(index[rows], count, derive_seed(*key, epoch))
    return result


class Batches:
    """``batches(step)`` -> (tokens, targets), each (batch_size, context_length) int64; targets are one token later.

    Sample number s = step * batch_size + row lies in epoch s // windows. An epoch cuts the tokens into ``windows``
    windows of ``context_length``, from an offset of its own, and visits each window once, in a permuted order. The
    offset and the order depend only on the SHA-256 of the tokens, the seed and the epoch, so an exact resume needs no
    saved state.

    Raises:
        ValueError, TypeError: a size is no whole number of at least 1, or the seed no whole number.
        InputError: there are fewer than ``context_length`` + 1 tokens.
    """

    def __init__(self, tokens: TokenFile, context_length: int, batch_size: int, seed: int):
        check_whole_number("context_length", context_length, 1)
        check_whole_number("batch_size", batch_size, 1)
        check_whole_number("seed", seed)
        if len(tokens) < context_length + 1:
            raise InputError(
                f"context_length: the training text has {len(tokens):,} tokens, a context of {context_length:,} "
                f"needs at least {context_length + 1:,}; use a shorter context or more text"
            )
        self._tokens = tokens.tokens
        self._key = (tokens.sha256, seed)
        self.context_length, self.batch_size = context_length, batch_size
        # One window less than would fit, where there are several, leaves room for the offset.
        self.windows = max(1, (len(tokens) - context_length) // context_length)
        self._offsets = min(context_length, len(tokens) - self.windows * context_length)

    def starts(self, step: int) -> np.ndarray:
        """Position of each row's first token."""
        sample = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        epochs, index = np.divmod(sample, self.windows)
        starts = np.empty_like(sample)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            seed = derive_seed("batches", *self._key, epoch)
            starts[rows] = permute(index[rows], self.windows, seed) * self.context_length + seed % self._offsets
        return starts

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.starts(step)[:, None] + np.arange(self.context_length + 1)
        import torch

        batch = torch.from_numpy(self._tokens[rows].astype(np.int64))
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


@dataclass(frozen=True)
class Window:
    """Inputs tokens[start : start + length]; of their targets, the first ``skip`` were scored by earlier windows."""

    start: int
    length: int
    skip: int


def evaluation_windows(tokens: int, context_length: int, stride: int) -> list[Window]:
    """Windows that score each of ``tokens`` but the first exactly once.

    They advance by ``stride``, and each scores only the tokens that no earlier window scored. So every target after the
    first window has at least context_length - stride tokens of context. The last window is moved back so that it is as
    long as the others.

    Raises:
        ValueError, TypeError: an argument is no whole number, or too small; names it.
    """
    check_whole_number("tokens", tokens, 0)
    check_whole_number("context_length", context_length, 1)
    check_whole_number("stride", stride, 1)
    targets = tokens - 1
    length = min(context_length, targets)
    windows, scored = [], 0
    while scored < targets:
        start = min(max(0, scored + stride - length), targets - length)
        windows.append(Window(start, length, scored - start))
        scored = start + length
    return windows


def evaluation_batches(
    tokens: np.ndarray | Concatenated, context_length: int, stride: int, batch_size: int, limit: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, targets) for :func:`evaluation_windows`, ``batch_size`` windows each; skipped targets are -100.

    ``limit``: the most windows, evenly spread and always the same; 0: all.

    Raises:
        ValueError, TypeError: as for :func:`evaluation_windows`.
    """
    import torch

    check_whole_number("batch_size", batch_size, 1)
    check_whole_number("limit", limit, 0)
    windows = evaluation_windows(len(tokens), context_length, stride)
    if 0 < limit < len(windows):
        windows = [windows[i * len(windows) // limit] for i in range(limit)]
    for first in range(0, len(windows), batch_size):
        group = windows[first : first + batch_size]
        rows = np.stack([tokens[w.start : w.start + w.length + 1] for w in group]).astype(np.int64)
        targets = rows[:, 1:].copy()
        for row, window in zip(targets, group, strict=True):
            row[: window.skip] = IGNORE
        yield torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets)
