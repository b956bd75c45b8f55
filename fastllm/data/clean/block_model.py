"""How likely each block of a page is main text: two ensembles of oblivious trees and a network over its features.

The numbers in ``block_model.npz`` were learned by ``python -m fastllm.bench.main_text_training``; numpy evaluates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .article import caption_odds, elsewhere_odds, leads, read_also_odds, stated_lead, teaser_odds
from .beside import comment_odds, landmark_odds, outside_odds
from .block_context import context
from .block_network import Network
from .body import Running
from .elements import Markup
from .features import DECLARED_ARTICLE, STATED_ARTICLE, features
from .lexicon import Lexicon
from .page_types import TYPES, PageTypes
from .page_words import PageWords
from .related import related_odds
from .small_pages import log_odds

WEIGHTS = Path(__file__).with_name("block_model.npz")
# Taken off the log-odds on pages that seem to be of these types: there text of the same form stands around the main
# text.
# Cross-validated, the three together raise mean F1 by 0.002 and precision by 0.01 over none. Between 0.2 and 0.6 for
# articles, 0.3 and 1 for forums, 0.5 and 0.9 for products mean F1 stays within 0.001.
_CAUTIONS = {"article": 0.6, "forum": 0.3, "product": 0.9}
# Added to the log-odds of an article's lead, and to those of one that the page's data have too.
_LEAD, _STATED_LEAD = 1.0, 3.0
# The share of the network in a block's probability. The first and the second trees have half of the rest each.
# Cross-validated, mean F1 is 0.858 at 0, 0.860 at 0.25, 0.862 at 0.35 and 0.5, and 0.853 at 1. On sites that look
# different from all of these pages more than 0.25 costs precision.
_NETWORK = 0.25
# Types' weights are saved in so many steps to either side of 0.
_STEPS = 127
# Rows that are evaluated at once: of 64 to 512 all are as fast.
_ROWS = 256


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

    @classmethod
    def mean(cls, ensembles: Sequence[Trees]) -> Trees:
        """Trees whose log-odds are the mean of those of ``ensembles``."""
        columns = np.concatenate([trees.columns for trees in ensembles])
        borders = np.concatenate([trees.borders for trees in ensembles])
        leaves = np.concatenate([trees.leaves for trees in ensembles]) / np.float32(len(ensembles))
        return cls(columns, borders, leaves, float(np.mean([trees.bias for trees in ensembles])))

    def probabilities(self, rows: np.ndarray) -> np.ndarray:
        """The log-odds (n,) of ``rows`` (n, features)."""
        trees, levels = self.columns.shape
        offsets = (np.arange(trees) * self.leaves.shape[1]).astype(np.int32)
        flat = self.leaves.ravel()
        result = np.empty(len(rows))
        for begin in range(0, len(rows), _ROWS):
            # Features first, so that a question to all rows reads what lies together.
            part = np.ascontiguousarray(rows[begin : begin + _ROWS].T)
            leaf = np.repeat(offsets[:, None], part.shape[1], axis=1)
            for level in range(levels):
                above = part[self.columns[:, level]] > self.borders[:, level, None]
                leaf += above.astype(np.int32) << level
            result[begin : begin + _ROWS] = flat[leaf].sum(0, dtype=np.float64)
        return 1 / (1 + np.exp(-np.clip(result + self.bias, -30, 30)))


def mean_of(first: np.ndarray, second: np.ndarray, network: np.ndarray) -> np.ndarray:
    """What both ensembles and the network say, as one."""
    return (1 - _NETWORK) * (first + second) / 2 + _NETWORK * network


def with_rules(markup: Markup, rows: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """``probabilities`` that blocks are main text, with what rules say; ``rows`` are the features."""
    type = TYPES[int(np.argmax(rows[0, -len(TYPES) :]))]
    declared, stated = (bool(rows[0, column] > 0) for column in (DECLARED_ARTICLE, STATED_ARTICLE))
    forum = type == "forum"
    caution = _CAUTIONS.get(type, 0.0)
    odds = log_odds(probabilities) - (max(caution, _CAUTIONS["article"]) if stated else caution)
    odds += read_also_odds(markup, odds)
    running = Running.of(markup)
    odds += comment_odds(markup, running, forum, declared or stated) + landmark_odds(markup, running)
    outside = outside_odds(markup, running, declared)
    if not forum:
        odds += related_odds(markup, running, probabilities)
        odds += elsewhere_odds(markup, running, probabilities)
        if stated:
            odds += teaser_odds(markup, running)
    if declared or stated or type == "article":
        odds += caption_odds(markup, running)
        outside = np.where(leads(markup, running), _LEAD, outside)
        if (lead := stated_lead(markup, running)) is not None:
            outside[lead] = _STATED_LEAD
    return 1 / (1 + np.exp(-odds - outside))


@dataclass(frozen=True)
class BlockModel:
    """A lexicon, trees over a page's features, and trees over what the first ones say about a block's surroundings.

    The network sees the features of all blocks of a page.
    """

    lexicon: Lexicon
    first: Trees
    second: Trees
    network: Network

    def probabilities(self, page: str, markup: Markup, words: PageWords) -> np.ndarray:
        """The probability that each block of ``markup``, whose words are ``words``, is main text."""
        rows = features(page, markup, words, self.lexicon)
        first = self.first.probabilities(rows)
        second = self.second.probabilities(context(first, words.counts + 0.5, markup))
        return with_rules(markup, rows, mean_of(first, second, self.network.probabilities(rows)))

    def save(self, path: Path) -> None:
        arrays: dict[str, np.ndarray] = {}
        for name in ("names", "words", "headings"):
            weights = getattr(self.lexicon, name)
            arrays[name] = np.frombuffer("\n".join(weights).encode(), np.uint8)
            arrays[f"{name}_weights"] = np.asarray(list(weights.values()), np.float16)
        types = self.lexicon.types
        arrays["types"] = np.frombuffer("\n".join(types.tokens).encode(), np.uint8)
        step = np.abs(types.weights).max(0, initial=1e-12) / _STEPS
        arrays |= {"types_weights": np.rint(types.weights / step).astype(np.int8), "types_step": step}
        for name in ("counts", "count_weights", "bias"):
            arrays[f"types_{name}"] = getattr(types, name).astype(np.float32)
        for name in ("first", "second"):
            trees = getattr(self, name)
            arrays |= {
                f"{name}_columns": trees.columns.astype(np.uint16), f"{name}_borders": trees.borders.astype(np.float32),
                f"{name}_leaves": trees.leaves.astype(np.float16), f"{name}_bias": np.asarray(trees.bias),
            }  # fmt: skip
        arrays |= {f"network_{name}": values for name, values in self.network.arrays().items()}
        np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]  # none is called allow_pickle

    @classmethod
    def load(cls, path: Path) -> BlockModel:
        with np.load(path, allow_pickle=False) as found:
            tokens = found["types"].tobytes().decode().split("\n")
            types = PageTypes(
                dict(zip(tokens, range(len(tokens)), strict=True)),
                found["types_weights"] * found["types_step"],
                **{name: found[f"types_{name}"].astype(np.float64) for name in ("counts", "count_weights", "bias")},
            )
            names, words, headings = (
                dict(
                    zip(
                        found[name].tobytes().decode().split("\n"),
                        found[f"{name}_weights"].astype(np.float64).tolist(),
                        strict=True,
                    )
                )
                for name in ("names", "words", "headings")
            )
            lexicon = Lexicon(names, words, headings, types)
            first, second = (
                Trees(
                    found[f"{name}_columns"].astype(np.int64), found[f"{name}_borders"],
                    found[f"{name}_leaves"].astype(np.float32), float(found[f"{name}_bias"]),
                )
                for name in ("first", "second")
            )  # fmt: skip
            prefix = "network_"
            network = Network.of({name.removeprefix(prefix): found[name] for name in found if name.startswith(prefix)})
        return cls(lexicon, first, second, network)


@cache
def block_model() -> BlockModel:
    """The model that ships."""
    return BlockModel.load(WEIGHTS)
