"""Every code block of every page: Python is run, shell commands are held to the command line, links lead somewhere.

The Python blocks of a page share their names, as a reader would paste them one after the other.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from fastllm.bench.command import main as bench_main
from fastllm.cli import build_parser as cli_parser
from fastllm.data import Tokenizer, write_token_file

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
# What a block may hold; "text" is output. tests/test_contributing.py runs CONTRIBUTING.md's Python.
LANGUAGES = {"python", "bash", "console", "text", "yaml", "toml", "json"}
# Pages whose Python is parts of a training step, with names that nobody defines: they are parsed, not run.
FRAGMENTS = {"post-training.md"}
# Programs of the shell blocks whose arguments are not ours to check.
OTHERS = {"pip", "sudo", "set", "srun", "ruff", "pre-commit", "git", "mkdocs", "pyright", "head", "show"}
KEYWORDS = {"for", "do", "done"}
# Runs the pages' blocks, one page after the other; each page has names of its own.
RUN = """
import json, sys, traceback
for page, blocks in json.load(open(sys.argv[1])).items():
    names = {"__name__": page}
    for line, code in blocks:
        try:
            exec(compile("\\n" * line + code, page, "exec"), names)
        except BaseException:
            traceback.print_exc()
            sys.exit(f"{page}, line {line + 1}")
print("all blocks ran")
"""


def blocks(page: Path, *languages: str) -> list[tuple[int, str, str]]:
    """(line that the code begins after, language, code) of a page's blocks; all languages without ``languages``."""
    text = page.read_text("utf-8")
    found = []
    for match in BLOCK.finditer(text):
        indent, language, code = match.groups()
        if not languages or language in languages:
            code = re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
            found.append((text.count("\n", 0, match.start()) + 1, language, code))
    return found


def test_blocks_are_of_a_kind_that_is_checked():
    assert {language for page in PAGES for _, language, _ in blocks(page)} <= LANGUAGES


