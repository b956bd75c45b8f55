"""Texts as the arrays that models read."""

import pytest
from task_text import TEXT

from fastllm.tasks.features import span_features, text_ids, windows


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
