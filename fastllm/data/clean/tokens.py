"""A page of HTML cut into tags, formulas and the text between them, in time proportional to its length."""

from __future__ import annotations

import re
from collections.abc import Iterator

# What these elements hold is no text of the page. Everything up to their first end tag is one token.
_RAW = "script|style|iframe|noembed|noframes|svg|textarea|title|canvas|object|audio|video"
# Quotes count right after "=" alone. Every loop ends at ">" or at the page's end, so that nothing is tried twice.
ATTRIBUTES = r"""(?:[^>=]+(?=[>=]|\Z)|=\s*(?:"[^"]*(?:"|\Z)|'[^']*(?:'|\Z))?)*"""
COMMENT = r"!--(?:-?>|(?s:.)*?(?:--!?>|\Z))"


def raw_element(group: int) -> str:
    """A pattern of such an element but for its first bracket; its name is group number ``group``."""
    return (
        rf"(?i:({_RAW}))(?![-\w:]){ATTRIBUTES}"
        rf"(?:(?<=/)>|>(?s:.)*?(?:</(?i:\{group})(?![-\w:])[^>]*(?:>|\Z)|\Z)|\Z)"
    )


_TOKEN = re.compile(
    rf"<(?:(?i:math(?![-\w:])|script(?=\s[^>]{{0,200}}?math/tex))({ATTRIBUTES})"
    r"(?:(?<=/)>|>((?s:.)*?)(?:</(?i:math|script)(?![-\w:])[^>]*(?:>|\Z)|\Z)|\Z)"
    rf"|{raw_element(3)}"
    rf"|(/?)([a-zA-Z][^\s/>]*)({ATTRIBUTES})(?:>|\Z)"
    rf"|{COMMENT}|[!?/][^>]*(?:>|\Z))"
)
# Tags that are cut at once, and at most: 100 times as many as the fullest of 511 benchmark pages has.
_AT_ONCE, _MOST = 100_000, 2_000_000

Token = tuple[str, tuple[str, str] | None, str | None, str | None, str | None]


def tokens(page: str) -> Iterator[Token]:
    """(text before it, a formula's attributes and inside, "/" of an end tag, name, attributes) of each tag.

    At last comes the text after them, with no tag.
    """
    for _ in range(_MOST // _AT_ONCE):
        parts = _TOKEN.split(page, _AT_ONCE)
        for text, formula_tag, inner, closing, tag, attributes in zip(
            parts[0::7], parts[1::7], parts[2::7], parts[4::7], parts[5::7], parts[6::7], strict=False
        ):
            yield text, None if formula_tag is None else (formula_tag, inner or ""), closing, tag, attributes
        page = parts[-1]
        if len(parts) <= 7 * _AT_ONCE:
            yield page, None, None, None, None
            return
