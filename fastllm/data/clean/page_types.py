"""What kind of page it is, by the names of its elements, the words that its blocks begin with, and counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .page_words import FIRST_WORDS, PageWords

TYPES = ("article", "collection", "documentation", "forum", "listing", "product", "service")
# So that a count that hardly differs between pages weighs little. A guess.
_LEAST_SPREAD = 1e-6


def page_tokens(names: Iterable[tuple[str, ...]], words: PageWords) -> set[str]:
    """The names of a page's elements as they are, and the words that its blocks begin with, after a colon."""
    found: set[str] = set().union(*names)
    starts, ends = words.starts[:-1], words.starts[1:]
    position = np.arange(len(words.numbers)) - np.repeat(starts, ends - starts)
    known = list(words.known)
    found.update(f":{known[number]}" for number in np.unique(words.numbers[position < FIRST_WORDS]).tolist())
    return found


@dataclass(frozen=True)
class PageTypes:
    """Scores of the types, about 1 for the page's own and 0 for others.

    Attributes:
        tokens: the row in ``weights`` of each known token.
        weights: (tokens, types).
        counts: (2, counts), means and spreads of the page's counts.
        count_weights: (counts, types).
        bias: (types,).
    """

    tokens: dict[str, int]
    weights: np.ndarray
    counts: np.ndarray
    count_weights: np.ndarray
    bias: np.ndarray

    def scores(self, tokens: Iterable[str], counts: np.ndarray) -> np.ndarray:
        """(types,) of the page that has ``tokens`` and ``counts``."""
        rows = [self.tokens[token] for token in tokens if token in self.tokens]
        mean, spread = self.counts
        return self.bias + self.weights[rows].sum(0) + (counts - mean) / spread @ self.count_weights

    @classmethod
    def learn(cls, pages: list[tuple[set[str], np.ndarray]], types: list[str], least: int, penalty: float) -> PageTypes:
        """Ridge regression on the types, in the dual form.

        Args:
            pages: tokens and counts of each page.
            least: how many pages have a token that is learned.
            penalty: on the squared weights of tokens and of counts that are scaled to a mean square of 1 over a page.
        """
        number: dict[str, int] = {}
        for tokens, _ in pages:
            for token in tokens:
                number[token] = number.get(token, 0) + 1
        known = {token: row for row, token in enumerate(sorted(t for t, times in number.items() if times >= least))}
        has = np.zeros((len(pages), len(known)))
        for row, (tokens, _) in enumerate(pages):
            has[row, [known[token] for token in tokens if token in known]] = 1
        share = has.mean(0)
        # A token that few pages have, or nearly all, is scaled less than to unit variance.
        scale = 1 / np.sqrt(share * (1 - share) + 0.02) / np.sqrt(len(known))
        counts = np.stack([found for _, found in pages])
        mean, spread = counts.mean(0), counts.std(0) + _LEAST_SPREAD
        rows = np.concatenate([(has - share) * scale, (counts - mean) / spread / np.sqrt(counts.shape[1])], 1)
        target = np.asarray([[type == name for name in TYPES] for type in types], float)
        offset = target.mean(0)
        dual = np.linalg.solve(rows @ rows.T + penalty * np.eye(len(rows)), target - offset)
        weights = rows.T @ dual
        of_tokens = weights[: len(known)] * scale[:, None]
        of_counts = weights[len(known) :] / np.sqrt(counts.shape[1])
        return cls(known, of_tokens, np.stack([mean, spread]), of_counts, offset - share @ of_tokens)
