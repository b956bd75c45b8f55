"""How well personal data is found: precision and recall by kind, over lines of this project's own making.

``python -m fastllm.bench.personal_data``. In ``personal_lines.txt`` personal data stands in ``{kind:...}``. A find is
right if it masks such a part, and nothing else of the line.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..data.clean.pii import mask
from ..parser import first_paragraph

LINES = Path(__file__).with_name("personal_lines.txt")
_MARKED = re.compile(r"\{(\w+):([^{}]+)\}")


@dataclass
class Grades:
    """By kind how many were there, were found rightly, and were found at all; and the lines that went wrong."""

    there: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, str]] = field(default_factory=list)

    def row(self, kinds: list[str]) -> tuple[float, float]:
        """Precision and recall over ``kinds``."""
        there, right, found = (sum(count[kind] for kind in kinds) for count in (self.there, self.right, self.found))
        return right / max(1, found), right / max(1, there)


def read_lines() -> list[str]:
    return [line for line in LINES.read_text("utf-8").splitlines() if line and not line.startswith("#")]


def grade(lines: list[str]) -> Grades:
    grades = Grades()
    for line in lines:
        expected = _MARKED.findall(line)
        plain = _MARKED.sub(r"\2", line)
        masked, counts = mask(plain)
        kept = re.split(r"\{\w+:[^{}]+\}", line)
        # What lies between the marked parts must come through, in order.
        whole = re.fullmatch(".*?".join(map(re.escape, kept)), masked) is not None
        grades.there.update(kind for kind, _ in expected)
        grades.found.update(counts)
        hidden = Counter(kind for kind, text in expected if text not in masked) if whole else Counter()
        grades.right.update(hidden & counts)
        if not whole or Counter(kind for kind, _ in expected) != counts:
            grades.wrong.append((line, masked))
    return grades


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser("python -m fastllm.bench.personal_data", description=first_paragraph(__doc__))
    parser.parse_args(argv)
    lines = read_lines()
    grades = grade(lines)
    print(f"{len(lines)} lines, {sum('{' in line for line in lines)} of them with personal data\n")
    print("| kind | there | precision | recall |\n|---|---|---|---|")
    for name, kinds in [*((kind, [kind]) for kind in sorted(grades.there)), ("all", sorted(grades.there))]:
        precision, recall = grades.row(kinds)
        print(f"| {name} | {sum(grades.there[kind] for kind in kinds)} | {precision:.3f} | {recall:.3f} |")
    for line, masked in grades.wrong:
        print(f"wrong: {line!r} became {masked!r}")


if __name__ == "__main__":
    main()