def test_python_blocks_run(tmp_path):
    pages = {
        str(page.relative_to(ROOT)): [(line, code) for line, _, code in blocks(page, "python")]
        for page in PAGES
        if page.name != "CONTRIBUTING.md" and page.name not in FRAGMENTS
    }
    assert sum(map(len, pages.values())) >= 8
    # What docs/data.md reads.
    (tmp_path / "tokens").mkdir()
    documents = ["One document. Two sentences.", "Another."]
    write_token_file(tmp_path / "tokens/train-00000.bin", documents, Tokenizer.train(documents, 260))
    # What docs/bench-json.md reads.
    shutil.copy(ROOT / "bench" / "results" / "cpu-avx2" / "bench.json", tmp_path)
    (tmp_path / "blocks.json").write_text(json.dumps(pages))
    result = subprocess.run(
        [sys.executable, "-c", RUN, "blocks.json"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("all blocks ran\n")


@pytest.mark.parametrize("name", sorted(FRAGMENTS))
def test_fragments_are_python(name):
    found = blocks(ROOT / "docs" / name, "python")
    assert found
    for line, _, code in found:
        compile("\n" * line + code, name, "exec")


def commands() -> list[tuple[str, list[str]]]:
    """(where, words) of every command of the shell blocks, without the assignments and keywords before it.

    Of a ``console`` block, which shows how something was measured, those of fastllm alone.
    """
    found = []
    for page in PAGES:
        for line, language, code in blocks(page, "bash", "console"):
            for written in re.sub(r"\\\n", " ", code).splitlines():
                # A list of words in quotes may go on in the next line.
                balanced = written if written.count('"') % 2 == 0 else written.replace('"', "")
                words: list[str] = []
                for word in [*shlex.split(balanced, comments=True), ";"]:
                    word, ends = word.rstrip(";"), word in ("&&", "|", ">") or word.endswith(";")
                    if word and not ends:
                        words.append(word)
                        continue
                    words += [word] if word and word not in ("&&", "|", ">") else []
                    while words and (re.fullmatch(r"[A-Za-z_]+=.*", words[0]) or words[0] in KEYWORDS):
                        words.pop(0)
                    if words and (language == "bash" or words[0] == "fastllm"):
                        found.append((f"{page.relative_to(ROOT)}:{line}", words))
                    words = []
    return found


def refused(words: list[str]) -> str | None:
    """Why a command cannot be as it stands, or None."""
    program, *arguments = words
    if program == "torchrun":
        program, arguments = "fastllm", arguments[arguments.index("fastllm") + 1 :]
    if program == "fastllm":
        return _refused_arguments(arguments)
    if program in ("python", "pytest") or "/" in program:
        named = [a for a in [program, *arguments] if re.fullmatch(r"[\w.-]+(/[\w.-]+)+", a)]
        if missing := [a for a in named if not (ROOT / a).exists() and not a.startswith(("runs/", "results"))]:
            return f"{missing[0]} does not exist"
        if program == "python" and arguments[:1] == ["-m"]:
            return _refused_by_module(*arguments[1:])
        return None
    return None if program in OTHERS else f"the program {program} is not known"


def _refused_arguments(arguments: list[str]) -> str | None:
    if "--help" in arguments or "$@" in arguments or "..." in arguments:
        arguments = [*arguments[:1], "--help"]
    if arguments[0] == "bench":
        return _refused_by(bench_main, arguments[1:])
    return _refused_by(lambda words: cli_parser(words[0]).parse_args(words), arguments)


def _refused_by_module(name: str, *arguments: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return f"no module {name}"
    # The others have no arguments.
    return _refused_by(importlib.import_module(name).main, [*arguments]) if name.startswith("fastllm.bench.") else None


class Parsed(Exception):
    """The arguments are in order: what would be done with them is not done."""


def _refused_by(main: Callable[[list[str]], object], arguments: list[str]) -> str | None:
    """Why the parser in ``main`` refuses the arguments, or None."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(parser, args=None, namespace=None):
        parse(parser, args, namespace)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        try:
            main(arguments)
        except Parsed:
            return None
        except SystemExit as exit_:
            return f"{' '.join(arguments)}: exit code {exit_.code}" if exit_.code else None
    raise AssertionError(f"{main.__module__}: parses no arguments")


def test_shell_commands_are_what_the_command_line_takes(capsys):
    found = commands()
    assert len(found) > 40
    wrong = [f"{where}: {problem}" for where, words in found if (problem := refused(words))]
    assert not wrong, "\n".join([*wrong, capsys.readouterr().err])


@pytest.mark.parametrize(
    "text", ["fastllm train --no-such-flag", "fastllm fly", "python -m fastllm.bench.nothing", "python docs/none.py",
             "fastllm bench --nothing", "fastllm bench regress", "fastllm bench train --cpu avx2", "unheard-of --help",
             "python -m fastllm.bench.memory --no-such-flag"],
)  # fmt: skip
def test_a_command_that_does_not_exist_is_seen(text):
    assert refused(text.split())


def anchors(page: Path) -> set[str]:
    """The ids that headings get."""
    text = BLOCK.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text("utf-8")))
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            found.append(f"{page.relative_to(ROOT)}: {target}")
    return found


def test_links_lead_somewhere():
    assert not [link for page in PAGES for link in broken_links(page)]


@pytest.mark.parametrize("name", ["functional", "nn", "losses", "models", "training", "data", "drop_in"])
def test_the_reference_has_every_public_name(name):
    page = (ROOT / f"docs/api/{name}.md").read_text("utf-8")
    paths = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    for path in paths:  # what the site's builder looks for
        place, _, last = path.rpartition(".")
        assert hasattr(importlib.import_module(place), last), path
    there = {path.rpartition(".")[2] for path in paths}
    module = importlib.import_module(f"fastllm.{name}")
    objects = {getattr(module, n).__name__ for n in module.__all__ if callable(getattr(module, n))}
    assert objects <= there, f"not on docs/api/{name}.md: {sorted(objects - there)}"
