"""A page of HTML as its blocks of text and the elements around them, by one flat walk over its tags.

No tree is built and nothing recurses. A stack of open elements follows HTML's rules for tags that are left out. Every
tag costs the same however deep it lies, so that the walk's time grows with the page's length alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import unescape

from .page_data import carried
from .streamed import in_place

# A page's own control characters are removed; this one then stands for a line break.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
_LINE = "\x01"
_AROUND_LINE = re.compile(f" ?{_LINE} ?")

# What these elements hold is no text of the page. Everything up to their first end tag is one token.
_RAW = "script|style|iframe|noembed|noframes|svg|math|textarea|title|canvas|object|audio|video"
# Quotes count right after "=" alone. Every loop ends at ">" or at the page's end, so that nothing is tried twice.
_ATTRIBUTES = r"""(?:[^>=]+(?=[>=]|\Z)|=\s*(?:"[^"]*(?:"|\Z)|'[^']*(?:'|\Z))?)*"""
_TOKEN = re.compile(
    rf"<(?:(?i:({_RAW}|template(?![^>]*shadowrootmode)))(?![-\w:]){_ATTRIBUTES}"
    r"(?:(?<=/)>|>(?s:.)*?(?:</(?i:\1)(?![-\w:])[^>]*(?:>|\Z)|\Z)|\Z)"
    rf"|(/?)([a-zA-Z][^\s/>]*)({_ATTRIBUTES})(?:>|\Z)"
    r"|!--(?:-?>|(?s:.)*?(?:--!?>|\Z))|[!?/][^>]*(?:>|\Z))"
)

_PARAGRAPH_ENDS = {
    "address", "article", "aside", "blockquote", "center", "details", "dialog", "dir", "div", "dl", "fieldset",
    "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hgroup", "hr", "main",
    "menu", "nav", "ol", "p", "pre", "search", "section", "summary", "table", "ul", "li", "dd", "dt",
}  # fmt: skip
_TABLE_PARTS = {"td", "th", "tr", "tbody", "thead", "tfoot", "caption", "table"}
_BLOCKS = {
    *_PARAGRAPH_ENDS, *_TABLE_PARTS, "body", "noscript", "button", "select", "option", "legend", "template", "frameset",
    "marquee", "applet",
}  # fmt: skip
# An end tag inside these closes nothing outside them.
_SCOPES = {"table", "td", "th", "caption", "template", "marquee", "applet"}
# A start tag that implies the end of others: the tags that it ends, and the elements that bound the search.
_IMPLIED = {
    "li": (("li",), ("ul", "ol", "menu", "dir")),
    "dd": (("dd", "dt"), ("dl",)),
    "dt": (("dd", "dt"), ("dl",)),
    "option": (("option",), ("select",)),
    "tr": (("tr", "td", "th", "caption"), ("table",)),
    "td": (("td", "th", "caption"), ("tr", "table")),
    "th": (("td", "th", "caption"), ("tr", "table")),
    "tbody": (("tbody", "thead", "tfoot", "tr", "td", "th", "caption"), ("table",)),
}
_IMPLIED["thead"] = _IMPLIED["tfoot"] = _IMPLIED["tbody"]
# Carried text that begins with this many characters of what the page shows is not read twice.
_BEGINNING = 60
# Two of these in a row stand apart, as words in a menu or under a post.
_INLINE_GAP = {"span", "a", "label", "time"}

# Tags that are cut at once, and at most: 100 times as many as the fullest of 511 benchmark pages has.
_AT_ONCE, _MOST = 100_000, 2_000_000

_BODY = re.compile(rf"<body\b({_ATTRIBUTES})", re.IGNORECASE)
_UNSHOWN = re.compile(
    r"""\shidden(?=[\s>=/]|$)|display\s*:\s*none|[\s"'](?:sr-only|visually-?hidden|screen-reader-text)[\s"']""",
    re.IGNORECASE,
)
_NO_FRAMES = re.compile(r"<noframes\b[^>]{0,500}>((?s:.)*?)(?:</noframes|\Z)", re.IGNORECASE)
_ANY_TAG = re.compile(r"<[^<>]*>")
_KEPT_SPACE = re.compile(r"white-space\s*:\s*(?:pre|break-spaces)\b(?!-line)", re.IGNORECASE)


@dataclass
class Markup:
    """A page's elements and blocks, each a column in the order of the page; element 0 is the body.

    Attributes:
        tags, attributes, parents: each element's name, its tag's inside, and the number of its parent (or -1).
        starts, ends: the number of the first block in each element, and of the first block after it.
        rows, cells, items: the table row, the table cell and the list item that each element lies in, or -1.
        unshown, preformatted: whether each element is hidden, and whether its white space counts.
        texts: each block's text, its white space tidied except in ``preformatted`` ones.
        places: the element that each block lies in.
        linked: about how many characters of each block are in links.
        links: how many links begin in each block.
        carried: what the page carries as data, as text.
    """

    tags: list[str] = field(default_factory=list)
    attributes: list[str] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    unshown: list[bool] = field(default_factory=list)
    preformatted: list[bool] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    linked: list[int] = field(default_factory=list)
    links: list[int] = field(default_factory=list)
    carried: str = ""


class _Walk:
    def __init__(self):
        self.page = Markup()
        self.stack: list[int] = []
        # The depths of the open elements of each tag name, and the depths of open scopes.
        self.open: dict[str, list[int]] = {}
        self.scopes: list[int] = [-1]
        self.pieces: list[str] = []
        self.linked = self.links = 0
        # The depth of the stack where the open link began; -1: none is open.
        self.link = -1
        self.shown = ""

    def push(self, tag: str, attributes: str) -> None:
        page, number = self.page, len(self.page.tags)
        parent = self.stack[-1] if self.stack else -1
        row = page.rows[parent] if parent >= 0 else -1
        cell = page.cells[parent] if parent >= 0 else -1
        item = page.items[parent] if parent >= 0 else -1
        unshown = parent >= 0 and page.unshown[parent]
        preformatted = parent >= 0 and page.preformatted[parent]
        if tag == "tr":
            row = number
        elif tag in ("td", "th"):
            cell = number
        elif tag == "table":
            row = cell = -1
        elif tag == "li":
            item = number
        elif tag == "pre":
            preformatted = True
        if len(attributes) > 6:
            unshown = unshown or _UNSHOWN.search(attributes) is not None
            if "white-space" in attributes and _KEPT_SPACE.search(attributes):
                preformatted = True
        page.tags.append(tag)
        page.attributes.append(attributes)
        page.parents.append(parent)
        page.starts.append(len(page.texts))
        page.ends.append(-1)
        page.rows.append(row)
        page.cells.append(cell)
        page.items.append(item)
        page.unshown.append(unshown)
        page.preformatted.append(preformatted)
        depth = len(self.stack)
        self.open.setdefault(tag, []).append(depth)
        if tag in _SCOPES:
            self.scopes.append(depth)
        self.stack.append(number)

    def pop_to(self, depth: int) -> None:
        page = self.page
        while len(self.stack) > depth:
            number = self.stack.pop()
            page.ends[number] = len(page.texts)
            self.open[page.tags[number]].pop()
        while self.scopes[-1] >= depth:
            self.scopes.pop()
        if self.link > depth:
            self.link = -1

    def deepest(self, tags: tuple[str, ...]) -> int:
        return max((self.open[tag][-1] for tag in tags if self.open.get(tag)), default=-1)

    def flush(self) -> None:
        """End the current block."""
        if not self.pieces:
            return
        text = "".join(self.pieces)
        self.pieces.clear()
        page, place = self.page, self.stack[-1]
        if "&" in text:
            text = _CONTROLS.sub("", unescape(text)) if _LINE not in text else _unescape_lines(text)
        if page.preformatted[place]:
            text = text.replace(_LINE, "\n").replace("\r\n", "\n").replace("\r", "\n").strip("\n").rstrip()
        else:
            text = _in_order(text)
        if text and not text.isspace() and not (self.shown and text[:_BEGINNING] in self.shown):
            page.texts.append(text)
            page.places.append(place)
            page.linked.append(min(self.linked, len(text)))
            page.links.append(self.links)
        self.linked = self.links = 0

    def start(self, tag: str, attributes: str) -> None:
        if tag in _BLOCKS:
            inside = self.page.preformatted[self.stack[-1]]
            if tag in _PARAGRAPH_ENDS and (found := self.open.get("p")) and found[-1] > self.scopes[-1]:
                self.flush()
                self.pop_to(found[-1])
            if tag in _IMPLIED:
                ended, within = _IMPLIED[tag]
                limit = self.deepest(within)
                first = min(
                    (depth for name in ended for depth in reversed(self.open.get(name, ())[-1:]) if depth > limit),
                    default=None,
                )
                if first is not None:
                    self.flush()
                    self.pop_to(first)
            if inside and self.page.preformatted[self.stack[-1]]:
                # In preformatted text a block is a line.
                if self.pieces and not self.pieces[-1].endswith(("\n", _LINE)):
                    self.pieces.append(_LINE)
            else:
                self.flush()
            if tag != "hr":
                self.push(tag, attributes)
        elif tag == "a":
            self.link = len(self.stack) if "href" in attributes.lower() else -1
            self.links += self.link >= 0
        elif tag == "br":
            if not self.page.preformatted[self.stack[-1]] and self._after_line():
                self.flush()
            else:
                self.pieces.append(_LINE)
        elif "-" in tag or (len(attributes) > 6 and tag == "span" and _UNSHOWN.search(attributes)):
            self.push(tag, attributes)

    def _after_line(self) -> bool:
        for piece in reversed(self.pieces):
            if not piece.isspace():
                return piece == _LINE
        return False

    def end(self, tag: str) -> None:
        if tag == "a":
            self.link = -1
            return
        if tag in _BLOCKS or tag in self.open:
            found = self.open.get(tag)
            limit = self.deepest(("table",)) - 1 if tag in _TABLE_PARTS else self.scopes[-1]
            if tag == "br":
                self.pieces.append(_LINE)
            if found and found[-1] > max(0, limit):
                place = self.page.preformatted[self.stack[-1]]
                if place and found[-1] > 0 and self.page.preformatted[self.stack[found[-1] - 1]]:
                    if self.pieces and not self.pieces[-1].endswith(("\n", _LINE)) and tag in _BLOCKS:
                        self.pieces.append(_LINE)
                elif tag in _BLOCKS or place:
                    self.flush()
                self.pop_to(found[-1])
            elif tag in _BLOCKS and not self.page.preformatted[self.stack[-1]]:
                self.flush()

    def read(self, page: str, shown: str = "") -> None:
        """Walk over ``page``; blocks of whose beginning ``shown`` has already are left out."""
        pieces, start, end = self.pieces, self.start, self.end
        result, stack = self.page, self.stack
        self.shown = shown
        previous, apart = "", False
        for text, closing, tag, attributes in _tokens(page):
            if text:
                if not result.unshown[stack[-1]] or result.tags[stack[-1]] != "span":
                    if apart and pieces and pieces[-1][-1].isalnum() and text[0].isalnum():
                        pieces.append(" ")
                    pieces.append(text)
                    if self.link >= 0 and not text.isspace():
                        self.linked += len(text)
                previous, apart = "", False
            if tag is None:
                continue
            tag = tag.lower()
            if closing:
                end(tag)
                previous = tag
            elif tag not in ("body", "html", "head"):
                apart = previous == tag and tag in _INLINE_GAP and not result.preformatted[stack[-1]]
                start(tag, attributes or "")
                previous = ""
        self.flush()
        self.pop_to(1)


def _tokens(page: str) -> Iterator[tuple[str, str | None, str | None, str | None]]:
    """(text before it, "/" of an end tag, name, attributes) of each tag; at last the text after them, with no tag."""
    for _ in range(_MOST // _AT_ONCE):
        parts = _TOKEN.split(page, _AT_ONCE)
        yield from zip(parts[0::5], parts[2::5], parts[3::5], parts[4::5], strict=False)
        page = parts[-1]
        if len(parts) <= 5 * _AT_ONCE:
            yield page, None, None, None
            return


def _in_order(text: str) -> str:
    """``text`` with single spaces, and lines where marks were."""
    text = " ".join(text.split())
    return _AROUND_LINE.sub("\n", text).strip() if _LINE in text else text


def _unescape_lines(text: str) -> str:
    return _LINE.join(_CONTROLS.sub("", unescape(part)) for part in text.split(_LINE))


def read_markup(page: str, with_carried: bool = True) -> Markup:
    """Walk over ``page``, then over what it carries as data, in elements ``carried-...`` of their own.

    A page that shows frames alone is read as readers without frames see it.
    """
    page = in_place(_CONTROLS.sub("", page))
    walk = _Walk()
    body = _BODY.search(page)
    walk.push("body", body[1] if body else "")
    walk.read(page)
    if not walk.page.texts:
        for without_frames in _NO_FRAMES.finditer(page):
            walk.read(without_frames[1])
    found = carried(page) if with_carried else []
    for name, markup in found:
        shown = "\n".join(walk.page.texts)
        walk.push(name, "")
        walk.read(_CONTROLS.sub("", markup), shown)
    walk.pop_to(0)
    walk.page.carried = unescape(_ANY_TAG.sub(" ", "\n".join(markup for _, markup in found)))
    return walk.page
