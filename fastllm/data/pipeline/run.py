"""``fastllm prepare``: sources in, shards of clean text and a report out.

1. Plan: the files, in order (``work/plan.jsonl``).
2. Clean: batches of documents through the pure functions, in several processes or on Ray; shards in the plan's order.
3. Compare: exact and near duplicates among all that was kept, then repeated passages.
4. Write: the shards without what occurs again, ``report.json``, ``report.html`` and, last, ``prepared.json``.

A run that was killed goes on after its last whole shard, and leaves the very bytes that it would have left undisturbed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...config import InputError
from ...files import read_json, write_text
from ...locks import lock as take_lock
from ...other_work import cores
from ..clean import CleanConfig
from ..digest import file_sha256
from ..prepared import PREPARED
from ..sources import Failure, SourceEntry, plan_sources
from ..sources.limits import MIB
from .config import PipelineConfig
from .copying import WithoutRepeats
from .duplicates import find_duplicates
from .pool import Pool
from .report import write_report
from .shards import Shards
from .work import Batch, BatchResult, batches, run_batch

# No machine has cores for more processes than this.
MOST_WORKERS = 1024
# A report of a large corpus: longer than files that describe a run may be. A guess.
REPORT_LIMIT = 1 << 30
Tell = Callable[[float, str], None]


def prepare_text(
    sources: Sequence[str], out: str | Path, cleaning: CleanConfig | None = None,
    config: PipelineConfig | None = None, *, workers: int | None = None, engine: str = "local",
    tell: Tell = lambda done, text: None,
) -> dict[str, Any]:  # fmt: skip
    """Prepare ``sources`` into the folder ``out``, or go on where a run with the same settings stopped there.

    Args:
        workers: number of processes that clean; None: one for each core, 0: this one.
        engine: ``local``, or ``ray`` for the Ray cluster that RAY_ADDRESS names (else one on this machine).
        tell: called now and then with the share that is done and a line of text.

    Returns:
        The report, as ``report.json`` has it.

    Raises:
        InputError: a source is missing, ``out`` holds something else, a package is missing.
        OSError: ``out`` cannot be written.
    """
    out = Path(out)
    cleaning, config = cleaning or CleanConfig(), config or PipelineConfig()
    if engine not in ("local", "ray"):
        raise InputError(f"engine: expected local or ray, got {engine!r}")
    if workers is not None and not 0 <= workers <= MOST_WORKERS:
        raise InputError(f"workers: expected 0 to {MOST_WORKERS}, got {workers}")
    named = [str(source) for source in sources]
    settings = {"sources": named, **asdict(cleaning), **cleaning.contents(), **asdict(config)}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if (out / PREPARED).exists():
        if read_json(out / PREPARED, REPORT_LIMIT).get("key") != key:
            raise InputError(f"{out}: holds text that was prepared with other settings; choose another --out")
        # A run that was killed at its very end.
        shutil.rmtree(out / "work", ignore_errors=True)
        return read_json(out / "report.json", REPORT_LIMIT)
    with _locked(out):
        work = _plan(sources, out, config, key)
        shards = Shards(out, config)
        start = shards.recover()
        results = _results(batches(work, config, start), cleaning, config, workers, engine)
        _clean(results, work, start, shards, config, tell)
        tell(1.0, "comparing documents")
        return _finish(out, shards, config, settings, key)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Make ``out`` and keep other runs off it; what a killed run was writing is removed."""
    if out.exists() and not (out / "work").exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already, and is no unfinished run of fastllm prepare; choose another --out")
    new = not out.exists()
    try:
        (out / "work").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot write there: {error.strerror}") from error
    with open(out / "work" / "lock", "w") as lock:
        if not take_lock(lock, inherited=True):
            raise InputError(f"{out}: another fastllm prepare is at work there")
        for path in out.rglob(".*.tmp"):
            path.unlink()
        try:
            yield
        except BaseException:
            if new and not (out / "work" / "plan.jsonl").exists():
                shutil.rmtree(out)
            raise


