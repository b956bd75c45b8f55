"""Make clean text out of web pages, WARC files, MediaWiki dumps, books and JSON lines: main text extracted, Unicode
repaired, quality rules applied, duplicates removed. A run that was stopped goes on where it stopped."""

from __future__ import annotations

import argparse

from ..config import add_flags, build_settings, flags_given, tell_unused
from ..data.clean import CleanConfig
from ..data.pipeline import PipelineConfig, prepare_text
from ..training.reports.progress import Display


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="files, also .gz .bz2 .xz .zst, or folders of them")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the text and the report go")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="number of processes that clean (default: one for each core)"
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where the work runs: local processes or a Ray cluster (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_flags(parser, CleanConfig, "cleaning")
    add_flags(parser, PipelineConfig, "reading and writing")


def run(arguments: argparse.Namespace) -> int:
    given = {kind: flags_given(arguments, kind) for kind in (CleanConfig, PipelineConfig)}
    cleaning, config = (build_settings(kind, values, "command line") for kind, values in given.items())
    for part, values in zip((cleaning, config), given.values(), strict=True):
        tell_unused(part.unused(), values, "command line")
    display = Display(arguments.quiet)
    with display:
        report = prepare_text(
            arguments.source, arguments.out, cleaning, config,
            workers=arguments.workers, engine=arguments.engine, tell=display.update,
        )  # fmt: skip
    display.say(
        f"{report['documents_read']:,} documents read, {report['documents_kept']:,} kept, "
        f"{report['characters_kept']:,} characters"
    )
    for rule, count in report["rejected"].items():
        display.say(f"  {count:>8,}  {rule}")
    for rule, found in report["passages"].items():
        display.say(
            f"  {found['passages']:>8,}  {rule} taken out of {found['documents']:,} documents, "
            f"{found['characters']:,} characters"
        )
    display.say(f"in {arguments.out}: text/, rejected/, report.html, report.json, prepared.json")
    return 0
