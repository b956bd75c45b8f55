"""The work cut into batches, and what is done to one: the same functions for every engine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...config import InputError
from ...time_limit import OutOfTime, time_limit
from ..clean import CleanConfig, Document, Rejection, clean
from ..clean.document import EXCERPT
from ..clean.encodings import decode_page, undecodable, utf_16
from ..clean.minhash import SIZE, exact_key, signature
from ..clean.passages import anchors, code_points, sentence_spans
from ..sources import SINGLE, Failure, Raw, SourceEntry, read
from ..sources.limits import one_line
from .config import PipelineConfig

# A batch is closed by whichever comes first. Guesses.
BATCH_BYTES = 4 << 20
BATCH_ITEMS = 256


@dataclass(frozen=True)
class Batch:
    """Some of the work, in order. The next batch begins at ``following``: a number in the plan, a record in it."""

    items: list[SourceEntry | Raw | Failure]
    following: tuple[int, int]


@dataclass
class BatchResult:
    """What a batch became. The kept documents' lines, keys, signatures, passages and sizes have the same order."""

    lines: list[bytes] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    signatures: list[np.ndarray] = field(default_factory=list)
    spans: list[np.ndarray] = field(default_factory=list)
    anchors: list[np.ndarray] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: BatchResult) -> None:
        for name in ("lines", "keys", "signatures", "spans", "anchors", "characters", "rejections"):
            getattr(self, name).extend(getattr(other, name))
        self.counts += other.counts

    def reject(self, rejection: Rejection) -> None:
        self.rejections.append(rejection)
        self.counts[f"rule {rejection.rule}"] += 1


def _weight(item: SourceEntry | Raw | Failure) -> int:
    return item.size if isinstance(item, SourceEntry) else len(item.content) if isinstance(item, Raw) else 100


def batches(
    plan: Sequence[SourceEntry | Failure], config: PipelineConfig, start: tuple[int, int] = (0, 0)
) -> Iterator[Batch]:
    """The plan's work from ``start`` on. A file that is one document is read by whoever cleans it, others here."""
    items: list[SourceEntry | Raw | Failure] = []
    size = 0
    for number in range(start[0], len(plan)):
        entry = plan[number]
        found: Iterable[SourceEntry | Raw | Failure] = [entry]
        single = isinstance(entry, Failure) or entry.format in SINGLE
        if not isinstance(entry, Failure) and not single:
            found = read(entry, config.limits, config.text_field)
        for record, item in enumerate(found):
            if number == start[0] and record < start[1]:
                continue
            items.append(item)
            size += _weight(item)
            if size >= BATCH_BYTES or len(items) >= BATCH_ITEMS:
                yield Batch(items, (number + 1, 0) if single else (number, record + 1))
                items, size = [], 0
    if items:
        yield Batch(items, (len(plan), 0))


def _text(raw: Raw) -> tuple[str, dict[str, str]]:
    """The text of ``raw``, and what is worth noting of its encoding."""
    wide = raw.content.startswith((b"\xff\xfe", b"\xfe\xff")) or utf_16(raw.content) is not None
    # More than one byte in a hundred: a guess.
    if raw.kind == "text" and not wide and raw.content.count(b"\0") > len(raw.content) // 100:
        raise ValueError("binary, not text")
    text, encoding = decode_page(raw.content, raw.encoding or ("utf-8" if raw.kind == "wikitext" else None))
    noted = {} if encoding == "utf-8" else {"encoding": encoding}
    # The character may also be the author's own.
    missing = undecodable(text) - (raw.content.count(b"\xef\xbf\xbd") if encoding == "utf-8" else 0)
    return text, {**noted, "undecodable": str(missing)} if missing > 0 else noted


def run_batch(
    items: Sequence[SourceEntry | Raw | Failure], cleaning: CleanConfig, config: PipelineConfig
) -> BatchResult:
    """Read what is to be read and clean everything: a pure function of the items, the settings and the files.

    Raises:
        InputError: a package that the settings need is missing. What a document does wrong rejects it instead.
    """
    result = BatchResult()
    for item in items:
        found = read(item, config.limits) if isinstance(item, SourceEntry) else [item]
        for part in found:
            result.counts["documents"] += 1
            if isinstance(part, Failure):
                result.reject(Rejection(part.id, part.reason, part.details))
            else:
                result.counts["bytes"] += len(part.content)
                _one(part, cleaning, config, result)
    return result


def document_line(record: Mapping[str, Any]) -> bytes:
    """A document as a shard holds it: one line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _one(raw: Raw, cleaning: CleanConfig, config: PipelineConfig, result: BatchResult) -> None:
    excerpt = raw.content[:EXCERPT].decode(errors="replace")
    try:
        with time_limit(config.document_seconds):
            text, noted = _text(raw)
            result.counts["undecodable"] += int(noted.get("undecodable", 0))
            outcome, masked = clean(Document(raw.id, text, raw.kind, {**raw.metadata, **noted}), cleaning)
            if isinstance(outcome, Document):
                near = signature(outcome.text) if config.near_duplicates else np.zeros(SIZE, np.uint32)
                spans = sentence_spans(outcome.text)[1] if config.sentence_dedup else None
                length = config.exact_substrings
                found = anchors(code_points(outcome.text), length) if length else None
    except InputError:
        raise
    except OutOfTime:
        result.reject(Rejection(raw.id, "too_slow", {"seconds": config.document_seconds}, excerpt))
        return
    except Exception as error:
        # A library that fails on one page of a billion must not end the run; the reject tells of it.
        result.reject(Rejection(raw.id, "failed", {"error": one_line(error)}, excerpt))
        return
    if isinstance(outcome, Rejection):
        result.reject(outcome)
        return
    record = {"id": outcome.id, "text": outcome.text, **({"metadata": outcome.metadata} if outcome.metadata else {})}
    result.lines.append(document_line(record))
    result.keys.append(exact_key(outcome.text))
    result.signatures.append(near)
    if spans is not None:
        result.spans.append(spans)
    if found is not None:
        result.anchors.append(found)
    result.characters.append(len(outcome.text))
    for name, count in masked.items():
        result.counts[f"masked {name}"] += count
