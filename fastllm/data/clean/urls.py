"""A list of hosts and addresses that are left out, as RefinedWeb and FineWeb leave out whole sites."""

from __future__ import annotations

import contextlib
import posixpath
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .document import Document, Rejection

_ABSOLUTE = re.compile(r"(?:[a-z][a-z0-9+.\-]{0,32}:)?//", re.IGNORECASE)
_HOST = re.compile(r"(?=.{1,253}$)[\w-]{1,63}(?:\.[\w-]{1,63})*$")


def _parts(address: str) -> tuple[str, str]:
    """(host, path) in lower case, without ``www.``, user, port, query and fragment; ("", "") for what has no host.

    Names beyond ASCII are as in the domain name system (IDNA 2003), paths without percent signs, ``//`` and ``..``.
    """
    try:
        parts = urlsplit(address if _ABSOLUTE.match(address) else f"//{address}")
        host = (parts.hostname or "").removeprefix("www.").rstrip(".")
    except ValueError:
        return "", ""
    # A label that is empty or too long names no host: it stays as it is.
    with contextlib.suppress(UnicodeError):
        host = host.encode("idna").decode()
    return host, posixpath.normpath(f"/{unquote(parts.path).lower().strip('/')}").strip("/")


@cache
def blocked(path: str) -> dict[str, tuple[str, ...]]:
    """The hosts of the list at ``path``, each with the beginnings of paths that are left out; ``""`` is all of them.

    A line is a host, which stands for its subdomains too, or a host and the beginning of a path; ``#`` is a comment.

    Raises:
        ValueError: the file cannot be read, or a line is no host; names the file, the line and what was expected.
    """
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"block_urls: {path}: cannot be read: {error}") from error
    found: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        host, beginning = _parts(entry)
        if not _HOST.match(host):
            raise ValueError(f"block_urls: {path}, line {number}: expected a host or host/path, got {entry!r}")
        found[host] = (*found.get(host, ()), beginning)
    return found


def not_blocked(document: Document, path: str) -> Document | Rejection:
    """``document``, or a rejection where its ``url`` is on the list at ``path``. One without a ``url`` stays."""
    host, own = _parts(document.metadata.get("url", ""))
    hosts = blocked(path)
    labels = host.split(".")
    for begin in range(len(labels)):
        name = ".".join(labels[begin:])
        for beginning in hosts.get(name, ()):
            if not beginning or own == beginning or own.startswith(f"{beginning}/"):
                entry = f"{name}/{beginning}" if beginning else name
                return Rejection.of(document, "url", url=document.metadata["url"], entry=entry)
    return document
