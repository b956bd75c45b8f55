"""How good predictions are: accuracy and its interval, F1, exact match and F1 of answers, BLEU and chrF."""

from __future__ import annotations

import json
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..config import InputError

# sacrebleu's tokenizers that need no download; the first is its default.
TOKENIZERS = ("13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "none")
# The scripts that have no spaces between words, or whose words sacrebleu cuts finer -> the tokenizer for them.
SCRIPTS = {
    "HIRAGANA": "ja-mecab", "KATAKANA": "ja-mecab", "HANGUL": "ko-mecab", "CJK": "zh", "THAI": "char", "LAO": "char",
    "KHMER": "char", "MYANMAR": "char", "TIBETAN": "char",
}  # fmt: skip
# From this part of the letters on a text is in such a script; kana are a third of Japanese text and more (a guess).
PART = 0.2


def confusion(labels: Sequence[int], predicted: Sequence[int], classes: int) -> np.ndarray:
    """(classes, classes) counts; row: the label, column: what was predicted.

    Raises:
        ValueError: there are not as many of both, or one is no class.
    """
    if len(labels) != len(predicted):
        raise ValueError(f"labels and predicted: expected as many of both, got {len(labels)} and {len(predicted)}")
    for name, values in (("labels", labels), ("predicted", predicted)):
        if any(not 0 <= value < classes for value in values):
            raise ValueError(f"{name}: expected numbers from 0 to {classes - 1}, got {min(values)} to {max(values)}")
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (np.asarray(labels, np.int64), np.asarray(predicted, np.int64)), 1)
    return table


def f1_macro(labels: Sequence[int], predicted: Sequence[int], classes: int) -> float:
    """The mean over classes of 2 TP / (2 TP + FP + FN); a class that occurs on neither side is left out."""
    table = confusion(labels, predicted, classes)
    if not table.any():
        raise ValueError("labels: expected at least one, got none")
    both = table.sum(0) + table.sum(1)
    return float(np.mean(2 * table.diagonal()[both > 0] / both[both > 0]))


