"""Where the column chunks of a Parquet file lie and what they say of their sizes, by the file's footer.

pyarrow ends the whole process, by an exception of C++ that nothing catches, if it is asked for the metadata of a chunk
that is damaged. So the footer is read here: ``FileMetaData`` of
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift in Thrift's compact protocol.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO, NamedTuple

from .limits import Unreadable
from .parquet_pages import BYTE, FALSE, I64, LIST, MAP, SET, STRUCT, TRUE, CompactReader

# The most structures and lists inside one another: a footer has seven.
_DEPTH = 12
# The fields of FileMetaData, RowGroup, ColumnChunk and ColumnMetaData that are needed, each with its type.
_ROW_GROUPS, _COLUMNS, _METADATA = (4, LIST), (1, LIST), (3, STRUCT)
_UNCOMPRESSED, _COMPRESSED, _DATA, _DICTIONARY = (6, I64), (7, I64), (9, I64), (11, I64)


class Chunk(NamedTuple):
    """A column chunk: where its pages begin, and its bytes in the file and decompressed, as the footer says."""

    start: int
    compressed: int
    uncompressed: int


class _Footer(CompactReader):
    def fields(self, depth: int = 0) -> dict[tuple[int, int], Any]:
        """A structure's 64-bit integers, structures and lists of structures, by their numbers and types.

        pyarrow passes over a field of another type, and takes the last one of two.
        """
        found: dict[tuple[int, int], Any] = {}
        number = 0
        while head := self.byte():
            number, kind = self.field(head, number)
            if kind == STRUCT and (number, kind) in found:
                # pyarrow would merge them.
                raise Unreadable("damaged", "a structure in the footer comes twice")
            found[number, kind] = self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _DEPTH:
            raise Unreadable("damaged", "the footer is nested too deep")
        if kind == I64:
            return self.integer(64)
        if kind == STRUCT:
            return self.fields(depth + 1)
        if kind in (LIST, SET):
            return self._list(depth)
        if kind == MAP:
            raise Unreadable("damaged", "a map in the footer")
        self.skip(kind)
        return None

    def _list(self, depth: int) -> list[Any]:
        head = self.byte()
        size, kind = head >> 4, head & 15
        size = self.varint() if size == 15 else size
        # A truth value in a list has a byte of its own.
        kind = BYTE if kind in (TRUE, FALSE) else kind
        # Each has a byte at least, so that the footer's end bounds a size that lies.
        return [self._value(kind, depth + 1) for _ in range(size)]


def column_chunks(stream: BinaryIO) -> list[list[Chunk]]:
    """The column chunks of each row group, in the order of the schema's columns.

    Args:
        stream: a file that pyarrow has opened; where it stands afterwards is not defined.

    Raises:
        Unreadable: the footer is damaged, or does not say where a chunk is.
    """
    end = stream.seek(-8, 2)
    size = int.from_bytes(stream.read(4), "little")
    stream.seek(max(0, end - size))
    metadata = _Footer(io.BytesIO(stream.read(min(size, end)))).fields()
    try:
        return [[_chunk(column[_METADATA]) for column in group[_COLUMNS]] for group in metadata[_ROW_GROUPS]]
    except (KeyError, TypeError, ValueError) as error:
        raise Unreadable("damaged", "the footer does not say where each column is") from error


def _chunk(metadata: dict[tuple[int, int], Any]) -> Chunk:
    # Where pyarrow begins to read.
    start = min(at for at in (metadata[_DATA], metadata.get(_DICTIONARY, 0)) if at > 0)
    return Chunk(start, metadata[_COMPRESSED], metadata[_UNCOMPRESSED])
