"""Readers of examples, features, scores, predictions."""

import json
import re
import sys

import pytest
import torch
from extras import needed

from fastllm.config import InputError
from fastllm.data import Tokenizer
from fastllm.data.tokenizer import SPECIAL_TOKENS
from fastllm.models import Encoder, EncoderDecoder, ModelConfig
from fastllm.tasks.answer import MAX_TOKENS, _likeliest, answers
from fastllm.tasks.classify import classify
from fastllm.tasks.features import span_features, text_ids, windows
from fastllm.tasks.metrics import (
    answer_scores,
    confusion,
    f1_macro,
    signatures,
    squad_scores,
    suggested_tokenizer,
    translation_intervals,
    translation_scores,
    wilson_interval,
)
from fastllm.tasks.read import read_labelled, read_pairs, read_questions
from fastllm.tasks.store import open_examples, prepare_examples, split_examples
from fastllm.tasks.translate import translate

TEXT = "The cat sees the big red house. What does the cat see? The answer is the house, of course. " * 4


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 300, special_tokens=SPECIAL_TOKENS["masked"])


def test_pairs_from_a_table_and_from_two_files(tmp_path):
    (tmp_path / "pairs.tsv").write_text("a cat\teine Katze\textra\n \tleer\nhouse\tHaus\r\n")
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


def test_scores_of_labels_by_hand():
    labels, predicted = [0, 0, 1, 1, 2], [0, 1, 1, 1, 0]
    assert confusion(labels, predicted, 4).tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert f1_macro(labels, predicted, 4) == pytest.approx((2 / 4 + 4 / 5 + 0) / 3)


@pytest.mark.parametrize(
    ("expected", "given", "scores"),
    [
        (["The Cat!"], "cat", (1, 1)),
        (["red house"], "a red, big house", (0, 2 * 2 / 5)),
        (["dog", "red house"], "house", (0, 2 / 3)),
        (["cat"], "", (0, 0)),
        ([], "", (1, 1)),
        ([], "cat", (0, 0)),
        # SQuAD 2.0: gold answers that normalise to nothing are left out; only such ones mean none.
        (["the", "cat"], "", (0, 0)),
        (["the", "cat"], "A.", (0, 0)),
        (["the", "cat"], "the cat", (1, 1)),
        (["The", "?!"], "", (1, 1)),
        (["The", "?!"], "an", (1, 1)),
        (["The"], "cat", (0, 0)),
    ],
)
def test_scores_of_answers_by_hand(expected, given, scores):
    assert answer_scores(expected, given) == pytest.approx(scores)
    assert squad_scores([[{"text": t} for t in expected]], [given])["f1"] == pytest.approx(scores[1])


def test_questions_with_and_without_an_answer_are_scored_apart():
    scores = squad_scores([[{"text": "red house"}], [], []], ["house", "", "cat"])
    assert scores == pytest.approx(
        {"exact_match": 1 / 3, "f1": (2 / 3 + 1) / 3, "answered_exact_match": 0, "answered_f1": 2 / 3,
         "unanswerable_exact_match": 0.5, "unanswerable_f1": 0.5}
    )  # fmt: skip
    assert set(squad_scores([[], []], ["", "cat"])) == {"exact_match", "f1"}


@pytest.mark.parametrize(
    ("right", "total", "interval"),
    # By hand from Wilson's formula; the first is also Newcombe's (1998) example for 81 of 263.
    [(81, 263, (0.2553, 0.3662)), (0, 20, (0.0, 0.1611)), (1, 1, (0.2065, 1.0)), (1530, 1821, (0.8227, 0.8563))],
)
def test_a_proportion_has_wilsons_interval(right, total, interval):
    assert wilson_interval(right, total) == pytest.approx(interval, abs=1e-4)
    with pytest.raises(ValueError, match="right and total"):
        wilson_interval(total + 1, total)
    with pytest.raises(ValueError, match="total at least 1"):
        wilson_interval(0, 0)


