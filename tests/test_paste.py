"""docs/paste.py finds every command of the pages, and its table of substitutes fits them."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from thorough import THOROUGH

ROOT = Path(__file__).parent.parent
# What no machine can be asked for, and what a reader fills in.
NEEDS = re.compile(r"\bsudo\b|\bsrun\b|\bscontrol\b|--tune\b| \.\.\.|SOURCE|\bA\.json\b")


@pytest.fixture
def paste(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    spec = importlib.util.spec_from_file_location("paste", ROOT / "docs" / "paste.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("paste_table", None)


def found(paste, venv=False):
    return [command for page in paste.pages() for command in paste.commands(page, venv)]


def test_every_block_is_run_or_in_the_table(paste):
    """Every line of a shell block is part of a command, and what runs needs no other machine."""
    for page in paste.pages():
        lines = [
            line.strip()
            for match in paste.BLOCK.finditer(page.read_text("utf-8"))
            if match[2] in ("bash", "console")
            for line in match[3].splitlines()
            if line.strip() and not line.strip().startswith("#")
        ]
        pasted = "\n".join(command.text for command in paste.commands(page))
        assert not [line for line in lines if re.sub(r"\s+# .*$", "", line) not in pasted], page.name
    commands = found(paste)
    assert len(commands) > 100
    assert not [command.text for command in commands if command.run and NEEDS.search(command.run)]
    assert all(command.why for command in commands if command.run != command.text)


def test_no_row_of_the_table_is_stale(paste):
    whys = {why for venv in (False, True) for command in found(paste, venv) for why in command.why}
    assert {rule.why for rule in paste.RULES} == {why for why in whys if "not installed here" not in why}
    assert set(paste.INPUTS) <= {str(page.relative_to(ROOT)) for page in paste.pages()}
    prose = "\n".join(page.read_text("utf-8") for page in paste.pages())
    spans = [" ".join(match[1].split()) for match in paste.SENTENCE.finditer(prose)]
    for pattern in paste.MENTIONS:
        assert any(re.fullmatch(pattern, span) for span in spans), pattern


def test_lines_that_belong_together_are_one_command(paste):
    code = 'one \\\n  --two\n\n# a remark\nfor x in 1 2; do\n  three "$x\n4"\ndone\nfive    # why\n'
    assert paste.whole(code) == [(0, "one \\\n  --two"), (4, 'for x in 1 2; do\n  three "$x\n4"\ndone'), (8, "five")]
    with pytest.raises(ValueError, match="without an end: six"):
        paste.whole("six \\\n")


def test_commands_run_in_order_and_a_failure_is_the_exit_code(paste, tmp_path, monkeypatch, capsys):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("```bash\nset -- kept\necho $1 > made\ngrep kept made\nsudo reboot && false\nsrun x\n```\n")
    for arguments in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *identity, "commit", "-qm", "x"], cwd=tmp_path, check=True)
    rule = paste.RULES[0]._replace
    monkeypatch.setattr(paste, "ROOT", tmp_path)
    monkeypatch.setattr(paste, "pages", lambda: [page])
    rules = [rule(pattern="^sudo reboot && ", instead="", why="no root"), rule(pattern="^srun", instead=None)]
    monkeypatch.setattr(paste, "RULES", rules)
    target = paste.clone(tmp_path / "folder")
    results = paste.paste([], target, dict(os.environ), False, 60)
    assert [result.outcome for result in results] == ["ok", "ok", "exit code 1", "left"]
    assert results[1].output == "kept\n"
    assert paste.summary(results) == 1
    output = capsys.readouterr().out
    assert "2 ran as written, 0 ran with a substitute, 1 were left out, 1 failed" in output
    assert "failed: docs/page.md:5: exit code 1: set -- kept sudo reboot && false" in output
    assert paste.summary(results[:2]) == 0
    with pytest.raises(SystemExit, match="exists; choose another folder"):
        paste.clone(tmp_path / "folder")


def test_a_server_is_asked_and_stopped_and_what_hangs_is_ended(paste, tmp_path):
    serve = "import http.server as h; s = h.HTTPServer(('127.0.0.1', 0), h.SimpleHTTPRequestHandler)\n"
    serve += "print(f'http://127.0.0.1:{s.server_port}', flush=True); s.serve_forever()"
    (tmp_path / "serve.py").write_text(serve)
    run = f'mkdocs() {{ {sys.executable} serve.py "$@"; }}; mkdocs serve'
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's `&` leaves it
    try:
        assert paste.shell(run, tmp_path, dict(os.environ), 60)[0] == "ok"
    finally:
        signal.signal(signal.SIGINT, before)
    assert paste.shell("mkdocs() { exit 3; }; mkdocs serve", tmp_path, dict(os.environ), 60)[0] == "no page was served"
    assert paste.shell("sleep 60", tmp_path, dict(os.environ), 0.1)[0] == "not finished after 0 s"


@THOROUGH
def test_every_command_of_the_pages_runs(tmp_path):
    """About a quarter of an hour on two cores that are otherwise idle."""
    result = subprocess.run(
        [sys.executable, "docs/paste.py", str(tmp_path / "pasted")], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-5000:]
