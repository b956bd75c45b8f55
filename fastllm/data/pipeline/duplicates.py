"""Which documents occur again, exactly or nearly: the first one of each cluster stays.

Keys are compared a slice of their range at a time, so that memory is bounded by :data:`SLICE` keys, whatever the number
of documents; 8 bytes of each document lie in a file that is mapped. The clusters do not depend on how many processes
cleaned, nor on the slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..clean.minhash import BANDS, SIZE

# Keys that are sorted at once: 16 bytes each, and as much again for sorting.
SLICE = 1 << 22


class _Arrays:
    """The arrays of one name, one in each shard, mapped."""

    def __init__(self, work: Path, name: str):
        self.parts = [np.load(path, mmap_mode="r") for path in sorted(work.glob(f"{name}-*.npy"))]

    def rows(self, starts: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Rows by the number of their document; ``starts`` are the numbers that the shards begin with."""
        shard = np.searchsorted(starts, index, side="right") - 1
        result = np.empty((len(index), *self.parts[0].shape[1:]), self.parts[0].dtype)
        for number in np.unique(shard):
            chosen = shard == number
            result[chosen] = self.parts[number][index[chosen] - starts[number]]
        return result


def mapped(path: Path, dtype: type, count: int) -> np.ndarray:
    """A new array of ``count`` values in the file ``path``."""
    # A file of nothing cannot be mapped.
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(count,)) if count else np.zeros(0, dtype)


class _Clusters:
    """Union-find over document numbers; the smallest number of a cluster stands for it."""

    def __init__(self, parents: np.ndarray):
        self._parents = parents

    def find(self, number: int) -> int:
        parents = self._parents
        while (parent := int(parents[number])) != number:
            parents[number] = parents[parent]
            number = parent
        return number

    def join(self, first: int, second: int) -> None:
        a, b = sorted((self.find(first), self.find(second)))
        self._parents[b] = a

    def flatten(self) -> None:
        """Make every document point at its cluster's first one. Parents are smaller, so one pass in order is enough."""
        for begin in range(0, len(self._parents), SLICE):
            part = self._parents[begin : begin + SLICE]
            for i in np.flatnonzero(part != np.arange(begin, begin + len(part))).tolist():
                part[i] = self._parents[part[i]]


def sorted_slices(
    parts: Sequence[np.ndarray], used: Callable[[int], np.ndarray] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """64-bit keys and the places that they have in all ``parts`` together, both sorted, a slice of the range at a time.

    Args:
        used: gives for the number of a part which of its keys count; None: all.
    """
    slices = max(1, -(-sum(map(len, parts)) // SLICE))
    width = (1 << 64) // slices + 1
    for number in range(slices):
        low, high = number * width, min((number + 1) * width, 1 << 64) - 1
        keys, places, begin = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
        for i, part in enumerate(parts):
            inside = (part >= np.uint64(low)) & (part <= np.uint64(high))
            inside = np.flatnonzero(inside if used is None else inside & used(i))
            keys.append(part[inside])
            places.append(inside + begin)
            begin += len(part)
        key, place = np.concatenate(keys), np.concatenate(places)
        order = np.argsort(key, kind="stable")
        yield key[order], place[order]


def _runs(parts: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The numbers of documents that have the same 64-bit key, ascending, for each key that occurs more than once."""
    for key, place in sorted_slices(parts):
        begins = np.flatnonzero(np.r_[True, key[1:] != key[:-1]]) if len(key) else np.zeros(0, np.int64)
        ends = np.r_[begins[1:], len(key)]
        for at in np.flatnonzero(ends[: len(begins)] - begins > 1):
            yield place[begins[at] : ends[at]]


@dataclass(frozen=True)
class Duplicates:
    """For each document the number of the first one of its cluster, and whether it repeats an earlier one exactly.

    ``starts`` are the numbers that the shards begin with, and at last how many documents there are.
    """

    starts: np.ndarray
    first: np.ndarray
    exact: np.ndarray

    def kept(self, shard: int) -> np.ndarray:
        """For each document of a shard, whether it is the first one of its cluster."""
        own = np.arange(self.starts[shard], self.starts[shard + 1])
        return np.asarray(self.first[own[0] : own[-1] + 1] == own) if len(own) else np.zeros(0, bool)

    def repeated(self) -> set[int]:
        """The documents that later ones repeat."""
        found: set[int] = set()
        for begin in range(0, len(self.first), SLICE):
            part = np.asarray(self.first[begin : begin + SLICE])
            found |= set(part[part != np.arange(begin, begin + len(part))].tolist())
        return found


def find_duplicates(work: Path, near: bool, similarity: float) -> Duplicates:
    """Compare the keys, and with ``near`` the signatures, of all shards in ``work``.

    Args:
        similarity: share of equal MinHash values from which on two documents that have a band in common are near
            duplicates. Each is compared with the first and with the preceding one of its band.
    """
    keys = _Arrays(work, "key")
    starts = np.cumsum([0, *(len(part) for part in keys.parts)])
    count = int(starts[-1])
    first = mapped(work / "first.npy", np.int64, count)
    exact = mapped(work / "exact.npy", bool, count)
    for begin in range(0, count, SLICE):
        end = min(count, begin + SLICE)
        first[begin:end] = np.arange(begin, end)
        exact[begin:end] = False
    clusters = _Clusters(first)
    if count:
        for run in _runs([part[:, 0] for part in keys.parts]):
            rests = keys.rows(starts[:-1], run)[:, 1]
            for rest in np.unique(rests):
                same = run[rests == rest]
                for number in same[1:].tolist():
                    exact[number] = True
                    clusters.join(int(same[0]), number)
    if near and count:
        signatures, bands = _Arrays(work, "signature"), _Arrays(work, "band").parts
        for band in range(BANDS):
            for run in _runs([part[band] for part in bands]):
                _join_similar(run, signatures, starts[:-1], clusters, similarity)
    clusters.flatten()
    return Duplicates(starts, first, exact)


def _join_similar(
    run: np.ndarray, signatures: _Arrays, starts: np.ndarray, clusters: _Clusters, similarity: float
) -> None:
    # A band that thousands share is read in pieces.
    first = signatures.rows(starts, run[:1])
    for begin in range(1, len(run), 4096):
        part = run[begin - 1 : begin + 4096]
        values = signatures.rows(starts, part)
        to_first = (values[1:] == first).sum(1) >= similarity * SIZE
        to_previous = (values[1:] == values[:-1]).sum(1) >= similarity * SIZE
        for i in np.flatnonzero(to_first | to_previous).tolist():
            clusters.join(int(run[0] if to_first[i] else part[i]), int(part[i + 1]))
