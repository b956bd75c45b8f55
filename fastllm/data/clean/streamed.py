"""Pages that are sent in parts: what a script would move into place is moved here.

React sends what is late behind the page, in ``<div hidden id="S:n">``, and a script puts it where
``<template id="B:n">`` (or ``P:n``) waits for it.
"""

from __future__ import annotations

import re

_BEGIN = re.compile(r"""<div hidden(?:="")? id="S:([0-9a-z]+)">""")
_END = re.compile(r"""</div>(?=\s{0,20}<script\b[^>]{0,200}>[^<]{0,8000}?\$R[CSX]\()""")
_WAITING = re.compile(r"""<template id="[BP]:([0-9a-z]+)"></template>""")
# Parts wait in parts. What lies deeper is put at the end. A guess.
_DEEPEST = 8


def in_place(page: str) -> str:
    """``page`` with its late parts where they belong; those that nothing waits for come last."""
    if not _BEGIN.search(page):
        return page
    ends = [found.start() for found in _END.finditer(page)]
    parts: dict[str, str] = {}
    rest: list[str] = []
    at, end = 0, 0
    for begin in _BEGIN.finditer(page):
        if begin.start() < at:
            continue
        while end < len(ends) and ends[end] < begin.end():
            end += 1
        if end == len(ends):
            break
        rest.append(page[at : begin.start()])
        parts[begin[1]] = page[begin.end() : ends[end]]
        at = ends[end] + len("</div>")
    rest.append(page[at:])

    def put(text: str, depth: int) -> str:
        # Each part is used once, so that the whole grows no longer than the page.
        def part(found: re.Match[str]) -> str:
            inner = parts.pop(found[1], None) if depth < _DEEPEST else None
            return found[0] if inner is None else put(inner, depth + 1)

        return _WAITING.sub(part, text)

    whole = put("".join(rest), 0)
    return whole + "".join(f"<div>{part}</div>" for part in parts.values())
