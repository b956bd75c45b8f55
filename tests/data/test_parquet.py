"""Parquet files as sources: a row is a document."""

import io
import json
import os

import pytest
from extras import needed
from pages import article
from source_files import SMALL

from fastllm.config import InputError
from fastllm.data import optional
from fastllm.data.pipeline import PipelineConfig
from fastllm.data.sources import Failure, Limits, Raw, SourceEntry, plan_sources, read
from fastllm.data.sources.limits import Unreadable
from fastllm.data.sources.parquet_footer import column_chunks
from fastllm.data.sources.parquet_pages import decompressed_size


def parquet_of(columns, **options) -> bytes:
    arrow, parquet = needed("pyarrow", "parquet"), needed("pyarrow.parquet", "parquet")
    buffer = io.BytesIO()
    parquet.write_table(arrow.table(columns), buffer, **options)
    return buffer.getvalue()


def documents(tmp_path, content: bytes, field="text", limits=SMALL):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    return list(read(SourceEntry(str(path), path.name, "parquet", len(content)), limits, field))


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
def test_rows_are_read_as_lines_of_json_are(tmp_path, compression):
    rows = [{"text": article(i), "url": f"https://a/{i}", "id": f"i{i}", "score": i} for i in range(7)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    found = documents(tmp_path, parquet_of(columns, compression=compression, row_group_size=3))
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    same = list(read(SourceEntry(str(lines), "a.parquet", "jsonl", 0), SMALL))
    assert [raw.id for raw in found] == [f"a.parquet#{i}" for i in range(7)]
    assert found == same


def test_pages_as_bytes_are_decoded(tmp_path):
    content = b"<html><meta charset=iso-8859-2><p>\xb1\xb6\xbc</html>"
    (raw,) = documents(tmp_path, parquet_of({"html": [content]}), "html")
    assert (raw.kind, raw.content, raw.encoding) == ("html", content, None)


def test_rows_without_a_text_and_too_long_ones_are_counted(tmp_path):
    found = documents(tmp_path, parquet_of({"text": [article(0), None, "x" * (SMALL.document + 1), article(1)]}))
    assert [getattr(item, "reason", "") for item in found] == ["", "damaged", "too_large", ""]
    (number,) = documents(tmp_path, parquet_of({"text": [3]}))
    assert number == Failure("a.parquet#0", "damaged", {"error": "TypeError: text is int, not a string"})


def test_a_text_that_is_no_utf_8_costs_its_row_alone(tmp_path):
    arrow = needed("pyarrow", "parquet")
    texts = arrow.array([article(0).encode(), b"\xff\xfe", article(1).encode()]).view(arrow.string())
    found = documents(tmp_path, parquet_of({"text": texts}))
    assert [getattr(item, "reason", "") for item in found] == ["", "damaged", ""]


def test_a_file_without_the_column_names_those_that_it_has(tmp_path):
    (failure,) = documents(tmp_path, parquet_of({"body": [article(0)], "url": ["u"]}))
    assert failure.reason == "damaged"
    assert "no column text; it has body, url" in failure.details["error"]


def test_damaged_files_end_with_a_failure(tmp_path):
    content = parquet_of({"text": [article(i) for i in range(40)]}, row_group_size=10, compression="zstd")
    group = needed("pyarrow.parquet", "parquet").ParquetFile(io.BytesIO(content)).metadata.row_group(2)
    start = group.column(0).dictionary_page_offset
    broken = content[:start] + b"\xff" * 100 + content[start + 100 :]
    for damaged in (b"", b"PAR1", content[:-20], broken):
        *read_before, failure = documents(tmp_path, damaged)
        assert failure.reason == "damaged"
        assert failure.details["after_records"] == len(read_before)
    assert len(read_before) == 20


def test_a_file_that_would_grow_too_much_is_not_read(tmp_path):
    (failure,) = documents(
        tmp_path, parquet_of({"text": ["x" * 1000 * (i + 1) for i in range(50)]}, compression="zstd")
    )
    assert failure.reason == "bomb"


def varint(value: int, size: int = 0) -> bytes:
    """A number of Thrift's compact protocol, in at least ``size`` bytes."""
    value *= 2
    parts = [value >> shift & 127 for shift in range(0, max(7 * size, value.bit_length(), 1), 7)]
    return bytes([*(part | 128 for part in parts[:-1]), parts[-1]])


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_footer_that_says_less_than_the_pages_gives_is_not_believed(tmp_path, version, dictionary):
    """A file of 837 bytes took 1.6 GB."""
    content = parquet_of(
        {"text": ["x" * (1 << 22)]}, compression="brotli", use_dictionary=dictionary, data_page_version=version
    )
    column = needed("pyarrow.parquet", "parquet").ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(0)
    size = varint(column.total_uncompressed_size)
    footer = content.rindex(size)
    lying = content[:footer] + varint(1000, len(size)) + content[footer + len(size) :]
    (failure,) = documents(tmp_path, lying)
    assert (failure.reason, "would give 4,19" in failure.details["error"]) == ("bomb", True)
    # A compressed size of more than the file, beside which the pages are small.
    size = varint(column.total_compressed_size)
    footer = content.rindex(size, 0, footer + 20)
    lying = content[:footer] + varint(1 << 40) + content[footer + len(size) :]
    lying = lying[:-8] + (len(lying) - len(content) + int.from_bytes(content[-8:-4], "little")).to_bytes(4, "little")
    (failure,) = documents(tmp_path, lying + b"PAR1")
    assert failure.reason == "bomb"


def test_a_page_after_its_chunk_is_counted_where_pyarrow_reads_it(tmp_path):
    """It reads 100 bytes more of files by an early Parquet-MR."""
    rows, options = {"text": ["y", "x" * (1 << 22)]}, dict(data_page_size=1, write_batch_size=1, use_dictionary=False)
    content = parquet_of(rows, compression="brotli", write_statistics=False, store_schema=False, **options)
    metadata = needed("pyarrow.parquet", "parquet").ParquetFile(io.BytesIO(content)).metadata
    column, writer = metadata.row_group(0).column(0), metadata.created_by.encode()
    size = column.total_compressed_size
    pages, footer = content[: 4 + size], content[4 + size :]
    first = content.index(b"\x15\0\x15" + varint((1 << 22) + 10)) - 4
    footer = footer.replace(b"\x16" + varint(size), b"\x16" + varint(first, len(varint(size))))
    footer = footer.replace(varint(column.total_uncompressed_size), varint(1000, 4))
    early, late = (
        documents(tmp_path, pages + footer.replace(writer, name.ljust(len(writer))))
        for name in (b"parquet-mr version 1.2.8", b"parquet-mr version 1.2.9")
    )
    assert [item.reason for item in early] == ["bomb"]
    assert [item.content for item in late] == [b"y"]


def test_a_second_size_of_another_type_is_not_believed(tmp_path):
    """pyarrow passes over it, and takes memory by the first one."""
    rows = {"text": ["x" * (1 << 22)]}
    content = parquet_of(rows, compression="brotli", use_dictionary=False, write_statistics=False)
    column = needed("pyarrow.parquet", "parquet").ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(0)
    # A text's length and the row's level take 10 bytes.
    first, size = varint((1 << 22) + 10), column.total_compressed_size
    after = content.index(first) + len(first)
    other = b"\x06" + varint(2) + varint(5)
    pages, footer = content[:after] + other + content[after : 4 + size], content[4 + size :]
    footer = footer.replace(b"\x16" + varint(size), b"\x16" + varint(size + len(other)))
    footer = footer.replace(varint(column.total_uncompressed_size), varint(1000, 4))
    (failure,) = documents(tmp_path, pages + footer)
    assert failure.reason == "bomb"


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"\x25" + varint(9) + b"\x15" + varint((1 << 32) + 9) + b"\0", id="compressed size"),
        pytest.param(b"\x25" + varint(9) + b"\x15" + varint(1 << 64) + b"\0", id="compressed size beyond a file's"),
        pytest.param(
            b"\x25" + varint(9) + b"\x15" + varint(9) + b"\x05" + varint(65538) + varint(1) + b"\0", id="field"
        ),
        pytest.param(b"\x18" + varint(1 << 61), id="string"),
        pytest.param(b"\x18" + varint(1 << 67), id="string beyond an offset"),
    ],
)
def test_a_number_of_too_many_bits_is_damaged(tmp_path, header):
    """pyarrow takes the lowest bits: it would read pages that were not counted."""
    (tmp_path / "pages").write_bytes(header)
    with open(tmp_path / "pages", "rb") as stream, pytest.raises(Unreadable, match=r"bits|bytes"):
        decompressed_size(stream, 0, 1 << 62)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_the_pages_of_a_chunk_are_counted_as_they_were_written(version, compression):
    rows = {"text": [article(i) for i in range(300)], "id": [f"i{i % 3}" for i in range(300)]}
    content = parquet_of(
        rows, compression=compression, data_page_size=2000, data_page_version=version, write_page_index=True
    )
    stream = io.BytesIO(content)
    group = needed("pyarrow.parquet", "parquet").ParquetFile(stream).metadata.row_group(0)
    for column in (group.column(0), group.column(1)):
        start, size = column.dictionary_page_offset, column.total_compressed_size
        # The footer counts headers too, of about 20 to 100 bytes and a text's first and last value.
        pages = decompressed_size(stream, start, size)
        assert 0.5 * column.total_uncompressed_size < pages < column.total_uncompressed_size
        with pytest.raises(Unreadable, match="page"):
            decompressed_size(stream, start + 1, size)


