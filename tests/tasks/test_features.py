"""Texts as the arrays that models read."""

import pytest
from task_text import TEXT

from fastllm.tasks.features import (
    answer_features,
    answer_ids,
    pair_features,
    span_features,
    text_ids,
    windows,
)
from fastllm.tasks.show import marked


def test_long_texts_keep_their_beginning_and_end(tokenizer):
    ids = tokenizer.encode(TEXT)
    made = text_ids(TEXT, tokenizer, 18)
    assert made == [tokenizer.special("cls"), *ids[:12], *ids[-4:], tokenizer.special("sep")]
    assert len(text_ids("The", tokenizer, 18)) < 18


@pytest.mark.parametrize("context", [16, 24, 200])
def test_an_answers_tokens_decode_to_it_in_every_window_that_holds_it(tokenizer, context):
    start = TEXT.index("the house, of course")
    example = {"question": "What?", "context": TEXT, "answers": [{"text": "the house", "start": start}]}
    features = span_features([example], tokenizer, context)
    found = 0
    for row in features.rows:
        assert len(row["tokens"]) <= context
        if row["end"]:
            assert tokenizer.decode(row["tokens"][row["start"] : row["end"] + 1]).strip() == "the house"
            found += 1
    assert found >= 1
    # Every character of the text lies in some window.
    covered = set()
    for window in windows("What?", TEXT, tokenizer, context):
        for offset in window["_offsets"]:
            covered |= set(range(*offset)) if offset else set()
    assert covered >= {i for i, c in enumerate(TEXT) if not c.isspace()}


def test_a_text_that_fills_the_room_is_one_window(tokenizer):
    room = len(tokenizer.encode(TEXT))
    around = len(tokenizer.encode("What?")) + 3
    assert len(windows("What?", TEXT, tokenizer, room + around)) == 1
    first, second = windows("What?", TEXT, tokenizer, room + around - 1)
    assert first["tokens"][-2] != second["tokens"][-2] == tokenizer.encode(TEXT)[-1]


def test_a_long_question_takes_half_of_the_context(tokenizer):
    asked = tokenizer.encode(TEXT)[:12]
    for window in windows(TEXT, "red cat", tokenizer, 24):
        assert window["tokens"][1:13] == asked
        assert window["tokens"][13] == tokenizer.special("sep")


def test_a_window_that_lacks_a_part_of_the_answer_lacks_it(tokenizer):
    begin, end = 100, 150
    answer = {"text": TEXT[begin:end], "start": begin}
    rows = span_features([{"question": "What?", "context": TEXT, "answers": [answer]}], tokenizer, 40).rows
    spans = [[o for o in row["_offsets"] if o] for row in rows]
    whole = [span[0][0] <= begin and span[-1][1] >= end for span in spans]
    # Some windows begin within the answer, and some end there.
    assert any(begin < span[0][0] < end for span in spans)
    assert any(begin < span[-1][1] < end for span in spans)
    assert any(whole)
    assert [row["end"] > 0 for row in rows] == whole


def test_pairs_and_answers_that_just_fit_are_kept(tokenizer):
    pair = {"source": "The cat sees", "target": "the red house"}
    length = 1 + max(len(tokenizer.encode(text)) for text in pair.values())
    assert len(pair_features([pair], tokenizer, length)) == 1
    assert len(pair_features([pair], tokenizer, length - 1)) == 0
    example = {"parts": [["The cat", False], [" sees", True]], "templated": False}
    length = len(answer_ids(example, tokenizer)[0]) - 1
    assert len(answer_features([example], tokenizer, length)) == 1
    assert len(answer_features([example], tokenizer, length - 1)) == 0


@pytest.mark.parametrize(
    ("start", "end", "shown"),
    [(0, 2, "[ab]cde..."), (3, 5, "abc[de]fgh"), (4, 6, "...bcd[ef]gh"), (6, 8, "...def[gh]"), (0, 0, "[]abc...")],
)
def test_a_span_is_shown_between_what_stands_around_it(start, end, shown):
    assert marked("abcdefgh", start, end, around=3) == shown