def _plan(sources: Sequence[str], out: Path, config: PipelineConfig, key: str) -> list[SourceEntry | Failure]:
    """The plan of a run that is gone on with, or a new one."""
    path = out / "work" / "plan.jsonl"
    if path.exists():
        header, *lines = path.read_text("utf-8").splitlines()
        if json.loads(header)["key"] != key:
            raise InputError(f"{out}: holds an unfinished run with other settings; choose another --out, or remove it")
        return [SourceEntry(**item) if "path" in item else Failure(**item) for item in map(json.loads, lines)]
    inside = out.resolve()
    entries, failures = plan_sources(sources, config.format)
    # The output may lie inside a source.
    entries = [entry for entry in entries if not Path(entry.path).resolve().is_relative_to(inside)]
    work = [*failures, *entries]
    lines = [json.dumps({"key": key}), *(json.dumps(asdict(item)) for item in work)]
    write_text(path, "\n".join(lines) + "\n")
    return work


def _results(
    work: Iterator[Batch], cleaning: CleanConfig, config: PipelineConfig, workers: int | None, engine: str
) -> Iterator[tuple[Batch, BatchResult]]:
    if engine == "ray":
        from .on_ray import results

        yield from results(work, cleaning, config)
        return
    if workers is None:
        workers = cores()
    if workers == 0:
        for batch in work:
            yield batch, run_batch(batch.items, cleaning, config)
        return
    with Pool(workers, cleaning, config) as pool:
        yield from pool.results(work)


def _clean(
    results: Iterator[tuple[Batch, BatchResult]], work: list[SourceEntry | Failure], start: tuple[int, int],
    shards: Shards, config: PipelineConfig, tell: Tell,
) -> None:  # fmt: skip
    sizes = np.cumsum([0, *(item.size if isinstance(item, SourceEntry) else 0 for item in work)])
    total, begin = max(1, int(sizes[-1])), time.monotonic()
    counts: Counter[str] = Counter()
    following = start
    for batch, result in results:
        following = batch.following
        counts += result.counts
        counts["kept"] += len(result.lines)
        shards.add(result, following, config.shard_mb * MIB)
        seconds = max(1e-9, time.monotonic() - begin)
        tell(
            sizes[min(following[0], len(work))] / total,
            f"{counts['documents']:,} documents, {counts['kept']:,} kept, {counts['documents'] / seconds:,.0f} docs/s, "
            f"{counts['bytes'] / seconds / 1e6:,.1f} MB/s",
        )
    shards.flush(following)


def _finish(out: Path, shards: Shards, config: PipelineConfig, settings: dict[str, Any], key: str) -> dict[str, Any]:
    """Write the shards without what occurs again, the reports, and last the file that makes the folder whole."""
    written, counts = shards.done(), shards.counts()
    duplicates = find_duplicates(shards.work, config.near_duplicates, config.similarity)
    remove = WithoutRepeats(shards, config, duplicates, counts)
    files: list[dict[str, Any]] = []
    kept_sizes: list[np.ndarray] = []
    (out / "text").mkdir(exist_ok=True)
    for number, shard in enumerate(written):
        target = out / "text" / f"{len(files):05d}.jsonl.gz"
        size, characters = remove.copy(number, target, shard["text_bytes"])
        if len(characters):
            files.append({"name": f"text/{target.name}", "documents": len(characters), "bytes": size})
            kept_sizes.append(characters)
    sizes = np.concatenate(kept_sizes) if kept_sizes else np.zeros(0, np.int64)
    for file in files:
        file["sha256"] = file_sha256(out / file["name"])
    report = write_report(out, settings, counts, sizes)
    manifest = {
        "key": key, "documents": len(sizes), "characters": int(sizes.sum()),
        "bytes": sum(file["bytes"] for file in files), "shards": files,
    }  # fmt: skip
    write_text(out / PREPARED, json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(shards.work)
    return report
