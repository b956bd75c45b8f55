"""A text as its words, once: what the rules count and what MinHash compares."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

# Scripts that put no space between words: each of their characters counts as one, with the marks that follow it.
# Thai, Lao, Tibetan and Burmese; Khmer; Tai Le, New Tai Lue and Tai Tham; Balinese and Javanese; then Japanese and
# Chinese.
_SMALL = "\u0e00-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9ff\uaa60-\uaa7f"
_APART = f"{_SMALL}\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# Ethiopic has a mark of its own between words.
WORD = re.compile(f"[{_APART}](?:(?!\\w)[{_APART}])*|[^\\s\u1361{_APART}]+")
_SINGLE, _SINGLE_SMALL = (re.compile(f"^[{script}]", re.MULTILINE) for script in (_APART, _SMALL))
# An odd multiplier for polynomial hashes modulo 2^64 (Knuth's MMIX); odd, so that it has an inverse. And 2^64 over the
# golden ratio, which spreads bits (Fibonacci hashing, Knuth).
BASE, GOLDEN = 6364136223846793005, 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Words:
    """The words of a text, with the punctuation that sticks to them."""

    words: tuple[str, ...]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @cached_property
    def to_a_word(self) -> int:
        """How many of these are as much as a word: one, or more if most are characters of a script without spaces.

        Chinese and Japanese words have about two characters. The others spell sounds, and four are a guess.
        """
        lines, most = "\n".join(self.words), 0.5 * len(self.words)
        if len(_SINGLE.findall(lines)) <= most:
            return 1
        return 4 if len(_SINGLE_SMALL.findall(lines)) > most else 2

    @cached_property
    def hashes(self) -> np.ndarray:
        """64 bits of each word in lower case, the same on every machine."""
        known: dict[str, int] = {}
        for word in set(self.words):
            digest = hashlib.blake2b(word.lower().encode("utf-8", "replace"), digest_size=8).digest()
            known[word] = int.from_bytes(digest, "little")
        return np.fromiter((known[word] for word in self.words), np.uint64, len(self.words))

    def grams(self, n: int) -> np.ndarray:
        """A 64-bit hash of each run of ``n`` words; fewer words than that have none."""
        count = len(self.words) - n + 1
        if count < 1:
            return np.zeros(0, np.uint64)
        total = np.zeros(count, np.uint64)
        for i in range(n):
            total = total * np.uint64(BASE) + self.hashes[i : i + count]
        return total


@lru_cache(maxsize=2)
def words_of(text: str) -> Words:
    return Words(tuple(WORD.findall(text)))


def _covered(words: Words, starts: np.ndarray, n: int) -> float:
    """The share of characters in the runs of ``n`` words from each of ``starts``; overlaps count once."""
    steps = np.zeros(len(words.words) + 1, np.int64)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + n, -1)
    inside = np.cumsum(steps[:-1]) > 0
    return float(words.lengths[inside].sum() / max(1, words.lengths.sum()))


def repeated_share(words: Words, n: int) -> float:
    """The share of characters in runs of ``n`` words that occurred before; overlaps count once (Rae et al. 2021)."""
    grams = words.grams(n)
    if not len(grams):
        return 0.0
    _, first = np.unique(grams, return_index=True)
    again = np.ones(len(grams), bool)
    again[first] = False
    return _covered(words, np.flatnonzero(again), n)


def top_share(words: Words, n: int) -> float:
    """The share of characters in the most frequent run of ``n`` words; overlaps count once. 0 if none occurs twice."""
    grams = words.grams(n)
    if not len(grams):
        return 0.0
    _, first, counts = np.unique(grams, return_index=True, return_counts=True)
    most = int(counts.max())
    if most < 2:
        return 0.0
    at = int(first[counts == most].min())
    return _covered(words, np.flatnonzero(grams == grams[at]), n)


def repeated_parts(parts: Sequence[str]) -> tuple[float, float]:
    """The share of lines or paragraphs that occurred before, and their share of the characters."""
    seen: set[str] = set()
    count = size = 0
    for part in parts:
        if part in seen:
            count += 1
            size += len(part)
        seen.add(part)
    return count / max(1, len(parts)), size / max(1, sum(map(len, parts)))
