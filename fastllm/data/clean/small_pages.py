"""Rules for pages with little text, which the learned model has hardly seen: fragments, feeds' entries, notices."""

from __future__ import annotations

import re

import numpy as np

from .body import without_slug
from .elements import Markup

# Words and blocks from which on the model alone decides, and up to either of which the rules alone do. Of the 511
# pages that the model was learned from, 39 have fewer than 500 words and 5 fewer than 100.
MODEL_ALONE, RULES_ALONE = (500, 60), (100, 25)
_FURNITURE = {"nav", "form", "button", "dialog", "menu", "select", "label", "aside", "footer"}
_NAME = r"""(?:class|id|role|aria-label)\s*=\s*["']?[^"'>]*(?<![a-z])(?:{})(?![a-z])"""
_NAMED = re.compile(
    _NAME.format(
        r"sidebar|footer|cookies?|consent|shar(?:e|ing)|social|advert\w*|ads?|banner|promo|related|newsletter|search"
        "|complementary|contentinfo|copyright"
    ),
    re.IGNORECASE,
)
# Names of what leads elsewhere count where at least so many of the characters are links: a restaurant has a menu too.
_LEADING = re.compile(_NAME.format("nav(?:bar|igation)?|menu|breadcrumbs?|skip|pagination|pager|toc"), re.IGNORECASE)
_LED = 0.3
# Blocks of at least this many characters, mostly outside links, are text.
_LONG, _LINKED, _MENU, _MUCH = 70, 0.8, 3, 0.5
# What the model leaves out with less than these log-odds stays out, but for what is within so much of a page's
# likeliest block: guesses.
_SURELY_OUT, _ALIKE = -4.0, 1.0
# What a page of scripts alone tells readers who run none, in so many characters at most.
_NOTICE = 300
_NEEDS_SCRIPTS = re.compile(
    r"\b(?:enable|activate|turn on|requires?|needs?|without|support(?:ing|s)?)\b[^.!?]{0,60}\bjava ?script\b"
    r"|\bjava ?script\b[^.!?]{0,60}\b(?:enabled|required|needed|disabled|turned o(?:n|ff)|activated?)\b"
    r"|\b(?:aktivieren|activer|activez|habilit[ae]r?|attiva(?:re)?)\b[^.!?]{0,60}\bjava ?script\b"
    r"|\bjava ?script\b[^.!?]{0,60}\b(?:aktivieren|aktiviert|activ\u00e9|activado|attivato)\b",
    re.IGNORECASE,
)
# Log-odds. Guesses: they say what goes first, and are checked by tests alone.
_OUT, _MENU_ITEM, _TEXT, _SHORT, _LONELY_LINK = -4.0, -3.0, 3.0, 2.0, 1.5


def shows_nothing(markup: Markup) -> bool:
    """Whether all that a page has for readers is its description, or a notice that it needs scripts beside links."""
    noticed = linked = False
    for block, (text, place) in enumerate(zip(markup.texts, markup.places, strict=True)):
        parent = markup.parents[place]
        if parent >= 0 and "carried-description" in (markup.tags[place], markup.tags[parent]):
            continue
        if len(text) <= _NOTICE and _NEEDS_SCRIPTS.search(text):
            noticed = True
        elif markup.linked[block] > _LINKED * len(text):
            linked = True
        else:
            return False
    return noticed or not linked


def _is_named(markup: Markup, number: int, linked: float) -> bool:
    """Whether a class, an id or the like says that element ``number``, with this share of links, is no main text."""
    attributes = markup.attributes[number]
    found = [name for name in (_NAMED, *([_LEADING] if linked >= _LED else ())) if len(attributes) > 8]
    if not any(name.search(attributes) for name in found):
        return False
    without = without_slug(markup, number)
    return any(name.search(without) for name in found)


def rule_odds(markup: Markup) -> np.ndarray:
    """The log-odds that simple rules give each block.

    NaN for text that a page carries as data, except an article's body where the page shows no text.
    """
    total, links = np.cumsum([0, *map(len, markup.texts)]), np.cumsum([0, *markup.linked])
    outside: list[bool] = []
    carried: list[bool] = []
    bodies: list[bool] = []
    for number, (tag, attributes, parent) in enumerate(
        zip(markup.tags, markup.attributes, markup.parents, strict=True)
    ):
        out = parent >= 0 and outside[parent]
        if not out and parent >= 0:
            out = tag in _FURNITURE or markup.unshown[number]
            # A name on what holds much of the page says how it looks, not what it is. Some pages are a script and, in
            # noscript, their text for who runs none.
            begin, end = markup.starts[number], markup.ends[number]
            size, linked = total[end] - total[begin], links[end] - links[begin]
            few = size < _MUCH * total[-1]
            out = out or (few and (tag == "noscript" or _is_named(markup, number, linked / max(1, size))))
        outside.append(out)
        carried.append(tag.startswith("carried-") or (parent >= 0 and carried[parent]))
        body = carried[number] and (tag == "carried-posts" or 'itemprop="articleBody"' in attributes)
        bodies.append(body or (parent >= 0 and bodies[parent]))
    odds = np.empty(len(markup.texts))
    run: list[int] = []
    for block, (text, place, linked) in enumerate(zip(markup.texts, markup.places, markup.linked, strict=True)):
        link_alone = linked > _LINKED * len(text) and not markup.preformatted[place]
        if outside[place]:
            odds[block] = _OUT
        elif carried[place]:
            odds[block] = np.nan
        elif link_alone:
            # Several links in a block are a menu in a line; more of them than letters are links that nobody closed.
            menu = _MENU <= markup.links[block] <= len(text) // 2
            odds[block] = _MENU_ITEM if menu else _LONELY_LINK
        else:
            odds[block] = _TEXT if len(text) >= _LONG or markup.preformatted[place] else _SHORT
        alike = run and markup.tags[markup.places[run[-1]]] == markup.tags[place]
        run = ([*run[1 - _MENU :], block] if alike else [block]) if link_alone else []
        if len(run) == _MENU:
            odds[run] = np.minimum(odds[run], _MENU_ITEM)
    long = np.fromiter(map(len, markup.texts), np.int64) >= _LONG
    if not (long & (odds > 0)).any():
        odds[np.asarray([bodies[place] for place in markup.places])] = _TEXT
    return odds


def log_odds(probabilities: np.ndarray) -> np.ndarray:
    clipped = np.clip(probabilities, 1e-6, 1 - 1e-6)
    return np.log(clipped / (1 - clipped))


def rules_share(words: np.ndarray) -> float:
    """The rules' share in the decision on a page whose blocks have ``words`` words each: 0 to 1."""
    sizes = zip((words.sum(), len(words)), MODEL_ALONE, RULES_ALONE, strict=True)
    return float(np.clip(max((model - size) / (model - rules) for size, model, rules in sizes), 0, 1))


def blend(probabilities: np.ndarray, markup: Markup, words: np.ndarray) -> np.ndarray:
    """The model's ``probabilities``, and the rules' for as far as the page is small."""
    share = rules_share(words)
    if not share:
        return probabilities
    learned, rules = log_odds(probabilities), rule_odds(markup)
    surely_out = learned < min(_SURELY_OUT, learned.max() - _ALIKE)
    odds = (1 - share) * learned + share * np.where(np.isnan(rules) | surely_out, learned, rules)
    return 1 / (1 + np.exp(-odds))
