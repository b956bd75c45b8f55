"""Encodings as browsers take them: labels, order, and what cannot be decoded."""

import codecs
import gzip
import json

import pytest
from extras import needed

from fastllm.data.clean import CleanConfig
from fastllm.data.clean.encodings import codec_of, decode_page, undecodable
from fastllm.data.clean.text import tidy
from fastllm.data.pipeline import prepare_text


@pytest.mark.parametrize(
    ("label", "codec"),
    [
        ("gb2312", "gb18030"), ("GBK", "gb18030"), ("shift_jis", "cp932"), ("x-sjis", "cp932"), ("euc-kr", "cp949"),
        ("ks_c_5601-1987", "cp949"), ("big5", "big5hkscs"), ("us-ascii", "cp1252"), ("ISO-8859-1", "cp1252"),
        ("latin1", "cp1252"), ("iso-8859-9", "cp1254"), ("8859-9", "cp1254"), ("iso-8859-11", "cp874"),
        ("tis-620", "cp874"), ("windows-1251", "cp1251"), ("cp1251", "cp1251"), ("koi8-r", "koi8-r"),
        (" utf8 ", "utf-8"),
        ("utf-16", "utf-16-le"), ("macintosh", "mac-roman"), ("ibm866", "cp866"), ("base64", None), ("rot13", None),
        ("no-such", None), ("", None), (None, None),
    ],
)  # fmt: skip
def test_labels_name_what_pages_use(label, codec):
    assert codec_of(label) == codec
    if codec:
        codecs.lookup(codec)


@pytest.mark.parametrize(
    ("text", "written", "label"),
    [
        ("小", "gbk", "gb2312"), ("朱镕基", "gb18030", "gb2312"), ("日本①㈱", "cp932", "shift_jis"),
        ("똠방각하", "cp949", "euc-kr"), ("香港嘅", "big5hkscs", "big5"), ("ışğ", "cp1254", "iso-8859-9"),
        ("ไทย “x”", "cp874", "iso-8859-11"), ("日本①", "euc_jis_2004", "euc-jp"), ("日本", "iso2022-jp", "iso-2022-jp"),
        ("“x” \u2013 é", "cp1252", "us-ascii"), ("Привет", "koi8-r", "koi8-r"), ("Grüße", "utf-16-le", "utf-16le"),
    ],
)  # fmt: skip
def test_a_header_and_a_page_say_how_it_is_written(text, written, label):
    assert decode_page(text.encode(written), label)[0] == text
    if not written.startswith("utf-16"):
        page = f'<html><head><meta http-equiv="Content-Type" content="text/html; charset={label}">{text}'
        assert decode_page(page.encode(written))[0] == page


def test_the_order_is_mark_header_page_content():
    content = "<meta charset=koi8-r>Привет".encode("cp1251")
    assert decode_page(content, "windows-1251")[1] == "cp1251"
    assert decode_page(content)[1] == "koi8-r"
    assert decode_page(b"\xef\xbb\xbf<meta charset=koi8-r>" + "Привет".encode(), "windows-1251") == (
        "<meta charset=koi8-r>Привет", "utf-8",
    )  # fmt: skip
    # In a comment nothing is declared, and a page whose tags can be read is not UTF-16.
    assert decode_page("<!-- <meta charset=koi8-r> -->Grüße".encode("cp1252"))[1] == "cp1252"
    assert decode_page(b"<meta charset=utf-16>abc")[1] == "utf-8"
    # Text that is plainly UTF-8 is that.
    assert decode_page(("<meta charset=iso-8859-1>" + "Grüße aus Köln. " * 9).encode())[1] == "utf-8"


def test_what_a_keyword_or_a_script_says_of_charsets_declares_nothing():
    others = '<meta name="keywords" content="charset=koi8-r"><script>"<meta charset=koi8-r>"</script>'
    for own in (
        "<meta charset=windows-1251>",
        '<META content="text/html;charset=windows-1251" http-equiv=Content-Type>',
    ):
        page = f"{others}{own}Привет, мир"
        assert decode_page(page.encode("cp1251")) == (page, "cp1251")


def test_a_euro_sign_of_windows_and_pages_in_utf_16_without_a_mark_are_read():
    assert decode_page(b"<meta charset=gbk>\x80 100" + "中文".encode("gbk"))[0].endswith("€ 100中文")
    assert undecodable(decode_page(b"<meta charset=gbk>\xff 100")[0]) == 1
    for codec in ("utf-16-le", "utf-16-be"):
        assert decode_page("<p>Grüße".encode(codec)) == ("<p>Grüße", codec)


def test_what_cannot_be_decoded_stays_to_be_seen_and_is_counted(tmp_path):
    needed("ftfy", "data")
    text, encoding = decode_page(b"<p>A \x81 and \x8d here", "windows-1252")
    assert (encoding, undecodable(text)) == ("cp1252", 2)
    assert tidy(text).count("\ufffd") == 2
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_bytes(b"caf\xe9 and \x81 then some words\n" * 3)
    (source / "b.txt").write_text("The author wrote \ufffd here.")
    config = CleanConfig(rules=("none",))
    report = prepare_text([source], tmp_path / "out", config, workers=0)
    assert report["undecodable_characters"] == 3
    with gzip.open(tmp_path / "out" / "text" / "00000.jsonl.gz", "rt") as lines:
        first, second = map(json.loads, lines)
    assert first["metadata"] == {"encoding": "cp1252", "undecodable": "3"}
    assert "metadata" not in second
