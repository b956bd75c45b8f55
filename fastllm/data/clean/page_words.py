"""The words of a page's blocks as numbers, and what repeats among them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WORD = re.compile(r"\w+")
# A page's own control characters are removed, so that this one stands between blocks.
_BETWEEN = "\x02"
_WORD_OR_END = re.compile(rf"\w+|{_BETWEEN}")
# Characters whose words are strings at once.
_AT_ONCE = 1 << 20
# What tells a block's kind are its first words.
FIRST_WORDS = 24
# Odd numbers, so that a run of three words has a key of 64 bits.
_KEYS = np.asarray([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)


@dataclass(frozen=True)
class PageWords:
    """The words of each block: lower case, runs of letters, digits and underscores.

    Attributes:
        known: each word's number.
        numbers: of all words of all blocks in order.
        starts: (blocks + 1,), where in ``numbers`` each block begins.
        counts: (blocks,) float64, the number of words in each block.
    """

    known: dict[str, int]
    numbers: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str]) -> PageWords:
        known: dict[str, int] = {_BETWEEN: 0}
        parts: list[np.ndarray] = []
        begin, size = 0, 0
        for end, text in enumerate(texts, 1):
            size += len(text)
            if size >= _AT_ONCE or end == len(texts):
                found = _WORD_OR_END.findall(_BETWEEN.join([*texts[begin:end], ""]).lower())
                parts.append(np.asarray([known.setdefault(word, len(known)) for word in found], np.int32))
                begin, size = end, 0
        numbers = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        ends = np.flatnonzero(numbers == 0)
        starts = np.concatenate([[0], ends + 1 - np.arange(1, len(ends) + 1)])
        counts = np.diff(starts).astype(np.float64)
        return cls(known, numbers[numbers > 0], starts, counts)

    def owners(self) -> np.ndarray:
        """The block of each word."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def shares(self, chosen: np.ndarray) -> np.ndarray:
        """The share of each block's words that are ``chosen``, a flag for each word."""
        total = np.concatenate([[0], np.cumsum(chosen)])
        return (total[self.starts[1:]] - total[self.starts[:-1]]) / np.maximum(np.diff(self.starts), 1)

    def first_sums(self, weights: Mapping[str, float]) -> np.ndarray:
        """What the first words of each block weigh."""
        of_words = np.fromiter((weights.get(word, 0.0) for word in self.known), np.float64, len(self.known))
        total = np.concatenate([[0.0], np.cumsum(of_words[self.numbers])])
        begin = self.starts[:-1]
        return total[np.minimum(begin + FIRST_WORDS, self.starts[1:])] - total[begin]

    def runs(self) -> tuple[np.ndarray, np.ndarray]:
        """The key of the three words from each word on, but for the last two, and whether they are of one block."""
        keys = np.zeros(max(0, len(self.numbers) - 2), np.uint64)
        for step, key in enumerate(_KEYS):
            keys += self.numbers[step : step + len(keys)].astype(np.uint64) * key
        owners = self.owners()
        return keys, owners[: len(keys)] == owners[2:]


def repeated(words: PageWords, others: str) -> np.ndarray:
    """(blocks, 3): of a block's words those in runs of three that an earlier block, a later one and ``others`` have."""
    keys, inside = words.runs()
    owners = words.owners()
    where = np.flatnonzero(inside)
    shares = np.zeros((len(words.starts) - 1, 3))
    if not len(where):
        return shares
    order = where[np.argsort(keys[where], kind="stable")]
    sorted_keys, blocks = keys[order], owners[order]
    new = np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]])
    group = np.cumsum(new) - 1
    firsts = blocks[new]
    lasts = blocks[np.concatenate([np.flatnonzero(new)[1:] - 1, [len(order) - 1]])]
    found = np.zeros((3, len(words.numbers)), bool)
    known = words.known
    theirs = np.asarray([known.get(word, -1) for word in WORD.findall(others.lower())], np.int64)
    their_keys = np.zeros(max(0, len(theirs) - 2), np.uint64)
    for step, key in enumerate(_KEYS):
        their_keys += theirs[step : step + len(their_keys)].astype(np.uint64) * key
    flags = (firsts[group] < blocks, lasts[group] > blocks, np.isin(sorted_keys, their_keys))
    for row, flag in enumerate(flags):
        at = order[flag]
        for step in range(3):
            found[row, at + step] = True
        shares[:, row] = words.shares(found[row])
    return shares