@pytest.mark.parametrize("tokenize", ["13a", "zh", "char", "intl"])
def test_bleu_is_by_the_tokens_asked_for(tokenize):
    sacrebleu = needed("sacrebleu", "translate")
    references, found = ["我喜欢红色的大房子。", "他今天来了"], ["我喜欢红色的房子。", "他今天不来"]
    theirs = sacrebleu.corpus_bleu(found, [references], tokenize=tokenize, force=True)
    assert translation_scores(references, found, tokenize)["bleu"] == pytest.approx(theirs.score)
    assert f"|tok:{tokenize}|" in signatures(tokenize)["bleu"]
    assert signatures(tokenize)["bleu"].startswith("nrefs:1|case:mixed|")
    assert signatures(tokenize)["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|")


def test_bleu_tokens_that_are_not_there_are_refused(monkeypatch):
    needed("sacrebleu", "translate")
    for name in ("MeCab", "mecab_ko"):
        monkeypatch.setitem(sys.modules, name, None)
    for tokenize in ("ja-mecab", "ko-mecab"):
        monkeypatch.delitem(sys.modules, f"sacrebleu.tokenizers.tokenizer_{tokenize.replace('-', '_')}", raising=False)
        with pytest.raises(
            InputError, match=rf"tokenize: {tokenize} needs MeCab: pip install 'sacrebleu\[{tokenize[:2]}"
        ):
            translation_scores(["a"], ["a"], tokenize)
    with pytest.raises(InputError, match=r"tokenize: expected one of 13a, .*; got 'words'"):
        translation_scores(["a"], ["a"], "words")


@pytest.mark.parametrize(
    ("text", "tokenize"),
    [
        ("The house is red, in 東京.", "13a"), ("我喜欢红色的大房子。", "zh"),
        ("私は赤い大きな家が好きです。", "ja-mecab"), ("나는 빨간 집을 좋아한다.", "ko-mecab"),
        ("ฉันชอบบ้านสีแดง", "char"), ("Мне нравится дом.", "13a"), ("", "13a"),
        ("カタカナ", "ja-mecab"),
    ],
)  # fmt: skip
def test_the_script_suggests_the_tokens(text, tokenize):
    assert suggested_tokenizer([text, text]) == tokenize


def test_scores_of_translations_are_sacrebleus():
    needed("sacrebleu", "translate")
    references = ["the cat sat on the mat today", "a red house stands there now"]
    assert translation_scores(references, references) == pytest.approx({"bleu": 100, "chrf": 100})
    scores = translation_scores(references, ["the cat sat on a mat today", "there is nothing"])
    assert 0 < scores["bleu"] < scores["chrf"] < 100


def test_intervals_of_translations_are_sacrebleus():
    sacrebleu = needed("sacrebleu", "translate")
    references = ["the cat sat on the mat today", "a red house stands there now", "two men walk", "one dog runs"]
    found = ["the cat sat on a mat today", "a house stands there now", "two men walk", "a dog is here"]
    intervals = translation_intervals(references, found, resamples=200)
    for name, (low, high) in intervals.items():
        assert 0 <= low < translation_scores(references, found)[name] < high <= 100
    theirs = sacrebleu.metrics.BLEU(force=True).corpus_score(found, [references], n_bootstrap=200)
    shown = re.search(r"μ = ([\d.]+) ± ([\d.]+)", str(theirs))
    mean, half = map(float, shown.groups())
    assert intervals["bleu"] == pytest.approx((mean - half, min(100, mean + half)), abs=0.02)
    assert translation_intervals(["a b c d e"], ["a b c d e"], resamples=10)["bleu"] == pytest.approx((100, 100))
    assert translation_intervals(["a b", "c"], ["d", "e"], resamples=10)["bleu"] == (0, 0)
    # Some of the drawn scores are 0 then, others are not.
    least, most = translation_intervals(["abcdefgh", "c"], ["abxxxxxxx", "e"], resamples=40)["chrf"]
    assert least < translation_scores(["abcdefgh", "c"], ["abxxxxxxx", "e"])["chrf"] <= most


