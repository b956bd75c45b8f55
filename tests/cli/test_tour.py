"""docs/tour.md's commands, in their order, with a few steps of tiny models."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from cells import examples

from fastllm.cli import main
from fastllm.training import run

DOCS = Path(__file__).parents[2] / "docs"
TOUR = (DOCS / "tour.md").read_text("utf-8")
STEPS = ["--steps", "2", "--batch-size", "4", "--dtype", "float32", "--device", "cpu", "--eval-interval", "0"]
SHAPE = ["--num-layers", "1", "--hidden-size", "16", "--num-heads", "2", "--context-length", "32"]


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", TOUR, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.strip().splitlines()]


def quick(arguments: list[str]) -> list[str]:
    """The same command, small."""
    if arguments[0] == "train":
        shape = [] if "--pretrained" in arguments else [*SHAPE, "--vocab-size", "300"]
        return [*arguments, *STEPS, "--quiet", *shape]
    return [*arguments, "--max-new-tokens", "4"] if arguments[0] == "generate" else arguments


def test_the_tours_commands_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "matmul_flops", lambda *args: 1e11)
    monkeypatch.setattr("fastllm.training.reports.report.SAMPLE_TOKENS", 4)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "docs").mkdir()
    shutil.copy(DOCS / "sentiment.tsv", "docs")
    Path("pairs.tsv").write_text("".join(f"{e['source']}\t{e['target']}\n" for e in examples("seq2seq")))
    paragraphs = [
        {"context": e["context"], "qas": [{"id": e["id"], "question": e["question"], "answers": [
            {"text": a["text"], "answer_start": a["start"]} for a in e["answers"]]}]}
        for e in examples("answer")
    ]  # fmt: skip
    Path("questions.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    pairs = [{"prompt": f"Is {n} a number?", "chosen": " Yes.", "rejected": " No."} for n in range(20)]
    instructions = [{"prompt": pair["prompt"], "answer": pair["chosen"]} for pair in pairs]
    for name, lines in (("instructions", instructions), ("preferences", pairs)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for program, *arguments in commands():
        assert program == "fastllm"
        try:
            code = main(quick(arguments))
        except SystemExit as exit_:
            code = exit_.code
        assert code == 0, (arguments, capsys.readouterr().err)
    torch.set_num_threads(before)
    assert Path("runs/judge-scores/confusion.png").exists()


def test_what_the_tour_names_is_there():
    for path in re.findall(r"`((?:fastllm|docs|tests)/[\w./-]+)`", TOUR):
        assert (DOCS.parent / path).exists(), path
    for picture in re.findall(r"\]\((\S+\.png)\)", TOUR):
        assert (DOCS / picture).exists(), picture


def test_the_reviews_are_balanced_and_read():
    from fastllm.tasks.read import read_labelled

    labels = [example["label"] for example in read_labelled([DOCS / "sentiment.tsv"])]
    assert labels.count("positive") == labels.count("negative") == len(labels) / 2 == 48


@pytest.mark.parametrize("kind", ["pairs", "questions", "sections"])
def test_debians_pages_become_examples(kind, tmp_path, monkeypatch):
    import gzip
    import runpy
    import sys

    from fastllm.tasks.read import read_labelled, read_pairs, read_questions

    handbook = tmp_path / "usr/share/doc/debian-handbook/html"
    for language, text in (("en-US", "A <em>package</em> lies here."), ("de-DE", "Hier liegt ein <em>Paket</em>.")):
        (handbook / language).mkdir(parents=True)
        page = f"<html><div class='menu'>x<h1>Title {language}</h1></div><div class='para'>{text}</div></html>"
        (handbook / language / "a.html").write_text(page)
    for folder, text in (("man", "Files are \\fIread\\fP\nhere."), ("man/de", "Hier werden Dateien \\fIgelesen\\fP.")):
        path = tmp_path / "usr/share" / folder / "man1"
        path.mkdir(parents=True)
        source = f'.TH X 1\n.SH NAME\nls \\- list\n.PP\n{text}\n.SH "\u00dcBERSETZUNG"\nJemand\n'
        (path / "ls.1.gz").write_bytes(gzip.compress(source.encode()))
    python = tmp_path / "usr/share/doc/python3.11/html"
    (python / "library").mkdir(parents=True)
    entries = "".join(
        f"<dt id='e{i}'>term{i}(x)<a class='headerlink'>P</a></dt><dd><p>Entry {i} does a thing. And more.</p></dd>"
        for i in range(6)
    )
    (python / "glossary.html").write_text(f"<dl>{entries}</dl>")
    for part in ("c-api", "library"):
        (python / "_sources" / part).mkdir(parents=True)
        (python / "_sources" / part / "x.rst.txt").write_text(
            f"Title\n=====\n\n{part} " + "word " * 12 + "\n\n.. note:: x\n"
        )
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["debian.py", kind, str(tmp_path), str(out)])
    runpy.run_path(str(DOCS / "debian.py"), run_name="__main__")
    if kind == "pairs":
        found = [
            {(e["source"], e["target"]) for e in read_pairs([path])} for path in (out, out.with_suffix(".held.tsv"))
        ]
        expected = {
            ("A package lies here.", "Hier liegt ein Paket."),
            ("Files are read here.", "Hier werden Dateien gelesen."),
        }
        assert found[0] | found[1] == expected
        assert len(found[0]) == len(found[1]) == 1
    elif kind == "questions":
        found = read_questions([out])
        assert {e["question"] for e in found} == {f"What is term{i}?" for i in range(6)}
        assert all(e["answers"][0]["text"].endswith("does a thing.") for e in found)
    else:
        assert {e["label"] for e in read_labelled([out.rename(out.with_suffix(".csv"))])} == {"c-api", "library"}


def test_the_dictionary_finds_what_goes_with_what():
    import runpy

    dictionary = runpy.run_path(str(DOCS / "tour.py"))["dictionary"]
    pairs = [("red cat", "rote katze"), ("red dog", "rote hund"), ("cat", "katze"), ("big dog", "grosse hund")]
    known = dictionary([{"source": a, "target": b} for a, b in pairs])
    assert known == {"red": "rote", "cat": "katze", "dog": "hund", "big": "grosse"}


def test_instructions_and_preferences_come_from_sentences_that_follow_each_other():
    import runpy

    made = runpy.run_path(str(DOCS / "prompts.py"))["examples"]
    sentences = [f"Sentence number {n} of this text says {n}." for n in range(9)]
    found = made([" ".join(sentences[:6]), " ".join(sentences[6:]) + "\n\nToo short. This one stands alone here."])
    follows = dict(zip(sentences[:5] + sentences[6:8], sentences[1:6] + sentences[7:], strict=True))
    assert [e["answer"] for e in found["instructions"]] == list(follows.values())
    for pair in found["preferences"]:
        chosen, rejected = pair["chosen"].split(), pair["rejected"].split()
        assert pair["chosen"] == follows[pair["prompt"].strip()]
        assert len(rejected) == len(chosen) - 1
        assert (rejected[0], rejected[-1]) == (chosen[0], chosen[-1])


def test_pairs_that_teach_no_translation_are_dropped():
    import runpy

    fault = runpy.run_path(str(DOCS / "debian.py"))["fault"]
    assert fault("The file is read here.", "Hier wird die Datei gelesen.", 10) is None
    assert "same on both sides" in fault("set the option foo bar", "setzt Option foo bar", 10)
    assert "longer than 4" in fault("a b c d e", "f g h i", 4)
    assert "shorter than" in fault("one two three", "eins zwei drei", 10)
    assert "times as long" in fault("a man is here", "dort steht ein sehr alter und kluger guter Mann", 10)
    assert "letters" in fault("-x 1 2 3 /a=b", "+y 4 5 6 (c,d)", 10)
