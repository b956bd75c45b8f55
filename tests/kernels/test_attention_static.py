"""What ptxas makes of the attention kernels: two calls compiled here, and when the page of all of them is stale."""

import subprocess
import sys
from pathlib import Path

from fastllm.bench import attention_tables as tables
from fastllm.bench.interpreter import without_interpreter

PAGE = Path(__file__).parents[2] / "docs" / "attention-tables.md"


def test_no_spills_and_warpgroup_products(tmp_path):
    environment = {**without_interpreter(), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    command = [sys.executable, "-m", "fastllm.bench.attention_tables", "--spot"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    *lines, total = run.stdout.splitlines()
    assert total.endswith(" kernels, 0 that spill or do not fit")
    products = [line for line in lines if " full " in line and " delta " not in line]
    assert len(products) == 3
    assert all(line.endswith("HGMMA") for line in products)
    assert all(int(line.split("copies")[1].split()[0]) > 0 for line in products)
    other = tables.spot()[1][3]
    assert [line for line in lines if f" {other} " in line]


def test_the_page_has_all_calls_of_these_kernels_and_shows_no_spills():
    assert tables.stale(PAGE) is None
    assert f"{len(tables.planned())} of {len(tables.planned())} calls are compiled." in PAGE.read_text(encoding="utf-8")
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if "float" in line[:9]]
    assert len(rows) > 50
    assert [row for row in rows if {spills.strip() for spills in row[8].split("/")} - {"0", ""}] == []


def test_a_changed_kernel_makes_the_page_stale(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"Sources: {tables.fingerprint()}, of the Gluon kernels {tables.fingerprint(tables.HOPPER)}.")
    assert tables.stale(page) is None
    kernel = tmp_path / "attention" / "forward.py"
    kernel.parent.mkdir()
    kernel.write_text("x = 1\n")
    monkeypatch.setattr(tables.kernels, "__path__", [str(tmp_path)])
    (tmp_path / "launch.py").write_text("")
    (tmp_path / "math.py").write_text("")
    assert "is stale" in tables.stale(page)
    page.write_text(f"Sources: {tables.fingerprint()}, of the Gluon kernels {tables.fingerprint(tables.HOPPER)}.")
    kernel.write_text("# A comment.\n\nx = 1\n")
    assert tables.stale(page) is None
    kernel.write_text("x = 2\n")
    assert "is stale" in tables.stale(page)
