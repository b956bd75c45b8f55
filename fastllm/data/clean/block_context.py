"""What a first estimate says of each block's surroundings: neighbours, the elements around it, blocks of its kind."""

from __future__ import annotations

import numpy as np

from .elements import Markup
from .features import Sums, element_kinds


def context(first: np.ndarray, words: np.ndarray, markup: Markup) -> np.ndarray:
    """What a first estimate says about a block's surroundings, (blocks, features) float32.

    Args:
        first: the probability that each block is main text.
        words: its size.
    """
    count = len(first)
    place, parents = np.asarray(markup.places), np.asarray(markup.parents)
    weighted = np.stack([first * words, words, first, np.ones(count)], 1)
    sums = Sums(weighted)
    of_elements = sums.between(np.asarray(markup.starts), np.asarray(markup.ends))
    own: list[np.ndarray] = [first]
    for step in (-3, -2, -1, 1, 2, 3):
        moved = np.zeros(count)
        if abs(step) < count:
            if step > 0:
                moved[:-step] = first[step:]
            else:
                moved[-step:] = first[:step]
        own.append(moved)
    index = np.arange(count)
    for reach in (5, 15):
        begin, end = np.maximum(index - reach, 0), np.minimum(index + reach + 1, count)
        near = sums.between(begin, end)
        own += [near[:, 0] / near[:, 1], near[:, 2] / near[:, 3]]
    at = place
    for _ in range(5):
        of = of_elements[at]
        own += [of[:, 0] / np.maximum(of[:, 1], 1e-9), of[:, 2] / np.maximum(of[:, 3], 1)]
        at = np.where(parents[at] < 0, at, parents[at])
    group = element_kinds(markup)[place]
    _, group = np.unique(group, return_inverse=True)
    of_group = np.stack([np.bincount(group, column) for column in weighted.T], 1)[group]
    own += [of_group[:, 0] / of_group[:, 1], of_group[:, 2] / of_group[:, 3]]
    total = weighted.sum(0)
    before = np.cumsum(weighted, 0)
    own += [
        np.full(count, np.log1p(total[0])), np.full(count, total[0] / total[1]), before[:, 0] / total[0],
        np.full(count, (first > 0.5).mean()), np.full(count, first.max()),
    ]  # fmt: skip
    return np.stack(own, 1).astype(np.float32)
