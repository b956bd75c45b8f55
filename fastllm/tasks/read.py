"""Examples as people have them: pairs, labelled texts, questions. Readers refuse by name and line what they cannot use.

An example is a dict: ``source`` and ``target``; or ``text`` and ``label``; or ``question``, ``context`` and
``answers``, a list of ``text`` and ``start`` (characters), empty where the text has no answer.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import InputError
from ..data.corpus import read_text

Examples = list[dict]
# The names under which a table's columns go, in order of preference.
TEXT_COLUMNS = ("text", "sentence", "review", "content")
LABEL_COLUMNS = ("label", "sentiment", "class", "target")


def read_pairs(paths: Sequence[str | Path]) -> Examples:
    """Translation pairs: one TSV file (source, tab, target), or two files whose lines belong together (Moses).

    Pairs of which a side is empty are left out, as Moses files have them.

    Raises:
        InputError: a file is missing, empty or malformed, or two files differ in their number of lines.
    """
    paths = [Path(path) for path in paths]
    if len(paths) == 2:
        sides = [read_text(path).removesuffix("\n").split("\n") for path in paths]
        if len(sides[0]) != len(sides[1]):
            raise InputError(
                f"{paths[1]}: {len(sides[1]):,} lines do not match the {len(sides[0]):,} lines of {paths[0]}"
            )
        pairs = list(zip(*sides, strict=True))
    elif len(paths) == 1:
        pairs = []
        for number, line in enumerate(read_text(paths[0]).removesuffix("\n").split("\n"), 1):
            fields = line.split("\t")
            if len(fields) < 2:
                raise InputError(f"{paths[0]}: line {number}: expected source, tab and target, got no tab")
            pairs.append(fields[:2])
    else:
        raise InputError(f"data: expected a TSV file of pairs, or two files with a line each, got {len(paths)} files")
    examples = [{"source": a.strip(), "target": b.strip()} for a, b in pairs if a.strip() and b.strip()]
    if not examples:
        raise InputError(f"{paths[0]}: no pair with text on both sides")
    return examples


def _tree(line: str, where: str) -> dict:
    """The Stanford treebank's ``(3 (2 It) (4 works))``: the root's label and the leaves' text."""
    match = re.match(r"\((\d+) ", line)
    if match is None or line.count("(") != line.count(")"):
        raise InputError(f"{where}: expected a labelled tree, got {line[:40]!r}")
    leaves = re.findall(r"\(\d+ ([^()]+)\)", line)
    text = " ".join(leaves).replace("-LRB-", "(").replace("-RRB-", ")")
    return {"text": text, "label": match[1]}


def _table(path: Path, text: str) -> Examples:
    csv.field_size_limit(sys.maxsize)
    first = text.split("\n", 1)[0]
    tabs = path.suffix.lower() == ".tsv" or (path.suffix.lower() != ".csv" and "\t" in first)
    # A TSV's quotes are characters of the text.
    dialect = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else dict(delimiter=",", strict=True)
    rows = csv.reader(text.splitlines(keepends=True), **dialect)
    try:
        header = [name.strip().lower() for name in next(rows)]
        columns = [
            next((header.index(name) for name in names if name in header), None)
            for names in (TEXT_COLUMNS, LABEL_COLUMNS)
        ]
        if None in columns:
            raise InputError(
                f"{path}: line 1: expected a header with a text column ({', '.join(TEXT_COLUMNS)}) and a label column "
                f"({', '.join(LABEL_COLUMNS)}), got {', '.join(header)[:80]!r}"
            )
        examples = []
        for row in rows:
            if not row:
                continue
            if len(row) <= max(columns):
                raise InputError(f"{path}: line {rows.line_num}: expected {len(header)} fields, got {len(row)}")
            examples.append({"text": row[columns[0]].strip(), "label": row[columns[1]].strip()})
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num}: {error}") from error
    return examples


def _folder(path: Path) -> Examples:
    examples = []
    for folder in sorted(child for child in path.iterdir() if child.is_dir()):
        if folder.name == "unsup":  # IMDB's texts without a label
            continue
        for file in sorted(folder.glob("*.txt")):
            examples.append({"text": read_text(file).strip().replace("<br />", "\n"), "label": folder.name})
    if not examples:
        raise InputError(f"{path}: expected a folder for each label with .txt files in it, as IMDB's train/pos")
    return examples


def read_labelled(paths: Sequence[str | Path]) -> Examples:
    """Texts with labels: IMDB's folders (a folder for each label), CSV or TSV with a header, SST's trees.

    Raises:
        InputError: a file or folder is missing, empty or malformed, or a text or label in it is empty.
    """
    examples: Examples = []
    for path in map(Path, paths):
        if path.is_dir():
            examples += _folder(path)
            continue
        text = read_text(path)
        if re.match(r"\(\d+ \(", text):
            lines = text.removesuffix("\n").split("\n")
            here = [_tree(line, f"{path}: line {i}") for i, line in enumerate(lines, 1) if line.strip()]
        else:
            here = _table(path, text)
        if not here:
            raise InputError(f"{path}: a header and no example")
        for number, example in enumerate(here, 1):
            for part in ("text", "label"):
                if not example[part]:
                    raise InputError(f"{path}: example {number} has an empty {part}")
        examples += here
    if not examples:
        raise InputError("data: expected files or folders of labelled texts, got none")
    return examples


def read_questions(paths: Sequence[str | Path]) -> Examples:
    """Questions with answers in a text, in SQuAD's JSON, version 1.1 or 2.0.

    Raises:
        InputError: a file is missing or malformed, or an answer does not stand where it is said to. Names the question.
    """
    examples: Examples = []
    for path in map(Path, paths):
        text = read_text(path)
        try:
            content = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path}: not JSON: {error}") from error
        try:
            for article in content["data"]:
                for paragraph in article["paragraphs"]:
                    context = paragraph["context"]
                    for entry in paragraph["qas"]:
                        answers = [
                            {"text": a["text"], "start": a["answer_start"]}
                            for a in ([] if entry.get("is_impossible") else entry["answers"])
                        ]
                        for answer in answers:
                            start = answer["start"]
                            if context[start : start + len(answer["text"])] != answer["text"] or not answer["text"]:
                                raise InputError(
                                    f"{path}: question {entry['id']}: the answer {answer['text'][:40]!r} does not "
                                    f"stand at character {start} of its context"
                                )
                        examples.append(
                            {"id": str(entry["id"]), "question": entry["question"].strip(), "context": context,
                             "answers": answers}
                        )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not SQuAD's JSON (data, paragraphs, context, qas): {error!r}") from error
    if not examples:
        raise InputError(f"{paths[0] if paths else 'data'}: no question in it")
    return examples


READERS = {"seq2seq": read_pairs, "classify": read_labelled, "answer": read_questions}


def read_examples(objective: str, paths: Sequence[str | Path]) -> Examples:
    """The examples of an objective on tasks, from files of the forms that its reader knows."""
    if not paths:
        raise InputError(f"data: objective {objective} needs files; {READERS[objective].__doc__.splitlines()[0]}")
    return READERS[objective](paths)
