"""fastllm prepare: the same bytes for any number of workers and after any kill, duplicates, reports, refusals."""

import contextlib
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from alarm import ring
from extras import needed
from pages import article, dump, gzipped, page, texts, tree, warc
from thorough import THOROUGH

from fastllm.cli import main
from fastllm.config import InputError
from fastllm.data import DataConfig, Tokenizer, load_corpus, load_dataset
from fastllm.data.clean import CleanConfig
from fastllm.data.pipeline import PipelineConfig, duplicates, pool, prepare_text, work
from fastllm.data.pipeline.pool import Pool
from fastllm.data.pipeline.work import Batch
from fastllm.data.sources import Raw

needed("ftfy", "data")

CONFIG = PipelineConfig(shard_mb=1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with every kind of source, with duplicates, rejects and broken files."""
    folder = tmp_path_factory.mktemp("sources")
    for i in range(40):
        (folder / f"page{i:02d}.html").write_text(page(article(i)))
    (folder / "again.html").write_text(page(article(3), main=False))
    (folder / "copy.txt").write_text(f"A page\n\n{article(5)}")
    (folder / "near.txt").write_text(f"{article(7, 30)}\n\nOne more sentence ends this text.")
    (folder / "nearly.txt").write_text(article(7, 30))
    (folder / "short.txt").write_text("Too short.")
    (folder / "empty.html").write_text("")
    (folder / "deep.html").write_text("<div>" * 5000)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "binary.txt").write_bytes(bytes(1000))
    (folder / "web.warc.gz").write_bytes(warc([page(article(100 + i)).encode() for i in range(20)]))
    (folder / "cut.warc.gz").write_bytes(warc([page(article(200 + i)).encode() for i in range(9)])[:-900])
    (folder / "wiki.xml").write_text(dump([("A", "0", article(300)), ("B", "0", "#REDIRECT [[A]]")]))
    lines = b"".join(json.dumps({"text": article(400 + i, 10)}).encode() + b"\n" for i in range(230))
    (folder / "lines.jsonl.gz").write_bytes(gzipped(lines + b"{broken\n"))
    return folder


@pytest.fixture(scope="module")
def undisturbed(sources, tmp_path_factory):
    small = pytest.MonkeyPatch()
    small.setattr(work, "BATCH_BYTES", 1 << 16)
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare_text([sources], out, CleanConfig(mask_pii=True), CONFIG, workers=0)
    small.undo()
    return out


def test_every_document_is_kept_or_rejected_with_its_rule(undisturbed):
    report = json.loads((undisturbed / "report.json").read_text())
    assert report["rejected"] == {
        "unknown_format": 1, "truncated": 1, "damaged": 1, "redirect": 1, "coding": 1, "empty": 2,
        "gopher_quality": 1, "exact_duplicate": 2, "near_duplicate": 1,
    }  # fmt: skip
    documents = texts(undisturbed)
    assert report["documents_read"] == report["documents_kept"] + sum(report["rejected"].values())
    assert len(documents) == report["documents_kept"]
    by_id = {document["id"].split("/", 1)[1]: document for document in documents}
    assert by_id["page07.html"]["text"] == f"A page\n\n{article(7)}"
    assert by_id["web.warc.gz#3"]["metadata"] == {"url": "http://example.org/2"}
    assert {f"web.warc.gz#{i}" for i in range(1, 21)} <= set(by_id)
    assert by_id["wiki.xml#0"]["metadata"] == {"title": "A"}
    assert len([i for i in by_id if i.startswith("lines")]) == 230


def test_rejects_say_what_they_repeat_or_broke(undisturbed):
    def rejects(rule):
        (path,) = (undisturbed / "rejected" / rule).iterdir()
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line, parse_constant=pytest.fail) for line in lines]

    assert {(r["id"].split("/")[1], r["of"].split("/")[1]) for r in rejects("exact_duplicate")} == {
        ("page03.html", "again.html"), ("page05.html", "copy.txt"),
    }  # fmt: skip
    (near,) = rejects("near_duplicate")
    assert (near["id"].split("/")[1], near["of"].split("/")[1]) == ("nearly.txt", "near.txt")
    (short,) = rejects("gopher_quality")
    assert (short["measure"], short["value"], short["least"], short["most"]) == ("words", 2, 50, None)
    assert short["text"] == "Too short."
    (cut,) = rejects("truncated")
    assert cut["after_records"] == 8


def test_the_reports_show_every_rule_and_escape_what_they_quote(undisturbed):
    page = (undisturbed / "report.html").read_text()
    for rule in json.loads((undisturbed / "report.json").read_text())["rejected"]:
        assert f"<h3>{rule} (" in page
    assert "<svg" in page
    assert "<div><div>" not in page
    assert "&lt;div&gt;&lt;div&gt;" in page


def test_processes_give_the_same_bytes(sources, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "BATCH_BYTES", 1 << 16)
    prepare_text([sources], tmp_path / "out", CleanConfig(mask_pii=True), CONFIG, workers=2)
    assert tree(tmp_path / "out") == tree(undisturbed)
    # A finished run is left as it is.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    prepare_text([sources], tmp_path / "out", CleanConfig(mask_pii=True), CONFIG)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_a_run_killed_anywhere_ends_with_the_bytes_of_an_undisturbed_one(sources, undisturbed, tmp_path, monkeypatch):
    """Every file that is written is in turn the last one before the run dies."""
    from fastllm import files

    monkeypatch.setattr(work, "BATCH_BYTES", 1 << 16)
    expected = tree(undisturbed)

    class Killed(BaseException):
        pass

    replace = os.replace
    kill_at, deaths = 1, 0
    while True:
        count = 0

        def counted(source, target, kill_at=kill_at):
            nonlocal count
            count += 1
            if count == kill_at:
                # The temporary file stays, as kill -9 would leave it.
                raise Killed
            replace(source, target)

        monkeypatch.setattr(files.os, "replace", counted)
        try:
            prepare_text([sources], tmp_path / "out", CleanConfig(mask_pii=True), CONFIG, workers=0)
            break
        except Killed:
            deaths += 1
            # Now and then further on, so that whole shards are gone on from.
            kill_at = 1 + (deaths * 5) % 17
        assert deaths < 60
    assert deaths > 3
    assert tree(tmp_path / "out") == expected


COMMAND = (
    "import sys; from fastllm.data.pipeline import work; work.BATCH_BYTES = 1 << 16; from fastllm.cli import main; "
)


@THOROUGH
@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_random_and_started_again(sources, undisturbed, tmp_path, seed):
    draw = random.Random(seed)
    command = [
        sys.executable, "-c", COMMAND + "sys.exit(main(sys.argv[1:]))", "prepare", str(sources), "--out",
        str(tmp_path / "out"), "--workers", "2", "--shard-mb", "1", "--mask-pii", "--quiet",
    ]  # fmt: skip
    deaths = 0
    while not (tmp_path / "out" / "prepared.json").exists():
        process = subprocess.Popen(command)
        begin = time.monotonic()
        # Importing torch takes most of a short run: the kill comes once the work has begun.
        while not (tmp_path / "out" / "work" / "plan.jsonl").exists() and time.monotonic() - begin < 60:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.5) if deaths < 3 else 60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        deaths += 1
        assert deaths < 10
    subprocess.run(command, check=True)
    assert tree(tmp_path / "out") == tree(undisturbed)


def test_output_inside_a_source_is_not_read(sources, tmp_path):
    (tmp_path / "a.txt").write_text(article(1))
    prepare_text([tmp_path], tmp_path / "out", config=CONFIG, workers=0)
    assert [d["id"].split("/")[1] for d in texts(tmp_path / "out")] == ["a.txt"]


def test_what_cannot_be_written_to_is_refused_before_any_work(sources, undisturbed, tmp_path):
    with pytest.raises(InputError, match="prepared with other settings"):
        prepare_text([sources], undisturbed, CleanConfig(), CONFIG, workers=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    for out in (tmp_path / "mine", tmp_path / "mine" / "file"):
        with pytest.raises(InputError, match="is there already"):
            prepare_text([sources], out, workers=0)
    assert os.listdir(tmp_path / "mine") == ["file"]
    with pytest.raises(InputError, match="no such file"):
        prepare_text([tmp_path / "none"], tmp_path / "out", workers=0)
    with pytest.raises(InputError, match="engine: expected local or ray"):
        prepare_text([sources], tmp_path / "out", engine="spark")
    with pytest.raises(InputError, match="workers: expected 0 to 1024, got -1"):
        prepare_text([sources], tmp_path / "out", workers=-1)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_did_and_refuses_in_one_line(tmp_path, capsys):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(article(i))
    out = ["--out", str(tmp_path / "out"), "--workers", "0"]
    files = [str(tmp_path / f"{i}.txt") for i in range(12)]
    assert main(["prepare", *files, files[3], *out]) == 0
    shown = capsys.readouterr().out
    assert "13 documents read, 12 kept" in shown
    assert re.search(r"1\s+exact_duplicate", shown)
    assert "docs/s" in shown
    assert "MB/s" in shown
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["prepare", str(tmp_path / "none"), "--out", str(tmp_path / "x")], "none: no such file or folder"),
        (["prepare", *files, "--rules", "gopher", "--out", str(tmp_path / "x")], "rules: expected some of"),
        (["prepare", *files, "--language", "english", "--out", str(tmp_path / "x")], "zxx; got 'english'"),
        (["prepare", str(tmp_path / "empty"), "--out", str(tmp_path / "x")], "no file to read in "),
        (["prepare", "/dev/zero", "--out", str(tmp_path / "x")], "/dev/zero: neither a file nor a folder"),
        (["tokenizer", "train", files[0], "--out", files[1]], "cannot write there: it is no folder"),
        (["tokenizer", "train", files[0], "--vocab-size", "3", "--out", str(tmp_path / "x" / "y")], "vocab_size: "),
        (["prepare", *files, "--similarity", "2", "--out", str(tmp_path / "x")], "similarity: expected at most 1.0"),
        (["prepare", *files, "--rules", "c4", *out], "prepared with other settings"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_two_runs_in_one_folder_are_refused(sources, tmp_path):
    import fcntl

    (tmp_path / "out" / "work").mkdir(parents=True)
    with open(tmp_path / "out" / "work" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another fastllm prepare is at work"):
            prepare_text([sources], tmp_path / "out", workers=0)


class _Deadly:
    """Ends or holds up the process that receives it."""

    id = "deadly"

    def __init__(self, action, argument):
        self.action, self.argument = action, argument

    def __reduce__(self):
        return self.action, (self.argument,)


def test_a_document_that_ends_or_holds_up_its_process_costs_itself_alone(monkeypatch):
    monkeypatch.setattr(pool, "GRACE", 20.0)
    config = PipelineConfig(document_seconds=30.0)
    good = [Raw(f"d{i}", article(i).encode(), "text", {}) for i in range(6)]
    items = [[good[0], _Deadly(os._exit, 9), good[1]], [good[2]], [good[3], good[4]], [good[5]]]
    with Pool(2, CleanConfig(), config) as processes:
        found = list(processes.results(Batch(some, (i, 0)) for i, some in enumerate(items)))
    assert [batch.items for batch, _ in found] == items
    assert [json.loads(line)["id"] for _, result in found for line in result.lines] == [f"d{i}" for i in range(6)]
    (rejection,) = [r for _, result in found for r in result.rejections]
    assert (rejection.id, rejection.rule, rejection.details) == ("deadly", "crashed", {"exit_code": 9})


def test_a_document_that_takes_too_long_is_rejected():
    slow = Raw("slow", b"<p>" + b"<b>a</b> " * 400_000, "html", {})
    result = work.run_batch([slow], CleanConfig(), PipelineConfig(document_seconds=0.05))
    assert [r.rule for r in result.rejections] == ["too_slow"]


def test_a_library_that_swallows_errors_is_stopped_all_the_same(monkeypatch):
    def swallowing(document, config):
        with contextlib.suppress(Exception):
            if document.id == "slow":
                ring()
        return real(document, config)

    real = work.clean
    monkeypatch.setattr(work, "clean", swallowing)
    documents = [Raw(name, article(1).encode(), "text", {}) for name in ("slow", "x")]
    result = work.run_batch(documents, CleanConfig(), PipelineConfig())
    assert [(r.id, r.rule) for r in result.rejections] == [("slow", "too_slow")]
    assert [json.loads(line)["id"] for line in result.lines] == ["x"]


def _tags(path, megabytes: int):
    with open(path, "wb") as file:
        for _ in range(megabytes):
            file.write(b"<div>" * (1 << 18) if file.tell() == 0 else b"<br><" * 209715)


def test_a_hundred_megabytes_of_one_tag_are_refused(tmp_path):
    _tags(tmp_path / "tag.html", 100)
    report = prepare_text([tmp_path / "tag.html"], tmp_path / "out", workers=0)
    assert report["rejected"] == {"too_large": 1}


def test_megabytes_of_one_tag_are_read_where_a_document_may_be_large(tmp_path):
    _tags(tmp_path / "tag.html", 9)
    # The clock has a test of its own: here other work on the machine may take most of the time.
    config = PipelineConfig(max_document_mb=1024, document_seconds=600)
    report = prepare_text([tmp_path / "tag.html"], tmp_path / "out", config=config, workers=0)
    assert report["rejected"].keys() <= {"empty", "gopher_quality", "gopher_repetition"}
    assert report["documents_kept"] == 0


def test_duplicates_do_not_depend_on_how_the_keys_are_sliced(sources, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "BATCH_BYTES", 1 << 16)
    monkeypatch.setattr(duplicates, "SLICE", 100)
    prepare_text([sources], tmp_path / "out", CleanConfig(mask_pii=True), CONFIG, workers=0)
    assert tree(tmp_path / "out") == tree(undisturbed)


def test_nothing_kept_is_a_report_and_no_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("Too short.")
    report = prepare_text([tmp_path / "a.txt"], tmp_path / "out", workers=0)
    assert report["documents_kept"] == 0
    with pytest.raises(InputError, match="0 documents are too few"):
        load_corpus(DataConfig(data=(str(tmp_path / "out"),)))


# What training reads of it


def test_a_prepared_folder_is_a_corpus_and_its_tokens_a_dataset(undisturbed, tmp_path, capsys):
    corpus = load_corpus(DataConfig(data=(str(undisturbed),)))
    every = [document["text"] for document in texts(undisturbed)]
    assert list(corpus.validation) == every[9::10]
    assert list(corpus.train) == [text for i, text in enumerate(every) if i % 10 != 9]
    assert main(["tokenizer", "train", str(undisturbed), "--out", str(tmp_path / "tok"), "--vocab-size", "600"]) == 0
    assert "training on all" in capsys.readouterr().out
    tokenizer = Tokenizer.load(tmp_path / "tok" / "tokenizer.json")
    arguments = ["--tokenizer", str(tmp_path / "tok"), "--shard-tokens", "100000"]
    assert main(["tokenizer", "encode", str(undisturbed), "--out", str(tmp_path / "tokens"), *arguments]) == 0
    dataset = load_dataset(DataConfig(data=(str(tmp_path / "tokens"),)), tmp_path / "run", vocab_size=0)
    assert len(list((tmp_path / "tokens").glob("train-*.bin"))) > 1
    starts = dataset.train.document_starts[:2].tolist()
    assert tokenizer.decode(dataset.train.tokens[starts[0] : starts[1]]) == every[0]
    assert os.listdir(tmp_path / "run") == ["corpus.json"]
    again = load_dataset(DataConfig(data=(str(undisturbed),)), tmp_path / "other", vocab_size=600)
    assert again.train.bytes == dataset.train.bytes
    with pytest.raises(InputError, match="give it alone"):
        load_dataset(DataConfig(data=(str(tmp_path / "tokens"), "x")), tmp_path / "run", vocab_size=0)
    with pytest.raises(InputError, match="give it alone"):
        load_corpus(DataConfig(data=(str(undisturbed), "x")))
    with pytest.raises(InputError, match=r"held_out: .* has a split already"):
        load_corpus(DataConfig(data=(str(undisturbed),)), ["x"])


def test_a_large_corpus_trains_a_tokenizer_on_a_sample_and_says_so(undisturbed, tmp_path, capsys):
    command = ["tokenizer", "train", str(undisturbed), "--out", str(tmp_path / "tok"), "--vocab-size", "300"]
    assert main([*command, "--sample-mb", "1"]) == 0
    assert "training on a sample: one document in 2 of" in capsys.readouterr().out


def test_a_damaged_shard_is_refused_by_name(undisturbed, tmp_path):
    import shutil

    shutil.copytree(undisturbed, tmp_path / "out")
    shard = tmp_path / "out" / "text" / "00000.jsonl.gz"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"00000\.jsonl\.gz: damaged"):
        list(load_corpus(DataConfig(data=(str(tmp_path / "out"),))).train)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_show_prints_the_pieces(undisturbed, tmp_path, capsys, kind):
    out = str(tmp_path / "tok")
    assert (
        main(["tokenizer", "train", str(undisturbed), "--out", out, "--vocab-size", "500", "--kind", kind, "--quiet"])
        == 0
    )
    assert main(["tokenizer", "show", "--tokenizer", out, "the lighthouse \x1b[31m日"]) == 0
    shown = capsys.readouterr().out
    assert "lighthouse" in shown.replace("|", "").replace("##", "")
    assert "\x1b" not in shown
    assert "bytes per token" in shown
    assert "longest in the vocabulary" in shown
    assert main(["tokenizer", "show", "--tokenizer", out, "--ids", "the"]) == 0
    assert capsys.readouterr().out.split() == [
        str(i) for i in Tokenizer.load(tmp_path / "tok" / "tokenizer.json").encode("the")
    ]
    assert main(["tokenizer", "show", "--tokenizer", out, "--file", str(tmp_path / "none")]) == 2
    assert "none: No such file" in capsys.readouterr().err
