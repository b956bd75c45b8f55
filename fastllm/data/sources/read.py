"""Documents out of files, one at a time: HTML, text, JSON lines, Parquet, WARC, MediaWiki dumps, tar and zip.

A reader yields :class:`Raw` documents and :class:`Failure` notes in the file's order, and never raises for what the
file holds: where the rest of a file cannot be read, it ends with a Failure that says after how many records.
"""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from ...config import InputError
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


def _opened_zip(path: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except OSError:
        raise
    except Exception as error:
        # Besides BadZipFile a damaged directory raises NotImplementedError, IndexError and others.
        raise Unreadable("damaged", one_line(error)) from error


def _read_zip(entry: SourceEntry, limits: Limits) -> Iterator[Item]:
    with _opened_zip(entry.path) as archive:
        for member in archive.infolist():
            # is_dir fails on a member without a name.
            if member.filename.endswith("/"):
                continue
            id = f"{entry.id}#{member.filename}"
            if member.file_size > max(limits.free, limits.ratio * max(1, member.compress_size)):
                yield Failure(id, "bomb", {"compressed": member.compress_size, "size": member.file_size})
                continue
            try:
                with archive.open(member) as file:
                    yield _member(entry, member.filename, file.read, limits)
            except InputError:
                raise
            except Exception as error:
                # Each compression has errors of its own, and zipfile others for headers.
                yield Failure(id, "damaged", {"error": one_line(error)})


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
