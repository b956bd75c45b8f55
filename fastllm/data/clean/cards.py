"""What a page repeats: cards, rows and posts, which are siblings alike that hold several blocks each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .elements import Markup

# The fewest siblings of one tag that are cards, and their fewest blocks on average. Guesses.
_LEAST, _BLOCKS = 3, 1.5


@dataclass(frozen=True)
class Cards:
    """Which card each element lies in.

    Attributes:
        roots: of each element the one that is its card as a whole, of the largest set that it lies in, or -1.
        slots: of each element where in its card it is, by the tags between them; equal for equal paths.
        groups: of each element the number of the set of siblings that have its tag.
        sizes: of each set how many of its elements hold text.
    """

    roots: np.ndarray
    slots: np.ndarray
    groups: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, markup: Markup) -> Cards:
        numbers: dict[tuple[int, str], int] = {}
        pairs = zip(markup.parents, markup.tags, strict=True)
        groups = np.asarray([numbers.setdefault(pair, len(numbers)) for pair in pairs])
        held = np.asarray(markup.ends) - np.asarray(markup.starts)
        sizes = np.bincount(groups, held > 0)
        cards = ((sizes >= _LEAST) & (np.bincount(groups, held) >= _BLOCKS * sizes))[groups] & (held > 0)
        roots: list[int] = []
        slots: list[int] = []
        paths: dict[tuple[int, str], int] = {}
        of_element = zip(markup.tags, markup.parents, cards.tolist(), sizes[groups].tolist(), strict=True)
        largest: list[int] = []
        for number, (tag, parent, card, size) in enumerate(of_element):
            above = largest[parent] if parent >= 0 else 0
            if card and parent >= 0 and size >= above:
                roots.append(number)
                slots.append(0)
                largest.append(size)
            else:
                roots.append(roots[parent] if parent >= 0 else -1)
                slots.append(paths.setdefault((slots[parent], tag), len(paths) + 1) if parent >= 0 else 0)
                largest.append(above)
        return cls(np.asarray(roots), np.asarray(slots), groups, sizes)


def _numbered(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]


def card_columns(markup: Markup, values: np.ndarray, running: np.ndarray) -> list[np.ndarray]:
    """Of each block what the set of cards that it lies in looks like, and what is in its place in all of them.

    -1 where there is no card.

    Args:
        values: (blocks, 4), characters, characters in links, digits, and whether there is a sign of money.
        running: of each block its characters of running text.
    """
    place = np.asarray(markup.places)
    starts, ends = np.asarray(markup.starts), np.asarray(markup.ends)
    cards = Cards.of(markup)
    roots, count = cards.roots[place], len(place)
    inside, root = roots >= 0, np.maximum(roots, 0)
    chosen = np.where(inside, cards.groups[root], -1)
    group = _numbered(chosen)
    # One number for each set and place in it.
    slot = _numbered(chosen * (cards.slots.max() + 1) + cards.slots[place])
    size = np.where(inside, cards.sizes[cards.groups[root]], 1)
    one = np.ones(count)

    def total(of: np.ndarray, by: np.ndarray) -> np.ndarray:
        return np.bincount(by, of)[by]

    chars, linked, digits, money = values.T
    chars_of_set, whole = total(chars, group), chars.sum()
    blocks = total(one, group) / size
    spread = np.sqrt(total(((ends - starts)[root] - blocks) ** 2, group) / total(one, group))
    begins = np.full(group.max() + 1, count)
    np.minimum.at(begins, group, np.arange(count))
    in_slot, chars_in_slot = total(one, slot), total(chars, slot)
    texts: dict[str, int] = {}
    which = np.asarray([texts.setdefault(text, len(texts)) for text in markup.texts])
    different = np.unique(slot * len(texts) + which) // len(texts)
    columns = [
        np.log1p(size), blocks, np.log1p(chars_of_set / size), total(linked, group) / chars_of_set,
        chars_of_set / whole, total(money, group) / size, total(digits, group) / chars_of_set, in_slot / size,
        np.bincount(different)[slot] / in_slot, np.log1p(chars_in_slot / in_slot), total(linked, slot) / chars_in_slot,
        chars_of_set / chars_of_set[inside].max(initial=1.0), spread / np.maximum(blocks, 1),
        np.arange(count) - starts[root],
        total(running, group) / chars_of_set, begins[group] / count, total(money, slot) / in_slot,
        total(running, group) / whole,
    ]  # fmt: skip
    return [np.where(inside, column, -1.0) for column in columns]
