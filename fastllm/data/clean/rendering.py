"""Blocks as text: paragraphs apart, items and rows on lines of their own, a title once."""

from __future__ import annotations

import re
from itertools import groupby

from .markup import Markup

_PERMALINK = re.compile(r"\s*[\u00b6\uf0c1](?=\s|$)|\s+#$")
# In headings with a link of at most so many characters, which a sign alone has.
_LINKED_SIGN = re.compile(r"^[#\u00a7\U0001f517]\s*|\s*[#\u00a7\U0001f517]$")
_SIGN = 1
# What wikis put behind a heading.
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_EDIT = re.compile(
    r"\s*\[\s*(?:edit|bearbeiten|modifier|editar|modifica|bewerken|edytuj|redigera|rediger|muokkaa|editovat|szerkeszt\u00e9s"
    r"|\u043f\u0440\u0430\u0432\u0438\u0442\u044c|\u7f16\u8f91|\u7de8\u8f2f|\u7de8\u96c6|\ud3b8\uc9d1)\b[^\[\]]{0,40}\]\s*$",
    re.IGNORECASE,
)
# Rows of tables whose cells hold more than this, in characters, lay out a page; and those of which a cell holds several
# blocks, one of them with more than the second.
_LAYOUT, _PARAGRAPH = 600, 80


def data_rows(markup: Markup) -> dict[int, list[int]]:
    """The blocks of each table row that holds data: more than one cell, none of them a page of its own."""
    rows: dict[int, list[int]] = {}
    cells: dict[int, dict[int, list[int]]] = {}
    for block, place in enumerate(markup.places):
        row = markup.rows[place]
        if row >= 0 and not markup.preformatted[place]:
            rows.setdefault(row, []).append(block)
            cells.setdefault(row, {}).setdefault(markup.cells[place], []).append(len(markup.texts[block]))
    return {
        row: blocks
        for row, blocks in rows.items()
        if len(cells[row]) > 1
        and sum(map(sum, cells[row].values())) <= _LAYOUT
        and not any(len(sizes) > 1 and max(sizes) > _PARAGRAPH for sizes in cells[row].values())
    }


def _table(markup: Markup, row: int) -> int:
    """The element that holds ``row``'s table: the head and the body are parts of one."""
    above = markup.parents[row]
    return markup.parents[above] if markup.tags[above] in ("thead", "tbody", "tfoot") else above


def render(markup: Markup, kept: list[int]) -> str:
    """The blocks ``kept`` as text: paragraphs apart, items and rows on lines of their own, a title once."""
    rows = data_rows(markup)
    parts: list[str] = []
    previous: tuple[str, int] | None = None
    headings: set[str] = set()
    row_of = {block: row for row, blocks in rows.items() for block in blocks}
    for key, group in groupby(kept, key=lambda block: row_of.get(block, -1 - block)):
        blocks = list(group)
        place = markup.places[blocks[0]]
        if key >= 0:
            cells = groupby(blocks, key=lambda block: markup.cells[markup.places[block]])
            text = " | ".join(" ".join(markup.texts[block] for block in cell).replace("\n", " ") for _, cell in cells)
            current = ("row", _table(markup, key))
        else:
            text = markup.texts[blocks[0]]
            item = markup.items[place]
            current = ("item", item) if item >= 0 and not markup.preformatted[place] else ("block", place)
            if not markup.preformatted[place]:
                text = _PERMALINK.sub("", text).strip()
                if markup.links[blocks[0]] and markup.tags[place] in _HEADINGS:
                    text = _EDIT.sub("", text)
                    if markup.linked[blocks[0]] <= _SIGN:
                        text = _LINKED_SIGN.sub("", text)
                if markup.tags[place] in ("h1", "h2"):
                    if text in headings:
                        continue
                    headings.add(text)
            if current[0] == "item" and current != previous:
                text = f"- {text}"
        if not text:
            continue
        if previous is not None:
            lines = current[0] == previous[0] and (
                current[0] == "item" or (current[0] == "row" and current == previous)
            )
            parts.append("\n" if lines else "\n\n")
        parts.append(text)
        previous = current
    return "".join(parts)
