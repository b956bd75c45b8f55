"""Examples as people have them: pairs, labelled texts, questions. Readers refuse by name and line what they cannot use.

An example is a dict: ``source`` and ``target``; or ``text`` and ``label``; or ``question``, ``context`` and
``answers``, a list of ``text`` and ``start`` (characters), empty where the text has no answer.

A file may be compressed, as its name says (``.gz``, ``.bz2``, ``.xz``, ``.zst``). A line ends at a newline, with or
without a carriage return before it; every other separator that Unicode has is text.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import InputError, check_encodable
from ..data.corpus import lines_of, read_text
from ..data.sources.compressed import SUFFIXES
from ..parser import first_paragraph
from .forms import FORMS
from .prompts import read_instructions, read_preferences

Examples = list[dict]
# The names under which a table's columns go, in order of preference.
TEXT_COLUMNS = ("text", "sentence", "review", "content")
LABEL_COLUMNS = ("label", "sentiment", "class", "target")
# What separates the fields of a .csv: a comma; a semicolon where a comma is the decimal point; a tab.
SEPARATORS = (",", ";", "\t")
# How IMDB's reviews have their line ends.
BREAK = re.compile(r"<br ?/?>", re.IGNORECASE)


def read_pairs(paths: Sequence[str | Path]) -> Examples:
    """Translation pairs: one TSV file (source, tab, target), or two files whose lines belong together (Moses).

    Pairs with an empty side, which Moses files have, and empty lines of a TSV file are left out.

    Raises:
        InputError: a file is missing, empty or malformed, or two files differ in their number of lines.
    """
    paths = [Path(path) for path in paths]
    if len(paths) == 2:
        sides = [lines_of(read_text(path)) for path in paths]
        if len(sides[0]) != len(sides[1]):
            raise InputError(
                f"{paths[1]}: {len(sides[1]):,} lines do not match the {len(sides[0]):,} lines of {paths[0]}"
            )
        pairs = list(zip(*sides, strict=True))
    elif len(paths) == 1:
        pairs = []
        for number, line in enumerate(lines_of(read_text(paths[0])), 1):
            if not line.strip():
                continue
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


def _suffix(path: Path) -> str:
    """What the file's name ends with, in lower case, the suffix of its compression apart."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _columns(header: list[str]) -> tuple[int, int] | None:
    """Where the text and the label stand; None unless both have a column."""
    names = [name.strip().lower() for name in header]
    text, label = (
        next((names.index(name) for name in known if name in names), None) for known in (TEXT_COLUMNS, LABEL_COLUMNS)
    )
    return None if text is None or label is None else (text, label)


def _rows(path: Path, text: str):
    """(line, fields) of each row of a table; empty where the line is. A TSV's quotes are characters of its text."""
    lines = lines_of(text)
    suffix = _suffix(path)
    header = next((line for line in lines if line.strip()), "")
    if suffix == ".tsv" or (suffix != ".csv" and "\t" in header):
        yield from ((number, line.split("\t") if line else []) for number, line in enumerate(lines, 1))
        return
    csv.field_size_limit(sys.maxsize)
    # csv's reader takes a line end from its lines, and none but newlines and carriage returns.
    ended = [line + "\n" for line in lines]
    separators = [
        separator for separator in SEPARATORS if _columns(next(csv.reader([header], delimiter=separator))) is not None
    ]
    rows = csv.reader(ended, delimiter=(separators or SEPARATORS)[0], strict=True)
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num}: {error}") from error


def _table(path: Path, text: str) -> Examples:
    rows = _rows(path, text)
    first, header = next(((number, row) for number, row in rows if any(field.strip() for field in row)), (1, []))
    columns = _columns(header)
    if columns is None:
        texts, labels, got = ", ".join(TEXT_COLUMNS), ", ".join(LABEL_COLUMNS), ", ".join(header)[:80]
        raise InputError(
            f"{path}: line {first}: expected a header with a text column ({texts}) and a label column ({labels}), or a "
            f"label before the text of each line, got {got!r}"
        )
    examples = []
    for number, row in rows:
        if not row:
            continue
        if len(row) <= max(columns):
            raise InputError(f"{path}: line {number}: expected {len(header)} fields, got {len(row)}")
        examples.append({"text": row[columns[0]].strip(), "label": row[columns[1]].strip()})
    if not examples:
        raise InputError(f"{path}: a header and no example")
    return examples


