"""The quality filter by a reference's word frequencies."""

import json
import math
import random

import pytest
from extras import needed
from pages import article

from fastllm.config import InputError, build_settings
from fastllm.data.clean import CleanConfig, Document, Rejection, clean
from fastllm.data.clean.unigram import Unigram, reference_model
from fastllm.data.pipeline import prepare_text


def reference_lines(begin):
    return "".join(json.dumps({"text": article(i)}) + "\n" for i in range(begin, 60))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "reference.jsonl"
    path.write_text(reference_lines(0))
    return str(path)


def strange(seed):
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("qxzjkvw", k=6)) for _ in range(80)) + "."


def test_scores_are_mean_log_probabilities():
    model = Unigram.of(["a", "a", "b"])
    assert model.score(["a", "c"]) == pytest.approx((math.log(3 / 6) + math.log(1 / 6)) / 2)
    assert model.score([]) == -math.inf


def test_the_bound_keeps_the_share_of_the_reference_and_refuses_other_words(path):
    needed("ftfy", "data")
    config = CleanConfig(rules=("none",), quality_reference=path, quality_share=0.9)
    kept = [clean(Document("x", article(1000 + i)), config)[0] for i in range(60)]
    # Articles are longer than the pieces that the bound is from: more than 0.9 of them pass.
    assert sum(isinstance(found, Document) for found in kept) >= 54
    found, _ = clean(Document("x", strange(1)), config)
    assert isinstance(found, Rejection)
    assert found.rule == "quality"
    assert found.details["log_probability"] < found.details["least"] == round(reference_model(path, 0.9)[1], 4)
    assert reference_model(path, 0.5)[1] > reference_model(path, 0.9)[1] > reference_model(path, 0.99)[1]
    found, _ = clean(Document("x", "?! ..."), config)
    assert found.details["log_probability"] is None


def test_a_run_counts_it_and_a_bad_reference_is_refused_before_any_work(path, tmp_path):
    needed("ftfy", "data")
    texts = [article(500), strange(2), article(501)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = CleanConfig(rules=("none",), quality_reference=path)
    report = prepare_text([tmp_path / "in.jsonl"], tmp_path / "out", config, workers=0)
    assert (report["documents_kept"], report["rejected"]) == (2, {"quality": 1})
    (tmp_path / "few.txt").write_text("Few words.")
    (tmp_path / "page.html").write_text("<p>Few words.")
    for name, message in (
        ("none.txt", "no such file"), ("few.txt", "expected at least 4,000 words, got 2"),
        ("page.html", "expected text or JSON lines, got html"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"quality_reference: .*{message}"):
            build_settings(CleanConfig, {"quality_reference": str(tmp_path / name)}, "command line")


def test_a_run_with_a_file_that_has_changed_is_another_run(tmp_path):
    needed("ftfy", "data")
    (tmp_path / "in.txt").write_text(article(500))
    reference, hosts = tmp_path / "reference.jsonl", tmp_path / "hosts.txt"
    for name, path, contents in (
        ("quality_reference", reference, [reference_lines(0), reference_lines(1)]),
        ("block_urls", hosts, ["one.example\n", "two.example\n"]),
    ):  # fmt: skip
        out = tmp_path / name
        path.write_text(contents[0])
        prepare_text([tmp_path / "in.txt"], out, CleanConfig(rules=("none",), **{name: str(path)}), workers=0)
        again = prepare_text([tmp_path / "in.txt"], out, CleanConfig(rules=("none",), **{name: str(path)}), workers=0)
        assert again["documents_kept"] == 1
        path.write_text(contents[1])
        changed = CleanConfig(rules=("none",), **{name: str(path)})
        with pytest.raises(InputError, match="other settings"):
            prepare_text([tmp_path / "in.txt"], out, changed, workers=0)


def test_a_new_configuration_reads_its_reference_anew(tmp_path):
    path = tmp_path / "reference.txt"
    bounds = []
    for number in (1, 100):
        path.write_text("\n\n".join(article(number + i) for i in range(40)))
        CleanConfig(rules=("none",), quality_reference=str(path))
        bounds.append(reference_model(str(path), 0.95)[0].total)
    assert bounds[0] != bounds[1]
