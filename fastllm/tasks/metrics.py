"""How good predictions are: accuracy and F1, exact match and F1 of answers, BLEU and chrF."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..config import InputError


def confusion(labels: Sequence[int], predicted: Sequence[int], classes: int) -> np.ndarray:
    """(classes, classes) counts; row: the label, column: what was predicted."""
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (np.asarray(labels), np.asarray(predicted)), 1)
    return table


def f1_macro(labels: Sequence[int], predicted: Sequence[int], classes: int) -> float:
    """The mean over classes of 2 TP / (2 TP + FP + FN); a class that occurs on neither side is left out."""
    table = confusion(labels, predicted, classes)
    both = table.sum(0) + table.sum(1)
    return float(np.mean(2 * table.diagonal()[both > 0] / both[both > 0]))


def _normal(text: str) -> list[str]:
    """Words as SQuAD's scores compare them: lower case, without articles and punctuation."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def answer_scores(expected: Sequence[str], given: str) -> tuple[float, float]:
    """Exact match and F1 of words against the nearest of ``expected``; none expected: 1 for an empty answer."""
    best = (0.0, 0.0)
    for text in expected or [""]:
        a, b = _normal(text), _normal(given)
        if not a or not b:
            f1 = exact = float(a == b)
        else:
            shared = sum((Counter(a) & Counter(b)).values())
            exact, f1 = float(a == b), 2 * shared / (len(a) + len(b))
        best = (max(best[0], exact), max(best[1], f1))
    return best


def squad_scores(expected: Sequence[Sequence[dict]], given: Sequence[str]) -> dict[str, float]:
    """``exact_match`` and ``f1``, means over the questions, in [0, 1] (Rajpurkar et al. 2016)."""
    pairs = [answer_scores([a["text"] for a in answers], text) for answers, text in zip(expected, given, strict=True)]
    return {"exact_match": float(np.mean([p[0] for p in pairs])), "f1": float(np.mean([p[1] for p in pairs]))}


def translation_scores(references: Sequence[str], translations: Sequence[str]) -> dict[str, float]:
    """sacreBLEU's corpus ``bleu`` (Post 2018, its default 13a tokens) and ``chrf`` (Popovic 2015), 0 to 100.

    Raises:
        InputError: sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise InputError("BLEU and chrF are sacrebleu's: pip install 'fastllm[translate]'") from error
    bleu = sacrebleu.corpus_bleu(list(translations), [list(references)], force=True).score
    return {"bleu": bleu, "chrf": sacrebleu.corpus_chrf(list(translations), [list(references)]).score}
