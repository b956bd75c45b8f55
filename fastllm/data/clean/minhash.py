"""Signatures for finding near duplicates: MinHash (Broder 1997) over runs of five words, 14 bands of 8 values.

numpy computes all 112 values of a block of runs at once. Two texts whose sets of runs have the Jaccard similarity s
share a band with probability 1 - (1 - s^8)^14: 0.92 at s = 0.8, 0.10 at s = 0.5.
"""

from __future__ import annotations

import hashlib

import numpy as np

from .words import BASE, GOLDEN, words_of

# As FineWeb was compared (Penedo et al. 2024, arXiv:2406.17557).
BANDS, ROWS, RUN = 14, 8, 5
SIZE = BANDS * ROWS
_draw = np.random.Generator(np.random.PCG64(20240607))
# Multiply-shift hashing (Dietzfelbinger et al. 1997): odd 64-bit factors, the upper 32 bits count.
_FACTORS = _draw.integers(0, 1 << 63, SIZE, np.uint64) * np.uint64(2) + np.uint64(1)
_TERMS = _draw.integers(0, 1 << 63, SIZE, np.uint64)
_BLOCK = 2048


def exact_key(text: str) -> bytes:
    """16 bytes of the text's SHA-256: the same for the same text alone."""
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()[:16]


def signature(text: str) -> np.ndarray:
    """The 112 values, uint32. A text of fewer than five words is one run."""
    words = words_of(text)
    grams = np.unique(words.grams(min(RUN, max(1, len(words.words)))))
    result = np.full(SIZE, np.iinfo(np.uint32).max, np.uint32)
    # Runs differ mostly in their low bits; this spreads them.
    grams = (grams ^ (grams >> np.uint64(31))) * np.uint64(GOLDEN)
    for begin in range(0, len(grams), _BLOCK):
        block = grams[begin : begin + _BLOCK, None]
        values = ((block * _FACTORS + _TERMS) >> np.uint64(32)).astype(np.uint32)
        np.minimum(result, values.min(0), out=result)
    return result


def band_keys(signatures: np.ndarray) -> np.ndarray:
    """A 64-bit key for each band of (n, 112) signatures, (n, 14)."""
    parts = signatures.reshape(len(signatures), BANDS, ROWS).astype(np.uint64)
    keys = np.zeros(parts.shape[:2], np.uint64)
    for row in range(ROWS):
        keys = keys * np.uint64(BASE) + parts[:, :, row] + np.uint64(1)
        keys ^= keys >> np.uint64(29)
    return keys
