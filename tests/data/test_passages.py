"""Repeated passages: sentences and exact substrings against plain loops over strings, and whole runs."""

import gzip
import json
import random

import numpy as np
import pytest
from extras import needed
from pages import article, paragraph, texts, tree

from fastllm.cli import main
from fastllm.data.clean import CleanConfig, passages
from fastllm.data.clean.cutting import cut, whole_words
from fastllm.data.clean.passages import anchors, code_points, sentence_spans, window_hashes
from fastllm.data.pipeline import PipelineConfig, duplicates, prepare_text, work
from fastllm.data.pipeline.duplicates import find_duplicates
from fastllm.data.pipeline.passages import RepeatedSubstrings
from fastllm.data.pipeline.shards import Shards

PLAIN = CleanConfig(rules=("none",), repair=False)


def write(folder, documents):
    folder.mkdir(exist_ok=True)
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder / "in.jsonl"


def rejects(folder, rule):
    found = []
    for path in sorted((folder / "rejected" / rule).iterdir()):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found += map(json.loads, lines)
    return found


def test_equal_windows_have_equal_hashes_wherever_they_are(monkeypatch):
    monkeypatch.setattr(passages, "BLOCK", 64)
    text = "abc" * 40 + "x😀y" + "abc" * 40
    hashes = window_hashes(code_points(text), 7)
    windows = [text[i : i + 7] for i in range(len(text) - 6)]
    assert len(hashes) == len(windows)
    assert len(set(hashes.tolist())) == len(set(windows)) == len(set(zip(windows, hashes.tolist(), strict=True)))
    assert len(window_hashes(code_points("short"), 7)) == 0


@pytest.mark.parametrize("block", [37, 1 << 18])
def test_every_window_holds_anchors_that_its_characters_alone_decide(monkeypatch, block):
    monkeypatch.setattr(passages, "BLOCK", block)
    draw = np.random.default_rng(0)
    common = draw.integers(97, 123, 60).astype(np.uint32)
    texts = [np.r_[draw.integers(97, 123, n), common, draw.integers(97, 123, n)].astype(np.uint32) for n in (31, 200)]
    found = [anchors(codes, 60) for codes in texts]
    for codes, own in zip(texts, found, strict=True):
        places = own["place"].astype(int)
        assert (np.diff(places) > 0).all()
        assert (own["key"] == window_hashes(codes, 30)[places]).all()
        for begin in range(len(codes) - 59):
            assert ((places >= begin) & (places <= begin + 30)).any()
    assert set(found[0]["key"].tolist()) & set(found[1]["key"].tolist())
    # Few of many: about four for each 60 characters.
    assert len(found[1]) < 460 / 60 * 6


def repeated_plainly(documents, length):
    """For each document the characters that lie in a window that occurred before."""
    seen, result = set(), []
    for text in documents:
        covered = np.zeros(len(text), bool)
        for begin in range(len(text) - length + 1):
            window = text[begin : begin + length]
            if window in seen:
                covered[begin : begin + length] = True
            seen.add(window)
        result.append(covered)
    return result


