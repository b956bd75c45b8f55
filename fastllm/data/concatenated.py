"""Arrays on the disk that follow each other, read as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np


class Concatenated:
    """Arrays of one dimension that follow each other, as one that is never copied as a whole.

    It has of numpy's array what reading needs: length, dtype, integers, slices and integer arrays of any shape as
    index, ``searchsorted``, and ``numpy.asarray``, which does copy.

    Args:
        offsets: what to add to each part's values.
    """

    ndim = 1

    def __init__(self, parts: Sequence[np.ndarray | Concatenated], offsets: Sequence[int] | None = None):
        self._parts = list(parts)
        self._offsets = list(offsets) if offsets is not None else None
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.dtype = self._parts[0].dtype
        self.shape = (int(self._ends[-1]),)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.generic]:
        return (value for number in range(len(self._parts)) for value in self._part(number))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.concatenate([self._part(i) for i in range(len(self._parts))]).astype(dtype or self.dtype, copy=False)

    def _part(self, number: int, index: slice | np.ndarray = slice(None)) -> np.ndarray:
        values = self._parts[number][index]
        return values if self._offsets is None else values + self.dtype.type(self._offsets[number])

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            pieces, begin = [], 0
            for number, end in enumerate(self._ends.tolist()):
                if start < end and stop > begin:
                    pieces.append(self._part(number, slice(max(0, start - begin), stop - begin)))
                begin = end
            if len(pieces) == 1:
                return pieces[0]
            return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)
        index = np.asarray(index)
        if index.dtype == bool or not np.issubdtype(index.dtype, np.integer):
            raise TypeError(f"index: expected integers or a slice, got {index.dtype}")
        if index.size and not (-len(self) <= index.min() and index.max() < len(self)):
            raise IndexError(f"index: out of range for {len(self):,} values")
        index = np.where(index < 0, index + len(self), index).astype(np.int64)
        numbers = np.searchsorted(self._ends, index, side="right")
        result = np.empty(index.shape, self.dtype)
        for number in np.unique(numbers):
            chosen = numbers == number
            begin = int(self._ends[number]) - len(self._parts[number])
            result[chosen] = self._part(int(number), index[chosen] - begin)
        return result[()]

    def searchsorted(self, values, side: Literal["left", "right"] = "left", sorter=None):
        """As numpy's, of ascending values: each part is searched where it lies."""
        if sorter is not None:
            raise TypeError("sorter: not taken by arrays that stay on disk")
        values = np.asarray(values).astype(np.int64)
        total = np.zeros(values.shape, np.int64)
        for part, offset in zip(self._parts, self._offsets or [0] * len(self._parts), strict=True):
            # numpy would copy a part as a whole if the types differed.
            inside = np.maximum(values - offset, 0).astype(part.dtype)
            total += np.where(values >= offset, np.searchsorted(part, inside, side=side), 0)
        return total[()]
