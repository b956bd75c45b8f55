"""The fast extractor: lexbor's tree, marks put into it at C speed, and one pass over the text that results.

Walking the tree in Python would cost a call for each node. Instead every block gets a control character before and
after it, links, cells and preformatted text get others, and the page's text, taken in one call, is then cut at them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..optional import require

# The marks; a page's own control characters are removed first.
_BLOCK, _PRE, _PRE_END, _LINK, _LINK_END, _ITEM, _CELL, _HEADING, _LINE = "\x1e\x01\x02\x03\x04\x05\x06\x0e\x0f"
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f]")

_UNSEEN = "script, style, noscript, template, svg, canvas, iframe, object, embed, audio, video, head, select, textarea"
_HIDDEN = "[hidden], [aria-hidden=true]"
_FURNITURE = (
    "nav, form, button, dialog, menu, [role=navigation], [role=banner], [role=contentinfo], [role=search], "
    "[role=menu], [role=dialog], [role=complementary]"
)
_OUTSIDE_MAIN = "header, footer, aside"
_MAIN = "main, [role=main], article, [itemprop=articleBody]"
_BLOCKS = (
    "address, article, aside, blockquote, center, dd, details, div, dl, dt, fieldset, figcaption, figure, footer, "
    "h1, h2, h3, h4, h5, h6, header, hr, li, main, ol, p, pre, section, summary, table, tbody, thead, tr, ul"
)
# A landmark counts as the main part only with so many characters: some pages leave it empty.
_LEAST_MAIN = 140
# Blocks of at least so many characters, mostly outside links, are text; shorter ones follow their neighbours.
_LONG = 70
_LINKED = 0.5
# Consecutive list items, or cells, that are links alone: from so many on they are a menu or a table of contents.
_MENU = 3
_NAMES = re.compile(
    r"(?:^|[\s_-])(?:nav|navbar|navigation|menu|breadcrumbs?|sidebar|footer|cookies?|consent|share|sharing|social|"
    r"advert|ads?|banner|promo|related|newsletter|skip|pagination|pager|toc|headerlink)(?:$|[\s_-])",
    re.IGNORECASE,
)
# Inline elements have classes too, thousands of them in coloured source code.
_NAMED = ", ".join(
    f"{tag}[{name}]" for tag in ("div", "section", "ul", "ol", "p", "table", "a") for name in ("class", "id")
)
_PERMALINK = re.compile(f"{_LINK}[\u00b6#\u00a7]?{_LINK_END}")
_MARKS = re.compile(f"[{_LINK}{_LINK_END}{_ITEM}{_HEADING}{_CELL}]")
_WHITE = re.compile(r"\s+")
# Tags that may nest; the others close themselves.
_TAG = re.compile(
    r"<(/?)(?!(?:area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr|p|li|dt|dd|tr|td|th|thead|tbody|"
    r"tfoot|option|optgroup|colgroup|rp|rt|html|head|body)\b)[a-zA-Z]"
)
# Nested elements beyond this are refused: an HTML5 parser's time grows with their square.
DEEPEST = 3000


class TooDeep(ValueError):
    """A page nests its elements too deeply to be parsed; the argument is the depth that was reached."""


def _tree(page: str):
    depth = 0
    # Where there are too few tags to nest so deeply, nothing needs counting.
    if page.count("<") > DEEPEST:
        for match in _TAG.finditer(page):
            depth = max(0, depth - 1) if match[1] else depth + 1
            if depth > DEEPEST:
                raise TooDeep(depth)
    parser = require("selectolax.lexbor", "selectolax", "--extractor fast").LexborHTMLParser
    return parser(_CONTROLS.sub("", page))


def _remove(root, selector: str) -> None:
    # From the end: what is inside goes before what it is inside of.
    for node in reversed(root.css(selector)):
        node.decompose()


@dataclass
class _Block:
    """A piece of the page between two marks."""

    text: str
    linked: int
    preformatted: bool = False
    item: bool = False
    heading: bool = False

    @property
    def link_density(self) -> float:
        return self.linked / max(1, len(self.text))


def _blocks(root) -> list[_Block]:
    """Mark ``root`` and cut its text."""
    for node in root.css("a"):
        node.insert_before(_LINK)
        node.insert_after(_LINK_END)
    for node in root.css("br"):
        node.insert_before(_LINE)
    for node in root.css("td, th"):
        node.insert_after(_CELL)
    for node in root.css("h1, h2, h3, h4, h5, h6"):
        node.insert_before(_HEADING)
    for node in root.css("li"):
        node.insert_before(_ITEM)
    for node in root.css("pre"):
        node.insert_before(_PRE)
        node.insert_after(_PRE_END)
    for node in root.css(_BLOCKS):
        node.insert_before(_BLOCK)
        node.insert_after(_BLOCK)
    blocks = []
    item = heading = False
    for number, piece in enumerate(re.split(f"[{_PRE}{_PRE_END}]", root.text(deep=True))):
        if number % 2:
            code = _MARKS.sub("", _PERMALINK.sub("", piece)).replace(_BLOCK, "").replace(_LINE, "\n").strip("\n")
            if code.strip():
                blocks.append(_Block(code.rstrip(), 0, preformatted=True))
            continue
        for part in piece.split(_BLOCK):
            item, heading = item or _ITEM in part, heading or _HEADING in part
            if not part or part.isspace():
                continue
            part = _PERMALINK.sub("", part)
            linked = sum(len(_WHITE.sub(" ", link)) for link in re.findall(f"{_LINK}([^{_LINK_END}]*)", part))
            cells = [_WHITE.sub(" ", _MARKS.sub("", cell)).strip(" ") for cell in part.split(_CELL)]
            text = " | ".join(cell for cell in cells if cell)
            text = "\n".join(line.strip() for line in text.split(_LINE)).strip()
            if text:
                blocks.append(_Block(text, linked, item=item, heading=heading))
                item = heading = False
    return blocks


def _without_menus(blocks: list[_Block]) -> list[_Block]:
    """Leave out runs of blocks that are links alone, and blocks that are mostly several links."""
    kept: list[_Block] = []
    run: list[_Block] = []
    for block in [*blocks, None]:
        if block is not None and not block.preformatted and not block.heading and block.link_density > 0.9:
            run.append(block)
            continue
        if len(run) < _MENU:
            kept += run
        run = []
        if block is not None:
            kept.append(block)
    return kept


def _content(blocks: list[_Block]) -> list[_Block]:
    """Of a page without landmarks: long blocks of text, and short ones between or right before them.

    After jusText (Pomikalek 2011): the long blocks decide, the short ones follow their neighbours.
    """
    good = [block.preformatted or (len(block.text) >= _LONG and block.link_density < _LINKED) for block in blocks]
    bad = [block.link_density >= _LINKED and not block.preformatted for block in blocks]
    last: int | None = None
    kept = list(good)
    for index in range(len(blocks)):
        if not good[index]:
            continue
        between = range(0 if last is None else last + 1, index)
        if last is None:
            # What precedes the first text is its heading, or furniture.
            headings = [i for i in between if blocks[i].heading]
            between = range(headings[0], index) if headings and index - headings[0] <= 5 else range(index, index)
        for i in between:
            kept[i] = not bad[i]
        last = index
    if last is None:
        return [block for block, no in zip(blocks, bad, strict=True) if not no]
    # A short closing block is text if it ends as a sentence does.
    for index in range(last + 1, min(last + 3, len(blocks))):
        kept[index] = not bad[index] and blocks[index].text[-1] in ".!?\"'\u201d\u2019"
    return [block for block, keep in zip(blocks, kept, strict=True) if keep]


def _join(blocks: list[_Block]) -> str:
    """Paragraphs with a blank line between them; list items on lines of their own."""
    parts: list[str] = []
    previous: _Block | None = None
    for block in blocks:
        if previous is not None:
            parts.append("\n" if block.item and previous.item else "\n\n")
        parts.append(f"- {block.text}" if block.item else block.text)
        previous = block
    return "".join(parts)


def extract_fast(page: str) -> str:
    """The main text of ``page``: its landmark (``main``, ``article``), else its long blocks; without menus.

    Raises:
        TooDeep: the elements nest too deeply.
        InputError: selectolax is not installed.
    """
    tree = _tree(page)
    if tree.body is None:
        return ""
    _remove(tree, _UNSEEN)
    _remove(tree, _HIDDEN)
    body = tree.body
    if body is None:
        return ""
    total = len(body.text(deep=True))
    candidates = sorted((-len(node.text(deep=True).strip()), i, node) for i, node in enumerate(body.css(_MAIN)[:64]))
    root, landmark = body, False
    if candidates and -candidates[0][0] >= min(_LEAST_MAIN, total / 4):
        root, landmark = candidates[0][2], True
    # Several articles side by side are a listing: all of them together are the page.
    if landmark and root.tag == "article" and sum(node.tag == "article" for _, _, node in candidates) > 1:
        root, landmark = body, False
    main_size = len(root.text(deep=True))
    _remove(root, _FURNITURE if root is not body else f"{_FURNITURE}, {_OUTSIDE_MAIN}")
    for node in reversed(root.css(_NAMED)):
        names = f"{node.attributes.get('class') or ''} {node.attributes.get('id') or ''}"
        if _NAMES.search(names) and len(node.text(deep=True)) < main_size * 0.3:
            node.decompose()
    blocks = _without_menus(_blocks(root))
    return _join(blocks if landmark else _content(blocks))


def visible_text(page: str) -> str:
    """Every text of ``page`` that is not hidden, blocks on lines of their own.

    Raises:
        TooDeep, InputError: as :func:`extract_fast`.
    """
    tree = _tree(page)
    _remove(tree, _UNSEEN)
    return "" if tree.body is None else _join(_blocks(tree.body))
