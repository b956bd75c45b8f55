"""What follows a heading that announces other texts: related ones, new ones, those that are read most."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np

from .article import likely_text
from .body import HEADINGS, Running
from .elements import Markup
from .unspaced import words_of_runs

# Such headings, whole and in lower case, of 29 languages.
_HEADINGS = Path(__file__).with_name("related_headings.txt")
_AROUND = " \t\n:\uff1a\u2026.!?>\u00bb\u203a+|-\u2013\u2014\u25a0\u25cf\u25c6\u3010\u3011[]\u25b6\u25bc"
_ACCENT = re.compile("[\u0300-\u036f]")
# The most characters of such a heading.
_LONGEST = 60
# The fewest characters of running text before one, the most in its section as a share of that, and what the section
# loses: guesses.
_TEXT, _SHARE, _OFF = 150, 0.8, 4.0
# The most headings of a page that are looked at, for a bound on the time: a guess.
_MOST = 64


@cache
def _headings() -> frozenset[str]:
    lines = _HEADINGS.read_text(encoding="utf-8").splitlines()
    return frozenset(_folded(words_of_runs(line)) for line in lines if not line.startswith("#"))


def _folded(heading: str) -> str:
    """``heading`` however it is capitalised, without accents and with the apostrophe of typewriters.

    Greek capitals have no accents, and those of Turkish i and \u0131 are not what Python makes of them.
    """
    letters = _ACCENT.sub("", unicodedata.normalize("NFD", heading.casefold()))
    return letters.replace("\u0131", "i").replace("\u2019", "'")


def _named(text: str) -> bool:
    return len(text) <= _LONGEST and _folded(text.strip(_AROUND)) in _headings()


def related_odds(markup: Markup, running: Running, probabilities: np.ndarray) -> np.ndarray:
    """What blocks lose that stand under a heading that announces other texts, after the page's one running text."""
    lost = np.zeros(len(markup.texts))
    if likely_text(markup, running, probabilities) is None:
        return lost
    begin, end = markup.starts[running.best], markup.ends[running.best]
    own = np.flatnonzero(running.characters[begin:end]) + begin
    if not len(own):
        return lost
    total = np.concatenate([[0.0], np.cumsum(running.characters)])
    named = [block for block, text in enumerate(markup.texts) if block > own[0] and _named(text)]
    for block in named[:_MOST]:
        if lost[block]:
            continue
        last = int(own[np.searchsorted(own, block) - 1])
        most = _SHARE * (total[last + 1] - total[begin])
        if most >= _SHARE * _TEXT:
            first, after = _section(markup, block, last, total, most)
            lost[first:after] = -_OFF
    return lost


def _section(markup: Markup, block: int, text: int, total: np.ndarray, most: float) -> tuple[int, int]:
    """The first block of what the heading ``block`` stands over, and the end.

    Args:
        text: a block before it that is not in it.
        total: the characters of running text before each block.
        most: how many of them it may have.
    """
    starts, ends, parents = markup.starts, markup.ends, markup.parents

    def fits(element: int) -> bool:
        return not starts[element] <= text < ends[element] and total[ends[element]] - total[starts[element]] <= most

    at, parent = -1, markup.places[block]
    while parent >= 0 and fits(parent):
        at, parent = parent, parents[parent]
    if parent < 0 or (at >= 0 and ends[at] > block + 1):
        return starts[at], ends[at]
    # The heading is a sibling of what it stands over: up to the next heading, or one element if it is no heading.
    level = HEADINGS.get(markup.tags[at], 0) if at >= 0 else 0
    end = block + 1
    for element in range(max(at, parent) + 1, len(parents)):
        if starts[element] >= ends[parent] or 0 < HEADINGS.get(markup.tags[element], 0) <= level:
            break
        if parents[element] == parent and starts[element] >= end and ends[element] > end:
            if total[ends[element]] - total[block] > most:
                break
            end = ends[element]
            if not level:
                break
    return block, end
