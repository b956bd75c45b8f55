"""Blocks as text: paragraphs apart, items and rows on lines of their own, a title once."""

from __future__ import annotations

import re
from itertools import groupby

from .code_rows import table_of
from .elements import Markup

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
# blocks, one of them with more than the second. Guesses.
_LAYOUT, _PARAGRAPH = 600, 80
_SPAN = re.compile(r"""(?<![\w-])(col|row)span\s*=\s*["']?\s*(\d{1,5})""", re.IGNORECASE)
# A cell takes at most so many columns or rows, more than any table has whose rows hold data: a guess.
_WIDEST = 100
# Lists nested deeper are shown as deep as this: a bound on the text's length.
_DEEPEST, _DEEPER = 8, "  "


def data_rows(markup: Markup) -> dict[int, list[int]]:
    """The blocks of each table row that holds data: more than one cell with text, none of them a page of its own.

    So does a row of one short text in a table of such rows.
    """
    rows: dict[int, list[int]] = {}
    cells: dict[int, dict[int, list[int]]] = {}
    for block, place in enumerate(markup.places):
        row = markup.rows[place]
        if row >= 0 and not markup.preformatted[place]:
            rows.setdefault(row, []).append(block)
            cells.setdefault(row, {}).setdefault(markup.cells[place], []).append(len(markup.texts[block]))
    data = {
        row
        for row, sizes_of in cells.items()
        if sum(map(sum, sizes_of.values())) <= _LAYOUT
        and not any(len(sizes) > 1 and max(sizes) > _PARAGRAPH for sizes in sizes_of.values())
    }
    tables = {table_of(markup, row) for row in data if len(cells[row]) > 1}
    return {
        row: blocks
        for row, blocks in rows.items()
        if row in data and (len(cells[row]) > 1 or _is_lone_cell(markup, blocks, tables))
    }


def _is_lone_cell(markup: Markup, blocks: list[int], tables: set[int]) -> bool:
    """Whether ``blocks``, all of a row's, are one short text in a table that has rows of data."""
    place = markup.places[blocks[0]]
    short = len(blocks) == 1 and len(markup.texts[blocks[0]]) <= _PARAGRAPH and markup.cells[place] >= 0
    return short and markup.tags[place] not in _HEADINGS and table_of(markup, markup.rows[place]) in tables


def _columns(markup: Markup, rows: dict[int, list[int]]) -> dict[int, int]:
    """The column of each cell with text in the tables of ``rows``; columns without text are not counted."""
    texts = {markup.cells[markup.places[block]] for blocks in rows.values() for block in blocks}
    tables = {table_of(markup, row) for row in rows}
    cells: dict[int, list[int]] = {}
    for number, tag in enumerate(markup.tags):
        if tag in ("td", "th") and (row := markup.rows[number]) >= 0:
            cells.setdefault(row, []).append(number)
    # Of each table its rows so far, and up to which row each column is taken from above.
    count: dict[int, int] = dict.fromkeys(tables, 0)
    taken: dict[int, dict[int, int]] = {table: {} for table in tables}
    column_of: dict[int, int] = {}
    used: dict[int, set[int]] = {table: set() for table in tables}
    for row, found in cells.items():
        table = table_of(markup, row)
        if table not in tables:
            continue
        column = 0
        for cell in found:
            while taken[table].get(column, 0) > count[table]:
                column += 1
            wide, high = _spans(markup.attributes[cell])
            for step in range(wide if high > 1 and column < _WIDEST else 0):
                taken[table][column + step] = count[table] + high
            if cell in texts:
                column_of[cell] = column
                used[table].add(column)
            column += wide
        count[table] += 1
    ranks = {table: {column: rank for rank, column in enumerate(sorted(columns))} for table, columns in used.items()}
    return {cell: ranks[table_of(markup, markup.rows[cell])][column] for cell, column in column_of.items()}


def _spans(attributes: str) -> tuple[int, int]:
    """How many columns and rows a cell takes."""
    found = {"col": 1, "row": 1}
    if "span" in attributes.lower():
        for kind, number in _SPAN.findall(attributes):
            found[kind.lower()] = min(max(1, int(number)), _WIDEST)
    return found["col"], found["row"]


class _Items:
    """What stands before the lines of lists: signs, and spaces where an item is inside another."""

    def __init__(self, markup: Markup):
        self._markup = markup
        self._depths: dict[int, int] = {}
        # Items with headings lay out a page.
        self._layout = {
            markup.items[place]
            for place in markup.places
            if markup.items[place] >= 0 and markup.tags[place] in _HEADINGS
        }

    def line(self, text: str, item: int) -> str:
        """``text`` of a block in ``item`` as a line."""
        known = item in self._depths
        if not known:
            self._depths[item] = self._depth(item)
        space = _DEEPER * self._depths[item]
        return f"{space}{'' if known else '- '}{text.replace(chr(10), chr(10) + space) if space else text}"

    def _depth(self, item: int) -> int:
        outer = item
        for _ in range(_DEEPEST):
            above = self._markup.parents[outer]
            outer = self._markup.items[above] if above >= 0 else -1
            if outer < 0:
                break
            if outer in self._depths and outer not in self._layout:
                return min(self._depths[outer] + 1, _DEEPEST)
        return 0


def _row(markup: Markup, blocks: list[int], columns: dict[int, int]) -> str:
    """The cells of a row of data, by ``columns``, which has the column of a cell; its lines become one."""
    texts: dict[int, list[str]] = {}
    for block in blocks:
        texts.setdefault(columns.get(markup.cells[markup.places[block]], 0), []).append(markup.texts[block])
    cells = (" ".join(texts.get(column, ())).replace("\n", " ") for column in range(max(texts) + 1))
    return " | ".join(cells).strip()


def _block(markup: Markup, block: int) -> str:
    """The text of a block without the signs that link to it; of a preformatted one, as it is."""
    place, text = markup.places[block], markup.texts[block]
    if markup.preformatted[place]:
        return text
    text = _PERMALINK.sub("", text).strip()
    if markup.links[block] and markup.tags[place] in _HEADINGS:
        text = _EDIT.sub("", text)
        if markup.linked[block] <= _SIGN:
            text = _LINKED_SIGN.sub("", text)
    return text


def render(markup: Markup, kept: list[int]) -> str:
    """The blocks ``kept`` as text: paragraphs apart, items and rows on lines of their own, a title once."""
    rows = data_rows(markup)
    columns = _columns(markup, rows) if rows else {}
    items = _Items(markup)
    parts: list[str] = []
    previous: tuple[str, int] | None = None
    headings: set[str] = set()
    row_of = {block: row for row, blocks in rows.items() for block in blocks}
    for key, group in groupby(kept, key=lambda block: row_of.get(block, -1 - block)):
        blocks = list(group)
        if key >= 0:
            text, current = _row(markup, blocks, columns), ("row", table_of(markup, key))
        else:
            (block,) = blocks
            place = markup.places[block]
            text, item = _block(markup, block), markup.items[place]
            current = ("item", item) if item >= 0 and not markup.preformatted[place] else ("block", place)
            if markup.tags[place] in ("h1", "h2") and not markup.preformatted[place]:
                if text in headings:
                    continue
                headings.add(text)
            if current[0] == "item" and text:
                text = items.line(text, item)
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