@pytest.mark.parametrize(
    "header", [b"", b"\x15", b"\x15\x80" * 20, b"\x1c" * 50, b"\x15\x00\x00", b"\x19\x00", b"\xff"]
)
def test_a_header_of_anything_else_is_damaged(header):
    with pytest.raises(Unreadable):
        decompressed_size(io.BytesIO(header), 0, 100)


def test_one_long_text_that_many_rows_name_is_never_held_for_all(tmp_path):
    arrow = needed("pyarrow", "parquet")
    text = os.urandom(1 << 19).hex()
    column = arrow.DictionaryArray.from_arrays(arrow.array([0] * 500), arrow.array([text]))
    limits = Limits(document=1 << 21)
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_of({"text": column}))
    before = arrow.total_allocated_bytes()
    count = 0
    for raw in read(SourceEntry(str(path), "a", "parquet", 0), limits):
        count += 1
        assert len(raw.content) == len(text)
        assert arrow.total_allocated_bytes() - before < 20 * len(text)
    assert count == 500


def test_columns_of_lists_and_structures_are_refused_before_a_row_is_read(tmp_path):
    arrow = needed("pyarrow", "parquet")
    (failure,) = documents(tmp_path, parquet_of({"text": arrow.array([[article(0)] * 9])}))
    assert "column text is list<element: string>, not a string" in failure.details["error"]
    columns = {"text": [article(0)], "url": [[article(0)] * 9], "title": [{"de": "Hafen"}], "id": ["i0"]}
    (raw,) = documents(tmp_path, parquet_of(columns))
    assert raw.metadata == {"id": "i0"}


