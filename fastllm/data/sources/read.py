"""Documents out of files, one at a time: HTML, text, JSON lines, Parquet, WARC, MediaWiki dumps, tar and zip.

A reader yields :class:`Raw` documents and :class:`Failure` notes in the file's order, and never raises for what the
file holds: where the rest of a file cannot be read, it ends with a Failure that says after how many records.
"""

from __future__ import annotations

import errno
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from .codings import text_of
from .compressed import SUFFIXES, Prompt, open_stream
from .limits import Failure, Limits, Raw, Unreadable, one_line, too_large
from .mediawiki import read_mediawiki
from .plan import SINGLE, SourceEntry, format_of
from .records import read_json_lines, read_parquet
from .warc import read_warc

Item = Raw | Failure


def _document(id: str, content: bytes, kind: str, limits: Limits) -> Item:
    """A file or an archive's member as a document; a page that was saved as it was sent may be compressed."""
    try:
        return Raw(id, text_of(content, None, limits), kind, {})
    except Unreadable as error:
        return Failure(id, error.reason, {"error": str(error)})


def _read_single(entry: SourceEntry, limits: Limits) -> Iterator[Item]:
    with open_stream(entry.path, limits) as stream:
        content = stream.read(limits.document + 1)
    if len(content) > limits.document:
        yield too_large(entry.id, limits)
    else:
        yield _document(entry.id, content, entry.format, limits)


def _member(entry: SourceEntry, name: str, read: Callable[[int], bytes], limits: Limits) -> Item:
    path = PurePosixPath(name.replace("\\", "/"))
    id = f"{entry.id}#{name}".encode("utf-8", "replace").decode()
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        return Failure(id, "outside", {})
    kind = format_of(name)
    if kind not in SINGLE or path.suffix.lower() in SUFFIXES:
        return Failure(id, "unknown_format", {})
    content = read(limits.document + 1)
    return too_large(id, limits) if len(content) > limits.document else _document(id, content, kind, limits)


def _read_tar(entry: SourceEntry, limits: Limits) -> Iterator[Item]:
    # As a stream: nothing is sought, and nothing is ever written to the disk.
    with (
        open_stream(entry.path, limits) as stream,
        tarfile.open(fileobj=Prompt(stream), mode="r|") as archive,  # pyright: ignore  # a stream is only read from
    ):
        for member in archive:
            # tarfile keeps every header that it has seen.
            archive.members = []
            if member.isdir():
                continue
            if member.isfile():
                yield _member(entry, member.name, archive.extractfile(member).read, limits)
            else:
                yield Failure(f"{entry.id}#{member.name}", "no_file", {})


def _is_damage(error: Exception) -> bool:
    """Whether zipfile raises ``error`` for what an archive holds.

    Its own errors and those of its compressions; NotImplementedError for versions and compressions it does not know,
    RuntimeError for passwords, ValueError for names and places, EOFError for members that are cut off.
    """
    if isinstance(error, OSError):
        # bzip2's error has no number, and a member that begins before the file is an invalid argument.
        return error.errno in (None, errno.EINVAL)
    known = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, ValueError, EOFError)
    # zipfile reads Zstandard from Python 3.14 on.
    return isinstance(error, known) or type(error).__name__ == "ZstdError"


def _of_zip(call: Callable[..., Any], *arguments: Any) -> Any:
    """What ``call``, one of zipfile's, gives.

    Raises:
        Unreadable: the archive is damaged there.
    """
    try:
        return call(*arguments)
    except Exception as error:
        if not _is_damage(error):
            raise
        raise Unreadable("damaged", one_line(error)) from error


def _read_zip(entry: SourceEntry, limits: Limits) -> Iterator[Item]:
    with _of_zip(zipfile.ZipFile, entry.path) as archive:
        for member in archive.infolist():
            # is_dir fails on a member without a name.
            if member.filename.endswith("/"):
                continue
            id = f"{entry.id}#{member.filename}"
            if member.file_size > max(limits.free, limits.ratio * max(1, member.compress_size)):
                yield Failure(id, "bomb", {"compressed": member.compress_size, "size": member.file_size})
                continue
            try:
                with _of_zip(archive.open, member) as file:
                    yield _member(entry, member.filename, partial(_of_zip, file.read), limits)
            except Unreadable as error:
                yield Failure(id, error.reason, {"error": str(error)})


def read(entry: SourceEntry, limits: Limits, text_field: str = "text") -> Iterator[Item]:
    """The documents of one file.

    Args:
        text_field: of a JSON line's object or a Parquet file's row; ``html`` means that it holds a page.
    """
    readers: dict[str, Callable[[], Iterator[Item]]] = {
        "html": lambda: _read_single(entry, limits),
        "text": lambda: _read_single(entry, limits),
        "jsonl": lambda: read_json_lines(entry, limits, text_field),
        "parquet": lambda: read_parquet(entry, limits, text_field),
        "warc": lambda: read_warc(entry, limits),
        "mediawiki": lambda: read_mediawiki(entry, limits),
        "tar": lambda: _read_tar(entry, limits),
        "zip": lambda: _read_zip(entry, limits),
    }
    records = 0
    try:
        for item in readers[entry.format]():
            records += 1
            yield item
    except Unreadable as error:
        yield Failure(entry.id, error.reason, {"error": str(error), "after_records": records})
    except (tarfile.ReadError, EOFError) as error:
        yield Failure(entry.id, "truncated", {"error": one_line(error), "after_records": records})
    except (tarfile.TarError, zlib.error, OSError) as error:
        reason = "unreadable" if isinstance(error, OSError) and error.errno is not None else "damaged"
        yield Failure(entry.id, reason, {"error": one_line(error), "after_records": records})
