"""A page of HTML as its blocks of text and the elements around them, by one flat walk over its tags.

No tree is built and nothing recurses. A stack of open elements follows HTML's rules for tags that are left out. Every
tag costs the same however deep it lies, so that the walk's time grows with the page's length alone.
"""

from __future__ import annotations

import re
from html import escape, unescape

from .code_rows import join_code_rows
from .elements import Markup
from .mathematics import formula, image_formula, is_drawn
from .page_data import carried, descriptions
from .page_state import SHOWN, state_markup
from .streamed import in_place
from .tokens import ATTRIBUTES, COMMENT, raw_element, tokens
from .white_space import (
    CODE,
    COLLAPSED,
    KEPT,
    LINES,
    is_shown_as_block,
    kept_space,
    line_numbers,
    unmarked,
    with_marks,
)  # fmt: skip
from .white_space import LINE_MARK as _LINE

# Removed from a page, so that marks of white space are ours. References never stand for one.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
_AROUND_LINE = re.compile(f" ?{_LINE} ?")

_PARAGRAPH_ENDS = {
    "address", "article", "aside", "blockquote", "center", "details", "dialog", "dir", "div", "dl", "fieldset",
    "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hgroup", "hr", "listing",
    "main", "menu", "nav", "ol", "p", "pre", "search", "section", "summary", "table", "ul", "li", "dd", "dt",
}  # fmt: skip
_TABLE_PARTS = {"td", "th", "tr", "tbody", "thead", "tfoot", "caption", "table"}
_BLOCKS = {
    *_PARAGRAPH_ENDS, *_TABLE_PARTS, "body", "noscript", "button", "select", "option", "legend", "template", "frameset",
    "marquee", "applet",
}  # fmt: skip
_VOID = {"area", "base", "col", "embed", "input", "link", "meta", "param", "source", "track", "wbr"}
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
# The fewest characters of a block of running text, and the largest share of them in links. Guesses.
LONG, LINKED = 80, 0.3
# Carried text that begins with this many characters of what the page shows is not read twice. A guess.
_BEGINNING = 60
# Two of these in a row stand apart, as words in a menu or the name and the time of a post.
_INLINE_GAP = {"span", "a", "label", "time"}