def _normal(text: str) -> list[str]:
    """Words as SQuAD's scores compare them: lower case, without articles and punctuation."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def wilson_interval(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a proportion ``right`` / ``total`` (Wilson 1927), within [0, 1]; 95% for the default ``z``.

    Raises:
        ValueError: not 0 <= right <= total, or total is 0.
    """
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"right and total must be 0 <= right <= total and total at least 1, got {right} and {total}")
    centre = (right + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * math.sqrt(right * (total - right) / total + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def answer_scores(expected: Sequence[str], given: str) -> tuple[float, float]:
    """Exact match and F1 of words against the nearest of ``expected``, by SQuAD 2.0's rule (Rajpurkar et al. 2018).

    Expected answers that normalise to nothing (articles and punctuation alone) do not count; where none
    is left, an answer that normalises to nothing is right.
    """
    best, wanted = (0.0, 0.0), [words for words in map(_normal, expected) if words]
    b = _normal(given)
    for a in wanted or [[]]:
        if not a or not b:
            f1 = exact = float(a == b)
        else:
            shared = sum((Counter(a) & Counter(b)).values())
            exact, f1 = float(a == b), 2 * shared / (len(a) + len(b))
        best = (max(best[0], exact), max(best[1], f1))
    return best


def squad_scores(expected: Sequence[Sequence[dict]], given: Sequence[str]) -> dict[str, float]:
    """``exact_match`` and ``f1``, means over the questions, in [0, 1].

    Where some questions have an answer and some have none, also each mean over either kind: ``answered_f1``,
    ``unanswerable_f1`` and so on, SQuAD 2.0's HasAns and NoAns.
    """
    if not given:
        raise ValueError("given: expected at least one answer, got none")
    pairs = [answer_scores([a["text"] for a in answers], text) for answers, text in zip(expected, given, strict=True)]
    kinds = {"": pairs}
    if 0 < sum(map(bool, expected)) < len(expected):
        for name, kind in (("answered_", True), ("unanswerable_", False)):
            kinds[name] = [pair for pair, answers in zip(pairs, expected, strict=True) if bool(answers) == kind]
    return {
        f"{name}{score}": float(np.mean([pair[column] for pair in some]))
        for name, some in kinds.items()
        for column, score in enumerate(("exact_match", "f1"))
    }


def _bleu_and_chrf(tokenize: str):
    """sacrebleu's BLEU and chrF.

    Raises:
        InputError: sacrebleu, or what it needs for ``tokenize``, is not installed; or there is no such tokenizer.
    """
    if tokenize not in TOKENIZERS:
        raise InputError(f"tokenize: expected one of {', '.join(TOKENIZERS)}; got {tokenize!r}")
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise InputError("BLEU and chrF are sacrebleu's: pip install 'fastllm[translate]'") from error
    try:
        return BLEU(tokenize=tokenize, force=True), CHRF()
    except (RuntimeError, ImportError) as error:
        extra = tokenize.partition("-")[0]
        raise InputError(f"tokenize: {tokenize} needs MeCab: pip install 'sacrebleu[{extra}]'") from error


def signatures(tokenize: str = "13a") -> dict[str, str]:
    """sacrebleu's signatures of ``bleu`` and ``chrf``: what a score has to be compared with.

    Raises:
        InputError: as for :func:`translation_scores`.
    """
    result = {}
    for name, metric in zip(("bleu", "chrf"), _bleu_and_chrf(tokenize), strict=True):
        # A signature has the number of references, which a metric knows after its first use.
        metric.corpus_score(["a"], [["a"]])
        result[name] = str(metric.get_signature())
    return result


def translation_scores(
    references: Sequence[str], translations: Sequence[str], tokenize: str = "13a"
) -> dict[str, float]:
    """sacreBLEU's corpus ``bleu`` (Post 2018) and ``chrf`` (Popovic 2015), 0 to 100.

    Args:
        tokenize: sacrebleu's name of BLEU's tokens, one of :data:`TOKENIZERS`.

    Raises:
        InputError: sacrebleu, or what it needs for ``tokenize``, is not installed; or there is no such tokenizer.
    """
    bleu, chrf = _bleu_and_chrf(tokenize)
    pair = (list(translations), [list(references)])
    return {"bleu": bleu.corpus_score(*pair).score, "chrf": chrf.corpus_score(*pair).score}


def _with_plain_numbers(metric) -> None:
    """Let ``metric`` score in Python's floats: a mean over NumPy's float32 and a float 0.0 is an error in Python."""
    compute = metric._compute_score_from_stats

    def plain(stats):
        score = compute(stats)
        score.score = float(score.score)
        return score

    metric._compute_score_from_stats = plain


def translation_intervals(
    references: Sequence[str], translations: Sequence[str], tokenize: str = "13a", resamples: int = 1000
) -> dict[str, tuple[float, float]]:
    """The 95% interval of each of :func:`translation_scores`: sacrebleu's, over sentences drawn with replacement.

    They are the mean of ``resamples`` scores and what lies 2.5% of them from it (Koehn 2004), always the same draws.

    Raises:
        InputError: as for :func:`translation_scores`.
    """
    result = {}
    for name, metric in zip(("bleu", "chrf"), _bleu_and_chrf(tokenize), strict=True):
        _with_plain_numbers(metric)
        score = metric.corpus_score(list(translations), [list(references)], n_bootstrap=resamples)
        found = json.loads(score.format(width=6, signature=str(metric.get_signature()), is_json=True))
        # It says neither where all of the drawn scores are 0.
        mean, half = found.get("confidence_mean", 0.0), found.get("confidence_var", 0.0)
        result[name] = (max(0.0, mean - half), min(100.0, mean + half))
    return result


def suggested_tokenizer(references: Sequence[str]) -> str:
    """The tokenizer for the language that most of ``references`` is in, by its script."""
    counts: Counter[str] = Counter()
    for character, count in Counter("".join(references)).items():
        if character.isalpha():
            counts[SCRIPTS.get(unicodedata.name(character, "").split(" ")[0].split("-")[0], "13a")] += count
    total = counts.total()
    # Japanese has Han characters too, so its own are asked for first.
    found = (name for name in ("ja-mecab", "ko-mecab", "zh", "char") if counts[name] > PART * total)
    return next(found, "13a")
