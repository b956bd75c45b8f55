"""Scores of predictions: by hand, and sacrebleu's."""

import re
import sys

import pytest
from extras import needed

from fastllm.config import InputError
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
