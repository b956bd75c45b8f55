"""Pastes the commands of README.md, CONTRIBUTING.md and docs/ into a shell, in a fresh clone, and says what each took.

python docs/paste.py FOLDER                     the active environment; the clone is FOLDER/fastllm
python docs/paste.py FOLDER --venv              a fresh environment in FOLDER/venv, installed as the pages say
python docs/paste.py FOLDER --pages README.md   these pages alone

Commands are the lines of ``bash`` and ``console`` blocks, and code in a sentence that is a whole command. They run in
the order of the page, each page in a clean clone. docs/paste_table.py has the substitutes: what is run in place of a
command that a machine cannot run, or that takes long, and why. The exit code is 1 where a command fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from paste_table import ENVIRONMENT, INPUTS, MENTIONS, OPTIONAL, RULES, make_inputs

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
SENTENCE = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:fastllm|python|pip|pytest|mkdocs|torchrun|bench/gpu\.sh)\s[^`]+)`")
SERVES = re.compile(r"\b(fastllm|mkdocs) serve\b")
# A line that only sets what later lines of its block use.
SETS = re.compile(r"set -- .*|\w+=\S+|\w+=\$\(.*\)")
# What `git clean` leaves between two pages: the install.
KEPT = ("*.so", "*.egg-info", "build", ".venv")


class Command(NamedTuple):
    page: str
    line: int
    text: str
    # What is run, None where nothing is; and why that is not the text.
    run: str | None
    why: tuple[str, ...]


class Result(NamedTuple):
    command: Command
    seconds: float
    outcome: str
    output: str


def pages() -> list[Path]:
    """README.md first, as a reader does."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def whole(code: str) -> list[tuple[int, str]]:
    """(line, command) of a block: lines that a backslash, a quote or a loop carries on are one command."""
    found, parts, began = [], [], 0
    for number, line in enumerate(code.splitlines()):
        if not parts and (not line.strip() or line.lstrip().startswith("#")):
            continue
        began = began if parts else number
        parts.append(line)
        text = "\n".join(parts)
        loop = text.startswith("for ") and line != "done"
        if not (line.endswith("\\") or text.count('"') % 2 or loop):
            found.append((began, re.sub(r"\s+# .*$", "", text)))
            parts = []
    if parts:
        raise ValueError(f"a command without an end: {parts[0]}")
    return found


def ruled(page: str, line: int, text: str, venv: bool) -> Command:
    """``text`` with the rules of the table applied in order."""
    run, why = text, []
    for rule in RULES:
        if (
            not re.fullmatch(rule.page, page)
            or (venv and rule.active_only)
            or not re.search(rule.pattern, run, re.MULTILINE)
        ):
            continue
        why += [rule.why] if rule.why not in why else []
        if rule.instead is None:
            return Command(page, line, text, None, tuple(why))
        run = re.sub(rule.pattern, rule.instead, run, flags=re.MULTILINE)
    absent = [program for program in OPTIONAL if re.search(rf"\b{program} ", run) and not shutil.which(program)]
    if absent and not venv:
        return Command(page, line, text, None, (*why, f"{absent[0]} is not installed here"))
    return Command(page, line, text, run, tuple(why))


def commands(page: Path, venv: bool = False) -> list[Command]:
    """The commands of a page in order. Lines that set names stand before the later lines of their block."""
    text, name = page.read_text("utf-8"), str(page.relative_to(ROOT))
    found = []
    for match in BLOCK.finditer(text):
        if match[2] not in ("bash", "console"):
            continue
        first, sets = text.count("\n", 0, match.start()) + 2, ""
        for line, written in whole(re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)):
            if SETS.fullmatch(written.replace("\\\n", " ")):
                sets += written + "\n"
            else:
                found.append((match.start(), first + line, sets + written))
    prose = BLOCK.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    for match in SENTENCE.finditer(prose):
        written = " ".join(match[1].split())
        if not any(re.fullmatch(pattern, written) for pattern in MENTIONS):
            found.append((match.start(), text.count("\n", 0, match.start()) + 1, written))
    return [ruled(name, line, written, venv) for _, line, written in sorted(found)]


