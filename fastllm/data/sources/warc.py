"""Pages out of WARC files (ISO 28500), as Common Crawl's; texts out of its WET files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from ..optional import require
from .codings import codings, text_of, undo
from .compressed import Prompt, open_stream
from .limits import Failure, Limits, Raw, Unreadable, one_line
from .plan import SourceEntry

_CHARSET = re.compile(r"charset\s*=\s*[\"']?([-\w.:]+)", re.IGNORECASE)

# What HTML begins with (WHATWG's MIME Sniffing Standard, section 7.1): it tells what a response without a type is.
_PAGE = re.compile(
    rb"(?:\xef\xbb\xbf)?[\t\n\f\r ]*<(?:!--|(?:!DOCTYPE HTML|HTML|HEAD|SCRIPT|IFRAME|H1|DIV|FONT|TABLE|A|STYLE|TITLE|B"
    rb"|BODY|BR|P)[ >])",
    re.IGNORECASE,
)


def read_warc(entry: SourceEntry, limits: Limits) -> Iterator[Raw | Failure]:
    """Responses of HTML and conversions to text; other records hold no page and are skipped.

    Compression is undone before warcio sees the records, whether they were compressed one by one or as a whole.
    """
    iterator_of = require("warcio.archiveiterator", "warcio", "reading WARC files").ArchiveIterator
    number = -1
    with open_stream(entry.path, limits) as stream:
        # warcio takes empty lines before the first record for a record without headers, which is the whole file.
        while stream.peek(1)[:1] in (b"\r", b"\n"):
            stream.read(1)
        for number, record in enumerate(_records(iterator_of(Prompt(stream), check_digests=False))):
            if record.length is None:
                raise Unreadable("damaged", f"record {number} has no length")
            kind = _kind(record)
            # As it was sent: warcio undoes some codings, in lower case, one of each.
            content = _take(record.raw_stream, limits.document + 1) if kind else b""
            missing = _drain(record.raw_stream)
            if missing:
                raise Unreadable("truncated", f"record {number} lacks {missing:,} bytes of its content")
            id = f"{entry.id}#{number}"
            if record.rec_type is None:
                yield Failure(id, "damaged", {"error": "the record has no WARC-Type"})
            elif kind is not None:
                found = _document(id, record, kind, content, limits)
                if kind == "text" or _declared(record) or _seems_page(found):
                    yield found
    if number < 0 and os.path.getsize(entry.path):
        raise Unreadable("damaged", "no record in it")


def _records(found: Iterator[Any]) -> Iterator[Any]:
    """warcio's records, ``found``."""
    exceptions, headers = (
        require(f"warcio.{module}", "warcio", "reading WARC files") for module in ("exceptions", "statusandheaders")
    )
    # warcio's own, an address that a record lacks, and a length of more than 64 bits.
    damage = (
        exceptions.ArchiveLoadFailed, headers.StatusAndHeadersParserException, AttributeError, OverflowError,
    )  # fmt: skip
    while True:
        try:
            record = next(found, None)
        except damage as error:
            raise Unreadable("damaged", one_line(error)) from error
        if record is None:
            return
        yield record


def _declared(record) -> str:
    """The media type and charset that the response's headers declare, or ""."""
    return (record.http_headers.get_header("Content-Type") or "") if record.http_headers else ""


def _kind(record) -> str | None:
    """What the record holds: "html", "text", or None for one that holds no page. Without a type it may be "html"."""
    kind = {"response": "html", "conversion": "text"}.get(record.rec_type)
    declared = _declared(record).lower()
    return None if kind == "html" and declared and "html" not in declared else kind


def _seems_page(found: Raw | Failure) -> bool:
    """Whether a response without a type is a page, or one that cannot be read; binary content is another medium."""
    return found.reason != "coding" if isinstance(found, Failure) else _PAGE.match(found.content) is not None


def _document(id: str, record, kind: str, content: bytes, limits: Limits) -> Raw | Failure:
    """The record's ``content`` with its codings undone, or why that cannot be."""
    found = _CHARSET.search(_declared(record))
    charset = found and found[1]
    if len(content) > limits.document:
        return Failure(id, "too_large", {"limit": limits.document})
    try:
        content = undo(content, _applied(record.http_headers), limits)
        content = text_of(content, charset, limits) if kind == "html" else content
    except Unreadable as error:
        details = {"limit": limits.document} if error.reason == "too_large" else {"error": str(error)}
        return Failure(id, error.reason, details)
    url = record.rec_headers.get_header("WARC-Target-URI")
    return Raw(id, content, kind, {"url": url} if url else {}, charset)


def _applied(headers) -> list[str]:
    """What was done to a response's content, first the content codings, then those of the transfer."""
    found: dict[str, list[str]] = {"content-encoding": [], "transfer-encoding": []}
    for name, value in headers.headers if headers else ():
        if name.strip().lower() in found:
            found[name.strip().lower()].append(value)
    return [*codings(found["content-encoding"]), *codings(found["transfer-encoding"])]


def _take(stream, most: int) -> bytes:
    """Up to ``most`` bytes of ``stream``, whose reads may give fewer than they are asked for."""
    parts: list[bytes] = []
    while most > 0 and (part := stream.read(min(most, 1 << 16))):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


def _drain(rest) -> int:
    """Pass over the rest of a record; the bytes that it lacks."""
    while rest.read(1 << 16):
        pass
    return getattr(rest, "limit", 0)
