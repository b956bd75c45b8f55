"""How well and how fast main text comes out of HTML: graded by pages whose sources lie beside them.

``python -m fastllm.bench.cleaning /usr/share/doc/python3.11/html`` (Debian's python3.11-doc: pages made by Sphinx,
their sources in ``_sources``). Precision is the share of an extractor's words that the source has too, recall the share
of the source's words that the extractor has, words counted as often as they occur, both averaged over the pages. A
source also holds words that no page shows (names of directives and roles), so that nobody's recall can be 1.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..data.clean import CleanConfig, Document, Rejection, clean
from ..data.clean.html import EXTRACTORS
from ..data.optional import require

_WORD = re.compile(r"\w+")


def pairs(folder: Path) -> list[tuple[str, str]]:
    """(page, source) for every page of ``folder`` that has one."""
    found = []
    for source in sorted((folder / "_sources").rglob("*.rst.txt")):
        page = folder / str(source.relative_to(folder / "_sources")).replace(".rst.txt", ".html")
        if page.exists():
            found.append((page.read_text("utf-8"), source.read_text("utf-8")))
    return found


def strip_all_tags(page: str) -> str:
    """Every text but scripts and styles, as a first attempt would have it."""
    tree = require("selectolax.lexbor", "selectolax", "this").LexborHTMLParser(page)
    for node in tree.css("script, style"):
        node.decompose()
    return tree.body.text(separator=" ")


def main_division(page: str) -> str:
    """What is inside ``<div role="main">``: right for these pages alone."""
    tree = require("selectolax.lexbor", "selectolax", "this").LexborHTMLParser(page)
    node = tree.css_first("div[role=main]")
    return node.text(separator=" ") if node else ""


def whole_cleaning(page: str) -> str:
    """What ``fastllm prepare`` does to a page, quality rules and deduplication apart."""
    outcome, _ = clean(Document("page", page, "html"), CleanConfig(rules=("none",)))
    return "" if isinstance(outcome, Rejection) else outcome.text


def extractors() -> dict[str, Callable[[str], str]]:
    """By name; datatrove's where it is installed."""
    found: dict[str, Callable[[str], str]] = {
        "strip all tags": strip_all_tags,
        'div role="main"': main_division,
        "fastllm fast": EXTRACTORS["fast"],
        "fastllm prepare, without rules": whole_cleaning,
        "trafilatura": EXTRACTORS["trafilatura"],
        "trafilatura baseline": EXTRACTORS["baseline"],
    }
    try:
        from datatrove.pipeline.extractors import Trafilatura
    except ImportError:
        return found
    found["datatrove (Trafilatura)"] = Trafilatura().extract
    return found


@dataclass
class Grade:
    """Sums over pages, of which :meth:`row` shows means. ``seconds`` are this process's on a core."""

    precision: float = 0.0
    recall: float = 0.0
    seconds: float = 0.0
    pages: int = 0

    def add(self, extract: Callable[[str], str], page: str, source: str) -> None:
        begin = time.process_time()
        text = extract(page)
        self.seconds += time.process_time() - begin
        ours, theirs = (Counter(_WORD.findall(part.lower())) for part in (text, source))
        common = sum((ours & theirs).values())
        self.precision += common / max(1, sum(ours.values()))
        self.recall += common / max(1, sum(theirs.values()))
        self.pages += 1

    @property
    def f1(self) -> float:
        """Of the mean precision and the mean recall."""
        precision, recall = self.precision / self.pages, self.recall / self.pages
        return 2 * precision * recall / max(1e-9, precision + recall)

    def row(self, megabytes: float) -> str:
        means = f"{self.precision / self.pages:.3f} | {self.recall / self.pages:.3f} | {self.f1:.3f}"
        return f"{means} | {megabytes / self.seconds:.1f}"


def grade(extractors: dict[str, Callable[[str], str]], documents: list[tuple[str, str]]) -> dict[str, Grade]:
    """Every extractor on every page; page by page, so that a busy machine slows all of them alike."""
    grades = {name: Grade() for name in extractors}
    for extract in extractors.values():
        extract(documents[0][0])
    for page, source in documents:
        for name, extract in extractors.items():
            grades[name].add(extract, page, source)
    return grades


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth page")
    arguments = parser.parse_args(argv)
    documents = pairs(arguments.folder)[:: arguments.every]
    size = sum(len(page.encode()) for page, _ in documents) / 1e6
    print(f"{len(documents)} pages, {size:.1f} MB of HTML; MB for each second of one core\n")
    print("| extractor | precision | recall | F1 | MB/s |\n|---|---|---|---|---|")
    for name, found in grade(extractors(), documents).items():
        print(f"| {name} | {found.row(size)} |")


if __name__ == "__main__":
    main()
