"""What finds repeated passages: keys of three sentences in a row, and rolling hashes of windows of characters.

Spans of sentences are those of C4 (Raffel et al. 2020) and of datatrove's SentenceDedup. Of the hashes of short windows
winnowing (Schleimer et al. 2003) keeps few, and yet at least one, the same one, of every long window.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache

import numpy as np

from ..sentences import sentence_starts
from .words import BASE, GOLDEN

SENTENCES = 3
_WORD = re.compile(r"\w+")
_MIX = np.uint64(GOLDEN)
# Windows that are hashed at once: some 100 bytes each.
BLOCK = 1 << 18
ANCHOR = np.dtype([("key", "<u8"), ("place", "<u4")])


def sentence_spans(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Where sentences begin and at last how long ``text`` is; and a 64-bit key for each three of them in a row.

    Case, punctuation and white space do not change a key. What holds no word belongs to the sentence before it.
    """
    found = sentence_starts(text)
    starts, digests = [], []
    for begin, end in zip(found, [*found[1:], len(text)], strict=False):
        words = _WORD.findall(text[begin:end].casefold())
        if words:
            starts.append(begin)
            digest = hashlib.blake2b(" ".join(words).encode("utf-8", "replace"), digest_size=8).digest()
            digests.append(int.from_bytes(digest, "little"))
    values = np.array(digests, np.uint64)
    count = max(0, len(values) - SENTENCES + 1)
    keys = np.zeros(count, np.uint64)
    for i in range(SENTENCES):
        keys = keys * np.uint64(BASE) + values[i : i + count]
    return np.array([*starts, len(text)], np.int64), keys


def code_points(text: str) -> np.ndarray:
    """``text`` as an array of uint32, one for each character."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@cache
def _powers(base: int, count: int) -> np.ndarray:
    values = np.full(count, base, np.uint64)
    values[0] = 1
    return np.cumprod(values, dtype=np.uint64)


def window_hashes(codes: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of each window of ``length`` characters, one for each place where it can begin."""
    count = len(codes) - length + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    result = np.empty(count, np.uint64)
    size = BLOCK + length
    powers, inverses = _powers(BASE, size), _powers(pow(BASE, -1, 1 << 64), size)
    for begin in range(0, count, BLOCK):
        part = codes[begin : begin + BLOCK + length - 1].astype(np.uint64)
        part = (part + np.uint64(1)) * _MIX
        part ^= part >> np.uint64(32)
        sums = np.zeros(len(part) + 1, np.uint64)
        np.cumsum(part * powers[: len(part)], out=sums[1:])
        values = (sums[length:] - sums[:-length]) * inverses[: len(part) - length + 1]
        values ^= values >> np.uint64(32)
        values *= _MIX
        values ^= values >> np.uint64(29)
        result[begin : begin + BLOCK] = values
    return result


def _sliding(choose: np.ufunc, values: np.ndarray, width: int) -> np.ndarray:
    """The least (``np.minimum``) or largest (``np.maximum``) of each ``width`` values in a row."""
    count, span = len(values) - width + 1, 1
    while 2 * span <= width:
        values = choose(values[:-span], values[span:])
        span *= 2
    return choose(values[:count], values[width - span : width - span + count])


def anchor_length(length: int) -> int:
    """How long the windows are that stand for windows of ``length`` characters: half of it.

    Shorter ones would be fewer, and more of them phrases that many texts have.
    """
    return length // 2


def anchors(codes: np.ndarray, length: int) -> np.ndarray:
    """Places and hashes of short windows such that each window of ``length`` characters holds at least one of them.

    Which of its short windows a long one has for anchors depends on its own characters alone: equal windows share them.

    Returns:
        :data:`ANCHOR` records, the places ascending; about four for each ``length`` characters.
    """
    short = anchor_length(length)
    width = length - short + 1
    found = [np.zeros(0, ANCHOR)]
    for begin in range(0, len(codes) - length + 1, BLOCK):
        hashes = window_hashes(codes[begin : begin + BLOCK + length - 1], short)
        least = _sliding(np.minimum, hashes, width)
        around = np.zeros(len(least) + 2 * (width - 1), np.uint64)
        around[width - 1 : width - 1 + len(least)] = least
        places = np.flatnonzero(_sliding(np.maximum, around, width) == hashes)
        part = np.empty(len(places), ANCHOR)
        part["key"], part["place"] = hashes[places], places + begin
        # The preceding block may have chosen some of these.
        last = int(found[-1]["place"][-1]) if len(found[-1]) else -1
        known = np.isin(part["place"], found[-1]["place"]) if last >= begin else np.zeros(len(part), bool)
        found.append(part[~known])
    result = np.concatenate(found)
    return result[np.argsort(result["place"], kind="stable")]