def documents_with_passages(draw):
    letters = "abcdefgh é日\n"
    pool = ["".join(draw.choices(letters, k=draw.randrange(40, 160))) for _ in range(12)] + ["ab" * 90, "a" * 70]
    documents = []
    for _ in range(60):
        parts = []
        for _ in range(draw.randrange(1, 6)):
            own = "".join(draw.choices(letters, k=draw.randrange(5, 120)))
            piece = draw.choice(pool)
            begin = draw.randrange(len(piece) // 2)
            parts += [own, piece[begin : begin + draw.randrange(20, 170)]]
        documents.append(" ".join("".join(parts).split()))
    return [*documents, documents[3], "tiny"]


@pytest.mark.parametrize(("slice_size", "weak"), [(duplicates.SLICE, False), (257, False), (257, True)])
def test_exact_substrings_are_those_that_a_plain_loop_finds(tmp_path, monkeypatch, slice_size, weak):
    documents = documents_with_passages(random.Random(slice_size))
    config = PipelineConfig(near_duplicates=False, exact_substrings=50)
    result = work.run_batch(
        [work.Raw(f"d{i}", text.encode(), "text", {}) for i, text in enumerate(documents)], PLAIN, config
    )
    kept = [json.loads(line)["text"] for line in result.lines]
    monkeypatch.setattr(duplicates, "SLICE", slice_size)
    if weak:
        # Hashes that collide may hide a passage, and never make one.
        from fastllm.data.pipeline import passages as compared

        monkeypatch.setattr(compared, "window_hashes", lambda *call: window_hashes(*call) >> np.uint64(56))
    shards = Shards(tmp_path, config)
    shards.work.mkdir()
    for begin in range(0, len(kept), 20):
        part = work.BatchResult()
        for name in ("lines", "keys", "signatures", "anchors", "characters"):
            getattr(part, name).extend(getattr(result, name)[begin : begin + 20])
        part.counts["documents"] = 20
        shards.add(part, (0, begin + 20), 1 << 30)
        shards.flush((0, begin + 20))
    found = find_duplicates(shards.work, False, 0.75)
    ranges = RepeatedSubstrings(shards.work, found, 50).ranges
    first = found.first.tolist()
    expected = repeated_plainly([text if first[i] == i else "" for i, text in enumerate(kept)], 50)
    assert sum(map(np.sum, expected)) > 2000
    marked = [np.zeros(len(text), bool) for text in kept]
    for document, begin, end in ranges.tolist():
        marked[document][begin:end] = True
    for text, got, right in zip(kept, marked, expected, strict=True):
        right = right if len(right) else np.zeros(len(text), bool)
        assert (got <= right).all() if weak else (got == right).all()


def test_words_stay_whole_and_apart():
    text = "one thousand words\nand more"
    assert whole_words(text, 6, 21) == (12, 19)
    assert whole_words("日本語の本", 1, 3) == (1, 3)
    assert whole_words("abcdef", 2, 4) == (4, 4)
    assert cut("a bb cc dd", [(2, 4)]) == "a cc dd"
    assert cut("a bb cc dd", [(1, 5), (7, 8)]) == "a cc dd"
    assert cut("a\nb c", [(1, 4)]) == "a\nc"
    assert cut("日本語", [(1, 2)]) == "日語"
    assert cut("x\n    y", [(0, 1)]) == "y"


def test_keys_of_sentences_heed_neither_case_nor_marks():
    _, keys = sentence_spans("One is here. Two, is here! Three is here.\n\n* * *\n\nFour is here.")
    starts, same = sentence_spans("ONE is here? Two is   here. Three is here. Four is  here.")
    assert keys.tolist() == same.tolist()
    assert len(starts) == 5
    assert sentence_spans("One is here. Two is here. Three is here.")[1].tolist() == keys[:1].tolist()
    assert len(sentence_spans("One. Two.")[1]) == 0
    assert len(sentence_spans(" ")[1]) == 0


def corpus():
    """Documents with a notice of four sentences, a quotation and one that has little else."""
    draw = random.Random(77)
    notice = "This shop sends parcels. Every parcel is insured! Nobody pays twice here. Ask us for the rest."
    quoted = paragraph("glacier", draw, 6)
    return [
        f"{article(1)}\n\n{notice}",
        f"{article(2)}\n\n{notice.upper()}\n\n{article(3)}",
        f"{article(4)}\n\n{quoted}",
        f"Before it {quoted[7:300]} and after it. {article(5)}",
        f"A few words. {notice} A few more.",
        article(6),
        article(6),
    ], notice, quoted  # fmt: skip


def test_a_run_takes_out_sentences_and_substrings_and_says_so(tmp_path, capsys):
    needed("ftfy", "data")
    documents, notice, quoted = corpus()
    source = write(tmp_path, documents)
    command = ["prepare", str(source), "--rules", "none", "--no-near-duplicates", "--sentence-dedup"]
    assert main([*command, "--exact-substrings", "100", "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    assert "1  repeated_sentences taken out of 1 documents" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rejected"] == {"exact_duplicate": 1, "too_short": 1}
    assert report["documents_read"] == report["documents_kept"] + 2
    kept = [document["text"] for document in texts(tmp_path / "out")]
    assert kept[0] == documents[0]
    assert kept[1] == f"{article(2)}\n\n{article(3)}"
    assert kept[2] == documents[2]
    assert quoted[20:280] not in kept[3]
    assert kept[3].startswith("Before it")
    assert kept[3].endswith(f"and after it. {article(5)}")
    assert kept[4] == article(6)
    manifest = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert manifest["documents"] == 5
    assert manifest["characters"] == report["characters_kept"] == sum(map(len, kept))
    (sentences,) = rejects(tmp_path / "out", "repeated_sentences")
    assert (sentences["passages"], sentences["text"]) == (1, notice.upper())
    (substring,) = rejects(tmp_path / "out", "repeated_substrings")
    assert substring["text"] in quoted
    assert len(substring["text"]) > 270
    (short,) = rejects(tmp_path / "out", "too_short")
    assert (short["words"], short["least"]) == (6, 50)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h3>repeated_substrings (1)</h3>" in page


def test_bytes_are_the_same_for_any_workers_slices_and_kills(tmp_path, monkeypatch):
    from fastllm import files

    draw = random.Random(0)
    shared = [paragraph("harbour", draw, 5) for _ in range(6)]
    documents = [f"{article(i)}\n\n{shared[i % 6]}\n\n{article(2000 + i)}" for i in range(260)]
    source = write(tmp_path / "in", documents)
    config = PipelineConfig(near_duplicates=False, shard_mb=1, sentence_dedup=True, exact_substrings=120)
    monkeypatch.setattr(work, "BATCH_BYTES", 1 << 16)
    report = prepare_text([source], tmp_path / "out", PLAIN, config, workers=0)
    assert report["passages"]["repeated_sentences"]["documents"] == 254
    expected = tree(tmp_path / "out")
    assert sum(name.startswith("text/") for name in expected) > 1
    monkeypatch.setattr(duplicates, "SLICE", 50_000)

    class Killed(BaseException):
        pass

    replace, left = files.os.replace, 11

    def counted(source, target):
        nonlocal left
        left -= 1
        if not left:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", counted)
    with pytest.raises(Killed):
        prepare_text([source], tmp_path / "killed", PLAIN, config, workers=0)
    assert (tmp_path / "killed" / "work" / "done-00000.json").exists()
    prepare_text([source], tmp_path / "killed", PLAIN, config, workers=2)
    assert tree(tmp_path / "killed") == expected


def test_no_passages_and_no_documents_are_no_errors(tmp_path):
    config = PipelineConfig(sentence_dedup=True, exact_substrings=100)
    for name, documents in (("short", ["a b c"]), ("none", [""]), ("far", [article(1), article(2)])):
        source = write(tmp_path / name, documents)
        report = prepare_text([source], tmp_path / f"{name}.out", PLAIN, config, workers=0)
        assert report["passages"] == {}
        assert report["documents_kept"] == len([text for text in documents if text])
