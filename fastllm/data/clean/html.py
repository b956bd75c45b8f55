"""The main text of an HTML page, by one of several extractors.

``fast`` is a walk over the page's tags and a small model of its blocks; ``trafilatura`` and ``baseline`` are
trafilatura's extraction and its baseline; ``all`` keeps every visible text.
"""

from __future__ import annotations

from collections.abc import Callable

from ..optional import require
from .main_text import extract_fast, visible_text


def _trafilatura(page: str) -> str:
    library = require("trafilatura", "trafilatura", "--extractor trafilatura", extra="trafilatura")
    return library.extract(page, include_comments=False, include_tables=True, deduplicate=False) or ""


def _baseline(page: str) -> str:
    return require("trafilatura", "trafilatura", "--extractor baseline", extra="trafilatura").baseline(page)[1]


EXTRACTORS: dict[str, Callable[[str], str]] = {
    "fast": extract_fast,
    "trafilatura": _trafilatura,
    "baseline": _baseline,
    "all": visible_text,
}
