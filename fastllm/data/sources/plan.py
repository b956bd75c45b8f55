"""Which files a run reads, in which order, and as what; decided once, before any is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config import InputError
from .compressed import SUFFIXES
from .limits import Failure, one_line

# What a file is, by the end of its name once .gz and the like are off.
FORMATS = {
    ".html": "html", ".htm": "html", ".xhtml": "html", ".warc": "warc", ".wet": "warc", ".xml": "mediawiki",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".text": "text", ".md": "text", ".rst": "text",
    ".parquet": "parquet", ".tar": "tar", ".zip": "zip",
}  # fmt: skip
NAMES = ("html", "warc", "mediawiki", "jsonl", "parquet", "text", "tar", "zip")
# Formats whose files are one document each.
SINGLE = ("html", "text")


@dataclass(frozen=True)
class SourceEntry:
    """One file to read: where, under which name its documents go, as what, and its size in bytes."""

    path: str
    id: str
    format: str
    size: int


def format_of(name: str) -> str | None:
    """What the name of a file says that it is; None: nothing known."""
    path = Path(name.lower())
    if path.suffix == ".tgz":
        return "tar"
    if path.suffix in SUFFIXES:
        path = path.with_suffix("")
    return FORMATS.get(path.suffix)


def _walk(folder: str) -> Iterator[os.DirEntry | OSError]:
    """Files below ``folder``, in the order of their names; hidden ones, and folders behind links, apart."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        yield error
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        else:
            yield entry


def _entry(item: os.DirEntry, id: str, inside: Path, given: str | None) -> SourceEntry | Failure:
    kind = given or format_of(item.name)
    try:
        if item.is_symlink() and not Path(item.path).resolve().is_relative_to(inside):
            return Failure(id, "outside", {"target": os.readlink(item.path)})
        if item.is_symlink() and not Path(item.path).exists():
            return Failure(id, "unreadable", {"error": "a link to nothing"})
        if not item.is_file():
            return Failure(id, "no_file", {})
        if kind is None:
            return Failure(id, "unknown_format", {})
        return SourceEntry(item.path, id, kind, item.stat().st_size)
    except (OSError, RuntimeError) as error:
        return Failure(id, "unreadable", {"error": one_line(error)})


def _folder(root: Path, name: str, given: str | None) -> Iterator[SourceEntry | Failure]:
    """Each file in ``root``, whose entries' ids begin with ``name``."""
    inside = root.resolve()
    for item in _walk(str(root.absolute())):
        if isinstance(item, OSError):
            yield Failure(f"{name}: {item.filename}", "unreadable", {"error": one_line(item)})
            continue
        relative = os.path.relpath(item.path, root.absolute()).encode("utf-8", "replace").decode()
        yield _entry(item, f"{name}/{relative}", inside, given)


def plan_sources(sources: Sequence[str], given: str | None = None) -> tuple[list[SourceEntry], list[Failure]]:
    """The files of ``sources`` in order, and which files are skipped.

    Args:
        given: the format of every file, whatever its name says.

    Raises:
        InputError: a source does not exist or is a file of no known format, or there is no file to read.
    """
    entries: list[SourceEntry] = []
    failures: list[Failure] = []
    names: set[str] = set()
    for source in sources:
        root = Path(source)
        if not root.exists():
            raise InputError(f"{source}: no such file or folder")
        base = root.resolve().name or "root"
        name, number = base, 1
        while name in names:
            number += 1
            name = f"{base}~{number}"
        names.add(name)
        if root.is_file():
            kind = given or format_of(root.name)
            if kind is None:
                raise InputError(f"{source}: unknown format; say --format {'|'.join(NAMES)}")
            entries.append(SourceEntry(str(root.absolute()), name, kind, root.stat().st_size))
            continue
        if not root.is_dir():
            raise InputError(f"{source}: neither a file nor a folder")
        for found in _folder(root, name, given):
            if isinstance(found, SourceEntry):
                entries.append(found)
            else:
                failures.append(found)
    if not entries:
        first = f" ({failures[0].id}: {failures[0].reason})" if failures else ""
        raise InputError(f"no file to read in {', '.join(sources)}{first}")
    return entries, failures
