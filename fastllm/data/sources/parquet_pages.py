"""What the pages of a Parquet file say that they decompress to: their headers decide how much memory they take.

A header is Thrift's compact protocol (https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md)
of ``PageHeader`` in https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

from __future__ import annotations

import re
from typing import BinaryIO

from .limits import Unreadable

# Numbers of Thrift's types: both values of a boolean, one byte, integers as varints, and so on.
TRUE, FALSE, BYTE, _I16, _I32, I64, _DOUBLE, _BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
# The fields of a page's header that have its sizes, and the most structures inside one another; a header has three.
_UNCOMPRESSED, _COMPRESSED, _DEPTH = 2, 3, 8
# As the versions of Parquet-MR have named themselves. Any other name is taken for an early one.
_VERSION = re.compile(r"parquet-mr version (\d{1,4})\.(\d{1,4})\.(\d{1,4})(?:-snapshot)?(?: \(build [0-9a-f]*\))?")


class CompactReader:
    """Reads values of the compact protocol from ``stream``, where it stands."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream

    def byte(self) -> int:
        found = self._stream.read(1)
        if not found:
            raise Unreadable("damaged", "a header is cut off")
        return found[0]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise Unreadable("damaged", "a number in a header has more than 64 bits")

    def integer(self, bits: int) -> int:
        value = self.varint()
        if value >> bits:
            # pyarrow would take the lowest ones.
            raise Unreadable("damaged", f"a number in a header has more than {bits} bits")
        return (value >> 1) ^ -(value & 1)

    def field(self, head: int, number: int) -> tuple[int, int]:
        """The number and the type of the field that begins with the byte ``head``, after the one of ``number``."""
        step, kind = head >> 4, head & 15
        number = number + step if step else self.integer(16)
        if number >= 1 << 15:
            raise Unreadable("damaged", "a field's number in a header has more than 16 bits")
        return number, kind

    def skip(self, kind: int) -> None:
        """Pass over a value that holds no others."""
        if kind == BYTE:
            self.byte()
        elif kind in (_I16, _I32, I64):
            self.varint()
        elif kind == _DOUBLE:
            self._stream.seek(8, 1)
        elif kind == _BINARY:
            size = self.varint()
            if size >> 31:
                raise Unreadable("damaged", f"a string in a header has {size:,} bytes")
            self._stream.seek(size, 1)
        elif kind not in (TRUE, FALSE):
            raise Unreadable("damaged", f"a header has a value of Thrift's type {kind}")


class _Header(CompactReader):
    def structure(self, depth: int = 0) -> dict[int, int]:
        """The integers of 32 bits among a structure's fields by their numbers; other fields are passed over.

        As pyarrow does: it passes over a size of another type, and takes the last one of two.
        """
        if depth > _DEPTH:
            raise Unreadable("damaged", "a page's header is nested too deep")
        found: dict[int, int] = {}
        number = 0
        while head := self.byte():
            number, kind = self.field(head, number)
            if kind == _I32:
                found[number] = self.integer(32)
            elif kind == STRUCT:
                self.structure(depth + 1)
            else:
                # No header that Parquet defines has a list, a set or a map.
                self.skip(kind)
        return found


def _sizes(stream: BinaryIO, at: int) -> tuple[int, int]:
    """What the page at byte ``at`` decompresses to, and where the next one begins."""
    stream.seek(at)
    header = _Header(stream).structure()
    grown, compressed = header.get(_UNCOMPRESSED, -1), header.get(_COMPRESSED, -1)
    if grown < 0 or compressed < 0:
        raise Unreadable("damaged", f"the page at byte {at:,} has no size")
    return grown, stream.tell() + compressed


def decompressed_size(stream: BinaryIO, begin: int, size: int, beyond: int = 0) -> int:
    """The bytes that the pages of a column chunk decompress to, by their headers.

    Args:
        stream: the file; where it stands afterwards is not defined.
        begin, size: where the chunk begins, and its bytes.
        beyond: how many bytes after it may begin pages too; what is no page there ends them.

    Raises:
        Unreadable: a header is damaged.
    """
    at, end, total = begin, begin + size, 0
    while at < end + beyond:
        try:
            grown, following = _sizes(stream, at)
        except Unreadable:
            if at < end:
                raise
            break
        total, at = total + grown, following
    return total


def read_beyond(created_by: str | None) -> int:
    """How many bytes after a column chunk pyarrow reads for pages, by the name that the file's writer gave itself.

    Parquet-MR before 1.2.9 left a header out of the chunk's size (PARQUET-816).
    """
    name = (created_by or "").strip().lower()
    version = _VERSION.fullmatch(name)
    late = version is not None and tuple(map(int, version.groups())) >= (1, 2, 9)
    return 100 if name.startswith("parquet-mr") and not late else 0
