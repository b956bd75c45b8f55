"""Rewrites the generated parts of the README: ``python docs/tables.py``; ``--check`` says whether they are stale."""

import re
import sys
from pathlib import Path

from fastllm.registry import OPS

README = Path(__file__).parent.parent / "README.md"


def ops() -> str:
    """The op table, from the registry."""
    rows = ["| op | module | what it computes | backends |", "|---|---|---|---|"]
    for op in OPS.values():
        module = f"`nn.{op.module.__name__}`" if op.module else ""
        rows.append(f"| `functional.{op.name}` | {module} | {op.summary} | {', '.join(op.backends)} |")
    return "\n".join(rows)


GENERATED = {"ops": ops}


def regenerate(text: str) -> str:
    """``text`` with each ``<!-- NAME: generated -->`` ... ``<!-- end -->`` filled anew."""
    for name, make in GENERATED.items():
        pattern = re.compile(rf"(<!-- {name}: generated[^\n]*-->\n).*?(\n<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, make=make: match[1] + make() + match[2], text)
        if found != 1:
            raise SystemExit(f"{README}: expected one generated part named {name!r}, found {found}")
    return text


def main() -> None:
    old = README.read_text(encoding="utf-8")
    new = regenerate(old)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if new == old else f"{README} is stale: run python docs/tables.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
