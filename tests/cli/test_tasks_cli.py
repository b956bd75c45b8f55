"""The commands for tasks, from training to a score and a prediction, and what they refuse."""

import json
import os
import re
import socket
from functools import partial

import pytest
import torch
from cells import examples
from command_line import check_refused, run

from fastllm.data.tokenizer import Tokenizer
from fastllm.models import Encoder, EncoderDecoder, load_model
from fastllm.training.reports.progress import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    "--steps", "3", "--context-length", "32", "--num-layers", "1", "--hidden-size", "16", "--num-heads", "2",
    "--vocab-size", "300", "--batch-size", "4", "--dtype", "float32", "--device", "cpu", "--quiet",
    "--eval-interval", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data of each task, and a run on each."""
    folder = tmp_path_factory.mktemp("tasks")
    pairs = "".join(f"{e['source']}\t{e['target']}\n" for e in examples("seq2seq"))
    (folder / "pairs.tsv").write_text(pairs)
    (folder / "labels.csv").write_text(
        "text,label\n" + "".join(f"{e['text']},{e['label']}\n" for e in examples("classify"))
    )
    paragraphs = [
        {"context": e["context"], "qas": [{"id": e["id"], "question": e["question"], "answers": [
            {"text": a["text"], "answer_start": a["start"]} for a in e["answers"]]}]}
        for e in examples("answer")
    ]  # fmt: skip
    (folder / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    for number in range(22):
        (folder / f"text{number}.txt").write_text(
            "\n\n".join(e["text"].capitalize() + "." for e in examples("classify"))
        )
    before = os.getcwd()
    os.chdir(folder)
    train = ["train", *SMALL]
    texts = sorted(str(p) for p in folder.glob("*.txt"))
    keep = "--no-deduplicate"
    assert run(*train, "--objective", "seq2seq", "--encoder", "gru", "--data", "pairs.tsv", "--out", "translate") == 0
    assert run(*train, "--objective", "mlm+nsp", keep, "--data", *texts, "--out", "encoder") == 0
    fine = [a for a in train if a in ("train", "--quiet")]
    fine += ["--steps", "3", "--batch-size", "4", "--dtype", "float32", "--device", "cpu", "--pretrained", "encoder"]
    assert run(*fine, "--objective", "classify", "--data", "labels.csv", "--out", "classify") == 0
    assert run(*fine, "--objective", "answer", "--data", "squad.json", "--out", "answer") == 0
    assert run(*train, "--decoder", "lstm", "--data", *texts[:2], "--out", "write") == 0
    yield folder
    os.chdir(before)


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def test_runs_leave_models_curves_and_held_out_examples(here):
    assert isinstance(load_model("translate/model"), EncoderDecoder)
    judge = load_model("classify/model")
    assert isinstance(judge, Encoder)
    assert judge.config.labels == ("bad", "good")
    assert judge.config.heads == ("classify",)
    assert Tokenizer.load("classify/model/tokenizer.json").fingerprint == (
        Tokenizer.load("encoder/model/tokenizer.json").fingerprint
    )
    for name, score in (
        ("translate", "perplexity"),
        ("classify", "accuracy"),
        ("answer", "f1"),
        ("encoder", "mlm_loss"),
    ):
        assert (here / name / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert f"validation_{score}" in read_metrics(here / name / "metrics.jsonl")[-1]
    assert "reference:" in (here / "translate" / "samples.txt").read_text()
    assert "labelled" in (here / "classify" / "samples.txt").read_text()
    assert "[" in (here / "answer" / "samples.txt").read_text()


def test_fine_tuning_starts_from_the_pretrained_body(here):
    config = (here / "classify" / "config.toml").read_text()
    assert 'pretrained = "encoder"' in config
    arguments = ["train", "--objective", "classify", "--pretrained", "encoder", "--data", "labels.csv", "--steps", "1"]
    assert run(*arguments, "--quiet", "--lr", "1e-12", "--muon-lr", "1e-12", "--out", "still", "--device", "cpu") == 0
    before, after = load_model("encoder/model"), load_model("still/model")
    for name, value in before.encoder.named_parameters():
        torch.testing.assert_close(after.encoder.get_parameter(name), value, rtol=1e-5, atol=1e-6)


def test_a_task_goes_on_exactly_where_it_stopped(here):
    command = ["train", *SMALL, "--objective", "seq2seq", "--data", "pairs.tsv", "--checkpoint-interval", "2"]
    assert run(*command, "--steps", "4", "--out", "whole") == 0
    assert run(*command, "--steps", "4", "--out", "parts") == 0
    import shutil

    shutil.rmtree("parts/checkpoints/step-00000004")
    shutil.rmtree("parts/model")
    assert run("train", "--resume", "parts", "--quiet") == 0
    files = [here / name / "model" / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_every_task_predicts_and_is_scored(here, capsys):
    assert run("translate", "--run", "translate", "red cat", "green dog") == 0
    assert capsys.readouterr().out.count("\n") == 2
    (here / "lines.txt").write_text("red cat\n\ngreen dog\n")
    assert run("classify", "--run", "classify", "--file", "lines.txt") == 0
    assert re.fullmatch(r"(bad|good)\t0\.\d+\tred cat\n(bad|good)\t0\.\d+\tgreen dog\n", capsys.readouterr().out)
    # The n-th line of what comes out is the translation of the n-th that went in.
    assert run("translate", "--run", "translate", "--file", "lines.txt") == 0
    translated = capsys.readouterr().out.split("\n")
    assert [bool(line) for line in translated] == [True, False, True, False]
    assert run("answer", "--run", "answer", "--question", "which?", "--context", "the key is K7.") == 0
    assert "[" in capsys.readouterr().out
    assert run("generate", "--run", "write", "--max-new-tokens", "3") == 0
    capsys.readouterr()
    for name, data, scores in (
        ("translate", "pairs.tsv", ("bleu", "chrf")), ("classify", "labels.csv", ("accuracy", "f1")),
        ("answer", "squad.json", ("exact match", "f1")), ("write", "text3.txt", ("bits per byte",)),
    ):  # fmt: skip
        assert run("eval", "--run", name, data, "--out", f"scores-{name}") == 0
        shown = capsys.readouterr().out.replace("_", " ")
        assert all(re.search(rf"^{score}: \d+\.\d{{4}}$", shown, re.MULTILINE) for score in scores), shown
        written = json.loads((here / f"scores-{name}" / "scores.json").read_text("utf-8"))
        if name == "translate":
            assert re.search(r"^bleu signature: nrefs:1\|.*\|tok:13a\|", shown, re.MULTILINE)
            assert written["chrf_signature"].startswith("nrefs:1|")
            low, high = written["bleu_interval"]
            assert f"\nbleu interval: {low:.4f} to {high:.4f} (95%)\n" in shown
        if name == "classify":
            low, high = written["accuracy_interval"]
            assert low < written["accuracy"] < high or high == 1
            assert f"\naccuracy interval: {low:.4f} to {high:.4f} (95%)\n" in shown
    assert (here / "scores-classify" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert len((here / "scores-answer" / "predictions.jsonl").read_text().splitlines()) == 40


def test_options_that_have_no_effect_are_named(here, capsys):
    greedy = ("--beams", "1", "--length-penalty", "2")
    for command, why in (
        (("translate", "--run", "translate", *greedy, "red cat"), "length_penalty has no effect: one beam is a greedy"),
        (("eval", "--run", "translate", "pairs.tsv", *greedy), "length_penalty has no effect: one beam is a greedy"),
        (("eval", "--run", "classify", "labels.csv", "--beams", "4"), "beams has no effect: it is for translations"),
        (("eval", "--run", "write", "text3.txt", "--limit", "2"), "limit has no effect: it is for examples and pairs"),
    ):
        assert run(*command) == 0
        assert f"fastllm: warning: command line: {why}" in capsys.readouterr().err


def test_bleu_by_the_language_of_the_references_is_hinted_at_and_given(here, capsys):
    (here / "zh.tsv").write_text("red cat\t我喜欢红色的猫\ngreen dog\t绿色的狗\n", "utf-8")
    scores = ["eval", "--run", "translate", "zh.tsv", "--beams", "1"]
    assert run(*scores) == 0
    out, err = capsys.readouterr()
    assert "|tok:13a|" in out
    assert err == "hint: for BLEU in the language of these references sacrebleu has --tokenize zh\n"
    assert run(*scores, "--tokenize", "zh") == 0
    out, err = capsys.readouterr()
    assert "|tok:zh|" in out
    assert err == ""


def test_bad_input_is_refused_in_one_line_before_any_work(here, capsys):
    (here / "empty.tsv").write_text("")
    (here / "strange.csv").write_text("text,label\nx,ugly\n")
    check = partial(check_refused, capsys)
    train = ("train", *SMALL)
    check("this model is for fastllm classify, not for fastllm translate", "translate", "--run", "classify", "x")
    check("for fastllm translate, not for fastllm generate", "generate", "--run", "translate")
    check("not for fastllm answer", "answer", "--run", "encoder", "--question", "q", "--context", "c")
    check(r"empty\.tsv: an empty file", "eval", "--run", "translate", "empty.tsv")
    check("label 'ugly' is not among the model's: bad, good", "eval", "--run", "classify", "strange.csv")
    check("an encoder without a task", "eval", "--run", "encoder", "text3.txt")
    check("no text given", "translate", "--run", "translate")
    check("no text given", "classify", "--run", "classify", " ")
    check("text 2 of 3 is empty", "classify", "--run", "classify", "red", "", "cat")
    check("text 2 of 2 is empty", "translate", "--run", "translate", "red", " ")
    check("beams: expected at least 1, got 0", "translate", "--run", "translate", "--beams", "0", "x")
    check("no such run", "classify", "--run", "absent", "x")
    check("objective seq2seq needs files", *train, "--objective", "seq2seq", "--out", "o")
    check(
        "line 1: expected source, tab and target", *train, "--objective", "seq2seq", "--data", "text3.txt", "--out", "o"
    )
    check("decoder: objective mlm needs none, got gru", *train, "--objective", "mlm", "--decoder", "gru", "--out", "o")
    check("label 'ugly' is not among those trained on", *train, "--objective", "classify", "--data", "labels.csv",
          "--held-out", "strange.csv", "--out", "o")  # fmt: skip
    fine = ("train", "--steps", "1", "--quiet", "--out", "o", "--pretrained")
    check("--hidden-size: the model's shape comes from --pretrained", *fine, "encoder", "--objective", "classify",
          "--data", "labels.csv", "--hidden-size", "8")  # fmt: skip
    check("absent: no such folder", *fine, "absent", "--objective", "classify", "--data", "labels.csv")
    check("objective classify needs transformer, lstm or gru, got none", *fine, "write", "--objective", "classify",
          "--data", "labels.csv")  # fmt: skip
    check("is not the one that .* was trained with", *fine, "encoder", "--objective", "classify", "--data",
          "labels.csv", "--tokenizer", "translate/model/tokenizer.json")  # fmt: skip
    check("next-sentence pairs need at least two documents", *train, "--objective", "nsp", "--data", "text3.txt",
          "--out", "o")  # fmt: skip
    check("--objective cannot be given|--resume: a run keeps", "train", "--resume", "encoder", "--objective", "mlm")


def test_a_mismatched_tokenizer_is_refused(here, capsys, tmp_path):
    import shutil

    shutil.copytree("classify/model", tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    shutil.copy("translate/model/tokenizer.json", tmp_path / "model" / "tokenizer.json")
    check_refused(capsys, "tokens do not match the model's vocab_size|no cls token", "classify", "--model",
            tmp_path / "model", "x")  # fmt: skip


def test_serving_refuses_before_it_listens(here, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        check_refused(capsys, "port .* Address already in use", "serve", "classify", "--port", taken.getsockname()[1])
    check_refused(capsys, "a second model for classify", "serve", "classify", "still", "--port", "0")
    check_refused(capsys, "an encoder without a task cannot be served", "serve", "encoder", "--port", "0")
    check_refused(capsys, "absent: no such folder", "serve", "absent")
