"""What is generated of README.md and of docs/ is fresh."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_generated_parts_are_fresh():
    result = subprocess.run([sys.executable, "docs/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_static_page_is_fresh():
    result = subprocess.run([sys.executable, "docs/static.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_fault_in_the_table_has_its_test():
    faults = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").split("## Faults")[1].split("\n## ")[0]
    rows = [line for line in faults.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for before, row in zip([rows[0], *rows], rows, strict=False):
        cell = row.rstrip(" |").rsplit("|", 1)[1]
        named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+?)_?\.\.\.)?`", before if "the same test" in cell else cell)
        assert named, row
        for file, start in named:
            sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob(f"*/{file}")]
            assert any(re.search(rf"^def {start}", source, re.MULTILINE) for source in sources), f"{file}::{start}"
