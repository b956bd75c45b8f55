"""Where on a page the running text is: the element that holds most of it, and where each block lies relative to it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .elements import Markup
from .markup import LINKED, LONG

HEADINGS = {"h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6}
# An id with at least so many words that are its heading's is made of it, as in documentation, and names no landmark.
# One that is made of a page's title may be shorter. A guess.
_SLUG = 3
_ID = re.compile(r"""(?<![\w-])id\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""", re.IGNORECASE)
_PART = re.compile(r"[^\W_]+")


def nearest(parents: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The nearest element at or above each element that is ``chosen``; the body where there is none."""
    result: list[int] = []
    for number, (parent, yes) in enumerate(zip(parents.tolist(), chosen.tolist(), strict=True)):
        result.append(number if yes or parent < 0 else result[parent])
    return np.asarray(result)


def _unseen(markup: Markup) -> np.ndarray:
    """Whether each block is hidden, or in what the page carries as data."""
    unseen = np.asarray(markup.unshown)[np.asarray(markup.places)]
    for number, tag in enumerate(markup.tags):
        if tag.startswith("carried-"):
            unseen[markup.starts[number] : markup.ends[number]] = True
    return unseen


@dataclass(frozen=True)
class Running:
    """Where running text is.

    What is hidden or carried as data counts only if a page shows no running text.

    Attributes:
        characters: the characters of running text in each block.
        scores: for each element its children's characters, half of its own and half of its grandchildren's.
        best: the element with the highest score.
    """

    characters: np.ndarray
    scores: np.ndarray
    best: int

    @classmethod
    def of(cls, markup: Markup, leave_out: np.ndarray | None = None) -> Running:
        """``leave_out``: blocks whose text is not counted, a flag for each."""
        length, linked = np.fromiter(map(len, markup.texts), np.float64), np.asarray(markup.linked, np.float64)
        running = (length - linked) * ((length > LONG) & (linked < LINKED * length))
        if leave_out is not None:
            running *= ~leave_out
        place, parents = np.asarray(markup.places), np.asarray(markup.parents)
        seen = running * ~_unseen(markup)
        running = seen if seen.any() else running
        size, above = len(parents), np.maximum(parents[place], 0)
        scores = np.bincount(above, running, size) + np.bincount(place, running, size) * 0.5
        scores += np.bincount(np.maximum(parents[above], 0), running, size) * 0.5
        return cls(running, scores, int(np.argmax(scores)))


def body_columns(markup: Markup, depth: np.ndarray) -> list[np.ndarray]:
    """Where each block lies relative to the element with the most running text; ``depth`` has each element's."""
    place, parents = np.asarray(markup.places), np.asarray(markup.parents)
    starts, ends = np.asarray(markup.starts), np.asarray(markup.ends)
    count, size = len(place), len(parents)
    found = Running.of(markup)
    running, score, best = found.characters, found.scores, found.best
    above = np.maximum(parents[place], 0)
    over = np.zeros(size, bool)
    at = best
    while at >= 0:
        over[at] = True
        at = int(parents[at])
    common = nearest(parents, over)[place]
    total = np.concatenate([[0.0], np.cumsum(running)])
    inside = total[ends] - total[starts]
    outside = (ends <= starts[best]) | (starts >= ends[best])
    second = float((score * outside).max(initial=0.0))
    index = np.arange(count)
    before, after = starts[best] - index, index - ends[best] + 1
    whole = max(total[-1], 1.0)
    return [
        depth[best] - depth[common], depth[place] - depth[common], inside[common] / whole,
        np.log1p(np.maximum(before, 0)), np.log1p(np.maximum(after, 0)),
        np.full(count, inside[best] / whole), np.full(count, second / max(score[best], 1.0)),
        np.full(count, score[best] / whole), np.full(count, np.log1p(score[best])),
        score[place] / max(score[best], 1.0), score[above] / max(score[best], 1.0),
        total[:-1] / whole,
    ]  # fmt: skip


def title_blocks(markup: Markup) -> np.ndarray:
    """Whether each block is an ``h1`` or in one."""
    first = np.asarray([tag == "h1" for tag in markup.tags])
    places = np.asarray(markup.places)
    return first[places] | first[np.maximum(np.asarray(markup.parents)[places], 0)]


def last_headings(markup: Markup) -> tuple[np.ndarray, np.ndarray]:
    """For each block the block of the last heading before it, or -1, and that heading's level, or 0."""
    levels = np.asarray([HEADINGS.get(tag, 0) for tag in markup.tags])
    parents = np.asarray(markup.parents)
    places = np.asarray(markup.places)
    above = np.maximum(parents[places], 0)
    level = np.maximum(levels[places], levels[above])
    index = np.arange(len(places))
    latest = np.maximum.accumulate(np.where(level > 0, index, -1))
    # A heading's own heading is the one before it.
    shifted = np.concatenate([[-1], latest[:-1]])
    return shifted, np.where(shifted >= 0, level[np.maximum(shifted, 0)], 0)


def without_slug(markup: Markup, number: int) -> str:
    """The attributes of element ``number``, without an id that says the same as the heading that it begins with."""
    attributes, first = markup.attributes[number], markup.starts[number]
    found = _ID.search(attributes)
    if not found or first >= markup.ends[number]:
        return attributes
    place = markup.places[first]
    tag = next((tag for tag in (markup.tags[place], markup.tags[markup.parents[place]]) if tag in HEADINGS), "")
    parts = _PART.findall((found[1] or found[2] or found[3] or "").lower())
    if not tag or parts != _PART.findall(markup.texts[first].lower()) or len(parts) < (1 if tag == "h1" else _SLUG):
        return attributes
    return attributes[: found.start()] + attributes[found.end() :]
