"""What cleaning leaves on the disk, shard by shard: written whole, and counted only once a last file says so."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ...files import whole_file, write_text
from ..clean import Rejection
from ..clean.minhash import BANDS, SIZE, band_keys
from ..clean.passages import ANCHOR
from .config import PipelineConfig
from .work import BatchResult

_NUMBER = re.compile(r"(\d{5})\.")


def compress(path: Path, lines: Iterable[bytes]) -> None:
    """Write ``lines`` as gzip, whole or not at all; the same lines give the same bytes."""
    with whole_file(path) as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as stream:
        for line in lines:
            stream.write(line)


def rejection_line(rejection: Rejection) -> bytes:
    """A line of JSON for the file of what was rejected."""
    record = {"id": rejection.id, "rule": rejection.rule, **rejection.details, "text": rejection.excerpt}
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _joined(name: str, parts: list[np.ndarray], dtype: np.dtype) -> dict[str, np.ndarray]:
    counts = np.array([len(part) for part in parts], np.int64)
    return {name: np.concatenate([np.zeros(0, dtype), *parts]), f"{name}_count": counts}


class Shards:
    """The folder of a run: ``work`` for what is still to be compared, ``rejected`` for what is out.

    Shard k is ``work/text-k.jsonl.gz`` with ``work/key-k.npy`` (16 bytes of SHA-256), ``work/characters-k.npy`` and,
    for near duplicates, ``work/signature-k.npy`` and ``work/band-k.npy``; for repeated passages ``work/span-k.npy`` and
    ``work/anchor-k.npy``, with how many each document has in ``work/span_count-k.npy`` and ``work/anchor_count-k.npy``;
    and ``rejected/RULE/k.jsonl.gz``.
    ``work/done-k.json`` comes last.
    """

    def __init__(self, folder: Path, config: PipelineConfig):
        self.folder, self.work = folder, folder / "work"
        self._config = config
        self._number = 0
        self._pending = BatchResult()
        self._size = 0

    def recover(self) -> tuple[int, int]:
        """Where to go on: what comes after the last whole shard. Files beyond it are removed."""
        following = (0, 0)
        while (path := self.work / f"done-{self._number:05d}.json").exists():
            following = tuple(json.loads(path.read_text("utf-8"))["following"])
            self._number += 1
        for path in [*self.work.glob("*"), *(self.folder / "rejected").glob("*/*")]:
            number = _NUMBER.search(path.name)
            if path.name.endswith(".tmp") or (number and int(number[1]) >= self._number):
                path.unlink()
        return following

    def add(self, result: BatchResult, following: tuple[int, int], limit: int) -> None:
        """Take a batch's result; write a shard when ``limit`` bytes of text, or of rejects, have come together."""
        self._pending.add(result)
        self._size += sum(map(len, result.lines))
        rejected = sum(len(r.excerpt) + 200 for r in self._pending.rejections)
        if self._size >= limit or rejected >= limit:
            self.flush(following)

    def flush(self, following: tuple[int, int]) -> None:
        """Write what has come together, if anything has."""
        pending, number = self._pending, f"{self._number:05d}"
        if not pending.counts and not pending.lines:
            return
        compress(self.work / f"text-{number}.jsonl.gz", pending.lines)
        arrays = {
            "key": np.frombuffer(b"".join(pending.keys), np.uint64).reshape(-1, 2),
            "characters": np.asarray(pending.characters, np.int64),
        }
        if self._config.near_duplicates:
            signatures = np.asarray(pending.signatures, np.uint32).reshape(-1, SIZE)
            # Band after band, so that one of them is read in one go.
            bands = np.ascontiguousarray(band_keys(signatures).reshape(-1, BANDS).T)
            arrays |= {"signature": signatures, "band": bands}
        if self._config.sentence_dedup:
            arrays |= _joined("span", pending.spans, np.dtype(np.uint64))
        if self._config.exact_substrings:
            arrays |= _joined("anchor", pending.anchors, ANCHOR)
        for name, values in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, values)
            with whole_file(self.work / f"{name}-{number}.npy") as file:
                file.write(buffer.getbuffer())
        by_rule: dict[str, list[bytes]] = {}
        for rejection in pending.rejections:
            by_rule.setdefault(rejection.rule, []).append(rejection_line(rejection))
        for rule, lines in by_rule.items():
            self.write_rejected(rule, self._number, lines)
        done = {
            "following": following,
            "documents": len(pending.lines),
            "text_bytes": self._size,
            "counts": dict(sorted(pending.counts.items())),
        }
        write_text(self.work / f"done-{number}.json", json.dumps(done) + "\n")
        self._number += 1
        self._pending, self._size = BatchResult(), 0

    def write_rejected(self, rule: str, number: int, lines: Iterable[bytes]) -> None:
        folder = self.folder / "rejected" / rule
        folder.mkdir(parents=True, exist_ok=True)
        compress(folder / f"{number:05d}.jsonl.gz", lines)

    def done(self) -> list[dict[str, Any]]:
        """What each whole shard's last file says."""
        return [json.loads(path.read_text("utf-8")) for path in sorted(self.work.glob("done-*.json"))]

    def counts(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for shard in self.done():
            total.update(shard["counts"])
        return total
