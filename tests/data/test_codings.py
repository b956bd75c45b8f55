"""Transfer and content codings of archived responses: any case and order, unknown ones, and hostile ones."""

import gzip
import tracemalloc
import zlib

import pytest
from extras import needed
from pages import article, page

from fastllm.data.sources import Failure, Limits, Raw, SourceEntry, read
from fastllm.data.sources.codings import codings, undo
from fastllm.data.sources.limits import MIB, Unreadable

needed("warcio", "data")

PAGE = page(article(3)).encode()
SMALL = Limits(document=1 << 20, ratio=50, free=1 << 18)


def chunked(content: bytes, size: int = 700) -> bytes:
    parts = [content[i : i + size] for i in range(0, len(content), size)]
    return b"".join(b"%X;name=value\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\nTrailer: x\r\n\r\n"


def raw_deflate(content: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return stream.compress(content) + stream.flush()


def zstd(content: bytes) -> bytes:
    return needed("zstandard", "data").ZstdCompressor().compress(content)


def brotli(content: bytes) -> bytes:
    return needed("brotli", "data").compress(content)


APPLY = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstd, "br": brotli, "chunked": chunked}


def record(body: bytes, *headers: str) -> bytes:
    block = "\r\n".join(["HTTP/1.1 200 OK", "Content-Type: text/html; charset=utf-8", *headers, "", ""]).encode() + body
    head = (
        "WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:1>\r\nWARC-Target-URI: http://example.org/\r\n"
        "WARC-Date: 2024-01-01T00:00:00Z\r\nContent-Type: application/http; msgtype=response\r\n"
        f"Content-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def read_records(tmp_path, *records: bytes, limits: Limits = SMALL):
    path = tmp_path / "a.warc"
    path.write_bytes(b"".join(records))
    return list(read(SourceEntry(str(path), path.name, "warc", path.stat().st_size), limits))


@pytest.mark.parametrize(
    ("headers", "applied"),
    [
        (["Transfer-Encoding: Chunked"], ["chunked"]),
        (["TRANSFER-ENCODING: CHUNKED"], ["chunked"]),
        (["Content-Encoding: x-gzip"], ["gzip"]),
        (["content-encoding: GZIP", "transfer-encoding: chunked"], ["gzip", "chunked"]),
        (["Transfer-Encoding: gzip, chunked"], ["gzip", "chunked"]),
        (["Transfer-Encoding: chunked", "Content-Encoding: br"], ["br", "chunked"]),
        (["Content-Encoding: zstd"], ["zstd"]),
        (["Content-Encoding: deflate"], ["deflate"]),
        (["Content-Encoding: deflate, gzip"], ["deflate", "gzip"]),
        (["Content-Encoding: gzip", "Content-Encoding: zstd"], ["gzip", "zstd"]),
        (["Content-Encoding: identity"], []),
        (["Content-Encoding: "], []),
    ],
)
def test_codings_are_undone_in_any_case_and_order(tmp_path, headers, applied):
    body = PAGE
    for name in applied:
        body = APPLY[name](body)
    first, second = read_records(tmp_path, record(body, *headers), record(PAGE))
    assert isinstance(first, Raw), first
    assert (first.content, first.encoding) == (PAGE, "utf-8")
    assert second.content == PAGE


@pytest.mark.parametrize("name", ["gzip", "zstd", "chunked", "br", "deflate"])
def test_content_that_was_decoded_before_it_was_archived_is_taken_as_it_is(name):
    assert undo(PAGE, [name], SMALL) == PAGE


def test_deflate_without_its_frame_and_several_gzip_members():
    assert undo(raw_deflate(PAGE), ["deflate"], SMALL) == PAGE
    assert undo(gzip.compress(b"one ") + gzip.compress(b"two"), ["gzip"], SMALL) == b"one two"


@pytest.mark.parametrize("name", ["compress", "aws-chunked", "lzma", "dcb", "no-such"])
def test_an_unknown_coding_is_a_rejection_with_its_name(tmp_path, name):
    first, second = read_records(tmp_path, record(b"\x1f\x9d\x90binary", f"Content-Encoding: {name}"), record(PAGE))
    assert isinstance(first, Failure)
    assert (first.reason, name in first.details["error"]) == ("coding", True)
    assert second.content == PAGE


@pytest.mark.parametrize("name", ["gzip", "zstd", "br", "deflate", "chunked"])
def test_binary_content_that_is_not_in_its_coding_is_no_text(name):
    with pytest.raises(Unreadable) as caught:
        undo(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" * 9, [name], SMALL)
    assert caught.value.reason in ("coding", "truncated")


@pytest.mark.parametrize("name", ["gzip", "zstd", "br", "deflate", "chunked"])
def test_content_that_was_cut_off_says_so(name):
    coded = APPLY[name](PAGE)
    with pytest.raises(Unreadable) as caught:
        undo(coded[: len(coded) * 2 // 3], [name], SMALL)
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("name", ["gzip", "zstd", "br", "deflate"])
def test_a_bomb_in_a_coding_is_refused_early(tmp_path, name):
    bomb = record(APPLY[name](bytes(64 * MIB)), f"Content-Encoding: {name}")
    tracemalloc.start()
    try:
        first, second = read_records(tmp_path, bomb, record(PAGE))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert first.reason in ("bomb", "too_large")
    assert second.content == PAGE
    # 1 MiB is allowed. What is decompressed before the size is looked at comes to it: 4 MiB in deflate.
    assert peak < 12 * MIB


def test_header_values_are_lists():
    assert codings(["gzip , Chunked", "identity", ""]) == ["gzip", "chunked"]


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_a_compression_that_no_header_tells_of_is_undone(tmp_path, compress):
    (found,) = read_records(tmp_path, record(compress(PAGE)))
    assert found.content == PAGE


@pytest.mark.parametrize(
    "body", [b"%PDF-1.7 text", b"\x89PNG\r\n", b"GIF89a", b"<html>\0\0\1\2", bytes(range(1, 256)) * 4, b"PK\x03\x04abc"]
)
def test_what_is_binary_is_no_page(tmp_path, body):
    first, second = read_records(tmp_path, record(body), record(PAGE))
    assert (first.reason, second.content) == ("coding", PAGE)


def test_a_charset_is_no_coding_and_wide_text_is_not_binary(tmp_path):
    assert codings(["UTF-8, gzip", "iso-8859-1"]) == ["gzip"]
    for body in ("<p>\u4e2d".encode("utf-16-le"), "\ufeff<p>".encode("utf-16-be"), b"<p>\x1b$B"):
        (found,) = read_records(tmp_path, record(body))
        assert found.content == body


@pytest.mark.parametrize("name", ["gzip", "deflate", "zstd", "br", "chunked"])
def test_no_content_is_in_every_coding(name):
    assert undo(b"", [name], SMALL) == b""


def test_content_that_there_is_no_memory_for_is_not_called_damaged(monkeypatch):
    class Decompressor:
        def decompress(self, content):
            raise MemoryError

    monkeypatch.setattr(zlib, "decompressobj", lambda *arguments: Decompressor())
    with pytest.raises(MemoryError):
        undo(gzip.compress(PAGE), ["gzip"], SMALL)
