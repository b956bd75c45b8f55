"""The folder of a run of ``fastllm prepare``: where it goes on, when a shard is full, and what stays in one."""

import gzip
import json

import numpy as np
import pytest
from extras import needed

from fastllm.data.clean import CleanConfig, Rejection
from fastllm.data.pipeline import PipelineConfig, prepare_text, work
from fastllm.data.pipeline.shards import Shards
from fastllm.data.pipeline.work import BatchResult, batches, document_line
from fastllm.data.sources import SourceEntry

needed("ftfy", "data")

CONFIG = PipelineConfig(near_duplicates=False)


def kept(*texts):
    result = BatchResult()
    for text in texts:
        result.lines.append(document_line({"id": text, "text": text}))
        result.keys.append(bytes(16))
        result.characters.append(len(text))
        result.counts["documents"] += 1
    return result


def rejected(count):
    result = BatchResult()
    for number in range(count):
        result.reject(Rejection(str(number), "too_short", {}, ""))
    return result


def test_a_killed_run_goes_on_after_its_last_whole_shard(tmp_path):
    (tmp_path / "work").mkdir()
    first = Shards(tmp_path, CONFIG)
    first.add(kept("a"), (1, 0), 1)
    second = rejected(1)
    second.add(kept("b"))
    first.add(second, (2, 5), 1)
    whole = {path for path in tmp_path.rglob("*") if path.is_file()}
    # What a third shard left before it was named whole.
    for name in ("work/text-00002.jsonl.gz", "work/key-00003.npy", "work/.key-00002.npy.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "rejected" / "too_short" / "00002.jsonl.gz").write_bytes(b"half")
    again = Shards(tmp_path, CONFIG)
    assert again.recover() == (2, 5)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == whole
    again.add(kept("c"), (3, 0), 1)
    assert [shard["following"] for shard in again.done()] == [[1, 0], [2, 5], [3, 0]]
    assert again.counts()["documents"] == 3


@pytest.mark.parametrize("make", [lambda: kept("x" * 40), lambda: rejected(1)])
def test_a_shard_is_written_once_text_or_rejects_fill_it(tmp_path, make):
    (tmp_path / "work").mkdir()
    shards = Shards(tmp_path, CONFIG)
    for number in range(9):
        shards.add(make(), (number + 1, 0), 200)
    written = shards.done()
    assert 1 < len(written) <= 9
    shards.flush((9, 0))
    assert shards.done()[-1]["following"] == [9, 0]
    names = [path.name for path in sorted((tmp_path / "work").glob("text-*"))]
    assert names == [f"text-{number:05d}.jsonl.gz" for number in range(len(shards.done()))]


def test_the_work_that_is_left_is_what_comes_after_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "BATCH_ITEMS", 3)
    plan = []
    for number, count in enumerate((4, 1, 7)):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{number} {record}"}) + "\n" for record in range(count)))
        plan.append(SourceEntry(str(path), path.name, "jsonl", path.stat().st_size))
    plan.insert(1, SourceEntry(str(tmp_path / "0.jsonl"), "single", "text", 9))
    every = list(batches(plan, CONFIG))
    assert sum(len(batch.items) for batch in every) == 4 + 1 + 1 + 7
    for number, batch in enumerate(every):
        rest = [item for later in every[number + 1 :] for item in later.items]
        assert [item for later in batches(plan, CONFIG, batch.following) for item in later.items] == rest


@pytest.mark.parametrize(("least", "stays"), [(12, True), (13, False)])
def test_a_text_that_loses_a_passage_stays_with_just_enough_words(tmp_path, least, stays):
    shared = " ".join(f"This sentence number {number} is the same in both of them." for number in range(3))
    texts = [f"{shared}\n\n{' '.join(f'{name}{word}' for word in range(12))}" for name in ("first", "second")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PipelineConfig(near_duplicates=False, sentence_dedup=True, min_doc_words=least)
    report = prepare_text(
        [str(tmp_path / "in.jsonl")], tmp_path / "out", CleanConfig(rules=("none",), repair=False), config, workers=0
    )
    assert report["rejected"] == ({} if stays else {"too_short": 1})
    lines = gzip.decompress((tmp_path / "out" / "text" / "00000.jsonl.gz").read_bytes()).splitlines()
    found = [json.loads(line)["text"] for line in lines]
    assert found == [texts[0], texts[1].removeprefix(f"{shared}\n\n")][: 2 if stays else 1]
    assert report["characters_kept"] == np.sum([len(text) for text in found])
