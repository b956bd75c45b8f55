"""What belongs to a page's article: its lead before the text, and no links alone around it."""

from __future__ import annotations

import re

import numpy as np

from .body import Running, title_blocks
from .elements import Markup

# Blocks of other text between the title and the lead, as of authors and dates: a guess.
_BEFORE = 6
# What is a block's own, up to elements that hold no more than so many blocks before or after it: a guess.
_OWN = 3
# Leads are no part of these.
_NO_LEAD = {"li", "figure", "figcaption", "aside", "nav", "blockquote"}
_CAPTION = re.compile(
    r"""(?<![\w-])(?:class|id)\s*=\s*(?:"[^"]*?|'[^']*?|[^\s"'>]*?)(?<![a-z])"""
    r"""(?:img|image|photo|picture|media|gallery|slide|caption|credit|video)""",
    re.IGNORECASE,
)
# Names stand at the beginning of a tag: a bound on the time that a tag takes.
_NAMES = 300
# The fewest characters of running text in an article, and the least share of a block of links alone that is in links.
_ARTICLE, _LINKS = 300, 0.9
# Taken off the log-odds of links alone around an article. Of these blocks on the 511 pages a share of 0.01 is main
# text where the page is an article, by words.
_OFF = 4.0


def leads(markup: Markup, running: Running) -> np.ndarray:
    """Whether each block is the running text between the title and the element with the most running text.

    Of such blocks on the 511 pages a share of 0.73 is main text on articles, and 0.73 to 1.00 on other pages.
    """
    found = np.zeros(len(markup.texts), bool)
    places = np.asarray(markup.places)
    runs = running.characters > 0
    inside = runs & ((places == running.best) | (np.asarray(markup.parents)[places] == running.best))
    titles = np.flatnonzero(title_blocks(markup))
    first = int(np.argmax(inside)) if inside.any() else 0
    titles = titles[titles < first]
    if not len(titles):
        return found
    between = 0
    for block in range(int(titles[-1]) + 1, first):
        if markup.linked[block] >= _LINKS * len(markup.texts[block]):
            continue
        between += 1
        if between > _BEFORE:
            break
        found[block] = runs[block] and not _is_beside(markup, block)
    return found


def _is_beside(markup: Markup, block: int) -> bool:
    """Whether an element that is ``block``'s own says that it is a caption, an item or a quotation."""
    at = markup.places[block]
    while at > 0 and markup.starts[at] >= block - _OWN and markup.ends[at] <= block + _OWN:
        if markup.tags[at] in _NO_LEAD or _CAPTION.search(markup.attributes[at][:_NAMES]):
            return True
        at = markup.parents[at]
    return False


def teaser_odds(markup: Markup, running: Running) -> np.ndarray | float:
    """What blocks of links alone lose outside of the element with the most running text, for each block."""
    best = running.best
    if running.scores[best] < _ARTICLE:
        return 0.0
    index = np.arange(len(markup.texts))
    length = np.fromiter(map(len, markup.texts), np.float64)
    alone = np.asarray(markup.linked) >= _LINKS * length
    return -_OFF * (alone & ((index < markup.starts[best]) | (index >= markup.ends[best])))
