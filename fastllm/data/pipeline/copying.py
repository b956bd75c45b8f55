"""Shards written without what occurs again: whole documents, and passages in those that stay."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...files import whole_file
from ..clean import Rejection
from ..clean.cutting import cut, whole_words
from ..clean.document import EXCERPT
from ..clean.words import words_of
from .config import PipelineConfig
from .duplicates import Duplicates
from .passages import Ranges, RepeatedSentences, RepeatedSubstrings, sentence_ranges, without_overlaps
from .shards import Shards, compress, rejection_line
from .work import document_line


class WithoutRepeats:
    """Copies shards but for their duplicates and repeated passages, which go to ``rejected``, and counts those.

    Shards are copied in order.
    """

    def __init__(self, shards: Shards, config: PipelineConfig, duplicates: Duplicates, counts: Counter[str]):
        self.shards, self.config, self.duplicates, self.counts = shards, config, duplicates, counts
        # The documents that others repeat, and those of the shards copied so far by their names.
        self.repeated = duplicates.repeated()
        self.ids: dict[int, str] = {}
        work, length = shards.work, config.exact_substrings
        self.sentences = RepeatedSentences(work, duplicates) if config.sentence_dedup else None
        self.substrings = RepeatedSubstrings(work, duplicates, length) if length else None

    def copy(self, number: int, target: Path, size: int) -> tuple[int, np.ndarray]:
        """Write what stays of shard ``number``, which holds ``size`` bytes of text, to ``target``, if anything does.

        Returns:
            The bytes of text that were kept, and the characters of each document.
        """
        source = self.shards.work / f"text-{number:05d}.jsonl.gz"
        keep = self.duplicates.kept(number)
        sizes = np.load(self.shards.work / f"characters-{number:05d}.npy")
        spans = dict(self.sentences.of_shard(number)) if self.sentences else {}
        passages = dict(self.substrings.of_shard(number)) if self.substrings else {}
        begin = int(self.duplicates.starts[number])
        named = self.repeated & set(range(begin, begin + len(keep)))
        if keep.all() and not (named or spans or passages):
            if len(keep):
                with whole_file(target) as file, open(source, "rb") as content:
                    shutil.copyfileobj(content, file)
            return size, sizes
        rejected: dict[str, list[bytes]] = {}
        written = 0

        def kept() -> Iterator[bytes]:
            nonlocal written
            with gzip.open(source, "rb") as lines:
                for own, line in enumerate(lines):
                    if begin + own in named:
                        self.ids[begin + own] = json.loads(line)["id"]
                    if not keep[own]:
                        self._reject(self._duplicate(begin + own, line), rejected)
                        continue
                    if own in spans or own in passages:
                        line, sizes[own] = self._without_passages(line, spans.get(own), passages.get(own, []), rejected)
                        keep[own] = bool(line)
                    written += len(line)
                    if line:
                        yield line

        lines = kept()
        start = next(lines, None)
        if start is not None:
            compress(target, itertools.chain([start], lines))
        for rule, rejects in rejected.items():
            self.shards.write_rejected(rule, number, rejects)
        return written, sizes[keep]

    def _reject(self, rejection: Rejection, rejected: dict[str, list[bytes]]) -> None:
        rejected.setdefault(rejection.rule, []).append(rejection_line(rejection))
        self.counts[f"rule {rejection.rule}"] += 1

    def _duplicate(self, own: int, line: bytes) -> Rejection:
        document = json.loads(line)
        rule = "exact_duplicate" if self.duplicates.exact[own] else "near_duplicate"
        first = self.ids[int(self.duplicates.first[own])]
        return Rejection(document["id"], rule, {"of": first}, document["text"][:EXCERPT])

    def _without_passages(
        self, line: bytes, spans: np.ndarray | None, passages: Ranges, rejected: dict[str, list[bytes]]
    ) -> tuple[bytes, int]:
        """The line without its repeated passages and the characters of its text; nothing if too few words are left."""
        document = json.loads(line)
        text = document["text"]
        found = {
            "repeated_sentences": [] if spans is None else sentence_ranges(text, spans),
            "repeated_substrings": [r for r in (whole_words(text, *r) for r in passages) if r[0] < r[1]],
        }
        every = without_overlaps(sorted(itertools.chain(*found.values())))
        if not every:
            return line, len(text)
        rest = cut(text, every)
        words = len(words_of(rest).words)
        if words < self.config.min_doc_words:
            least = {"words": words, "least": self.config.min_doc_words}
            self._reject(Rejection(document["id"], "too_short", least, text[:EXCERPT]), rejected)
            return b"", 0
        for rule, ranges in found.items():
            if ranges:
                characters = sum(end - begin for begin, end in ranges)
                self.counts[f"documents {rule}"] += 1
                self.counts[f"passages {rule}"] += len(ranges)
                self.counts[f"characters {rule}"] += characters
                excerpt = "\n\n".join(text[begin:end].strip() for begin, end in ranges)[:EXCERPT]
                details = {"passages": len(ranges), "characters": characters}
                removed = Rejection(document["id"], rule, details, excerpt)
                rejected.setdefault(rule, []).append(rejection_line(removed))
        return document_line({**document, "text": rest}), len(rest)