_BODY = re.compile(rf"<body\b({ATTRIBUTES})", re.IGNORECASE)
_UNSHOWN = re.compile(
    r"""\shidden(?=[\s>=/]|$)|(?<![\w-])display\s*:\s*none|[\s"'](?:sr-only|visually-?hidden|screen-reader-text)[\s"']""",
    re.IGNORECASE,
)
# What HTML once had for source code; tags inside are text. In a comment or a script it is no element.
_SOURCE = re.compile(
    rf"<(?:{COMMENT}|{raw_element(1)}|(?i:xmp)(?![-\w:]){ATTRIBUTES}"
    r"(?:>((?s:.)*?)(?:</(?i:xmp)(?![-\w:])[^>]*(?:>|\Z)|\Z)|\Z))"
)
# A template whose content is shown, in the shadow of the element around it.
_SHADOW = re.compile(r"shadowrootmode", re.IGNORECASE)
_NO_FRAMES = re.compile(r"<noframes\b[^>]{0,500}>((?s:.)*?)(?:</noframes|\Z)", re.IGNORECASE)
_ANY_TAG = re.compile(r"<[^<>]*>")
# Asides that are part of the text: quotations in posts, notes, warnings and abstracts in documentation.
_PART_OF_TEXT = re.compile(
    r"""(?<![\w-])class\s*=\s*(?:"[^"]*?|'[^']*?|)(?<![a-z])(?:quote|admonition|callout|notecard|note|notice|warning|tip|hint"""
    r"""|alert|caution|important|danger|info|footnotes?|starlight-aside|abstract|(?<=["'])topic)(?![a-z])""",
    re.IGNORECASE,
)
# Names stand at the beginning of a tag: a bound on the time that a tag takes. A guess.
_NAMES = 1000


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
        # Whether nothing but tags came since a formula.
        self.after_formula = False
        # Of each element its name in the source, what becomes of its white space, whether that is so since an element
        # within a block, and whether its text is left out: 2 with that of all elements inside, 1 alone.
        self.names: list[str] = []
        self.spaces: list[int] = []
        self.inline: list[bool] = []
        self.silent: list[int] = []
        # Cells' texts as they are in the source, where white space is lost.
        self.cells: dict[int, str] = {}
        self.known: dict[tuple[str, str], tuple[bool, int | None, int]] = {}

    def says(self, tag: str, attributes: str) -> tuple[bool, int | None, int]:
        """Whether a tag's attributes hide its element, what they say of its white space, and of line numbers."""
        if len(attributes) <= 6:
            return False, None, 0
        key = (tag, attributes)
        if key not in self.known:
            hidden = _UNSHOWN.search(attributes) is not None
            self.known[key] = hidden, kept_space(tag, attributes), line_numbers(tag, attributes)
        return self.known[key]

    def push(self, tag: str, attributes: str, block: bool = True) -> None:
        page, number = self.page, len(self.page.tags)
        parent = self.stack[-1] if self.stack else -1
        row = page.rows[parent] if parent >= 0 else -1
        cell = page.cells[parent] if parent >= 0 else -1
        item = page.items[parent] if parent >= 0 else -1
        unshown = parent >= 0 and page.unshown[parent]
        space = self.spaces[parent] if parent >= 0 else COLLAPSED
        silent = self.silent[parent] if parent >= 0 and self.silent[parent] > 1 else 0
        if tag == "tr":
            row = number
        elif tag in ("td", "th"):
            cell = number
        elif tag == "table":
            row = cell = -1
        elif tag == "li":
            item = number
        hidden, own, numbers = self.says(tag, attributes)
        # A body that is hidden waits for its script.
        unshown = unshown or (hidden and parent >= 0)
        if unshown and tag == "span":
            silent = max(silent, 1)
        if numbers > 1 or (numbers and space == CODE) or (tag == "span" and is_drawn(attributes, self.after_formula)):
            silent = 2
        inline = parent >= 0 and self.inline[parent] and space != COLLAPSED
        if own is None and tag in ("pre", "listing"):
            own = CODE
        if own is not None and own != space:
            # Inside text whose lines are lines of one, they stay so.
            space, inline = CODE if space == CODE and own == KEPT else own, inline or not block
        self.names.append(tag)
        part_of_text = tag == "aside" and _PART_OF_TEXT.search(attributes[:_NAMES]) is not None
        page.tags.append("div" if part_of_text else tag)
        page.attributes.append(attributes)
        page.parents.append(parent)
        page.starts.append(len(page.texts))
        page.ends.append(-1)
        page.rows.append(row)
        page.cells.append(cell)
        page.items.append(item)
        page.unshown.append(unshown)
        page.preformatted.append(space >= KEPT)
        self.spaces.append(space)
        self.inline.append(inline)
        self.silent.append(silent)
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
            self.open[self.names[number]].pop()
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
        raw = "".join(self.pieces)
        self.pieces.clear()
        page, place = self.page, self.stack[-1]
        text = unescape(raw) if "&" in raw else raw
        if page.preformatted[place] and not self.inline[place]:
            text = text.replace(_LINE, "\n").replace("\r\n", "\n").replace("\r", "\n").strip("\n").rstrip()
        else:
            raw, text = text, _in_order(text)
            if page.tags[place] == "td" and len(raw) - len(text) > 1:
                self.cells[len(page.texts)] = raw
        text = unmarked(text)
        if page.tags[place] == "noscript" and text[:1] == "<" and text[-1:] == ">":
            # A browser that runs scripts saves what is inside as text.
            text = ""
        if text and not text.isspace() and not (self.shown and text[:_BEGINNING] in self.shown):
            page.texts.append(text)
            page.places.append(place)
            page.linked.append(min(self.linked, len(text)))
            page.links.append(self.links)
        self.linked = self.links = 0

    def start(self, tag: str, attributes: str) -> None:
        if tag in _BLOCKS:
            inside = self.spaces[self.stack[-1]] == CODE
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
            if inside and self.spaces[self.stack[-1]] == CODE:
                # In code a block is a line.
                self.end_line()
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
        elif tag == "img":
            if shown := image_formula(attributes):
                self.pieces.append(shown)
        elif "-" in tag:
            self.push(tag, attributes)
        elif (len(attributes) > 6 and tag not in _VOID) or self.open.get(tag):
            self.start_inline(tag, attributes)

    def start_inline(self, tag: str, attributes: str) -> None:
        """Push an element within a block, if its attributes tell it from the text around it."""
        hidden, own, numbers = self.says(tag, attributes)
        space = self.spaces[self.stack[-1]]
        if own is not None and own != space and is_shown_as_block(attributes):
            self.flush()
            self.push(tag, attributes)
            return
        differs = own is not None and own != space
        if tag == "span":
            differs = differs or hidden or is_drawn(attributes, self.after_formula)
        # Inside an element that was pushed, the end of another of its tag is not its own.
        if differs or self.open.get(tag) or (space == CODE and numbers):
            self.push(tag, attributes, False)

    def end_line(self) -> None:
        if self.pieces and not self.pieces[-1].endswith(("\n", _LINE)):
            self.pieces.append(_LINE)

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
                first, last = self.stack[found[-1]], self.stack[-1]
                if self.spaces[last] == CODE and self.spaces[self.stack[found[-1] - 1]] == CODE:
                    if tag in _BLOCKS:
                        self.end_line()
                elif tag in _BLOCKS or (self.page.preformatted[last] and not self.inline[first]):
                    self.flush()
                self.pop_to(found[-1])
            elif tag in _BLOCKS and self.spaces[self.stack[-1]] != CODE:
                self.flush()

    def shows_little(self) -> bool:
        """Whether nearly all that the page shows is links."""
        return sum(map(len, self.page.texts)) - sum(self.page.linked) < SHOWN

    def read(self, page: str, shown: str = "") -> None:
        """Walk over ``page``; blocks of whose beginning ``shown`` has already are left out."""
        pieces, start, end = self.pieces, self.start, self.end
        result, stack = self.page, self.stack
        self.shown = shown
        previous, apart = "", False
        # How many templates are open: their content waits for scripts, and may hold templates.
        templates = 0
        for text, maths, closing, tag, attributes in tokens(page):
            if templates:
                if tag is not None and tag.lower() == "template":
                    templates += -1 if closing else not _is_empty(attributes)
                continue
            if text:
                top = stack[-1]
                self.after_formula = self.after_formula and text.isspace()
                if not self.silent[top]:
                    if self.inline[top] or self.spaces[top] == LINES:
                        text = with_marks(text, self.spaces[top])
                    if apart and pieces and pieces[-1][-1].isalnum() and text[0].isalnum():
                        pieces.append(" ")
                    pieces.append(text)
                    if self.link >= 0 and not text.isspace():
                        self.linked += len(text)
                previous, apart = "", False
            if maths is not None and self.silent[stack[-1]] < 2:
                if shown := formula(*maths):
                    pieces.append(shown)
                    self.after_formula = True
                previous, apart = "", False
            if tag is None:
                continue
            tag = tag.lower()
            if closing:
                end(tag)
                previous = tag
            elif tag == "template" and not _SHADOW.search(attributes or ""):
                templates = int(not _is_empty(attributes))
            elif tag not in ("body", "html", "head"):
                apart = (apart or previous in _INLINE_GAP) and tag in _INLINE_GAP and not result.preformatted[stack[-1]]
                start(tag, attributes or "")
                previous = ""
        self.flush()
        self.pop_to(1)