def _folder(path: Path) -> Examples:
    examples = []
    for folder in sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")):
        if folder.name == "unsup":  # IMDB's texts without a label
            continue
        inner = sorted(child.name for child in folder.iterdir() if child.is_dir() and any(child.glob("*.txt")))
        if inner:
            raise InputError(f"{folder}: expected the texts of one label, got folders ({', '.join(inner)}): name one "
                             "that holds a folder for each label, as IMDB's train")  # fmt: skip
        for file in sorted(folder.glob("*.txt")):
            examples.append({"text": BREAK.sub("\n", read_text(file).strip()), "label": folder.name})
    if not examples:
        raise InputError(f"{path}: expected a folder for each label with .txt files in it, as IMDB's train/pos")
    return examples


def read_labelled(paths: Sequence[str | Path]) -> Examples:
    """Texts with labels: IMDB's folders (a folder for each label), CSV or TSV with a header, or a text on each line as
    SST's trees, ``label text`` or TREC's ``LABEL:fine text`` (whose label is the coarse one).

    Raises:
        InputError: a file or folder is missing, empty or malformed, or a text or label in it is empty.
    """
    examples: Examples = []
    for path in map(Path, paths):
        if path.is_dir():
            examples += _folder(path)
            continue
        text = read_text(path, legacy={form.shape: form.latin for form in FORMS if form.latin})
        begin = len(text) - len(text.lstrip("\r\n"))
        form = next((form for form in FORMS if form.shape.match(text, begin)), None)
        here = _table(path, text) if form is None else form.read(path, text)
        for number, example in enumerate(here, 1):
            for part in ("text", "label"):
                if not example[part]:
                    raise InputError(f"{path}: example {number} has an empty {part}")
        examples += here
    if not examples:
        raise InputError("data: expected files or folders of labelled texts, got none")
    return examples


def _question(entry: dict, context: str, where: str) -> dict:
    """One of SQuAD's questions about ``context``.

    Raises:
        InputError: an answer does not stand where it is said to, or a text is empty or cannot be encoded.
    """
    where = f"{where}: question {entry['id']}"
    question = entry["question"].strip()
    if not question:
        raise InputError(f"{where}: an empty question")
    for text in (str(entry["id"]), question, context):
        check_encodable(text, where)
    none = entry.get("is_impossible", False)
    if not isinstance(none, bool):
        raise InputError(f"{where}: is_impossible: expected true or false, got {none!r}")
    answers = []
    for answer in [] if none else entry["answers"]:
        text, start = answer["text"], answer["answer_start"]
        check_encodable(text, where)
        if type(start) is not int or start < 0:
            raise InputError(f"{where}: answer_start: expected a number of characters, got {start!r}")
        if not text or context[start : start + len(text)] != text:
            raise InputError(f"{where}: the answer {text[:40]!r} does not stand at character {start} of its context")
        answers.append({"text": text, "start": start})
    return {"id": str(entry["id"]), "question": question, "context": context, "answers": answers}


def read_questions(paths: Sequence[str | Path]) -> Examples:
    """Questions with answers in a text, in SQuAD's JSON, version 1.1 or 2.0.

    Raises:
        InputError: a file is missing or malformed, an answer does not stand where it is said to, or a text has half a
            surrogate pair. Names the question.
    """
    examples: Examples = []
    for path in map(Path, paths):
        text = read_text(path)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON: {error}") from error
        try:
            examples += [
                _question(entry, paragraph["context"], str(path))
                for article in content["data"]
                for paragraph in article["paragraphs"]
                for entry in paragraph["qas"]
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not SQuAD's JSON (data, paragraphs, context, qas): {error!r}") from error
    if not examples:
        raise InputError(f"{paths[0] if paths else 'data'}: no question in it")
    return examples


READERS = {
    "seq2seq": read_pairs, "classify": read_labelled, "answer": read_questions, "instruct": read_instructions,
    "dpo": read_preferences,
}  # fmt: skip


def read_examples(objective: str, paths: Sequence[str | Path]) -> Examples:
    """The examples of an objective on tasks, from files of the forms that its reader knows."""
    if not paths:
        forms = first_paragraph(READERS[objective].__doc__).rstrip(".")
        expected = f" Expected: {forms[0].lower()}{forms[1:]}" if forms else ""
        raise InputError(f"data: objective {objective} needs files.{expected}")
    return READERS[objective](paths)
