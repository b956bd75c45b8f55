"""Which passages of the kept documents occurred before: three sentences in a row, or a run of characters exactly.

The first occurrence stays, in the order of the documents. Characters are compared themselves; of sentences the 64-bit
keys. Memory is bounded by :data:`~.duplicates.SLICE` keys, one shard's keys and one document; the rest lies in mapped
files. Exact passages take 21 bytes there for each character near an anchor that occurs twice.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..clean.passages import SENTENCES, anchor_length, code_points, sentence_spans, window_hashes
from . import duplicates as compared
from .duplicates import Duplicates, mapped, sorted_slices

Ranges = list[tuple[int, int]]


class _Keys:
    """The keys of one name in all shards, one document's after the other's, and which belong to kept documents."""

    def __init__(self, work: Path, name: str, duplicates: Duplicates):
        self._duplicates = duplicates
        self.parts = [np.load(path, mmap_mode="r") for path in sorted(work.glob(f"{name}-*.npy"))]
        self.counts = [np.load(path, mmap_mode="r") for path in sorted(work.glob(f"{name}_count-*.npy"))]
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def used(self, shard: int) -> np.ndarray:
        return np.repeat(self._duplicates.kept(shard), self.counts[shard])


class RepeatedSentences:
    """Spans of three sentences whose key an earlier span has."""

    def __init__(self, work: Path, duplicates: Duplicates):
        self._keys = _Keys(work, "span", duplicates)
        self._again = mapped(work / "span_again.npy", bool, int(self._keys.starts[-1]))
        for key, place in sorted_slices(self._keys.parts, self._keys.used):
            self._again[place[1:][key[1:] == key[:-1]]] = True

    def of_shard(self, shard: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number in the shard, which of its spans occurred before) of each document that has such spans."""
        begin, end = self._keys.starts[shard : shard + 2]
        ends = np.cumsum(self._keys.counts[shard])
        found = np.searchsorted(ends, np.flatnonzero(self._again[begin:end]), side="right")
        for number in np.unique(found).tolist():
            own = slice(begin + ends[number] - self._keys.counts[shard][number], begin + ends[number])
            yield number, np.asarray(self._again[own])


def sentence_ranges(text: str, again: np.ndarray) -> Ranges:
    """The characters of ``text`` that lie in the spans that occurred before."""
    starts, _ = sentence_spans(text)
    spans = np.flatnonzero(again)
    return without_overlaps([(int(starts[i]), int(starts[i + SENTENCES])) for i in spans])


def without_overlaps(ranges: Ranges) -> Ranges:
    """``ranges``, sorted by where they begin, without overlaps."""
    result: Ranges = []
    for begin, end in ranges:
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


def _rows(values: list[tuple[int, int, int]]) -> bytes:
    return np.array(values, np.int64).tobytes()


def _read_rows(path: Path) -> np.ndarray:
    # A file of nothing cannot be mapped.
    return np.memmap(path, np.int64, "r").reshape(-1, 3) if path.stat().st_size else np.zeros((0, 3), np.int64)


