"""How well and how fast main text comes out of HTML, graded by pages whose main text is known.

``python -m fastllm.bench.cleaning PAGES...``: folders or archives as :mod:`.marked_pages` reads them: pages with the
text that a person marked, or Sphinx's pages with their sources (Debian's python3.11-doc has
``/usr/share/doc/python3.11/html``; a source also holds words that no page shows, so that nobody's recall can be 1).

Precision is the share of an extractor's words that the known text has too, recall the share of its words that the
extractor has: lower case, runs of ``\\w``, as often as they occur. F1 is a page's 2PR / (P + R), 1 where both texts are
empty and 0 where one is. Means over pages come with 95% intervals of a bootstrap over pages.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from ..data.clean import CleanConfig, Document, Rejection, clean
from ..data.clean.html import EXTRACTORS
from ..data.optional import require
from ..parser import first_paragraph
from .marked_pages import MarkedPage, read_marked, words

# Resamples of the pages for an interval. A guess.
RESAMPLES = 2000
Extractor = Callable[[str], str]


def strip_all_tags(page: str) -> str:
    """Every text but scripts and styles, as a first attempt would have it."""
    tree = require("selectolax.lexbor", "selectolax", "this").LexborHTMLParser(page)
    for node in tree.css("script, style"):
        node.decompose()
    return tree.body.text(separator=" ") if tree.body else ""


def main_division(page: str) -> str:
    """What is inside ``<div role="main">``: right for Sphinx's pages alone."""
    tree = require("selectolax.lexbor", "selectolax", "this").LexborHTMLParser(page)
    node = tree.css_first("div[role=main]")
    return node.text(separator=" ") if node else ""


def whole_cleaning(page: str) -> str:
    """What ``fastllm prepare`` does to a page, quality rules and deduplication apart."""
    outcome, _ = clean(Document("page", page, "html"), CleanConfig(rules=("none",)))
    return "" if isinstance(outcome, Rejection) else outcome.text


def extractors() -> dict[str, Extractor]:
    """By name; those of resiliparse and datatrove where they are installed."""
    trafilatura = require("trafilatura", "trafilatura", "comparing", extra="trafilatura")
    found: dict[str, Extractor] = {
        "strip all tags": strip_all_tags,
        "fastllm fast": EXTRACTORS["fast"],
        "fastllm prepare, without rules": whole_cleaning,
        "trafilatura": EXTRACTORS["trafilatura"],
        "trafilatura, fast": lambda page: trafilatura.extract(page, fast=True, include_comments=False) or "",
        "trafilatura, precision": lambda page: trafilatura.extract(page, favor_precision=True) or "",
        "trafilatura baseline": EXTRACTORS["baseline"],
    }
    try:
        resiliparse = import_module("resiliparse.extract.html2text")
    except ImportError:
        pass
    else:
        found["resiliparse"] = lambda page: resiliparse.extract_plain_text(page, main_content=True)
    try:
        datatrove = import_module("datatrove.pipeline.extractors")
    except ImportError:
        pass
    else:
        found["datatrove (Trafilatura)"] = datatrove.Trafilatura().extract
    return found


@dataclass(frozen=True)
class Score:
    """One extractor on one page."""

    type: str
    precision: float
    recall: float

    @classmethod
    def of(cls, type: str, ours: Counter[str], known: Counter[str]) -> Score:
        if not ours and not known:
            return cls(type, 1.0, 1.0)
        common = (ours & known).total()
        return cls(type, common / max(1, ours.total()), common / max(1, known.total()))

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95% of the means of as many values drawn with replacement."""
    draw = np.random.default_rng(0)
    known = np.asarray(values)
    means = [known[draw.integers(0, len(known), len(known))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def report(scores: Mapping[str, Sequence[Score]], speeds: Mapping[str, float] | None = None) -> str:
    """A table: extractors by mean precision, recall and F1, F1 by type, and ``speeds`` in MB/s."""
    types = sorted({score.type for found in scores.values() for score in found})
    shown = types if len(types) > 1 else []
    head = ["extractor", "precision", "recall", "F1", "95% interval", *shown, *(["MB/s"] if speeds else [])]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, found in scores.items():
        f1 = [score.f1 for score in found]
        low, high = interval(f1)
        cells = [
            name, f"{np.mean([s.precision for s in found]):.3f}", f"{np.mean([s.recall for s in found]):.3f}",
            f"{np.mean(f1):.3f}", f"{low:.3f} to {high:.3f}",
            *(f"{np.mean([s.f1 for s in found if s.type == type]):.3f}" for type in shown),
            *([f"{speeds[name]:.1f}"] if speeds else []),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grade(
    extractors: Mapping[str, Extractor], pages: Sequence[MarkedPage]
) -> tuple[dict[str, list[Score]], dict[str, float]]:
    """Every extractor on every page, and its MB of HTML for each second of a core.

    Page by page in turn, so that a busy machine slows all of them alike.
    """
    scores: dict[str, list[Score]] = {name: [] for name in extractors}
    seconds = dict.fromkeys(extractors, 0.0)
    for extract in extractors.values():
        extract(pages[0].html)
    for page in pages:
        for name, extract in extractors.items():
            begin = time.process_time()
            text = extract(page.html)
            seconds[name] += time.process_time() - begin
            scores[name].append(Score.of(page.type, words(text), page.words))
    size = sum(len(page.html.encode("utf-8", "replace")) for page in pages) / 1e6
    return scores, {name: size / max(1e-9, taken) for name, taken in seconds.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastllm.bench.cleaning", description=first_paragraph(__doc__))
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth page")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only extractors whose names contain one of these")
    arguments = parser.parse_args(argv)
    for path in arguments.pages:
        pages = read_marked(path)[:: arguments.every]
        chosen = extractors()
        if all(page.type == "sphinx" for page in pages):
            chosen['div role="main"'] = main_division
        if arguments.only:
            chosen = {name: f for name, f in chosen.items() if any(part in name for part in arguments.only)}
        size = sum(len(page.html.encode("utf-8", "replace")) for page in pages) / 1e6
        print(f"{path}: {len(pages)} pages, {size:.1f} MB of HTML; MB for each second of one core\n")
        print(report(*grade(chosen, pages)), "\n")


if __name__ == "__main__":
    main()
