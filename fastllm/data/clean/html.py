"""The main text of an HTML page.

``fast`` reads the page with lexbor (through selectolax) and walks it once; ``trafilatura`` and ``baseline`` are
trafilatura's extraction and its baseline; ``all`` keeps every visible text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable

from ..optional import require
from .main_text import extract_fast, visible_text

# An encoding that the page declares for itself counts only in its first bytes, as browsers have it.
_DECLARED = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([-\w.:]+)""", re.IGNORECASE)
_XML = re.compile(rb"""^\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([-\w.:]+)""", re.IGNORECASE)
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


def decode_page(content: bytes, declared: str | None = None) -> tuple[str, str]:
    """The text of ``content``, and the encoding that it was read in.

    In this order: a byte order mark; UTF-8, if the content is; what the transport declared; what the page declares;
    Windows-1252, which reads anything. Only the last three may replace bytes by U+FFFD.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding, "replace"), encoding
    try:
        return content.decode(), "utf-8"
    except UnicodeDecodeError as error:
        # A page of UTF-8 with a few broken bytes stays UTF-8: legacy text fails at almost every such byte.
        if len(content) - error.start < 4 and error.reason == "unexpected end of data":
            return content.decode(errors="replace"), "utf-8"
    found = _XML.search(content[:1024]) or _DECLARED.search(content[:4096])
    for name in (declared, found and found[1].decode("ascii", "replace")):
        if not name:
            continue
        try:
            encoding = codecs.lookup(name).name
            text = content.decode(encoding, "replace")
        except (LookupError, ValueError, UnicodeError):
            continue
        if isinstance(text, str):
            # HTML reads Latin-1 as its superset.
            return (content.decode("cp1252", "replace"), "cp1252") if encoding == "iso8859-1" else (text, encoding)
    multibyte = len(re.findall(rb"[\xc2-\xf4][\x80-\xbf]+", content))
    lone = len(re.findall(rb"[\x80-\xff]", re.sub(rb"[\xc2-\xf4][\x80-\xbf]+", b"", content)))
    encoding = "utf-8" if multibyte > 10 * lone else "cp1252"
    return content.decode(encoding, "replace"), encoding


def _trafilatura(page: str) -> str:
    library = require("trafilatura", "trafilatura", "--extractor trafilatura")
    return library.extract(page, include_comments=False, include_tables=True, deduplicate=False) or ""


def _baseline(page: str) -> str:
    return require("trafilatura", "trafilatura", "--extractor baseline").baseline(page)[1]


EXTRACTORS: dict[str, Callable[[str], str]] = {
    "fast": extract_fast,
    "trafilatura": _trafilatura,
    "baseline": _baseline,
    "all": visible_text,
}