@pytest.mark.parametrize("name", ["url", "url.of"])
def test_what_is_read_beside_the_text_is_bounded_as_the_text_is(tmp_path, name):
    columns = {"text": ["short"] * 2, "url": ["a"] * 2, name: ["u" * (1 << 20)] * 2}
    (failure,) = documents(tmp_path, parquet_of(columns, compression="zstd"))
    assert failure.reason == "bomb"
    assert f"of {name} would give" in failure.details["error"]
    (item, _) = documents(tmp_path, parquet_of({"text": ["short"] * 2, "url": ["u" * SMALL.document, "u"]}))
    assert item.reason == "too_large"


def test_names_and_settings(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (entry,), _ = plan_sources([str(tmp_path)])
    assert entry.format == "parquet"
    assert "text_field" not in PipelineConfig(format="parquet", text_field="body").unused()


def test_without_pyarrow_the_error_names_the_command(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(optional, "import_module", missing)
    with pytest.raises(InputError, match=r"reading Parquet files needs pyarrow, .*pip install 'fastllm\[parquet\]'"):
        documents(tmp_path, b"PAR1")


def test_a_row_that_needs_a_package_is_not_taken_for_damage(tmp_path, monkeypatch):
    content = parquet_of({"html": [b"\x28\xb5\x2f\xfd and what is compressed"]})
    found = optional.import_module

    def missing(name):
        if name == "zstandard":
            raise ImportError(f"No module named {name!r}")
        return found(name)

    monkeypatch.setattr(optional, "import_module", missing)
    with pytest.raises(InputError, match="the content coding zstd needs zstandard"):
        documents(tmp_path, content, "html")


def test_a_damaged_footer_is_a_failure_and_no_end_of_the_process(tmp_path):
    """pyarrow ends it by an exception of C++ that nothing catches, if it is asked for such a column's metadata."""
    content = parquet_of({"text": ["one", "two"], "parts": [[1], []]}, store_schema=False)
    begin = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for at in range(begin, len(content) - 8):
        found = documents(tmp_path, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert all(isinstance(item, (Raw, Failure)) for item in found), at


def test_row_groups_lie_where_the_footer_says_and_their_columns_are_those_of_the_schema(tmp_path):
    content = parquet_of({"text": ["one", "two", "three"], "parts": [[1], [], None]}, row_group_size=2)
    metadata = needed("pyarrow.parquet", "parquet").ParquetFile(io.BytesIO(content)).metadata
    for group, chunks in enumerate(column_chunks(io.BytesIO(content))):
        columns = [metadata.row_group(group).column(number) for number in range(2)]
        starts = [column.dictionary_page_offset for column in columns]
        sizes = [(column.total_compressed_size, column.total_uncompressed_size) for column in columns]
        assert [chunk.start for chunk in chunks] == starts
        assert [chunk[1:] for chunk in chunks] == sizes
