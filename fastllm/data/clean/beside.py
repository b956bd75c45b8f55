"""What stands beside the main text: readers' comments, and what a page's own landmarks say is not its text."""

from __future__ import annotations

import re

import numpy as np

from .body import Running, title_blocks, without_slug
from .elements import Markup

_COMMENTS = re.compile(
    r"""(?<![\w-])(?:class|id)\s*=\s*(?:"[^"]*?|'[^']*?|[^\s"'>]*?)(?<![a-z])(?<!has-)(?<!no-)(?:comments?|comment_?list|comentarios?|"""
    r"""kommentare?|commentaires?|commenti|respond|disqus)(?![a-z])""",
    re.IGNORECASE,
)
# Each match has one of these, which are found sooner.
_HINTS = ("comment", "coment", "komment", "respond", "disqus")
# Names stand at the beginning of a tag: a bound on the time that a tag takes. A guess.
_NAMES = 300
# The fewest characters of running text in an article, and in one that the page declares: a guess. Where an article has
# more than this many times the longest comment's, it is the page's text, even if the page looks like a forum.
_ARTICLE, _DECLARED, _LONGER = 300, 100, 2.0
# Taken off the log-odds of comments and landmarks. On the 511 pages, cross-validated, comments change mean F1 by less
# than 0.001: there they are main text on the pages that hold nothing else, and never beside an article.
_OFF = 8.0
# Kinds of landmarks: tags, and what a role or a class says. Of their blocks that are likelier than 0.1 the model,
# cross-validated, takes a share of 0.17 to 0.37 for main text, by weight. 0.00 to 0.09 is.
_LANDMARK_TAGS = {
    "aside": "aside", "figcaption": "caption", "dialog": "dialog", "footer": "footer", "nav": "navigation",
    "amp-sidebar": "navigation", "amp-consent": "dialog", "amp-ad": "advertisement", "amp-embed": "advertisement",
    "option": "choice", "select": "choice",
}  # fmt: skip
_LANDMARK_ROLES = {
    "complementary": "aside", "dialog": "dialog", "alertdialog": "dialog", "navigation": "navigation",
    "menu": "navigation", "menubar": "navigation", "search": "banner", "banner": "banner", "contentinfo": "banner",
}  # fmt: skip
_ROLE = re.compile(r"""(?<![\w-])role\s*=\s*["']?\s*([a-z]+)""", re.IGNORECASE)
# Kinds that words of a class or an id name. Of their blocks that would be kept on the 511 pages, cross-validated, a
# share of 0.00 to 0.02 is main text, by weight. Without them mean F1 is 0.001 lower. Other names hold more main text:
# 0.16 for related texts, 0.24 for sidebars and lines of authors, 0.4 to 0.9 for advertisements, menus, promotions and
# buttons to share. Bars above a page, choices in forms and boxes about an author hold none on these pages: a share of
# 0.00 of 77, 168 and 7 blocks. Without them mean F1 is 0.0012 lower.
_NAMED = re.compile(
    r"""(?<![\w-])(?:class|id)\s*=\s*(?:"[^"]*?|'[^']*?|[^\s"'>]*?)(?<![a-z])"""
    r"""(?:(?P<modal>modal|pop-?up)|(?P<newsletter>newsletters?|subscribe|signup)|(?P<breadcrumbs>breadcrumbs?)"""
    r"""|(?P<foot>footer|copyright)|(?P<subscription>subscription-widget)|(?P<bar>(?:promo|announcements?|top)[-_]?bar)"""
    r"""|(?P<author>author[-_]?(?:bio|box|info)|about-(?:the-)?author)"""
    r"""|(?P<answering>(?:post|reply|answer|comment)-?form|quick-?reply)"""
    r"""|(?P<plugin>sharedaddy|jp-relatedposts|addtoany|a2a_kit|addthis|sharethis|shareaholic|yarpp|outbrain|taboola|zergnet"""
    r"""|revcontent|mashsb|heateor))(?![a-z])""",
    re.IGNORECASE,
)
# Subscriptions, forms for answers and plugins' own names are on too few of these pages to change it.
# Each match has one of these, which are found sooner.
_NAME_HINTS = (
    "modal", "popup", "pop-up", "newsletter", "subscribe", "signup", "breadcrumb", "footer", "copyright",
    "subscription", "form", "reply", "sharedaddy", "relatedposts", "addtoany", "a2a_kit", "addthis", "sharethis",
    "shareaholic", "yarpp", "outbrain", "taboola", "zergnet", "revcontent", "mashsb", "heateor", "promo",
    "announcement", "topbar", "top-bar", "top_bar", "author",
)  # fmt: skip
# Articles beside the main one have at most this share of its running text. On the 511 pages, cross-validated, leaving
# out what is outside of the article and of the main landmark moves mean F1 by 0.0005 (interval of the difference:
# -0.0005 to 0.0020).
_TEASERS = 0.3
# Taken off the log-odds of what is hidden: tabs that wait for a click, and copies. 0.5 to 1 are as good, 2 is worse.
_HIDDEN = 1.0
# Taken off them too if no sentence ends there, as in values for machines. Of such blocks that would be kept on the 511
# pages, cross-validated, a share of 0.19 is main text, by weight, and 0.68 of all hidden ones. 1.5 and 2 are as good.
_UNFINISHED = 1.5
_ENDS = (*'.!?:;\u2026\u3002\uff01\uff1f"\u201d\u00bb)\u300d',)


