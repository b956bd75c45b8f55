"""Readers of examples, and the folder that keeps them."""

import json
import re

import pytest

from fastllm.config import InputError
from fastllm.tasks.read import read_labelled, read_pairs, read_questions
from fastllm.tasks.store import open_examples, prepare_examples, split_examples


def test_pairs_from_a_table_and_from_two_files(tmp_path):
    (tmp_path / "pairs.tsv").write_text("a cat\teine Katze\textra\n \tleer\n\nhouse\tHaus\r\n\r\n \n")
    expected = [{"source": "a cat", "target": "eine Katze"}, {"source": "house", "target": "Haus"}]
    assert read_pairs([tmp_path / "pairs.tsv"]) == expected
    (tmp_path / "c.en").write_text("a cat\n\nhouse\n")
    (tmp_path / "c.de").write_text("eine Katze\nleer\nHaus\n")
    assert read_pairs([tmp_path / "c.en", tmp_path / "c.de"]) == expected


def test_labelled_texts_in_all_their_forms(tmp_path):
    expected = [{"text": "good, really", "label": "1"}, {"text": "bad", "label": "0"}]
    (tmp_path / "a.csv").write_text('label,text\n1,"good, really"\n0,bad\n')
    (tmp_path / "b.tsv").write_text("sentence\tlabel\ngood, really\t1\nbad\t0\n")
    assert read_labelled([tmp_path / "a.csv"]) == read_labelled([tmp_path / "b.tsv"]) == expected
    (tmp_path / "quote.tsv").write_text('text\tlabel\na 5" nail\t1\n')
    assert read_labelled([tmp_path / "quote.tsv"])[0]["text"] == 'a 5" nail'
    for name, content in (
        ("c.csv", '\n\nlabel,text\n1,"good, really"\n\n0,bad\n'),
        ("d.tsv", "\r\ntext\tlabel\ngood, really\t1\nbad\t0\n"),
        ("e.txt", "\n1 good, really\n\n0 bad\n"),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        assert read_labelled([tmp_path / name]) == expected, name
    (tmp_path / "sst.txt").write_text("(4 (2 It) (4 (4 works) (2 -LRB-)))\n(0 (2 No) (0 .))\n")
    assert read_labelled([tmp_path / "sst.txt"]) == [
        {"text": "It works (", "label": "4"},
        {"text": "No .", "label": "0"},
    ]
    for label, text in (("pos", "fine<br />film"), ("neg", "dull"), ("unsup", "unlabelled")):
        (tmp_path / "imdb" / label).mkdir(parents=True)
        (tmp_path / "imdb" / label / "0_1.txt").write_text(text)
    assert read_labelled([tmp_path / "imdb"]) == [
        {"text": "dull", "label": "neg"}, {"text": "fine\nfilm", "label": "pos"},
    ]  # fmt: skip


def squad(context="The house is red.", text="red", start=13, **more):
    entry = {"id": 7, "question": "Colour? ", "answers": [{"text": text, "answer_start": start}], **more}
    return {"version": "2.0", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": [entry]}]}]}


def test_questions_of_both_versions(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps(squad()))
    assert read_questions([tmp_path / "q.json"]) == [
        {"id": "7", "question": "Colour?", "context": "The house is red.", "answers": [{"text": "red", "start": 13}]}
    ]
    (tmp_path / "none.json").write_text(json.dumps(squad(is_impossible=True)))
    assert read_questions([tmp_path / "none.json"])[0]["answers"] == []


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_pairs, "a\tb\nno tab here\n", "line 2: expected source, tab and target"),
        (read_pairs, "", "an empty file"),
        (read_pairs, "a\t \n", "no pair with text on both sides"),
        (read_labelled, "words,mood\nx,1\n", "line 1: expected a header with a text column"),
        (read_labelled, "text,label\nx,1\ny\n", "line 3: expected 2 fields, got 1"),
        (read_labelled, "text,label\n,1\n", "example 1 has an empty text"),
        (read_labelled, "text,label\n", "a header and no example"),
        (read_labelled, 'text,label\n"x,1\n', "line 2: unexpected end of data"),
        (read_labelled, "(3 (2 It) works\n", "line 1: expected a labelled tree"),
        (read_questions, "{", "not JSON"),
        (read_questions, '{"data": [{"title": 1}]}', "not SQuAD's JSON"),
        (read_questions, '{"data": []}', "no question in it"),
        (read_questions, json.dumps(squad(is_impossible="false")), "question 7: is_impossible: expected true or false"),
        (read_labelled, "\n\nwords,mood\nx,1\n", "line 3: expected a header with a text column"),
        (read_questions, json.dumps(squad(start=3)), "question 7: the answer 'red' does not stand at character 3"),
    ],
)
def test_malformed_files_are_refused_by_name_and_line(tmp_path, read, content, message):
    path = tmp_path / "file.x"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read([path])
    assert "file.x" in str(caught.value)
    for damage, message in (
        (b"\xff\xfex", "not UTF-8 text"),
        (b"a\x00x", "a binary file"),
        (b" \n", "an empty file"),
    ):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {message}"):
            read([path])
    with pytest.raises(InputError, match="No such file"):
        read([tmp_path / "absent"])
    if read is not read_labelled:  # which takes folders of labelled texts
        with pytest.raises(InputError, match="Is a directory"):
            read([tmp_path])


