"""Minimal pairs: does a language model find the grammatical sentence of two the likelier one (BLiMP)?"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ..config import InputError, check_encodable
from ..data import Tokenizer, evaluation_windows
from ..data.corpus import lines_of, read_text
from ..models.mode import evaluation_mode
from .features import padded

# Logits held at once: 2^24 are 64 MiB in fp32. A guess.
LOGITS = 1 << 24


@dataclass(frozen=True)
class Paradigm:
    """A file of BLiMP's: ``name`` (its UID), ``term`` (the phenomenon), pairs of a good sentence and a bad one."""

    name: str
    term: str
    pairs: list[tuple[str, str]]


def read_blimp(folder: str | Path) -> list[Paradigm]:
    """The paradigms of BLiMP as it is given out (Warstadt et al. 2020): ``*.jsonl``, in ``folder`` or in its ``data``.

    Raises:
        InputError: there is none, or a line has no pair of sentences; names the file and the line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"blimp: {folder}: no such folder")
    paths = sorted(folder.glob("*.jsonl*")) or sorted((folder / "data").glob("*.jsonl*"))
    if not paths:
        raise InputError(f"blimp: {folder}: no .jsonl file in it")
    return [_paradigm(path) for path in paths]


def _paradigm(path: Path) -> Paradigm:
    pairs, first = [], None
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            record = json.loads(line)
            pair = (record["sentence_good"], record["sentence_bad"])
            names = [str(record.get(key) or path.name.partition(".")[0]) for key in ("UID", "linguistics_term")]
            for text in (*pair, *names):
                check_encodable(text, where)
            if not all(sentence.strip() for sentence in pair):
                raise InputError(f"{where}: an empty sentence")
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{where}: expected JSON with sentence_good and sentence_bad: {error!r}") from error
        pairs.append(pair)
        first = first or names
    assert first is not None, "read_text refuses a file of blank lines"
    name, phenomenon = first
    return Paradigm(name, phenomenon, pairs)


class _Window(NamedTuple):
    """A part of the sentence ``number``: ``ids``, of which those after the first ``skip`` + 1 are scored."""

    number: int
    ids: list[int]
    skip: int


@torch.no_grad()
def log_probabilities(model, tokenizer: Tokenizer, sentences: Sequence[str]) -> list[float]:
    """ln p of each sentence: the sum over all its tokens, after an end-of-text token.

    Beyond the model's context a token sees at least half a context before it. No end is scored.

    Args:
        model: a language model of :mod:`fastllm.models`; it is run in evaluation mode and left as it was.
    """
    context = model.config.context_length
    device = model.head.weight.device
    left: list[_Window] = []
    for number, sentence in enumerate(sentences):
        ids = [tokenizer.end_of_text, *tokenizer.encode(sentence)]
        for window in evaluation_windows(len(ids), context, max(1, context // 2)):
            left.append(_Window(number, ids[window.start : window.start + window.length + 1], window.skip))
    left.sort(key=lambda window: len(window.ids))
    result = [0.0] * len(sentences)
    with evaluation_mode(model):
        while left:
            # The longest of a part is its last; the part is as large as LOGITS allows.
            part = left[-max(1, LOGITS // (len(left[-1].ids) * model.config.vocab_size)) :]
            del left[-len(part) :]
            tokens = padded([window.ids for window in part], tokenizer.end_of_text).to(device)
            scored = torch.zeros(len(part), tokens.shape[1] - 1, dtype=torch.bool)
            for mask, window in zip(scored, part, strict=True):
                mask[window.skip : len(window.ids) - 1] = True
            logits = model(tokens[:, :-1]).float()
            chosen = logits.gather(-1, tokens[:, 1:, None])[..., 0] - logits.logsumexp(-1)
            sums = chosen.double().masked_fill(~scored.to(device), 0.0).sum(-1).tolist()
            for window, value in zip(part, sums, strict=True):
                result[window.number] += value
    return result


def blimp_scores(model, tokenizer: Tokenizer, paradigms: Sequence[Paradigm]) -> tuple[dict, list[dict]]:
    """BLiMP's scores, and both log-probabilities of each pair.

    ``blimp``: the mean over paradigms of the part of pairs whose good sentence is strictly the likelier one; ``terms``
    and ``paradigms``: that part, by name; ``right`` of ``pairs``; ``bits_per_byte`` of the good sentences.
    """
    pairs = [(paradigm, *pair) for paradigm in paradigms for pair in paradigm.pairs]
    found = log_probabilities(model, tokenizer, [sentence for _, *pair in pairs for sentence in pair])
    rows, by_paradigm, by_term = [], {}, {}
    for (paradigm, good, bad), good_score, bad_score in zip(pairs, found[::2], found[1::2], strict=True):
        right = good_score > bad_score
        by_paradigm.setdefault(paradigm.name, []).append(right)
        by_term.setdefault(paradigm.term, []).append(right)
        rows.append({"paradigm": paradigm.name, "good": good, "bad": bad, "log_probability_good": good_score,
                     "log_probability_bad": bad_score})  # fmt: skip
    parts = {name: sum(some) / len(some) for name, some in by_paradigm.items()}
    size = sum(len(good.encode()) for _, good, _ in pairs)
    scores = {
        "pairs": len(pairs),
        "blimp": sum(parts.values()) / len(parts),
        "right": sum(map(sum, by_paradigm.values())),
        "bits_per_byte": -sum(found[::2]) / math.log(2) / size,
        "terms": {name: sum(some) / len(some) for name, some in by_term.items()},
        "paradigms": parts,
    }
    return scores, rows
