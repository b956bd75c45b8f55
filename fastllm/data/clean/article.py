"""What belongs to a page's article: its lead before the text, and no links to other texts in it and around it."""

from __future__ import annotations

import re

import numpy as np

from .body import Running, title_blocks
from .elements import Markup

# Blocks of other text between the title and the lead, as of authors and dates: a guess.
_BEFORE = 6
# What is a block's own, up to elements that hold no more than so many blocks before or after it: a guess.
_OWN = 3
# The fewest characters of a lead that a page's data have too, and of its beginning where they end in an ellipsis or
# have more. Guesses.
_STATED, _CUT = 30, 60
# Leads are no part of these.
_NO_LEAD = {"li", "figure", "figcaption", "aside", "nav", "blockquote"}
_CAPTION = re.compile(
    r"""(?<![\w-])(?:class|id)\s*=\s*(?:"[^"]*?|'[^']*?|[^\s"'>]*?)(?<![a-z])"""
    r"""(?:img|image|photo|picture|media|gallery|slide|caption|credit|video)""",
    re.IGNORECASE,
)
# Names stand at the beginning of a tag: a bound on the time that a tag takes. A guess.
_NAMES = 300
# The fewest characters of running text in an article, and the least share of a block of links alone that is in links.
# Guesses.
_ARTICLE, _LINKS = 300, 0.9
# How lines that send readers to another text begin, in eight languages.
_READ_ALSO = re.compile(
    r"^\W*(?:(?:read|see|watch|learn) ?(?:more|also|next|:)|also read|more:|recommended|related|don.t miss"
    r"|must read|suggested|lea (?:tambi\u00e9n|m\u00e1s|adem\u00e1s)|lea:|leer m\u00e1s|leer? tambi\u00e9n"
    r"|mir[ea]|vea (?:tambi\u00e9n|adem\u00e1s)|puedes? ver|[lt]e (?:puede|podr\u00eda) interesar"
    r"|\u00e0 lire (?:aussi|\u00e9galement)|lire (?:aussi|\u00e9galement)|voir aussi|auch (?:lesen|interessant)"
    r"|lesen sie (?:auch|hier|mehr|dazu)|mehr (?:dazu|zum thema|zu)|siehe auch|leia (?:tamb\u00e9m|mais)"
    r"|veja (?:tamb\u00e9m|mais)|leggi anche|(?:czytaj|zobacz) (?:te\u017c|tak\u017ce|wi\u0119cej)|lees ook)\b",
    re.IGNORECASE,
)
# Captions by their class or id, as `image-caption` and `photo_credit`, also in camel case.
_NAMED_CAPTION = re.compile(
    r"""(?<![\w-])(?:class|id)\s*=\s*(?:"[^"]*?|'[^']*?|[^\s"'>]*?)"""
    r"""(?:(?<![A-Za-z])captions?|(?<=[a-z])Captions?|(?:photo|image)[-_]?(?:credit|Credit))(?![a-z])""",
)
# Taken off their log-odds. Of their blocks that would be kept on articles of the 511 pages, cross-validated, a share of
# 0.26 is main text, by weight, and 0.62 on all pages.
_BESIDE_PICTURE = 2.0
# Their most characters, and their least share of characters in links: guesses.
_LINE, _LINKED = 250, 0.3
# Taken off their log-odds. Of such lines on the 511 pages a share of 0.2 is main text, 0.28 on articles, by words. 2
# and 3 change mean F1, cross-validated, by 0.0001 and 0.0002.
_ELSEWHERE = 3.0
# Taken off the log-odds of links alone around an article. Of these blocks on the 511 pages a share of 0.01 is main
# text where the page is an article, by words.
_OFF = 4.0
# A page's running text is one text if more than half of it lies in one element, in at least so many characters, which
# the model takes for main text. Of 80, 150 and 300 characters all are as good, and so is a share of 0.35.
_ONE_TEXT, _ONE_TEXT_SHARE, _LIKELY = 150, 0.5, 0.5
# What leads elsewhere is less likely than this text by so much: links that are as likely are a shop's or a list's own.
# The other numbers are the length of short blocks and what they lose after the text. On the 986 pages of WCXB's
# development split that a model of 511 others has not seen the rule moves mean F1 by 0.001 (-0.0002 to 0.0037 and
# -0.0014 to 0.0041 on its halves), and on 281 old news pages in five languages by 0.060 (0.046 to 0.076).
_LESS_LIKELY, _SHORT, _AFTER = 0.1, 100, 2.0


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


