"""Files that may be compressed, read as a stream that cannot grow beyond its bounds."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..optional import require
from .limits import Limits, Unreadable, one_line

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
# What compressed files begin with, by the suffix of the compression; bzip2's magic includes that of its first block.
_MAGIC = {
    ".gz": re.compile(rb"\x1f\x8b\x08"), ".bz2": re.compile(rb"BZh[1-9]1AY&SY"), ".xz": re.compile(rb"\xfd7zXZ\0"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
}  # fmt: skip
# Bytes that are decompressed at once. A guess.
_CHUNK = 1 << 18


class _Bounded(io.RawIOBase):
    """A decompressed stream whose bytes are counted against those that its compressed file has given so far."""

    def __init__(self, stream: Any, compressed: BinaryIO | None, limits: Limits):
        self._stream, self._compressed, self._limits = stream, compressed, limits
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            # What precedes a cut is given out before the error is.
            content = getattr(self._stream, "read1", self._stream.read)(min(len(buffer), _CHUNK))
        except EOFError as error:
            raise Unreadable("truncated", one_line(error)) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise Unreadable("unreadable", one_line(error)) from error
            # zstandard's error is not importable where it is not installed.
            if isinstance(error, (OSError, zlib.error, lzma.LZMAError, ValueError)) or "Zstd" in type(error).__name__:
                raise Unreadable("damaged", one_line(error)) from error
            raise
        self._count += len(content)
        if self._compressed is not None and self._count > self._limits.free:
            given = max(1, self._compressed.tell())
            if self._count > self._limits.ratio * given:
                raise Unreadable(
                    "bomb", f"{given:,} compressed bytes gave {self._count:,}, more than {self._limits.ratio} times"
                )
        buffer[: len(content)] = content
        return len(content)


class Prompt:
    """A stream whose ``read`` gives what is there, so that an error further on takes nothing with it."""

    def __init__(self, stream: io.BufferedReader):
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        return self._stream.read1(size)


class _Zstandard:
    """zstandard's own reader ends quietly where a file was cut off; this one tells."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._library = require("zstandard", "zstandard", "reading .zst files")
        self._object = None
        self._waiting = memoryview(b"")

    def read(self, size: int) -> bytes:
        while not self._waiting:
            rest = self._object.unused_data if self._object is not None and self._object.eof else b""
            # 1 KB at once: each block of 4 bytes may give 128 KB, so that a bomb gives 32 MB at most.
            given = rest or self._file.read(1024)
            if not given:
                if self._object is not None and not self._object.eof:
                    raise EOFError("compressed file ended before the end of a frame")
                return b""
            if self._object is None or self._object.eof:
                self._object = self._library.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
            self._waiting = memoryview(self._object.decompress(given))
        content, self._waiting = self._waiting[:size], self._waiting[size:]
        return bytes(content)


@contextlib.contextmanager
def open_stream(path: str | Path, limits: Limits) -> Iterator[io.BufferedReader]:
    """``path`` as a buffered stream of what it holds, decompressed as its name says, or else as it begins.

    Raises:
        Unreadable: on opening or on reading: missing, cut short, damaged, or a decompression bomb.
        InputError: it is compressed by Zstandard and zstandard is not installed.
    """
    path = Path(path)
    try:
        file = open(path, "rb")  # noqa: SIM115, closed below
    except OSError as error:
        raise Unreadable("unreadable", one_line(error)) from error
    with file:
        suffix = path.suffix.lower()
        if suffix not in (*SUFFIXES, ".tgz"):
            begin = file.peek(10)[:10] if file.seekable() else b""
            suffix = next((name for name, magic in _MAGIC.items() if magic.match(begin)), "")
        if suffix in (".gz", ".tgz"):
            stream = gzip.GzipFile(fileobj=file, mode="rb")
        elif suffix == ".bz2":
            stream = bz2.BZ2File(file)
        elif suffix == ".xz":
            stream = lzma.LZMAFile(file)  # noqa: SIM115
        elif suffix == ".zst":
            stream = _Zstandard(file)
        else:
            stream = file
        yield io.BufferedReader(_Bounded(stream, None if stream is file else file, limits), _CHUNK)
