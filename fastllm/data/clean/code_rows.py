"""Code whose lines are rows of a table becomes one block, as in an element that keeps its white space."""

from __future__ import annotations

from itertools import compress

import numpy as np

from .elements import Markup

# The fewest rows of a cell with a number and a cell with text that are code for their numbers alone: a guess.
_NUMBERED = 3


def table_of(markup: Markup, row: int) -> int:
    """The element that holds ``row``'s table: the head and the body are parts of one."""
    above = markup.parents[row]
    return markup.parents[above] if markup.tags[above] in ("thead", "tbody", "tfoot") else above


def join_code_rows(markup: Markup, cells: dict[int, str]) -> None:
    """Join the lines of each table of code in ``markup``.

    It is one if each row has one cell of code, or a number that counts up and a text, some of which are indented.

    Args:
        cells: of the blocks in cells that have more white space in the source, their text there.
    """
    candidates = {
        row
        for block, place in enumerate(markup.places)
        if (row := markup.rows[place]) >= 0
        and ((markup.preformatted[place] and "\n" not in markup.texts[block]) or _is_indented(cells.get(block, "")))
    }
    if not candidates:
        return
    tables: dict[int, list[int]] = {table_of(markup, row): [] for row in candidates}
    for number, tag in enumerate(markup.tags):
        if tag == "tr" and (table := table_of(markup, number)) in tables:
            tables[table].append(number)
    removed: list[int] = []
    for rows in tables.values():
        removed += _join(markup, rows, cells)
    if removed:
        remove_blocks(markup, removed)


def _is_indented(text: str) -> bool:
    return text[:1] in ("\t", "\u00a0") or (text[:2].isspace() and text[:1] == " ")


def _join(markup: Markup, rows: list[int], cells: dict[int, str]) -> list[int]:
    """Join the lines in ``rows`` of one table, if they are code; the blocks that are no longer there."""
    lines: list[int | None] = []
    numbers: list[int] = []
    others: list[int] = []
    for row in rows:
        code: list[int] = []
        for block in range(markup.starts[row], markup.ends[row]):
            if markup.rows[markup.places[block]] != row:
                return []
            if markup.texts[block].isdecimal() and len(markup.texts[block]) < 9 and not code:
                numbers.append(int(markup.texts[block]))
                others.append(block)
            else:
                code.append(block)
        if len(code) > 1:
            return []
        lines.append(code[0] if code else None)
    blocks = [line for line in lines if line is not None]
    if len(blocks) < 2 or any("\n" in markup.texts[block] for block in blocks):
        return []
    if not all(markup.preformatted[markup.places[block]] for block in blocks):
        # A row without text is an empty line, but has its number.
        counted = numbers == list(range(numbers[0], numbers[0] + len(rows))) if numbers else False
        if not counted or len(rows) < _NUMBERED:
            return []
    first = blocks[0]
    texts = ["" if line is None else _line(markup, line, cells) for line in lines]
    markup.texts[first] = "\n".join(texts).strip("\n")
    for column in (markup.linked, markup.links):
        column[first] = sum(column[block] for block in blocks)
    markup.preformatted[markup.places[first]] = True
    return [*others, *blocks[1:]]


def _line(markup: Markup, block: int, cells: dict[int, str]) -> str:
    return cells.get(block, markup.texts[block]).replace("\u00a0", " ").strip("\r\n").rstrip()


def remove_blocks(markup: Markup, blocks: list[int]) -> None:
    """Take ``blocks`` out of ``markup``'s columns, in place."""
    keep = np.ones(len(markup.texts), bool)
    keep[blocks] = False
    before = np.concatenate([[0], np.cumsum(keep)])
    markup.starts[:] = before[markup.starts].tolist()
    markup.ends[:] = before[markup.ends].tolist()
    stays = keep.tolist()
    markup.texts[:] = compress(markup.texts, stays)
    markup.places[:] = compress(markup.places, stays)
    markup.linked[:] = compress(markup.linked, stays)
    markup.links[:] = compress(markup.links, stays)