def stated_lead(markup: Markup, running: Running) -> int | None:
    """The block between the title and the running text that says what the page's data say of it, if there is one.

    Its class does not matter, nor whether it looks like running text: short leads and headings count too.
    """
    runs = np.flatnonzero(running.characters[markup.starts[running.best] : markup.ends[running.best]])
    titles = np.flatnonzero(title_blocks(markup))
    if not len(titles) or not len(runs):
        return None
    last = markup.starts[running.best] + int(runs[0])
    for block in range(int(titles[0]) + 1, last + 1):
        unlinked = markup.linked[block] <= _LINKED * len(markup.texts[block])
        if unlinked and not markup.unshown[markup.places[block]] and _is_stated(markup, block):
            return block
    return None


def _is_stated(markup: Markup, block: int) -> bool:
    text = " ".join(markup.texts[block].split())
    if len(text) < _STATED:
        return False
    for stated in markup.descriptions:
        # Long ones are cut off at the end.
        begin = stated.rstrip(" .\u2026") if stated.endswith(("...", "\u2026")) else stated
        if text == stated or (len(begin) >= _CUT and text.startswith(begin)):
            return True
        if len(text) >= _CUT and stated.startswith(text):
            return True
    return False


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


def likely_text(markup: Markup, running: Running, probabilities: np.ndarray) -> float | None:
    """The probability of a page's one running text by what the model says of each block; None for no such text."""
    characters, begin, end = running.characters, markup.starts[running.best], markup.ends[running.best]
    inside = characters[begin:end]
    if running.scores[running.best] < _ONE_TEXT or inside.sum() <= _ONE_TEXT_SHARE * characters.sum():
        return None
    likely = float(np.average(probabilities[begin:end], weights=inside))
    return likely if likely >= _LIKELY else None


def elsewhere_odds(markup: Markup, running: Running, probabilities: np.ndarray) -> np.ndarray | float:
    """What leads elsewhere loses beside a page's one running text, for each block; short blocks after it lose less.

    Pages without data about themselves, as old ones are, end in lists of other texts.

    Args:
        running: where the page's running text is.
        probabilities: what the model says of each block.
    """
    likely = likely_text(markup, running, probabilities)
    if likely is None:
        return 0.0
    characters, begin, end = running.characters, markup.starts[running.best], markup.ends[running.best]
    inside = characters[begin:end]
    index = np.arange(len(characters))
    length = np.fromiter(map(len, markup.texts), np.float64)
    linked = np.asarray(markup.linked) / length
    less = probabilities < likely - _LESS_LIKELY
    outside = (index < begin) | (index >= end)
    # After an article's last paragraph come its notes, which have a link each, and a link to its source.
    alone = linked >= _LINKS
    several = np.concatenate([[False], alone[:-1]]) | np.concatenate([alone[1:], [False]])
    leading = alone & (outside | (several & (index > begin + int(np.flatnonzero(inside)[-1]))))
    leading |= (linked > _LINKED) & (length <= _LINE) & outside
    short = (index >= end) & (characters == 0) & (length < _SHORT)
    return -(_OFF * (less & leading) + _AFTER * (less & short))


def read_also_odds(markup: Markup, odds: np.ndarray) -> np.ndarray:
    """What lines that send readers to another text lose, for each block; ``odds`` are the blocks' log-odds so far."""
    found = np.zeros(len(odds))
    # What is less likely is left out as it is.
    for block in np.flatnonzero(odds > -_ELSEWHERE).tolist():
        text, linked = markup.texts[block], markup.linked[block]
        if linked >= _LINKED * len(text) and len(text) < _LINE and _READ_ALSO.search(text):
            found[block] = -_ELSEWHERE
    return found


def caption_odds(markup: Markup, running: Running) -> np.ndarray | float:
    """What captions of pictures lose that a class or an id names, for each block, if they are not most of the text."""
    inside: list[bool] = []
    known: dict[str, bool] = {"": False}
    for attributes, parent in zip(markup.attributes, markup.parents, strict=True):
        if attributes not in known:
            known[attributes] = _NAMED_CAPTION.search(attributes[:_NAMES]) is not None
        # Names on the body tell what a page may have.
        inside.append(parent >= 0 and (inside[parent] or known[attributes]))
    captions = np.asarray(inside)[np.asarray(markup.places)]
    if 2 * running.characters[captions].sum() > running.characters.sum():
        return 0.0
    return -_BESIDE_PICTURE * captions