class RepeatedSubstrings:
    """Passages of at least ``length`` characters that occurred before.

    1. Anchors (:func:`~..clean.passages.anchors`) that occur twice tell which characters can be in such a passage.
    2. Each window of ``length`` of these characters is hashed, and equal hashes are brought together.
    3. A window's characters are compared with those of the first window of the same hash.
    """

    def __init__(self, work: Path, duplicates: Duplicates, length: int):
        self._work, self._duplicates, self._length = work, duplicates, length
        # (document, first character, the one after the last), ascending.
        self.ranges = self._find()

    def of_shard(self, shard: int) -> Iterator[tuple[int, Ranges]]:
        """(number in the shard, its ranges) of each document that has repeated passages."""
        begin, end = self._duplicates.starts[shard : shard + 2]
        low, high = np.searchsorted(self.ranges[:, 0], [begin, end])
        rows = self.ranges[low:high]
        for number in np.unique(rows[:, 0]).tolist():
            own = rows[rows[:, 0] == number]
            yield number - int(begin), without_overlaps([(b, e) for _, b, e in own.tolist()])

    def _find(self) -> np.ndarray:
        regions = self._candidates()
        ends = np.cumsum(regions[:, 2] - regions[:, 1])
        count = int(ends[-1]) if len(ends) else 0
        if not count:
            return np.zeros((0, 3), np.int64)
        codes = np.memmap(self._work / "candidates.bin", np.uint32, "r")
        first = self._first_occurrences(codes, ends)
        with open(self._work / "ranges.bin", "wb") as table:
            for begin, end in self._equal(codes, first):
                region = int(np.searchsorted(ends, begin, side="right"))
                document, start, stop = regions[region].tolist()
                offset = start - (int(ends[region]) - (stop - start))
                table.write(_rows([(document, begin + offset, end + offset)]))
        return _read_rows(self._work / "ranges.bin")

    def _candidates(self) -> np.ndarray:
        """Write the characters that may lie in repeated passages one after the other; where they are from."""
        keys = _Keys(self._work, "anchor", self._duplicates)
        values = [part["key"] for part in keys.parts]
        twice = mapped(self._work / "anchor_twice.npy", bool, int(keys.starts[-1]))
        for key, place in sorted_slices(values, keys.used):
            same = key[1:] == key[:-1]
            twice[place[1:][same]] = True
            twice[place[:-1][same]] = True
        before = self._length - anchor_length(self._length)
        with open(self._work / "candidates.bin", "wb") as candidates, open(self._work / "regions.bin", "wb") as table:
            for shard, counts in enumerate(keys.counts):
                own = np.asarray(twice[keys.starts[shard] : keys.starts[shard + 1]])
                if not own.any():
                    continue
                ends = np.cumsum(counts)
                with gzip.open(self._work / f"text-{shard:05d}.jsonl.gz", "rb") as lines:
                    for number, line in enumerate(lines):
                        part = slice(int(ends[number] - counts[number]), int(ends[number]))
                        places = keys.parts[shard]["place"][part][own[part]].astype(np.int64)
                        if not len(places):
                            continue
                        codes = code_points(json.loads(line)["text"])
                        ranges = np.stack([places - before, places + self._length], 1).clip(0, len(codes))
                        regions = without_overlaps(ranges.tolist())
                        for begin, end in regions:
                            candidates.write(codes[begin:end].tobytes())
                        document = int(self._duplicates.starts[shard]) + number
                        table.write(_rows([(document, begin, end) for begin, end in regions]))
        return _read_rows(self._work / "regions.bin")

    def _first_occurrences(self, codes: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """For each place in ``codes`` the first one whose window has the same hash; -1 for that and where none is."""
        count, size = len(codes), compared.SLICE
        keys = mapped(self._work / "window.npy", np.uint64, count)
        whole = mapped(self._work / "window_whole.npy", bool, count)
        first = mapped(self._work / "window_first.npy", np.int64, count)
        for begin in range(0, count, size):
            hashes = window_hashes(codes[begin : begin + size + self._length - 1], self._length)
            keys[begin : begin + len(hashes)] = hashes
            places = np.arange(begin, min(count, begin + size))
            # A window across the border of two regions is none.
            last = np.searchsorted(ends, places + (self._length - 1), side="right")
            whole[begin : begin + size] = np.searchsorted(ends, places, side="right") == last
            first[begin : begin + size] = -1
        parts = [keys[begin : begin + size] for begin in range(0, count, size)]
        for key, place in sorted_slices(parts, lambda part: whole[part * size : (part + 1) * size]):
            if not len(key):
                continue
            group = np.cumsum(np.r_[True, key[1:] != key[:-1]]) - 1
            begins = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
            earliest = place[begins[group]]
            later = earliest != place
            first[place[later]] = earliest[later]
        return first

    def _equal(self, codes: np.ndarray, first: np.ndarray) -> Iterator[tuple[int, int]]:
        """The stretches of ``codes`` in which each window's characters are those of its first occurrence."""
        size = compared.SLICE
        for begin in range(0, len(first), size):
            part = np.asarray(first[begin : begin + size])
            places = np.flatnonzero(part >= 0)
            # Windows in a row whose first occurrences are in a row too.
            borders = np.flatnonzero((np.diff(places) != 1) | (np.diff(part[places]) != 1)) + 1
            for run in np.split(places, borders) if len(places) else []:
                here, there = begin + int(run[0]), int(part[run[0]])
                long = len(run) + self._length - 1
                same = np.asarray(codes[here : here + long] == codes[there : there + long])
                # The hash of other characters may be the same: what differs parts the run.
                edges = np.flatnonzero(np.diff(np.r_[False, same, False]))
                for low, high in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                    if high - low >= self._length:
                        yield here + low, here + high
