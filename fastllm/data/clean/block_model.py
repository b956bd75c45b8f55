"""How likely each block of a page is main text: two ensembles of oblivious trees over a page's features.

The numbers in ``block_model.npz`` were learned by ``python -m fastllm.bench.main_text_training``; numpy evaluates them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .features import Lexicon, context, features
from .markup import Markup
from .page_words import PageWords

WEIGHTS = Path(__file__).with_name("block_model.npz")
# Rows that are evaluated at once: with 400 trees of six levels 2.4 million comparisons.
_ROWS = 1024


@dataclass(frozen=True)
class Trees:
    """Oblivious trees: all nodes of a level ask the same question, so that the answers are a leaf's number.

    Attributes:
        columns, borders: (trees, levels), which feature a level compares with what.
        leaves: (trees, 2 ** levels), log-odds; the first level is the lowest bit.
        bias: what is added to the sum.
    """

    columns: np.ndarray
    borders: np.ndarray
    leaves: np.ndarray
    bias: float

    def probabilities(self, rows: np.ndarray) -> np.ndarray:
        """Of (n, features) rows, (n,)."""
        trees, levels = self.columns.shape
        powers = (1 << np.arange(levels)).astype(np.float32)
        offsets = np.arange(trees) * self.leaves.shape[1]
        flat, columns, borders = self.leaves.ravel(), self.columns.ravel(), self.borders.ravel()
        result = np.empty(len(rows))
        for begin in range(0, len(rows), _ROWS):
            part = rows[begin : begin + _ROWS]
            above = (part[:, columns] > borders).astype(np.float32).reshape(len(part), trees, levels)
            leaf = (above @ powers).astype(np.int64)
            result[begin : begin + _ROWS] = flat[leaf + offsets].sum(1, dtype=np.float64)
        return 1 / (1 + np.exp(-np.clip(result + self.bias, -30, 30)))


@dataclass(frozen=True)
class BlockModel:
    """A lexicon, trees over a page's features, and trees over what the first ones say about a block's surroundings."""

    lexicon: Lexicon
    first: Trees
    second: Trees

    def probabilities(self, page: str, markup: Markup, words: PageWords) -> np.ndarray:
        """Of each block of ``markup``, whose words are ``words``, the probability that it is main text."""
        first = self.first.probabilities(features(page, markup, words, self.lexicon))
        second = self.second.probabilities(context(first, words.counts + 0.5, markup))
        return (first + second) / 2

    def save(self, path: Path) -> None:
        arrays: dict[str, np.ndarray] = {}
        for name in ("names", "words", "headings"):
            weights = getattr(self.lexicon, name)
            arrays[name] = np.frombuffer("\n".join(weights).encode(), np.uint8)
            arrays[f"{name}_weights"] = np.asarray(list(weights.values()), np.float16)
        for name in ("first", "second"):
            trees = getattr(self, name)
            arrays |= {
                f"{name}_columns": trees.columns.astype(np.uint16), f"{name}_borders": trees.borders.astype(np.float32),
                f"{name}_leaves": trees.leaves.astype(np.float16), f"{name}_bias": np.float64(trees.bias),
            }  # fmt: skip
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> BlockModel:
        with np.load(path, allow_pickle=False) as found:
            lexicon = Lexicon(
                *(
                    dict(
                        zip(
                            found[name].tobytes().decode().split("\n"),
                            found[f"{name}_weights"].astype(np.float64).tolist(),
                            strict=True,
                        )
                    )
                    for name in ("names", "words", "headings")
                )
            )
            trees = [
                Trees(
                    found[f"{name}_columns"].astype(np.int64), found[f"{name}_borders"],
                    found[f"{name}_leaves"].astype(np.float32), float(found[f"{name}_bias"]),
                )
                for name in ("first", "second")
            ]  # fmt: skip
        return cls(lexicon, *trees)


@cache
def block_model() -> BlockModel:
    """The model that ships."""
    return BlockModel.load(WEIGHTS)
