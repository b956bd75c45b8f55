"""One self-contained HTML page with the curves of one or several runs side by side, their samples, and the settings
that differ."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import InputError, path
from ..files import check_plain, folder_to_fill
from ..training.reports.page import make_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=path, default=Path("report.html"), help="(default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.out.is_dir():
        raise InputError(f"{arguments.out}: a folder; --out names the page")
    check_plain(arguments.out)
    with folder_to_fill(arguments.out.parent):
        make_page(arguments.runs, arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes")
    return 0
