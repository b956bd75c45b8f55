"""Pages out of WARC files (ISO 28500), as Common Crawl's; texts out of its WET files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from ..optional import require
from .codings import codings, text_of, undo
from .compressed import Prompt, open_stream
from .limits import Failure, Limits, Raw, Unreadable, one_line
from .plan import SourceEntry

_CHARSET = re.compile(r"charset\s*=\s*[\"']?([-\w.:]+)", re.IGNORECASE)


def read_warc(entry: SourceEntry, limits: Limits) -> Iterator[Raw | Failure]:
    """Responses of HTML and conversions to text; other records hold no page and are skipped.

    Compression is undone before warcio sees the records, whether they were compressed one by one or as a whole.
    """
    iterator_of = require("warcio.archiveiterator", "warcio", "reading WARC files").ArchiveIterator
    errors = require("warcio.exceptions", "warcio", "reading WARC files")
    number = -1
    with open_stream(entry.path, limits) as stream:
        try:
            for number, record in enumerate(iterator_of(Prompt(stream), check_digests=False)):
                headers = record.http_headers
                declared = (headers.get_header("Content-Type") or "") if headers else ""
                kind = {"response": "html", "conversion": "text"}.get(record.rec_type)
                if kind == "html" and "html" not in declared.lower():
                    kind = None
                # As it was sent: warcio undoes some codings, in lower case, one of each.
                content = _take(record.raw_stream, limits.document + 1) if kind else b""
                missing = _drain(record.raw_stream)
                id = f"{entry.id}#{number}"
                if missing:
                    raise Unreadable("truncated", f"record {number} lacks {missing:,} bytes of its content")
                if len(content) > limits.document:
                    yield Failure(id, "too_large", {"limit": limits.document})
                elif kind:
                    charset = _CHARSET.search(declared)
                    try:
                        content = undo(content, _applied(headers), limits)
                        content = text_of(content, charset and charset[1], limits) if kind == "html" else content
                    except Unreadable as error:
                        details = {"limit": limits.document} if error.reason == "too_large" else {"error": str(error)}
                        yield Failure(id, error.reason, details)
                        continue
                    url = record.rec_headers.get_header("WARC-Target-URI")
                    yield Raw(id, content, kind, {"url": url} if url else {}, charset and charset[1])
        except errors.ArchiveLoadFailed as error:
            raise Unreadable("damaged", one_line(error)) from error
    if number < 0 and os.path.getsize(entry.path):
        raise Unreadable("damaged", "no record in it")


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
