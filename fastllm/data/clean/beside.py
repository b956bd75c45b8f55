"""What stands beside the main text: readers' comments, and what a page's own landmarks say is not its text."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .body import Running
from .markup import Markup

_COMMENTS = re.compile(
    r"""(?<![\w-])(?:class|id)\s*=\s*(?:"[^"]*?|'[^']*?|[^\s"'>]*?)(?<![a-z])(?:comments?|comment_?list|comentarios?|"""
    r"""kommentare?|commentaires?|commenti|respond|disqus)(?![a-z])""",
    re.IGNORECASE,
)
# Names stand at the beginning of a tag: a bound on the time that a tag takes.
_NAMES = 300
# The fewest characters of running text in an article. Where an article has more than this many times the longest
# comment's, it is the page's text, even if the page looks like a forum.
_ARTICLE, _LONGER = 300, 2.0
# Taken off the log-odds of comments and landmarks. On the 511 pages, cross-validated, comments change mean F1 by less
# than 0.001: there they are main text on the pages that hold nothing else, and never beside an article.
_OFF = 8.0
# Kinds of landmarks: tags, and what a role or a class says. Of their blocks that are likelier than 0.1 the model,
# cross-validated, takes a share of 0.17 to 0.37 for main text, by weight. 0.00 to 0.09 is.
_LANDMARK_TAGS = {
    "aside": "aside", "figcaption": "caption", "dialog": "dialog", "footer": "footer", "nav": "navigation",
    "amp-sidebar": "navigation", "amp-consent": "dialog",
}  # fmt: skip
_LANDMARK_ROLES = {
    "complementary": "aside", "dialog": "dialog", "alertdialog": "dialog", "navigation": "navigation",
    "menu": "navigation", "menubar": "navigation", "search": "banner", "banner": "banner", "contentinfo": "banner",
}  # fmt: skip
_ROLE = re.compile(r"""(?<![\w-])role\s*=\s*["']?\s*([a-z]+)""", re.IGNORECASE)
_MODAL = re.compile(
    r"""(?<![\w-])(?:class|id)\s*=\s*(?:"[^"]*?|'[^']*?|[^\s"'>]*?)(?<![a-z])modal(?![a-z])""", re.IGNORECASE
)
# Taken off the log-odds of what is hidden: tabs that wait for a click, and copies. 0.5 to 1 are as good, 2 is worse.
_HIDDEN = 1.0


def _inside(markup: Markup, matches: Callable[[str, str], bool]) -> np.ndarray:
    """Whether each element, but for the body, lies in one of which ``matches(tag, attributes)`` is true, or is one."""
    inside: list[bool] = []
    known: dict[tuple[str, str], bool] = {}
    for tag, attributes, parent in zip(markup.tags, markup.attributes, markup.parents, strict=True):
        # Names on the body tell what a page may have.
        found = parent >= 0 and inside[parent]
        if parent >= 0 and not found:
            if (tag, attributes) not in known:
                known[tag, attributes] = matches(tag, attributes)
            found = known[tag, attributes]
        inside.append(found)
    return np.asarray(inside)


def comment_odds(markup: Markup, running: Running, forum: bool) -> np.ndarray | float:
    """What comments beside an article lose, for each block.

    Args:
        running: where the page's running text is.
        forum: whether the page is taken for a forum's.
    """
    of_comments = _inside(markup, lambda _, names: len(names) > 6 and _COMMENTS.search(names[:_NAMES]) is not None)
    if of_comments[running.best] or running.scores[running.best] < _ARTICLE:
        return 0.0
    if forum and running.scores[running.best] < _LONGER * (running.scores * of_comments).max():
        return 0.0
    return -_OFF * of_comments[np.asarray(markup.places)]


def _landmark(tag: str, attributes: str) -> str | None:
    if tag in _LANDMARK_TAGS:
        return _LANDMARK_TAGS[tag]
    if len(attributes) > 6:
        role = _ROLE.search(attributes[:_NAMES])
        if role and role[1].lower() in _LANDMARK_ROLES:
            return _LANDMARK_ROLES[role[1].lower()]
        if _MODAL.search(attributes[:_NAMES]):
            return "modal"
    return None


def landmark_odds(markup: Markup, running: Running) -> np.ndarray:
    """What blocks in landmarks other than the main text lose, and hidden ones, for each block.

    A kind of landmark in which the most running text is, is a page's main text.
    """
    kinds: list[frozenset[str]] = []
    known: dict[tuple[str, str], str | None] = {}
    for tag, attributes, parent in zip(markup.tags, markup.attributes, markup.parents, strict=True):
        if parent < 0:
            kinds.append(frozenset())
            continue
        if (tag, attributes) not in known:
            known[tag, attributes] = _landmark(tag, attributes)
        kind = known[tag, attributes]
        above = kinds[parent]
        kinds.append(above if kind is None or kind in above else above | {kind})
    main = kinds[running.best]
    beside = np.asarray([not kind <= main for kind in kinds])[np.asarray(markup.places)]
    hidden = np.asarray(markup.unshown)[np.asarray(markup.places)]
    return np.where(beside, -_OFF, -_HIDDEN * hidden)
