"""Writes the table of docs/drop-in.md, what accelerate() swaps where: ``python docs/drop_in.py``.

``--check`` says whether the table is stale.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from architectures import ARCHITECTURES, build  # noqa: E402

import fastllm  # noqa: E402

PAGE = HERE / "drop-in.md"
OPS = ("rms_norm", "layer_norm", "embedding", "swiglu", "geglu", "attention", "linear_cross_entropy")


def table() -> str:
    rows = [
        f"| architecture | {' | '.join(f'`{op}`' for op in OPS)} | left |",
        f"|---|{'---|' * (len(OPS) + 1)}",
    ]
    for name, (cls, *_) in ARCHITECTURES.items():
        report = fastllm.accelerate(build(name)[0], dry_run=True)
        swapped = Counter(entry.by for entry in report.swapped)
        left = Counter((entry.what, entry.why) for entry in report.left)
        reasons = "; ".join(f"{count} {what}: {why}" for (what, why), count in left.items()).replace("|", "\\|")
        cells = [str(swapped[op] or "") for op in OPS]
        rows.append(f"| {name} (`{cls}`) | {' | '.join(cells)} | {reasons} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say whether the table is stale; write nothing")
    check = parser.parse_args().check
    import transformers

    transformers.utils.logging.set_verbosity_error()
    old = PAGE.read_text(encoding="utf-8")
    new, found = re.subn(
        r"(<!-- table: generated[^\n]*-->\n).*?(\n<!-- end -->)",
        lambda match: match[1] + table() + match[2],
        old,
        flags=re.DOTALL,
    )
    if found != 1:
        raise SystemExit(f"{PAGE}: expected one generated table, found {found}")
    if check:
        sys.exit(0 if new == old else f"{PAGE} is stale: run python docs/drop_in.py")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
