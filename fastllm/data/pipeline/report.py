"""What a run did: ``report.json``, and ``report.html`` with the counts as pictures and examples of what went."""

from __future__ import annotations

import gzip
import html
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...files import write_text

# What each rule is about, in the order in which documents meet them; other rules follow.
RULES = {
    "unknown_format": "files of no known format", "no_file": "neither a file nor a folder",
    "outside": "names and links that lead out of their folder", "unreadable": "could not be opened or read",
    "truncated": "files that end too early; what came before was read", "damaged": "damaged files or records",
    "bomb": "decompression bombs", "too_large": "larger than --max-document-mb", "redirect": "wiki redirects",
    "name_space": "wiki pages that are no articles", "coding": "transfer or content codings that cannot be undone",
    "too_slow": "took longer than --document-seconds", "crashed": "ended the process that cleaned them",
    "failed": "an error while cleaning", "empty": "no text left", "language": "another language",
    "url": "from a host or address in --block-urls",
    "gopher_repetition": "repeated lines, paragraphs or runs of words (Gopher)",
    "gopher_quality": "words, symbols, stop words (Gopher)", "fineweb": "line ends and lengths (FineWeb)",
    "c4": "place-holders, braces, too few sentences (C4)", "quality": "words less usual than in --quality-reference",
    "exact_duplicate": "the same text as an earlier document",
    "near_duplicate": "nearly the same text as an earlier document (MinHash)",
    "too_short": "fewer words than --min-doc-words were left without repeated passages",
}  # fmt: skip
# What was taken out of documents that stayed.
PASSAGES = {
    "repeated_sentences": "three sentences in a row that occurred before",
    "repeated_substrings": "as many characters as --exact-substrings that occurred before",
}
# Documents shown of each rule, and pixels of a histogram. Guesses.
_EXAMPLES = 3
_WIDTH = 420
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.15rem .8rem .15rem 0;text-align:left;vertical-align:top}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}pre{white-space:pre-wrap;background:#f5f5f5;"
    "padding:.6rem;max-height:14rem;overflow:auto}small{color:#666}rect.k{fill:#2a9d8f}rect.r{fill:#c8553d}"
)


def _examples(folder: Path, rule: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path in sorted((folder / "rejected" / rule).glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                record = json.loads(line)
                record["text"] = record["text"][:600]
                found.append(record)
                if len(found) == _EXAMPLES:
                    return found
    return found


def write_report(
    folder: Path, settings: Mapping[str, Any], counts: Counter[str], characters: np.ndarray
) -> dict[str, Any]:
    """Write both reports into ``folder``. They hold no times, so that a run that was killed writes the same ones.

    Args:
        characters: of each document that was kept.
    """
    rules = {name.removeprefix("rule "): count for name, count in counts.items() if name.startswith("rule ")}
    order = [*(rule for rule in RULES if rule in rules), *sorted(rules.keys() - RULES.keys())]
    edges = [0, *(1 << power for power in range(6, 25, 2))]
    histogram, _ = np.histogram(characters, [*edges, max(1 << 62, edges[-1] + 1)])
    report = {
        "settings": dict(settings),
        "documents_read": counts["documents"],
        "bytes_read": counts["bytes"],
        "documents_kept": len(characters),
        "characters_kept": int(characters.sum()),
        "rejected": {rule: rules[rule] for rule in order},
        "passages": {
            rule: {unit: counts[f"{unit} {rule}"] for unit in ("documents", "passages", "characters")}
            for rule in PASSAGES if counts[f"documents {rule}"]
        },
        "undecodable_characters": counts["undecodable"],
        "masked": {n.removeprefix("masked "): c for n, c in sorted(counts.items()) if n.startswith("masked ")},
        "characters_per_document": {
            "at_least": edges, "documents": histogram.tolist(),
            "median": float(np.median(characters)) if len(characters) else 0.0,
        },
    }  # fmt: skip
    write_text(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "report.html", _page(folder, report))
    return report


def _bars(rows: list[tuple[str, int, str]]) -> str:
    """A picture: a bar for each (label, count, class)."""
    most = max([count for _, count, _ in rows] + [1])
    height = 22 * len(rows)
    parts = [f'<svg width="820" height="{height}" role="img" font-size="13">']
    for i, (label, count, kind) in enumerate(rows):
        width, y = max(1 if count else 0, count * _WIDTH // most), 22 * i
        parts.append(
            f'<text x="230" y="{y + 15}" text-anchor="end">{html.escape(label)}</text>'
            f'<rect class="{kind}" x="240" y="{y + 3}" width="{width}" height="16"/>'
            f'<text x="{246 + width}" y="{y + 15}">{count:,}</text>'
        )
    return "".join([*parts, "</svg>"])


def _page(folder: Path, report: Mapping[str, Any]) -> str:
    rejected = report["rejected"]
    rows = [("kept", report["documents_kept"], "k"), *((rule, count, "r") for rule, count in rejected.items())]
    lengths = report["characters_per_document"]
    spans = [
        (f"from {low:,} characters", count, "k")
        for low, count in zip(lengths["at_least"], lengths["documents"], strict=True)
    ]
    parts = [
        f"<!doctype html><meta charset=utf-8><title>fastllm prepare</title><style>{_STYLE}</style>",
        "<h1>What fastllm prepare did</h1>",
        f"<p>{report['documents_read']:,} documents, {report['bytes_read']:,} bytes read; "
        f"{report['documents_kept']:,} kept, {report['characters_kept']:,} characters.</p>",
        "<h2>Where the documents went</h2>", _bars(rows),
        "<h2>How long the kept ones are</h2>", _bars(spans),
    ]  # fmt: skip
    if report["masked"]:
        parts += ["<h2>Masked personal data</h2>", _bars([(name, n, "r") for name, n in report["masked"].items()])]
    parts.append("<h2>What each rule removed</h2>")
    passages = {rule: found["documents"] for rule, found in report["passages"].items()}
    for rule, count in {**rejected, **passages}.items():
        about = PASSAGES.get(rule) or RULES.get(rule, "")
        parts.append(f"<h3>{html.escape(rule)} ({count:,})</h3><p>{html.escape(about)}</p>")
        for example in _examples(folder, rule):
            details = {k: v for k, v in example.items() if k not in ("id", "rule", "text")}
            parts.append(
                f"<p><b>{html.escape(example['id'])}</b> <small>{html.escape(json.dumps(details))}</small></p>"
            )
            if example["text"]:
                parts.append(f"<pre>{html.escape(example['text'])}</pre>")
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(json.dumps(value))}</td></tr>"
        for name, value in report["settings"].items()
    )
    return "\n".join([*parts, f"<h2>Settings</h2><table>{cells}</table>\n"])
