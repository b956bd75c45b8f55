"""Files of records of which one field is a document's text: JSON lines and Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from ...config import InputError
from ..optional import require
from .codings import text_of
from .compressed import open_stream
from .limits import Failure, Limits, Raw, Unreadable, one_line, too_large
from .parquet_footer import Chunk, column_chunks
from .parquet_pages import decompressed_size, read_beyond
from .plan import SourceEntry

# Fields that a document keeps beside its text, where they hold strings.
_KEPT = ("url", "title", "id")


def _document(id: str, record: Mapping[str, Any], field: str, limits: Limits) -> Raw | Failure:
    kind, content = "html" if field == "html" else "text", record[field]
    known = {name: record[name] for name in _KEPT if isinstance(record.get(name), str)}
    if isinstance(content, str):
        # Half a surrogate pair cannot be UTF-8; cleaning would remove it.
        content, encoding = content.encode("utf-8", "replace"), "utf-8"
    elif isinstance(content, bytes):
        content, encoding = text_of(content, None, limits), None
    else:
        raise TypeError(f"{field} is {type(content).__name__}, not a string")
    size = len(content) + sum(len(value) for name, value in known.items() if name != field)
    return too_large(id, limits) if size > limits.document else Raw(id, content, kind, known, encoding)


def _line(stream: BinaryIO, limits: Limits) -> bytes | None:
    """The next line, empty at the end; None for one that is too long, whose rest is skipped."""
    line = stream.readline(limits.document + 1)
    if len(line) <= limits.document:
        return line
    while line and not line.endswith(b"\n"):
        line = stream.readline(1 << 20)
    return None


def read_json_lines(entry: SourceEntry, limits: Limits, field: str) -> Iterator[Raw | Failure]:
    """A line's object is a document, whose text is its ``field``."""
    with open_stream(entry.path, limits) as stream:
        number = -1
        while (line := _line(stream, limits)) != b"":
            number += 1
            id = f"{entry.id}#{number}"
            if line is None:
                yield too_large(id, limits)
                continue
            if not line.strip():
                continue
            try:
                # A line that was written by hand may have a tab in a string.
                record = json.loads(line, strict=False)
                if not isinstance(record, dict):
                    raise TypeError(f"the line is {type(record).__name__}, not an object")
                found = _document(id, record, field, limits)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                found = Failure(id, "damaged", {"error": one_line(error)})
            yield found


def read_parquet(entry: SourceEntry, limits: Limits, field: str) -> Iterator[Raw | Failure]:
    """A row is a document, whose text is the column ``field``."""
    arrow, parquet = (
        require(module, "pyarrow", "reading Parquet files", "parquet") for module in ("pyarrow", "pyarrow.parquet")
    )
    with open(entry.path, "rb") as stream:
        try:
            file = parquet.ParquetFile(stream, pre_buffer=False)
            columns = _columns(file, field)
            for number, batch in enumerate(_rows(file, stream, columns, limits)):
                id = f"{entry.id}#{number}"
                try:
                    found = _document(id, batch.to_pylist()[0], field, limits)
                except (TypeError, UnicodeDecodeError) as error:
                    found = Failure(id, "damaged", {"error": one_line(error)})
                except Unreadable as error:
                    found = Failure(id, error.reason, {"error": str(error)})
                yield found
        except InputError:
            raise
        # pyarrow's errors are of several classes: ValueError, NotImplementedError, KeyError, OSError without a number.
        except (arrow.ArrowException, ValueError) as error:
            raise Unreadable("damaged", one_line(error)) from error


def _columns(file, field: str) -> list[str]:
    """Those to read of a Parquet file.

    Raises:
        Unreadable: there is no column ``field``, or it holds lists or structures.
    """
    schema = file.schema_arrow
    if field not in schema.names:
        raise Unreadable("damaged", f"no column {field}; it has {', '.join(schema.names)[:200]}")
    # A row's list may hold one long text of the file any number of times.
    nested = {column.name: str(column.type) for column in schema if column.type.num_fields}
    if field in nested:
        raise Unreadable("damaged", f"column {field} is {nested[field][:200]}, not a string")
    return [name for name in schema.names if name == field or (name in _KEPT and name not in nested)]


def _rows(file, stream: BinaryIO, columns: list[str], limits: Limits) -> Iterator[Any]:
    """The rows of ``columns``, a batch for each.

    Raises:
        Unreadable: one of them would grow too much.
    """
    # pyarrow reads a column whose name continues that of another after a dot together with it.
    begin, beyond = tuple(f"{name}." for name in columns), read_beyond(file.metadata.created_by)
    paths = [file.schema.column(number).path for number in range(len(file.schema))]
    groups = column_chunks(stream)
    if len(groups) != file.num_row_groups or any(len(chunks) != len(paths) for chunks in groups):
        raise Unreadable("damaged", f"a row group does not have the schema's {len(paths)} columns")
    for group, chunks in enumerate(groups):
        for path, chunk in zip(paths, chunks, strict=True):
            if f"{path}.".startswith(begin):
                _check_growth(path, chunk, stream, beyond, limits)
        # Row by row, which takes 7 us: the rows of a batch may all be one long text that the file holds once.
        yield from file.iter_batches(1, row_groups=[group], columns=columns, use_threads=False)


def _check_growth(path: str, chunk: Chunk, stream: BinaryIO, beyond: int, limits: Limits) -> None:
    compressed = min(chunk.compressed, stream.seek(0, 2) - chunk.start)
    # The file's footer may say less than its pages, by whose headers pyarrow takes memory.
    size = max(chunk.uncompressed, decompressed_size(stream, chunk.start, compressed, beyond))
    if size > max(limits.free, limits.ratio * max(1, compressed)):
        raise Unreadable("bomb", f"{compressed:,} compressed bytes of {path} would give {size:,}")