def test_files_that_do_not_go_together_are_refused(tmp_path):
    (tmp_path / "a").write_text("x\ny\n")
    (tmp_path / "b").write_text("x\n")
    with pytest.raises(InputError, match="b: 1 lines do not match the 2 lines of"):
        read_pairs([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(InputError, match="got 3 files"):
        read_pairs([tmp_path / "a"] * 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="a folder for each label"):
        read_labelled([tmp_path / "empty"])


# Kept with a run


def labelled(count, labels=("a", "b")):
    return [{"text": f"text {i}", "label": labels[i % len(labels)]} for i in range(count)]


def test_one_in_ten_is_held_out_and_texts_stay_together():
    train, held = split_examples(labelled(40))
    assert [e["text"] for e in held] == ["text 9", "text 19", "text 29", "text 39"]
    assert len(train) == 36
    asked = [{"question": str(i), "context": f"context {i // 3}", "answers": []} for i in range(60)]
    train, held = split_examples(asked)
    assert {e["context"] for e in train}.isdisjoint(e["context"] for e in held)
    assert len(held) == 6
    for count in (2, 9):  # less than ten
        train, held = split_examples(labelled(count))
        assert (len(train), len(held)) == (count - 1, 1)
    with pytest.raises(InputError, match="cannot be split"):
        split_examples(labelled(1))


def test_examples_survive_and_damage_is_named(tmp_path, tokenizer):
    train, held = split_examples([*labelled(40), *labelled(3)])
    made = prepare_examples(tmp_path, "classify", "toy", train, held, tokenizer)
    assert made.labels == ("a", "b")
    assert open_examples(tmp_path).train.examples == made.train.examples
    assert "3 repeated examples left out" in made.describe()
    assert not {e["text"] for e in made.train.examples} & {e["text"] for e in made.validation.examples}
    known = prepare_examples(tmp_path / "known", "classify", "toy", train, [*held, *held[:1], *train[:2]], tokenizer)
    assert f"{len(made.validation)} held out" in known.describe()
    assert "3 held-out examples left out that are repeated or trained on" in known.describe()
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"train\.jsonl: damaged"):
        open_examples(tmp_path)
    with pytest.raises(InputError, match="at least two labels, got a"):
        prepare_examples(tmp_path, "classify", "toy", labelled(4, "a"), held, tokenizer)
    with pytest.raises(InputError, match="label 'c' is not among those trained on: a, b"):
        prepare_examples(tmp_path, "classify", "toy", train, [{"text": "x", "label": "c"}], tokenizer)
    with pytest.raises(InputError, match="every example is among those trained on"):
        prepare_examples(tmp_path, "classify", "toy", train, train[:2], tokenizer)
