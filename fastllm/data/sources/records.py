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
            columns = _columns(file, field, limits)
            # Row by row, which takes 7 us: the rows of a batch may all be one long text that the file holds once.
            for number, batch in enumerate(file.iter_batches(1, columns=columns, use_threads=False)):
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


def _columns(file, field: str, limits: Limits) -> list[str]:
    """Those to read of a Parquet file.

    Raises:
        Unreadable: there is no column ``field``, it holds lists or structures, or one to read would grow too much.
    """
    schema = file.schema_arrow
    if field not in schema.names:
        raise Unreadable("damaged", f"no column {field}; it has {', '.join(schema.names)[:200]}")
    # A row's list may hold one long text of the file any number of times.
    nested = {column.name: str(column.type) for column in schema if column.type.num_fields}
    if field in nested:
        raise Unreadable("damaged", f"column {field} is {nested[field][:200]}, not a string")
    columns = [name for name in schema.names if name == field or (name in _KEPT and name not in nested)]
    # pyarrow reads a column whose name continues that of another after a dot together with it.
    begin = tuple(f"{name}." for name in columns)
    for group in range(file.num_row_groups):
        row_group = file.metadata.row_group(group)
        for column in map(row_group.column, range(row_group.num_columns)):
            path, size, compressed = column.path_in_schema, column.total_uncompressed_size, column.total_compressed_size
            if f"{path}.".startswith(begin) and size > max(limits.free, limits.ratio * max(1, compressed)):
                raise Unreadable("bomb", f"{compressed:,} compressed bytes of {path} would give {size:,}")
    return columns
