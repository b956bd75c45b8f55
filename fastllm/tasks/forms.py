"""Labelled texts with an example on each line and no header, as the field's own sets are given out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..config import InputError
from ..data.corpus import lines_of

# TREC goes round with numbers as labels too, one of its 292,402 bytes not UTF-8. A text in another script has many more
# such bytes, and Latin-1 would make nonsense of them (the limit is a guess).
STRAY = 1e-4
# How the Penn treebank and its kin write what would be read as structure.
ESCAPES = {
    "-LRB-": "(", "-RRB-": ")", "-LCB-": "{", "-RCB-": "}", "-LSB-": "[", "-RSB-": "]", r"\/": "/", r"\*": "*",
}  # fmt: skip
_ESCAPE = re.compile("|".join(map(re.escape, ESCAPES)))
# A label and a word, or a label and nodes that were found before; "\0" stands for each of these.
_NODE = re.compile(r"\([0-9]+ +(?:[^() \0]+|\0(?: *\0)*) *\)")
_LEAF = re.compile(r"\([0-9]+ +([^() ]+) *\)")
_ROOT = re.compile(r"\(([0-9]+) ")


class LineForm(NamedTuple):
    """A form of file without a header.

    ``shape`` matches the beginning of a file of this form; ``line`` makes an example of a line, None where it is not
    of the form; ``expected``: what a line should be, in words. ``latin``: the largest part of bytes beyond ASCII with
    which a file that is not UTF-8 is read as Latin-1; 0: it is refused.
    """

    shape: re.Pattern[str]
    line: Callable[[str], dict | None]
    expected: str
    latin: float = 0.0

    def read(self, path: Path, text: str) -> list[dict]:
        """The examples of ``text``; empty lines are skipped.

        Raises:
            InputError: a line is not of this form; names ``path`` and the line.
        """
        examples = []
        for number, line in enumerate(lines_of(text), 1):
            if not line.strip():
                continue
            example = self.line(line)
            if example is None:
                raise InputError(f"{path}: line {number}: expected {self.expected}, got {line[:40]!r}")
            examples.append(example)
        return examples


def tree(line: str) -> dict | None:
    """The Stanford treebank's ``(3 (2 It) (4 works))``: the root's label and the leaves' text."""
    line = line.strip(" ")
    reduced, before = line, ""
    while reduced != before:
        reduced, before = _NODE.sub("\0", reduced), reduced
    root = _ROOT.match(line)
    if reduced != "\0" or root is None:
        return None
    words = (_ESCAPE.sub(lambda found: ESCAPES[found[0]], leaf) for leaf in _LEAF.findall(line))
    return {"text": " ".join(words), "label": root[1]}


def _split(pattern: str) -> Callable[[str], dict | None]:
    """A line's example by the groups ``label`` and ``text`` of ``pattern``."""
    compiled = re.compile(pattern, re.DOTALL)

    def line(text: str) -> dict | None:
        match = compiled.fullmatch(text)
        return match and {"text": match["text"].strip(), "label": match["label"]}

    return line


FORMS = (
    LineForm(_ROOT, tree, "a labelled tree"),
    LineForm(
        re.compile(r"[A-Z]+:[A-Za-z]+ "), _split(r"(?P<label>[A-Z]+):[A-Za-z]+ (?P<text>.*)"),
        "LABEL:fine and a text", latin=1.0,
    ),
    LineForm(re.compile(r"__label__\S"), _split(r"__label__(?P<label>\S+)[ \t](?P<text>.*)"), "__label__ and a text"),
    LineForm(
        re.compile(r"[+-]?[0-9]+[ \t]"), _split(r"(?P<label>[+-]?[0-9]+)[ \t](?P<text>.*)"), "a label and a text",
        latin=STRAY,
    ),
)  # fmt: skip
