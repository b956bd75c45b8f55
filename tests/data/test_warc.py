"""WARC files as sources: members, cuts, types, and records that are damaged."""

import gzip

from extras import needed
from pages import article, page, warc
from source_files import documents

from fastllm.data.sources import Failure, Raw
from fastllm.data.sources.limits import MIB


def test_a_warc_of_gzip_members_reads_and_tells_where_it_was_cut_off(tmp_path):
    needed("warcio", "data")
    pages = [page(article(i)).encode() for i in range(6)]
    content = warc(pages)
    path = tmp_path / "a.warc.gz"
    path.write_bytes(content)
    whole = documents(path)
    assert [item.content for item in whole] == pages
    assert whole[2].metadata == {"url": "http://example.org/2"}
    assert (whole[0].id, whole[0].encoding) == ("a.warc.gz#1", "utf-8")
    cuts = 0
    for cut in range(200, len(content), len(content) // 25):
        path.write_bytes(content[:cut])
        items = documents(path)
        read_whole = [item for item in items if isinstance(item, Raw)]
        whole_inside = sum(len(warc(pages[: k + 1])) <= cut for k in range(len(pages)))
        assert [item.content for item in read_whole[:whole_inside]] == pages[:whole_inside]
        assert len(read_whole) <= whole_inside + 1
        assert len(items) - len(read_whole) <= 1
        # A cut between two members is a shorter file, not a damaged one.
        cuts += len(items) > len(read_whole)
    assert cuts >= 23
    broken = bytearray(content)
    broken[len(content) // 2 : len(content) // 2 + 40] = b"\xff" * 40
    path.write_bytes(broken)
    *read_whole, last = documents(path)
    assert isinstance(last, Failure)
    assert [item.content for item in read_whole] == pages[: len(read_whole)]


def test_other_warc_records_and_types_are_passed_over(tmp_path):
    needed("warcio", "data")
    path = tmp_path / "a.warc.gz"
    path.write_bytes(
        warc([b"%PDF"], content_type="application/pdf") + warc([b"<p>caf\xe9"], "text/html;charset=latin1")
    )
    (item,) = documents(path)
    assert (item.content, item.encoding) == (b"<p>caf\xe9", "latin1")


def response(content, headers=b"", without=b"none"):
    """A WARC record of a response; a header of the record that begins with ``without`` is left out."""
    block = b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n" + content
    head = [
        b"WARC/1.0",
        b"WARC-Type: response",
        b"WARC-Target-URI: http://example.org/",
        b"Content-Type: application/http",
    ]
    head.append(b"Content-Length: %d" % len(block))
    return b"\r\n".join(line for line in head if not line.startswith(without)) + b"\r\n\r\n" + block + b"\r\n\r\n"


def test_a_response_without_a_type_is_a_page_if_it_begins_as_one(tmp_path):
    needed("warcio", "data")
    path = tmp_path / "a.warc"
    pages = [b"<!doctype html><p>one", b"\n <HTML lang=en>two", b"<!-- three -->"]
    others = [b"\x89PNG\r\n\x1a\n\0\0", b'{"a": "<p>"}', b"<rss><p>", b"", b"text <p>"]
    packed = response(gzip.compress(b"<body >four"), b"Content-Encoding: gzip\r\n")
    empty = response(b"<p>five", b"Content-Type:\r\n")
    path.write_bytes(b"".join(map(response, [*pages, *others])) + packed + empty)
    assert [item.content for item in documents(path)] == [*pages, b"<body >four", b"<p>five"]


def test_a_warc_with_empty_lines_before_it_or_records_without_headers_loses_nothing_in_silence(tmp_path):
    needed("warcio", "data")
    path = tmp_path / "a.warc"
    record = response(b"<p>x")
    path.write_bytes(b"\r\n\r\n\n" + record * 2)
    assert [item.content for item in documents(path)] == [b"<p>x"] * 2
    path.write_bytes(record + response(b"<p>y", without=b"WARC-Type") + record)
    first, none, last = documents(path)
    assert (first.content, none.reason, last.content) == (b"<p>x", "damaged", b"<p>x")
    path.write_bytes(record + response(b"<p>y", without=b"Content-Length") + record)
    first, rest = documents(path)
    assert (first.content, rest.reason, rest.details["after_records"]) == (b"<p>x", "damaged", 1)
    path.write_bytes(record + response(b"<p>y", without=b"WARC-Target-URI") + record)
    first, rest = documents(path)
    assert (first.content, rest.reason) == (b"<p>x", "damaged")
    path.write_bytes(b"\r\n\r\n")
    assert [item.reason for item in documents(path)] == ["damaged"]


def test_a_bomb_inside_a_warc_record_is_refused(tmp_path):
    needed("warcio", "data")
    path = tmp_path / "a.warc.gz"
    path.write_bytes(warc([page(article(0)).encode(), b"<p>" + b"a" * 40 * MIB, b"<p>lost"]))
    first, last = documents(path)
    assert isinstance(first, Raw)
    assert (last.reason, last.details["after_records"]) == ("bomb", 1)