def _names_comments(attributes: str) -> bool:
    names = attributes[:_NAMES].lower()
    return any(map(names.__contains__, _HINTS)) and _COMMENTS.search(names) is not None


def comment_odds(markup: Markup, running: Running, forum: bool, article: bool) -> np.ndarray | float:
    """What comments beside an article lose, for each block.

    Args:
        running: where the page's running text is.
        forum: whether the page is taken for a forum's.
        article: whether the page says that it is an article, which may be shorter than its comments.
    """
    inside: list[bool] = []
    known: dict[str, bool] = {}
    for number, (attributes, parent) in enumerate(zip(markup.attributes, markup.parents, strict=True)):
        # Names on the body tell what a page may have.
        named = parent >= 0 and inside[parent]
        if parent >= 0 and not named and len(attributes) > 6:
            if attributes not in known:
                known[attributes] = _names_comments(attributes)
            named = known[attributes] and _names_comments(without_slug(markup, number))
        inside.append(named)
    of_comments = np.asarray(inside)
    of_blocks = of_comments[np.asarray(markup.places)]
    if not of_blocks.any():
        return 0.0
    outside = Running.of(markup, of_blocks)
    longest = outside.scores[outside.best]
    if longest < (_DECLARED if article else _ARTICLE):
        return 0.0
    if of_comments[running.best]:
        # A name like "has-comments" stands on whole articles: comments come after the text and hold no title.
        after = markup.starts[outside.best] < int(np.argmax(of_blocks))
        if not (article and after) or (title_blocks(markup) & of_blocks).any():
            return 0.0
    if forum and longest < _LONGER * (running.scores * of_comments).max():
        return 0.0
    return -_OFF * of_blocks


_KINDS = dict.fromkeys([*_LANDMARK_TAGS.values(), "banner", *_NAMED.groupindex])
# A bit for each kind.
_BITS = {kind: 1 << number for number, kind in enumerate(_KINDS)}


def _landmark(attributes: str) -> int:
    """The bit of the kind of landmark that a tag's attributes name, or 0."""
    names = attributes[:_NAMES].lower()
    role = _ROLE.search(names) if "role" in names else None
    if role and role[1] in _LANDMARK_ROLES:
        return _BITS[_LANDMARK_ROLES[role[1]]]
    named = _NAMED.search(names) if any(map(names.__contains__, _NAME_HINTS)) else None
    return _BITS[named.lastgroup] if named and named.lastgroup else 0


def landmark_odds(markup: Markup, running: Running) -> np.ndarray:
    """What blocks in landmarks other than the main text lose, and hidden ones, for each block.

    A kind of landmark in which the most running text is, is a page's main text.
    """
    tags = {tag: _BITS[kind] for tag, kind in _LANDMARK_TAGS.items()}
    kinds: list[int] = []
    known: dict[str, int] = {"": 0}
    for number, (tag, attributes, parent) in enumerate(
        zip(markup.tags, markup.attributes, markup.parents, strict=True)
    ):
        if parent < 0:
            kinds.append(0)
            continue
        kind = tags.get(tag)
        if kind is None:
            kind = known.get(attributes)
            if kind is None:
                kind = known[attributes] = _landmark(attributes)
            if kind:
                kind = _landmark(without_slug(markup, number))
        kinds.append(kinds[parent] | kind)
    places = np.asarray(markup.places)
    beside = (np.asarray(kinds) & ~kinds[running.best])[places] != 0
    unfinished = np.asarray([not text.endswith(_ENDS) for text in markup.texts])
    return np.where(beside, -_OFF, -(_HIDDEN + _UNFINISHED * unfinished) * np.asarray(markup.unshown)[places])


def outside_odds(markup: Markup, running: Running, declared: bool) -> np.ndarray:
    """What blocks outside the article and outside the main landmark lose, for each block but first headings.

    The article is the outermost ``article`` around the most running text, if others have far less, as teasers and
    comments have, and it has the page's first heading, or it is the only one of a page that is declared as an article.

    Args:
        declared: whether schema.org's data or OpenGraph's say that the page is an article.
    """
    parents, places = markup.parents, np.asarray(markup.places)
    starts, ends = np.asarray(markup.starts), np.asarray(markup.ends)
    article = main = -1
    at = running.best
    while at >= 0:
        if markup.tags[at] == "article":
            article = at
        elif markup.tags[at] == "main" or (
            (role := _ROLE.search(markup.attributes[at][:_NAMES])) and role[1].lower() == "main"
        ):
            main = at
        at = parents[at]
    index = np.arange(len(places))
    first = title_blocks(markup)

    def inside(element: int) -> np.ndarray:
        return (index >= starts[element]) & (index < ends[element])

    outside = np.zeros(len(places), bool)
    if main >= 0:
        outside |= ~inside(main)
    if article >= 0:
        total = np.concatenate([[0.0], np.cumsum(running.characters)])
        articles = np.asarray([tag == "article" for tag in markup.tags])
        others = articles & ((starts < starts[article]) | (ends > ends[article]))
        most = (total[ends] - total[starts])[others].max(initial=0.0)
        alone = articles.sum() == 1 and declared
        if most < _TEASERS * (total[ends[article]] - total[starts[article]]) and (
            first[inside(article)].any() or alone
        ):
            outside |= ~inside(article)
    return np.where(outside & ~first, -_OFF, 0.0)
