"""fastllm report: one page, self-contained, whatever the runs hold."""

import json
import re
from html.parser import HTMLParser

import pytest

from fastllm.cli import main
from fastllm.training import train
from fastllm.training.reports.curves import START, smoothed
from fastllm.training.reports.page import make_page

pytestmark = pytest.mark.usefixtures("short_runs")


def test_a_page_has_curves_results_samples_and_what_differs(config, tmp_path, capsys):
    for name, settings in (("a", {}), ("b<i>", {"batch_size": 2, "seed": 1})):
        train(config(eval_interval=2, **settings), tmp_path / name, quiet=True)
    (tmp_path / "a" / "samples.txt").write_text("</pre><script>alert(1)</script>")
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b<i>"), "--out", str(page)]) == 0
    text = page.read_text()
    assert text.count("<svg") >= 6
    assert "<script" not in text
    assert "b<i>" not in text  # what a name or a sample holds is text
    assert not re.search(r"""(src|href)=["'](?!#)""", text)  # nothing is loaded
    differing = re.findall(r'<tr class="differs"><td>([^<]*)', text)
    assert differing == ["training.batch_size", "training.seed"]
    HTMLParser().feed(text)


def test_many_runs_and_one_that_failed(config, tmp_path):
    """Each of twenty can be told apart, a loss that was not finite is named, and one without a step stops nothing."""
    train(config(steps=1), tmp_path / "run", quiet=True)
    text = (tmp_path / "run" / "config.toml").read_text()
    for number in range(20):
        folder = tmp_path / "sweep" / f"number-{number}"
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(text)
        loss = None if number == 3 else 1.0 + number
        (folder / "metrics.jsonl").write_text("" if number == 7 else json.dumps({"step": 1, "lr": 0.1, "loss": loss}))
    runs = sorted((tmp_path / "sweep").iterdir(), key=lambda folder: int(folder.name.partition("-")[2]))
    make_page(runs, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    looks = re.findall(r'class="key" style="([^"]*)"></span>([^<]*)<', page)
    assert [name for _, name in looks] == [f"number-{number}" for number in range(20)]
    assert len({look for look, _ in looks}) == 20
    rows = dict(re.findall(r"<tr class=\"same\"><td>(number-\d+)</td>((?:<td>[^<]*</td>)+)", page))
    cells = {name: re.findall(r"<td>([^<]*)", row) for name, row in rows.items()}
    assert (cells["number-2"][3], cells["number-3"][3]) == ("3.0000", "not finite")
    assert set(cells["number-7"]) == {"-"}
    assert 'name="viewport"' in page


def test_what_is_no_run_is_refused(config, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no run: config.toml is missing" in capsys.readouterr().err
    train(config(steps=1), tmp_path / "run", quiet=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"st')
    assert main(["report", str(tmp_path / "run")]) == 2
    assert "has nothing to show yet" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path)]) == 2
    assert "a folder; --out names the page" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "file" / "page.html")]) == 2
    assert f"{tmp_path / 'file'}: cannot write there: it is no folder" in capsys.readouterr().err


def test_smoothing_has_as_many_values_on_either_side_and_none_after_the_first():
    values = [float(i * i) for i in range(200)]
    found, span = smoothed(values), 200 // START
    for i in (0, 1, 3, span, 100, 199 - span):
        some = min(i, span)
        assert found[i] == pytest.approx(sum(values[i - some : i + some + 1]) / (2 * some + 1))
    assert found[199] == pytest.approx(sum(values[199 - span :]) / (span + 1))
