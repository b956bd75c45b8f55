"""Labelled texts, pairs and questions in files as the field gives them out."""

import bz2
import gzip
import json
import lzma
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.config import InputError
from fastllm.data.clean.urls import blocked
from fastllm.data.corpus import read_text
from fastllm.tasks.read import read_labelled, read_pairs, read_questions

# What str.splitlines cuts at, newline and carriage return apart.
SEPARATORS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and chr(c) not in "\r\n" and
              len(f"a{chr(c)}b".splitlines()) > 1]  # fmt: skip
FIELDS = st.lists(st.sampled_from([*SEPARATORS, "dull", "é", ";", "'"]), max_size=6).map(
    lambda p: "a" + "".join(p) + "b"
)


def test_the_separators_are_those_of_unicode():
    assert {"\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"} <= set(SEPARATORS)


@settings(max_examples=30, deadline=None)
@given(st.lists(FIELDS, min_size=1, max_size=3), st.sampled_from(["\n", "\r\n"]))
def test_only_newlines_end_a_line(tmp_path_factory, texts, end):
    folder = tmp_path_factory.mktemp("lines")
    expected = [{"text": text, "label": "1"} for text in texts]

    def write(name, lines):
        (folder / name).write_bytes(end.join([*lines, ""]).encode())
        return folder / name

    assert read_labelled([write("a.tsv", ["text\tlabel", *(f"{t}\t1" for t in texts)])]) == expected
    assert read_labelled([write("a.csv", ["text,label", *(f"{t},1" for t in texts)])]) == expected
    assert read_labelled([write("b.csv", ["label;text", *(f'1;"{t}"' for t in texts)])]) == expected
    assert read_labelled([write("a.txt", [f"1 {t}" for t in texts])]) == expected
    pairs = [{"source": t, "target": f"{t}!"} for t in texts]
    assert read_pairs([write("p.tsv", [f"{t}\t{t}!" for t in texts])]) == pairs
    assert read_pairs([write("p.en", texts), write("p.de", [f"{t}!" for t in texts])]) == pairs


def test_a_list_of_hosts_is_lines_too(tmp_path):
    (tmp_path / "hosts").write_text("one.example  # a\u2028b\r\ntwo.example\n", "utf-8")
    assert set(blocked(str(tmp_path / "hosts"))) == {"one.example", "two.example"}


def test_quoted_fields_hold_line_ends(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'text,label\r\n"two\nlines, ""said""",1\r\nnext,0\r\n')
    assert [e["text"] for e in read_labelled([tmp_path / "a.csv"])] == ['two\nlines, "said"', "next"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"1 a stirring , funny\n0 dull .\n", [("a stirring , funny", "1"), ("dull .", "0")]),
        (b"-1\tdull\n\n+1\tfine\n", [("dull", "-1"), ("fine", "+1")]),
        (b"__label__pos a, b\n__label__neg c\n", [("a, b", "pos"), ("c", "neg")]),
        (b"HUM:ind Who was Galileo ?\nNUM:dist How far ?\n", [("Who was Galileo ?", "HUM"), ("How far ?", "NUM")]),
        (b"LOC:city a sister\xf0city ?\nABBR:exp NASA ?\n", [("a sister\xf0city ?", "LOC"), ("NASA ?", "ABBR")]),
        ("LOC:city a sister\xf0city ?\n".encode(), [("a sister\xf0city ?", "LOC")]),
        (b"4 a sister\xf0city ?\n" + b"0 Who ?\n" * 2000, [("a sister\xf0city ?", "4"), *[("Who ?", "0")] * 2000]),
        (b"(3 Yes)\n(1 (2 -LRB-) (1 (2 and\\/or) (1 x\\*)))\n", [("Yes", "3"), ("( and/or x*", "1")]),
        ("(2 (2 a) (2 4\xa01\u2028b))\n".encode(), [("a 4\xa01\u2028b", "2")]),
    ],
)
def test_a_text_on_each_line_after_its_label(tmp_path, content, expected):
    path = tmp_path / "train.txt"
    for name, compress in (
        ("train", bytes),
        ("t.all.gz", gzip.compress),
        ("t.bz2", bz2.compress),
        ("t.xz", lzma.compress),
    ):
        path = tmp_path / name
        path.write_bytes(compress(content))
        assert [(e["text"], e["label"]) for e in read_labelled([path])] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1 good\nno label\n", "line 2: expected a label and a text, got 'no label'"),
        (b"HUM:ind Who ?\nWhat ?\n", "line 2: expected LABEL:fine and a text"),
        (b"(3 (2 It) (4 works))\n(3 (2 It) works)\n", "line 2: expected a labelled tree"),
        (b"(3 (2 It) (4 works))\n(3 (2 It) (4 works)) (2 x)\n", "line 2: expected a labelled tree"),
        (b"(3 (2 It) (4 works))\n(3 (2 It) ())\n", "line 2: expected a labelled tree"),
        (b"1 fine\n0 d\xfcll\n", "not UTF-8 text"),
        (b"1 \n", "example 1 has an empty text"),
    ],
)
def test_lines_of_another_form_are_refused(tmp_path, content, message):
    (tmp_path / "train.txt").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        read_labelled([tmp_path / "train.txt"])