def _is_empty(attributes: str | None) -> bool:
    """Whether a tag ends its own element, as XML's do."""
    return (attributes or "").endswith("/")


def _as_pre(found: re.Match[str]) -> str:
    """What :data:`_SOURCE` finds, an ``xmp`` element as a ``pre`` element."""
    return found[0] if found[2] is None else f"<pre>{escape(found[2], quote=False)}</pre>"


def _in_order(text: str) -> str:
    """``text`` with single spaces, and lines where marks were."""
    text = " ".join(text.split())
    return _AROUND_LINE.sub("\n", text).strip() if _LINE in text else text


def read_markup(page: str, with_carried: bool = True) -> Markup:
    """Walk over ``page``, then over what it carries as data, in elements ``carried-...`` of their own.

    A page that shows frames alone is read as readers without frames see it. A page that shows hardly any text is read
    as its script would show it, if its data tells.
    """
    page = in_place(_CONTROLS.sub("", page))
    if "<xmp" in page or "<XMP" in page:
        page = _SOURCE.sub(_as_pre, page)
    walk = _Walk()
    body = _BODY.search(page)
    walk.push("body", body[1] if body else "")
    walk.read(page)
    if not walk.page.texts:
        for without_frames in _NO_FRAMES.finditer(page):
            walk.read(without_frames[1])
    found = carried(page) if with_carried else []
    if with_carried and walk.shows_little():
        known = sum(len(markup) for name, markup in found if name != "carried-description")
        if known < SHOWN:
            walk.read(_CONTROLS.sub("", state_markup(page)))
    for name, markup in found:
        shown = "\n".join(walk.page.texts)
        walk.push(name, "")
        walk.read(_CONTROLS.sub("", markup), shown)
    walk.pop_to(0)
    join_code_rows(walk.page, walk.cells)
    # A description may be escaped twice, once for the attribute and once by its writer.
    walk.page.descriptions = [" ".join(unescape(unescape(text)).split()) for text in descriptions(page)]
    walk.page.carried = unescape(_ANY_TAG.sub(" ", "\n".join(markup for _, markup in found)))
    return walk.page