def test_the_longest_span_has_as_many_tokens_as_its_bound():
    offsets = [(place, place + 1) for place in range(MAX_TOKENS + 1)]
    starts, ends = torch.zeros(2, len(offsets))
    starts[0], ends[MAX_TOKENS - 1], ends[MAX_TOKENS] = 20.0, 20.0, 30.0
    place = _likeliest(starts, ends, offsets)
    assert (place.first, place.last) == (offsets[0], offsets[MAX_TOKENS - 1])


def test_the_best_span_is_the_best_of_all_windows(tokenizer):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, context_length=24, num_layers=1, num_heads=2, hidden_size=16, segments=2,
        encoder="transformer", decoder="none", heads=("span",),
    )  # fmt: skip
    model = Encoder(config).eval()
    for p in model.requires_grad_(False).parameters():
        p.mul_(5)
    (found,) = answers(model, tokenizer, [("What?", TEXT)], rows=3)
    best = (-float("inf"), None)
    for window in windows("What?", TEXT, tokenizer, 24):
        segments = torch.tensor([window["segments"]])
        starts, ends = model.span_logits(model.encode(torch.tensor([window["tokens"]]), None, segments))
        starts, ends = starts[0].log_softmax(-1), ends[0].log_softmax(-1)
        for i, first in enumerate(window["_offsets"]):
            for j, last in enumerate(window["_offsets"]):
                if first and last and i <= j:
                    best = max(best, (float(starts[i] + ends[j]), TEXT[first[0] : last[1]].strip()))
    assert found.score == pytest.approx(best[0], abs=1e-5)
    assert found.text == best[1]
    assert TEXT[found.start : found.end] == found.text


def test_predictions_do_not_depend_on_their_batch_and_leave_the_model_alone(tokenizer):
    shape = dict(
        vocab_size=tokenizer.vocab_size, context_length=40, num_layers=1, num_heads=2, hidden_size=16, dropout=0.5
    )
    texts = ["The cat", "What does the cat see? The big red house", "red", "the house, of course"]
    judge = Encoder(ModelConfig(**shape, encoder="gru", decoder="none", heads=("classify",), labels=("a", "b")))
    table = classify(judge, tokenizer, texts, rows=3)
    torch.testing.assert_close(table.sum(1), torch.ones(4))
    for text, row in zip(texts, table, strict=True):
        torch.testing.assert_close(classify(judge, tokenizer, [text])[0], row, rtol=1e-4, atol=1e-5)
    model = EncoderDecoder(ModelConfig(**shape, encoder="gru"))
    for beams in (1, 3):
        together = translate(model, tokenizer, texts, beams=beams, rows=2)
        assert together == [translate(model, tokenizer, [text], beams=beams)[0] for text in texts]
    assert model.training
    assert judge.training


class SpanLogits(Encoder):
    """The n-th row that is asked for has the logit ``first_tokens[n]`` at its first token, and 0 at ``place``."""

    def __init__(self, config, first_tokens, place):
        super().__init__(config)
        self.first_tokens, self.place = iter(first_tokens), place

    def span_logits(self, encoded):
        logits = torch.full(encoded.states.shape[:2], -50.0)
        for row in logits:
            row[0], row[self.place] = next(self.first_tokens), 0.0
        return logits, logits


@pytest.mark.parametrize(("last", "answered"), [(1.0, False), (-0.5, True)])
def test_no_answer_is_one_where_the_first_token_is_likelier_in_every_window(tokenizer, last, answered):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, context_length=24, num_layers=1, num_heads=2, hidden_size=16,
        encoder="transformer", decoder="none", heads=("span",),
    )  # fmt: skip
    found = windows("What?", TEXT, tokenizer, config.context_length)
    assert len(found) > 1
    model = SpanLogits(config, [1.0] * (len(found) - 1) + [last], found[0]["segments"].index(1))
    (span,) = answers(model, tokenizer, [("What?", TEXT)], allow_none=True)
    assert bool(span.text) == answered