def shell(text: str, folder: Path, environment: dict[str, str], limit: float) -> tuple[str, str]:
    """('ok' or what went wrong, output). A command that takes more than ``limit`` seconds is killed."""
    with tempfile.TemporaryFile() as written:

        def output() -> str:
            written.seek(0)
            return written.read().decode("utf-8", "replace")

        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=written, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_hears_interrupts,
        )  # fmt: skip
        try:
            if SERVES.search(text):
                return _served(process, output, limit), output()
            process.wait(limit)
            return "ok" if process.returncode == 0 else f"exit code {process.returncode}", output()
        except subprocess.TimeoutExpired:
            return f"not finished after {limit:.0f} s", output()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _hears_interrupts() -> None:
    """A shell that starts this script in the background has it ignore SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _served(process: subprocess.Popen, output: Callable[[], str], limit: float) -> str:
    """Asks the address that the server prints for its page, and stops the server as Ctrl-C does."""
    ends = time.monotonic() + limit
    while process.poll() is None and time.monotonic() < ends:
        time.sleep(0.1)
        if not (address := re.search(r"http://[\w.]+:\d+", output())):
            continue
        try:
            with urllib.request.urlopen(address[0], timeout=10):
                break
        except OSError:  # it prints the address before it listens
            continue
    else:
        return "no page was served"
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        return "not ended 30 s after Ctrl-C"
    return "ok"


def clone(folder: Path) -> Path:
    """The last commit, in a folder that is new."""
    target = folder / "fastllm"
    if target.exists():
        raise SystemExit(f"{target} exists; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(target)], check=True)
    return target


def environment_of(folder: Path, target: Path, venv: bool) -> dict[str, str]:
    """The variables of every command: the active environment's with the clone's package, or a fresh environment's."""
    found = {**os.environ, **ENVIRONMENT}
    for name in ("FASTLLM_ROOT", "PYTHONPATH"):
        found.pop(name, None)
    if venv:
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        return {**found, "VIRTUAL_ENV": str(folder / "venv"), "PATH": f"{folder}/venv/bin:{found['PATH']}"}
    return {**found, "PYTHONPATH": str(target), "FASTLLM_ROOT": str(target)}


def paste(names: list[str], target: Path, environment: dict[str, str], venv: bool, limit: float) -> list[Result]:
    """Every command of the pages ``names``, in order. A line is printed as each ends."""
    results = []
    for page in [page for page in pages() if not names or str(page.relative_to(ROOT)) in names]:
        found = commands(page, venv)
        if not found:
            continue
        print(f"\n{page.relative_to(ROOT)}", flush=True)
        keep = [word for pattern in KEPT for word in ("-e", pattern)]
        subprocess.run(["git", "reset", "-q", "--hard"], cwd=target, check=True)
        subprocess.run(["git", "clean", "-fdxq", *keep], cwd=target, check=True)
        make_inputs(target, environment, INPUTS.get(str(page.relative_to(ROOT)), ()))
        for command in found:
            began = time.monotonic()
            outcome, output = ("left", "") if command.run is None else shell(command.run, target, environment, limit)
            results.append(Result(command, time.monotonic() - began, outcome, output))
            _show(results[-1])
    return results


def _indented(text: str) -> str:
    return text.replace("\n", "\n" + " " * 20)


def _show(result: Result) -> None:
    command = result.command
    print(f"{result.seconds:8.1f} s  {result.outcome:<6}  {_indented(command.text)}", flush=True)
    if command.run not in (None, command.text):
        print(f"{'':20}run as: {_indented(command.run)}")
    for why in command.why:
        print(f"{'':20}because: {why}")
    if result.outcome not in ("ok", "left"):
        print("\n".join(f"{'':20}| {line}" for line in result.output.splitlines()[-25:]), flush=True)


def summary(results: list[Result]) -> int:
    """Prints the totals and every failure; the exit code."""
    counts = Counter("failed" if result.outcome not in ("ok", "left") else result.outcome for result in results)
    changed = sum(result.outcome == "ok" and result.command.run != result.command.text for result in results)
    print(
        f"\n{len(results)} commands, {sum(result.seconds for result in results):.0f} s: "
        f"{counts['ok'] - changed} ran as written, {changed} ran with a substitute, {counts['left']} were left out, "
        f"{counts['failed']} failed"
    )
    for command, _, outcome, _ in results:
        if outcome not in ("ok", "left"):
            print(f"failed: {command.page}:{command.line}: {outcome}: {' '.join(command.text.split())}")
    return 1 if counts["failed"] else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the clone goes; new or empty")
    parser.add_argument("--venv", action="store_true", help="make a fresh environment and run every pip install")
    parser.add_argument("--pages", nargs="+", default=[], metavar="PAGE", help="only these, such as docs/train.md")
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="for one command (%(default)s)")
    options = parser.parse_args(arguments)
    if unknown := set(options.pages) - {str(page.relative_to(ROOT)) for page in pages()}:
        parser.error(f"--pages: no page {', '.join(sorted(unknown))}")
    if options.venv and options.pages and "README.md" not in options.pages:
        parser.error("--venv: README.md must be among the pages, because its commands install the package")
    folder = options.folder.resolve()
    target = clone(folder)
    environment = environment_of(folder, target, options.venv)
    if not options.venv:
        outcome, output = shell("python -m fastllm.build", target, environment, options.limit)
        if outcome != "ok":
            raise SystemExit(f"python -m fastllm.build: {outcome}\n{output}")
    return summary(paste(options.pages, target, environment, options.venv, options.limit))


if __name__ == "__main__":
    sys.exit(main())
