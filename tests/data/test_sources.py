"""Reading sources: every format and compression, and input that is broken or hostile."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import sys
import tarfile
import time
import zipfile

import pytest
from extras import needed
from pages import article, dump, gzipped, page, warc
from source_files import SMALL, documents

from fastllm.config import InputError
from fastllm.data.optional import require
from fastllm.data.sources import Failure, Raw, plan_sources
from fastllm.data.sources.compressed import Prompt
from fastllm.data.sources.limits import MIB


def compressors():
    yield "", lambda content: content
    yield ".gz", gzipped
    yield ".bz2", bz2.compress
    yield ".xz", lzma.compress
    zstandard = needed("zstandard", "data")
    yield ".zst", zstandard.ZstdCompressor().compress


def jsonl(count):
    return b"".join(json.dumps({"text": article(i), "url": f"u{i}"}).encode() + b"\n" for i in range(count))


def make(name):
    pages = [page(article(i)).encode() for i in range(3)]
    if name == "a.jsonl":
        return jsonl(3)
    if name == "a.warc":
        return warc(pages, compress=False)
    if name == "a.xml":
        return dump([(f"T{i}", "0", article(i)) for i in range(3)]).encode()
    if name == "a.tar":
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for i, content in enumerate(pages):
                member = tarfile.TarInfo(f"d/{i}.html")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return buffer.getvalue()
    return pages[0] if name == "a.html" else article(0).encode()


@pytest.mark.parametrize("name", ["a.html", "a.txt", "a.jsonl", "a.warc", "a.xml", "a.tar"])
def test_every_format_reads_the_same_however_it_is_compressed(tmp_path, name):
    if name.endswith(".warc"):
        needed("warcio", "data")
    content = make(name)
    found = []
    for suffix, compress in compressors():
        path = tmp_path / (name + suffix)
        path.write_bytes(compress(content))
        items = documents(path)
        assert all(isinstance(item, Raw) for item in items), items
        found.append([(item.content, item.kind, item.metadata) for item in items])
    assert all(each == found[0] for each in found)
    assert len(found[0]) == (1 if name in ("a.html", "a.txt") else 3)


@pytest.mark.parametrize("name", ["a.jsonl", "a.warc", "a.xml", "a.tar", "a.txt"])
def test_a_compressed_file_whose_name_does_not_say_so_is_read(tmp_path, name):
    if name == "a.warc":
        needed("warcio", "data")
    (tmp_path / name).write_bytes(make(name))
    expected = documents(tmp_path / name)
    for _, compress in compressors():
        (tmp_path / name).write_bytes(compress(make(name)))
        assert documents(tmp_path / name) == expected
    (tmp_path / "b.txt").write_bytes(b"BZh9 is how bzip2 begins.")
    assert documents(tmp_path / "b.txt")[0].content == b"BZh9 is how bzip2 begins."


@pytest.mark.parametrize("name", ["a.jsonl", "a.warc", "a.xml", "a.tar", "a.txt"])
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_that_was_cut_off_gives_what_is_whole_and_says_so(tmp_path, name, suffix):
    compress = dict(compressors())[suffix]
    path = tmp_path / (name + suffix)
    content = compress(make(name))
    path.write_bytes(content[: len(content) * 2 // 3])
    *whole, last = documents(path)
    assert isinstance(last, Failure)
    assert last.reason in ("truncated", "damaged")
    assert last.details["after_records"] == len(whole)
    path.write_bytes(b"not what the name says" * 9)
    (only,) = documents(path)
    assert (only.reason, only.details["after_records"]) == ("damaged", 0)


@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.jsonl", "a.xml", "a.warc", "a.tar"])
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_decompression_bomb_costs_little_and_is_refused(tmp_path, name, suffix):
    path = tmp_path / (name + suffix)
    start = {"a.xml": b"<mediawiki><page>", "a.jsonl": b'{"text": "'}.get(name, b"")
    if name == "a.tar":
        member = tarfile.TarInfo("x.bin")
        member.size = 16 * MIB
        start = member.tobuf()
    path.write_bytes(
        dict(compressors())[suffix](start + bytes(16 * MIB) if name == "a.tar" else start + b"a" * 16 * MIB)
    )
    begin = time.thread_time()
    items = documents(path)
    assert items
    assert all(isinstance(item, Failure) for item in items)
    assert {item.reason for item in items} <= {"bomb", "too_large", "damaged", "unknown_format"}
    assert time.thread_time() - begin < 5


def test_members_that_point_outside_their_archive_are_refused_and_nothing_is_written(tmp_path):
    names = ["../up.txt", "/etc/passwd.txt", "a/../../up.txt", "C:\\x.txt", "good.txt", "..\\up.txt"]
    with tarfile.open(tmp_path / "a.tar", "w") as archive, zipfile.ZipFile(tmp_path / "a.zip", "w") as other:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"text"))
            other.writestr(name, "text")
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(p.name for p in tmp_path.parent.rglob("*"))
    items = documents(tmp_path / "a.tar")
    assert [item.reason if isinstance(item, Failure) else item.id for item in items] == [
        *["outside"] * 4, "a.tar#good.txt", "outside", "no_file",
    ]  # fmt: skip
    assert [isinstance(item, Raw) for item in documents(tmp_path / "a.zip")] == [False] * 4 + [True, False]
    assert sorted(p.name for p in tmp_path.parent.rglob("*")) == before


def test_files_that_were_saved_as_they_were_sent_are_decompressed_and_binary_ones_refused(tmp_path):
    content = page(article(0)).encode()
    zstandard = needed("zstandard", "data")
    kinds = {
        "a.html": gzip.compress(content), "b.htm": zstandard.ZstdCompressor().compress(content), "c.txt": content,
        "d.html": b"%PDF-1.4 \xe2\xe3", "e.html": b"\x89PNG\r\n\x1a\n", "f.txt": os.urandom(4000),
        "g.txt": "Grüße aus Köln".encode("utf-16"), "h.txt": "Words in UTF-16, no mark".encode("utf-16-le"),
        "i.txt": b"a \0 stray zero in a text " * 9, "j.html": gzip.compress(content)[:-20],
        "k.txt": b"RIFF begins files of sound.", "l.txt": b"GIF89a is a format.", "m.txt": b"wOFF is one of fonts.",
        "n.html": b"RIFFaaaaWEBPVP8L", "o.html": b"GIF89a\x20\0\x20\0" + b"A" * 90,
    }  # fmt: skip
    expected = {
        "a.html": content,
        "b.htm": content,
        **{name: kinds[name] for name in ("c.txt", "g.txt", "h.txt", "i.txt", "k.txt", "l.txt", "m.txt")},
    }
    with tarfile.open(tmp_path / "all.tar", "w") as archive, zipfile.ZipFile(tmp_path / "all.zip", "w") as packed:
        for name, body in kinds.items():
            (tmp_path / name).write_bytes(body)
            archive.add(tmp_path / name, name)
            packed.writestr(name, body)
    files = [found for name in kinds for found in documents(tmp_path / name)]
    for read_back in (files, documents(tmp_path / "all.tar"), documents(tmp_path / "all.zip")):
        assert {raw.id.split("#")[-1]: raw.content for raw in read_back if isinstance(raw, Raw)} == expected
        failed = {note.id.split("#")[-1]: note.reason for note in read_back if isinstance(note, Failure)}
        assert failed == {
            **dict.fromkeys(("d.html", "e.html", "f.txt", "n.html", "o.html"), "coding"), "j.html": "truncated",
        }  # fmt: skip


def test_damaged_and_lying_zip_archives_are_survived(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one.txt", article(1))
        archive.writestr("bomb.txt", b"a" * 16 * MIB)
        archive.writestr("two.txt", article(2))
    items = documents(tmp_path / "a.zip")
    assert [item.reason if isinstance(item, Failure) else "read" for item in items] == ["read", "bomb", "read"]
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[60:90] = b"\xff" * 30
    (tmp_path / "a.zip").write_bytes(content)
    items = documents(tmp_path / "a.zip")
    assert [item.reason if isinstance(item, Failure) else "read" for item in items] == ["damaged", "bomb", "read"]
    directory = content.index(b"PK\1\2")
    for at, value in ((directory + 6, 255), (directory + 30, 255)):
        changed = bytearray(content)
        changed[at] = value
        (tmp_path / "a.zip").write_bytes(changed)
        assert [item.reason for item in documents(tmp_path / "a.zip")] == ["damaged"]
    # The first member's name becomes its comment.
    changed = bytearray(content)
    changed[directory + 28], changed[directory + 32] = 0, changed[directory + 28]
    (tmp_path / "a.zip").write_bytes(changed)
    assert (documents(tmp_path / "a.zip")[0].id, documents(tmp_path / "a.zip")[0].reason) == ("a.zip#", "damaged")
    (tmp_path / "a.zip").write_bytes(content[:500])
    assert [item.reason for item in documents(tmp_path / "a.zip")] == ["damaged"]


def test_damaged_members_of_every_compression_are_survived(tmp_path):
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "a.zip", "w", kind) as archive:
            archive.writestr("a.txt", os.urandom(500).hex())
            archive.writestr("b.txt", "whole")
        content = bytearray((tmp_path / "a.zip").read_bytes())
        content[45:90] = b"\xff" * 45
        (tmp_path / "a.zip").write_bytes(content)
        damaged, whole = documents(tmp_path / "a.zip")
        assert (damaged.reason, whole.content) == ("damaged", b"whole")


@pytest.mark.parametrize("name", ["a.zip", "a.warc"])
@pytest.mark.parametrize("error", [MemoryError(), KeyError("x"), TypeError("x"), OSError(errno.EIO, "input error")])
def test_what_no_damage_raises_is_not_taken_for_damage(tmp_path, monkeypatch, name, error):
    """Faults of this package, of the memory and of the disk: an archive that is whole was counted as damaged."""

    def fail(*arguments, **options):
        raise error

    if name == "a.zip":
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("one.txt", article(1))
        monkeypatch.setattr(zipfile.ZipExtFile, "read", fail)
    else:
        (tmp_path / name).write_bytes(warc([b"<p>x"], compress=False))
        monkeypatch.setattr(Prompt, "read", fail)
    if isinstance(error, OSError):
        assert [item.reason for item in documents(tmp_path / name)] == ["unreadable"]
    else:
        with pytest.raises(type(error)):
            documents(tmp_path / name)


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), EOFError("ours")])
def test_a_fault_of_this_package_beside_a_member_is_no_damage(tmp_path, monkeypatch, error):
    def fail(*arguments):
        raise error

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("one.txt", article(1))
    monkeypatch.setattr(sys.modules["fastllm.data.sources.read"], "text_of", fail)
    if isinstance(error, EOFError):
        # The end of a file is taken for a cut anywhere.
        assert [item.reason for item in documents(tmp_path / "a.zip")] == ["truncated"]
    else:
        with pytest.raises(type(error), match="ours"):
            documents(tmp_path / "a.zip")


def test_a_member_with_a_password_is_damaged_and_the_next_one_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", article(1))
        archive.writestr("b.txt", article(2))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    for at in (6, content.index(b"PK\1\2") + 8):
        content[at] |= 1
    (tmp_path / "a.zip").write_bytes(content)
    locked, whole = documents(tmp_path / "a.zip")
    assert (locked.reason, "password" in locked.details["error"]) == ("damaged", True)
    assert whole.content.decode() == article(2)


def test_bad_json_lines_are_counted_one_by_one(tmp_path):
    lines = [
        b'{"text": "good"}', b"{not json", b'{"text": 7}', b'{"other": "x"}', b"[" * 50_000, b"", b'"a string"',
        b'{"text": "' + b"a" * SMALL.document + b'"}', b'{"text": "half \\ud800 a pair", "id": "n", "url": 3}',
        b"\xff\xfe",
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    items = documents(tmp_path / "a.jsonl")
    assert [item.reason if isinstance(item, Failure) else "read" for item in items] == [
        "read", "damaged", "damaged", "damaged", "damaged", "damaged", "too_large", "read", "damaged",
    ]  # fmt: skip
    assert (items[7].content, items[7].metadata) == (b"half ? a pair", {"id": "n"})
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a\ttab and a \0"}\n[{"text": "a"}]\n')
    written, array = documents(tmp_path / "c.jsonl")
    assert written.content == b"a\ttab and a \0"
    assert "list, not an object" in array.details["error"]
    (tmp_path / "b.jsonl").write_text('{"html": "<p>x"}\n')
    assert documents(tmp_path / "b.jsonl", text_field="html")[0].kind == "html"


def test_a_dump_gives_articles_and_counts_the_other_pages(tmp_path):
    pages = [("A", "0", "text a"), ("Talk:A", "1", "chat"), ("B", "0", "#REDIRECT [[A]]"), ("C", "0", "text & c")]
    (tmp_path / "a.xml").write_text(dump(pages))
    items = documents(tmp_path / "a.xml")
    assert [item.reason if isinstance(item, Failure) else item.content for item in items] == [
        b"text a", "name_space", "redirect", b"text & c",
    ]  # fmt: skip
    assert items[3].metadata == {"title": "C"}
    (tmp_path / "a.xml").write_text(dump(pages)[:-40])
    *whole, last = documents(tmp_path / "a.xml")
    assert (len(whole), last.reason) == (3, "truncated")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><mediawiki><page>&b;</page></mediawiki>', "damaged"),
        ("<a>" * 100_000, "damaged"),
        ("<mediawiki><page>" + "<x/>" * 200_000, "too_large"),
        ("<mediawiki><page><title>" + "a" * 300_000, "too_large"),
        ("", "truncated"),
        ("no xml", "damaged"),
    ],
)
def test_hostile_xml_is_refused(tmp_path, content, reason):
    (tmp_path / "a.xml").write_text(content)
    assert [item.reason for item in documents(tmp_path / "a.xml")] == [reason]


def test_a_file_that_vanished_or_may_not_be_read_is_counted(tmp_path):
    (item,) = documents(tmp_path / "gone.txt.gz")
    assert item.reason == "unreadable"
    assert "No such file" in item.details["error"]
    (tmp_path / "folder.txt").mkdir()
    (item,) = documents(tmp_path / "folder.txt")
    assert item.reason == "unreadable"


def test_a_plan_has_the_files_in_order_and_says_what_it_passes_over(tmp_path):
    root = tmp_path / "in"
    (root / "b").mkdir(parents=True)
    for name in ("b/2.html", "a.txt", "c.jsonl.gz", "x.png", ".hidden.txt", "b/10.html"):
        (root / name).write_text("x")
    (tmp_path / "secret.txt").write_text("secret")
    os.symlink(tmp_path / "secret.txt", root / "link.txt")
    os.symlink("a.txt", root / "own.txt")
    os.symlink(tmp_path, root / "up")
    os.symlink("nowhere", root / "dead.txt")
    os.mkfifo(root / "pipe.txt")
    entries, failures = plan_sources([str(root), str(root / "a.txt"), str(root)])
    own = ["in/a.txt", "in/b/10.html", "in/b/2.html", "in/c.jsonl.gz", "in/own.txt"]
    assert [entry.id for entry in entries] == [*own, "a.txt", *(name.replace("in/", "in~2/") for name in own)]
    assert [(failure.id, failure.reason) for failure in failures[:5]] == [
        ("in/dead.txt", "unreadable"), ("in/link.txt", "outside"), ("in/pipe.txt", "no_file"), ("in/up", "outside"),
        ("in/x.png", "unknown_format"),
    ]  # fmt: skip
    with pytest.raises(InputError, match="no such file or folder"):
        plan_sources([str(tmp_path / "none")])
    with pytest.raises(InputError, match="unknown format; say --format"):
        plan_sources([str(root / "x.png")])
    assert plan_sources([str(root / "x.png")], "text")[0][0].format == "text"


def test_a_missing_package_is_one_clear_line():
    with pytest.raises(InputError, match=r"reading x needs no-such-package.*pip install 'fastllm\[data\]'"):
        require("no_such_package", "no-such-package", "reading x")


def test_gzip_reads_several_members_and_zstandard_several_frames(tmp_path):
    zstandard = needed("zstandard", "data")
    halves = [jsonl(2), jsonl(3)]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)))
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, halves)))
    assert len(documents(tmp_path / "a.jsonl.gz")) == len(documents(tmp_path / "a.jsonl.zst")) == 5
