"""The GitHub workflows: they parse, and their steps name commands, files and extras that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; transformers brings it")
ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps():
    for file in FILES:
        for job, content in yaml.safe_load(file.read_text("utf-8"))["jobs"].items():
            for number, step in enumerate(content.get("steps", [])):
                if "run" in step:
                    # An expression becomes a word, as it does before the shell sees the step.
                    script = re.sub(r"\$\{\{.*?\}\}", "expression", step["run"])
                    yield pytest.param(script, id=f"{file.stem}-{job}-{number}")


@pytest.mark.skipif(sys.platform == "win32", reason="bash reads the steps")
@pytest.mark.parametrize("script", list(steps()))
def test_a_steps_script(script):
    found = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert found.returncode == 0, found.stderr
    extras = (ROOT / "pyproject.toml").read_text("utf-8")
    for names in re.findall(r"\.\[([\w,]+)\]", script):
        assert all(re.search(rf"^{name} = \[", extras, re.MULTILINE) for name in names.split(",")), names
    for path in re.findall(r"(?<![\w/.-])(?:\.ci|examples|bench|docs|tests)/[\w./-]+", script):
        assert (ROOT / path).exists(), path


def test_there_are_steps():
    assert len(list(steps())) > 5
