"""Passages taken out of a text: words stay whole, and what was apart stays apart."""

from __future__ import annotations

from collections.abc import Sequence

from .text import tidy
from .words import WORD


def _within_word(text: str, place: int) -> bool:
    found = WORD.match(text, place - 1, place + 1) if 0 < place < len(text) else None
    return found is not None and found.end() > place


def _rest_of_word(text: str, place: int) -> int:
    found = WORD.match(text, place)
    return place if found is None else found.end()


def whole_words(text: str, begin: int, end: int) -> tuple[int, int]:
    """The part of ``text[begin:end]`` without the pieces of words at its ends; it may be empty."""
    if _within_word(text, begin):
        begin = _rest_of_word(text, begin)
    while end > begin and _within_word(text, end):
        end -= 1
    return min(begin, end), end


def cut(text: str, ranges: Sequence[tuple[int, int]]) -> str:
    """``text`` without the characters in ``ranges``, which are ascending and do not overlap; tidied."""
    parts: list[str] = []
    at = 0
    for begin, end in [*ranges, (len(text), len(text))]:
        part = text[at:begin]
        if parts and part:
            removed = text[ranges[len(parts) - 1][0] : at]
            if parts[-1][-1:].isspace() and part[:1] == " ":
                part = part.lstrip(" ")
            elif not parts[-1][-1:].isspace() and not part[:1].isspace():
                part = ("\n" if "\n" in removed else " " if " " in removed else "") + part
        parts.append(part)
        at = end
    return tidy("".join(parts))