def test_a_table_without_a_header_is_a_text_on_each_line(tmp_path):
    (tmp_path / "a.tsv").write_text("1\tfine, really\n0\tdull\n")
    assert [e["label"] for e in read_labelled([tmp_path / "a.tsv"])] == ["1", "0"]


def test_compressed_files_are_read_and_damaged_ones_refused(tmp_path):
    for name, lines in (("train.en.gz", b"a cat\nhouse\n"), ("train.de.gz", b"eine Katze\nHaus\n")):
        (tmp_path / name).write_bytes(gzip.compress(lines))
    assert len(read_pairs([tmp_path / "train.en.gz", tmp_path / "train.de.gz"])) == 2
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b'sentence\tlabel\na 5" nail\t1\n'))
    assert read_labelled([tmp_path / "a.tsv.gz"]) == [{"text": 'a 5" nail', "label": "1"}]
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"1 text\n" * 1000)[:-9])
    (tmp_path / "plain.gz").write_bytes(b"1 text\n")
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"1 text\n" * (80 << 17)))
    for name, message in (("cut.gz", "truncated"), ("plain.gz", "damaged"), ("bomb.gz", "bomb")):
        with pytest.raises(InputError, match=message):
            read_labelled([tmp_path / name])
    with pytest.raises(InputError, match="No such file"):
        read_text(tmp_path / "absent.gz")


def test_imdb_is_named_by_its_part(tmp_path):
    for part in ("train", "test"):
        for label in ("pos", "neg"):
            (tmp_path / part / label).mkdir(parents=True)
            (tmp_path / part / label / "0_9.txt").write_text("one<br /><br />two")
        (tmp_path / part / "urls_pos.txt").write_text("an address")
    assert [e["label"] for e in read_labelled([tmp_path / "train"])] == ["neg", "pos"]
    with pytest.raises(InputError, match="test: expected the texts of one label, got folders"):
        read_labelled([tmp_path])


def squad(**entry):
    entry = {"id": 7, "question": "Colour?", "answers": [{"text": "red", "answer_start": 13}], **entry}
    context = entry.pop("context", "The house is red.")
    return json.dumps({"data": [{"title": "t", "paragraphs": [{"context": context, "qas": [entry]}]}]})


@pytest.mark.parametrize(
    "entry",
    [
        dict(question="Col\ud800our?"), dict(context="The house is red.\udfff"),
        dict(context="x" * 13 + "\ud83d", answers=[{"text": "\ud83d", "answer_start": 13}]),
        dict(answers=[{"text": "red", "answer_start": -4}]), dict(answers=[{"text": "red", "answer_start": 13.0}]),
        dict(answers=[{"text": "red", "answer_start": True}]),
        dict(answers=[{"text": "red", "answer_start": float("nan")}]),
        dict(question=" "),
        dict(answers=[{"text": "re\ud800", "answer_start": 13}]),
    ],
)  # fmt: skip
def test_questions_that_cannot_be_used_are_named(tmp_path, entry):
    (tmp_path / "q.json").write_text(squad(**entry))
    with pytest.raises(InputError, match=r"q\.json: question 7: "):
        read_questions([tmp_path / "q.json"])


def test_json_without_end_is_refused(tmp_path):
    (tmp_path / "q.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"q\.json: not JSON"):
        read_questions([tmp_path / "q.json"])
