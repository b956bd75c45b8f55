"""SHA-256 of files, and of arrays on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .concatenated import Concatenated

# Bytes of a file, or values of an array, that are read at once.
_AT_ONCE = 1 << 20


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of what ``path`` holds, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def arrays_sha256(arrays: Iterable[np.ndarray | Concatenated]) -> str:
    """The SHA-256 of one-dimensional ``arrays`` one after the other, as they are stored, in hexadecimal."""
    digest = hashlib.sha256()
    for array in arrays:
        for begin in range(0, len(array), _AT_ONCE):
            digest.update(np.asarray(array[begin : begin + _AT_ONCE]).data)
    return digest.hexdigest()
