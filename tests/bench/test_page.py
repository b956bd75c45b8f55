"""The plots and the page of a run, the page in a real browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from fastllm.bench import command, plots
from fastllm.bench.page import page
from fastllm.bench.results import COMPILED, EAGER, OURS, Row, Run, read_run
from fastllm.bench.scores import write

RATES = {"copy": 1e12, "matrix": 1e14}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def _row(op, direction, provider, us, **more):
    samples = [us * 1e-6 * x for x in (0.9, 1.0, 1.1)] if us else []
    settings = dict(least_bytes=10**6, flops=0, first_call=0.5, cache="cold", host=[1e-5], peak_bytes=10**6) | more
    return Row(op, settings.pop("shape", "real 8x8"), "bfloat16", direction, provider, samples=samples, **settings)


@pytest.fixture
def found() -> Run:
    """Two ops: we win, lose, and are swept over a size; one provider is wrong, one not installed."""
    rows = [
        _row("layer_norm", "forward", OURS, 10), _row("layer_norm", "forward", EAGER, 40),
        _row("layer_norm", "forward", COMPILED, 12), _row("layer_norm", "backward", OURS, 30),
        _row("layer_norm", "backward", EAGER, 15),
        _row("layer_norm", "forward", "rival", None, problem="result 0: error 1.00e+00, eager's own is <1e-3>"),
        _row("layer_norm", "forward", "absent", None, problem="not installed (absent)"),
        *(
            _row("attention", "both", who, n * us, flops=10**9 * n, axis="sequence length", size=n, shape=f"S {n}")
            for n in (512, 1024, 2048) for who, us in ((OURS, 1), (EAGER, 3))
        ),
    ]  # fmt: skip
    environment = {"device": "A <GPU>", "rates": RATES, "commit": "abc", "packages": {"torch": "2"}, "gpu": None}
    return Run(environment, rows, ["rms_norm, wide: too large for this device"])


def _size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def test_every_plot_is_drawn(found):
    pictures = plots.plots(found)
    assert set(pictures) == {"roofline", "speedup", "attention-bfloat16-cold"}
    for picture in pictures.values():
        width, height = _size(picture)
        assert width > 400
        assert height > 200


def test_nothing_to_draw_is_no_error(found):
    assert plots.plots(Run(found.environment, [row for row in found.rows if not row.samples])) == {}
    assert "0 calls" in page(Run(found.environment), {})


def test_leads_are_those_of_each_call(found):
    leads = plots.leads(plots.in_cases(found.rows))
    assert sorted(leads["layer_norm"][EAGER]) == pytest.approx([0.5, 4.0])
    assert leads["layer_norm"][COMPILED] == pytest.approx([1.2])
    assert sorted(leads["layer_norm"]["best other"]) == pytest.approx([0.5, 1.2])
    assert plots.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)


def test_the_roof_is_the_larger_of_bytes_and_flops():
    row = _row("op", "forward", OURS, 10)
    assert plots.floor(row, RATES) == pytest.approx(1e-6)
    assert plots.floor(_row("op", "forward", OURS, 10, flops=10**9), RATES) == pytest.approx(1e-5)


class _Tables(HTMLParser):
    """Table id -> its body's rows as texts."""

    def __init__(self, html: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.cell = False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "table":
            self.rows = self.tables.setdefault(attributes["id"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        if tag == "td":
            self.cell = False

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data


def _body(html: str, table: str) -> list[list[str]]:
    return [row for row in _Tables(html).tables[table] if row]


def test_losses_come_first_and_text_is_escaped(found):
    html = page(found, {"roofline": b"\x89PNG"})
    rows = _body(html, "cases")
    assert [(row[0], row[3], row[8]) for row in rows[:2]] == [
        ("layer_norm", "backward", "0.50x"),
        ("layer_norm", "forward", "1.20x"),
    ]
    assert "in 1 of them another provider is faster" in html
    assert "A &lt;GPU&gt;" in html
    assert "<GPU>" not in html
    assert "is &lt;1e-3&gt;" in html
    assert "absent: not installed" in html
    assert "rms_norm, wide: too large" in html
    assert set(re.findall(r"""(?:src|href)=["']?(\w+:)?""", html)) == {"data:"}  # nothing is fetched


def test_what_has_no_time_shows_none(found):
    row = next(row for row in _body(page(found, {}), "rows") if row[5] == "rival")
    assert row[6:13] == [""] * 7
    assert row[13].startswith("result 0: error")


def test_report_draws_a_run_again(found, tmp_path, capsys):
    file = tmp_path / "bench.json"
    write(found, file)
    assert read_run(file) == found
    assert command.main(["report", str(file), "--out", str(tmp_path / "new")]) == 0
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"bench.html", "roofline.png", "speedup.png", "attention-bfloat16-cold.png"}
    assert "written:" in capsys.readouterr().out


CLICKS = """
<script>
const table = document.getElementById("cases");
const order = () => [...table.tBodies[0].rows].filter(row => !row.hidden).map(row => row.cells[5].textContent);
const found = {loaded: order()};
const head = [...table.querySelectorAll("th")].find(head => head.textContent === "fastllm us");
head.firstChild.click(); found.ascending = order(); found.mark = head.getAttribute("aria-sort");
head.firstChild.click(); found.descending = order();
const input = document.querySelector("input[data-table=cases]");
input.value = "LAYER backward"; input.dispatchEvent(new Event("input")); found.filtered = order();
found.pictures = [...document.images].map(image => image.complete && image.naturalWidth > 0);
const pre = document.createElement("pre"); pre.id = "found"; pre.textContent = JSON.stringify(found);
document.body.append(pre);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (chromium, chromium-browser, google-chrome)")
def test_tables_sort_and_filter_in_a_browser(found, tmp_path):
    html = page(found, plots.plots(found))
    file = tmp_path / "page.html"
    # After the load event, when the embedded pictures are decoded.
    script = CLICKS.replace("<script>", "<script>addEventListener('load', () => {").replace("</script>", "})</script>")
    file.write_text(html.replace("</body>", f"{script}</body>"), encoding="utf-8")
    shot = tmp_path / "page.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dump = [*command, "--virtual-time-budget=5000", "--dump-dom", file.as_uri()]
    out = subprocess.run(dump, capture_output=True, text=True, timeout=120, check=True).stdout
    result = json.loads(re.search(r'<pre id="found">(.*?)</pre>', out)[1])
    ours = ["512.0", "1,024.0", "2,048.0"]
    assert result["loaded"][:2] == ["30.0", "10.0"]
    assert result["ascending"] == ["10.0", "30.0", *ours]
    assert result["mark"] == "ascending"
    assert result["descending"] == [*reversed(ours), "30.0", "10.0"]
    assert result["filtered"] == ["30.0"]
    assert result["pictures"] == [True] * 3
    subprocess.run(
        [*command, f"--screenshot={shot}", "--window-size=1400,1600", file.as_uri()], timeout=120, check=True
    )
    assert _size(shot.read_bytes()) == (1400, 1600)
