r"""Examples for translation, question answering and classification, made from Debian's documentation packages.

    apt-get download debian-handbook manpages manpages-dev manpages-de manpages-de-dev python3.11-doc
    apt-get download apt at bash bsdextrautils coreutils cron diffutils dosfstools dpkg e2fsprogs fdisk findutils grep \
        gzip hostname iptables kmod less libsane-common login man-db mount mtools nano netpbm nfs-common \
        openssh-client openssh-server passwd procps psmisc sane-utils sed systemd tar util-linux \
        util-linux-extra xz-utils
    for package in *.deb; do dpkg -x $package root; done        (or install them: the root is then /)
    python docs/debian.py pairs root pairs.tsv                  writes pairs.held.tsv, too
    python docs/debian.py questions root questions.json
    python docs/debian.py sections root sections.csv            writes sections.held.csv, too

Pairs: English and German paragraphs of the Debian handbook and of man pages that have equally many of them; the second
line's packages have the English man pages. What teaches no translation is dropped, and counted by reason. The pairs of
some pages are held out.
Questions: the entries of Python's documentation and of its glossary, "What is X?" with the first sentence of the entry
as the answer. The questions are synthetic: they test finding the right passage, not understanding.
Sections: paragraphs of Python's documentation, labelled with the part that they are from; as many of each.
The texts keep their licences (GPL, CC-BY-SA, PSF); they are not part of this repository.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import html.parser
import json
import random
import re
from collections import Counter
from pathlib import Path

BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6"}
# Of the pages with translations one in so many is held out.
HELD_OUT = 25
# Paragraphs with a label to learn from; the others are held out.
LABELLED = 400
# Words on a side of a pair, and how much longer than the other a side may be.
SHORTEST, LONGER = 4, 2
# Where a translated man page goes on with its translators.
TRANSLATORS = re.compile(
    r'^\.SH "?(ÜBERSETZUNG|KOLOPHON)|^\.SH "?COLOPHON|^\.PP\nDie deutsche Übersetzung', re.MULTILINE
)


def squeeze(text: str) -> str:
    """``text`` on one line, without invisible characters."""
    return " ".join(text.replace("\u200b", "").replace("\u00ad", "").split())


class Paragraphs(html.parser.HTMLParser):
    """Paragraphs and titles of a page of the handbook, in order."""

    def __init__(self):
        super().__init__()
        self.blocks: list[str] = []
        self._open: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag, attributes):
        kind = dict(attributes).get("class") or ""
        if tag in BLOCKS or (tag == "div" and "para" in kind.split()):
            self._open.append((tag, []))
        elif tag == "div":
            self._open.append((tag, None))

    def handle_endtag(self, tag):
        if self._open and self._open[-1][0] == tag:
            _, parts = self._open.pop()
            if parts is not None:
                self.blocks.append(squeeze("".join(parts)))

    def handle_data(self, data):
        if self._open and self._open[-1][1] is not None:
            self._open[-1][1].append(data)


Pairs = list[tuple[str, str]]


def handbook(root: Path) -> dict[str, Pairs]:
    """Pairs of each page whose blocks are equally many."""
    base, pages = root / "usr/share/doc/debian-handbook/html", {}
    for page in sorted((base / "en-US").glob("*.html")):
        other = base / "de-DE" / page.name
        sides = []
        for path in (page, other) if other.exists() else ():
            parser = Paragraphs()
            parser.feed(path.read_text("utf-8"))
            sides.append(parser.blocks)
        if len(sides) == 2 and len(sides[0]) == len(sides[1]):
            pages[page.name] = list(zip(*sides, strict=True))
    return pages


def man_blocks(path: Path) -> list[str]:
    """The paragraphs of a man page, without macros and fonts; none for a page in another language than man(7)."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    cut = TRANSLATORS.search(text)
    text = text[: cut.start()] if cut else text
    blocks, current = [], []
    for line in text.split("\n"):
        if line.startswith(('.\\"', "'\\\"")) or line.startswith("'"):
            continue
        macro = re.match(r"\.\s*(\w+)\s*(.*)", line)
        if macro and macro[1] in ("B", "I", "BR", "IR", "RB", "RI", "BI", "IB", "SM", "SB"):
            words = re.findall(r'"([^"]*)"|(\S+)', macro[2])
            glue = "" if len(macro[1]) == 2 and macro[1] not in ("SM", "SB") else " "
            current.append(glue.join(a or b for a, b in words))
        elif macro or not line.strip():
            blocks.append(" ".join(current))
            current = []
            if macro and macro[1] in ("SH", "SS"):
                blocks.append(macro[2].strip('" '))
        else:
            current.append(line)
    blocks.append(" ".join(current))
    plain = []
    for block in blocks:
        block = re.sub(r"\\f(\[\w*\]|\(..|.)", "", block)
        block = block.replace(r"\*(Aq", "'").replace(r"\(aq", "'").replace(r"\(bu", "*")
        block = re.sub(r"\\\((em|en)", "-", block)
        block = re.sub(r"\\\(..", "", block)
        block = re.sub(r"\\\[\w+\]", "", block)
        block = re.sub(r"\\([&/,:%]|s[+-]?\d+)", "", block).replace("\\-", "-").replace("\\ ", " ").replace("\\e", "\\")
        if block.strip():
            plain.append(squeeze(block))
    return plain


def man_pages(root: Path) -> dict[str, Pairs]:
    """Pairs of each man page whose paragraphs are equally many."""
    base, pages = root / "usr/share/man", {}
    for path in sorted(base.glob("de/man*/*.gz")):
        english = base / path.parent.name / path.name
        if english.exists():
            sides = [man_blocks(english), man_blocks(path)]
            if len(sides[0]) == len(sides[1]):
                pages[path.name] = list(zip(*sides, strict=True))
    return pages


def fault(source: str, target: str, words: int) -> str | None:
    """Why a pair teaches no translation, or None."""
    a, b = source.split(), target.split()
    if max(len(a), len(b)) > words:
        return f"longer than {words} words"
    if min(len(a), len(b)) < SHORTEST:
        return f"shorter than {SHORTEST} words"
    if 2 * sum((Counter(a) & Counter(b)).values()) >= min(len(a), len(b)):
        return "half of the words the same on both sides"
    if max(len(a), len(b)) > LONGER * min(len(a), len(b)):
        return f"one side {LONGER} times as long as the other"
    letters = min(sum(c.isalpha() or c == " " for c in side) / len(side) for side in (source, target))
    return "less than three quarters letters" if letters < 0.75 else None


def pairs(root: Path, words: int) -> tuple[Pairs, Pairs, Counter]:
    """Translated pairs to train on, pairs of pages held out, and how many were dropped for what reason.

    No text occurs twice on either side, and so none that is held out in training.
    """
    pages = {**handbook(root), **man_pages(root)}
    names = sorted(pages)
    # By a hash: neighbours in the alphabet are often about the same.
    names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    dropped, seen = Counter(), (set(), set())
    parts: list[Pairs] = [[], []]
    count = max(1, len(names) // HELD_OUT)
    for held, some in ((0, names[count:]), (1, names[:count])):
        for name in some:
            for pair in pages[name]:
                reason = fault(*pair, words)
                if reason is None and any(side in known for side, known in zip(pair, seen, strict=True)):
                    reason = "a side that occurred before"
                if reason is not None:
                    dropped[reason] += 1
                    continue
                for side, known in zip(pair, seen, strict=True):
                    known.add(side)
                parts[held].append(pair)
        random.Random(0).shuffle(parts[held])
    return *parts, dropped


class Entries(html.parser.HTMLParser):
    """(name, text) of the entries of a page of Python's documentation: terms with an id, and what they say."""

    def __init__(self):
        super().__init__()
        self.entries: list[tuple[str, str]] = []
        self._name: list[str] | None = None
        self._names: list[str] = []
        self._texts: list[tuple[int, list[str], str]] = []
        self._depth = 0
        self._skip = 0

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "dt":
            self._name, self._skip = [], 0
        elif tag == "dd":
            self._depth += 1
            name = "".join(self._names[-1:])
            self._names = []
            self._texts.append((self._depth, [], name))
        elif self._name is not None and "headerlink" in (values.get("class") or ""):
            self._skip = 1
        elif tag in ("p", "li", "pre") and self._texts:
            self._texts[-1][1].append("\n")

    def handle_endtag(self, tag):
        if tag == "dt" and self._name is not None:
            self._names.append(squeeze("".join(self._name)))
            self._name = None
        elif tag == "a":
            self._skip = 0
        elif tag == "dd" and self._texts:
            self._depth -= 1
            _, parts, name = self._texts.pop()
            text = squeeze("".join(parts))
            if name and text:
                self.entries.append((name, text))

    def handle_data(self, data):
        if self._name is not None:
            if not self._skip:
                self._name.append(data)
        elif self._texts:
            self._texts[-1][1].append(data)


def short_name(name: str) -> str:
    """``os.path.join(path, *paths)`` -> ``os.path.join``."""
    name = re.sub(r"^(class|exception|classmethod|staticmethod|abstractmethod|async|property|coroutine) ", "", name)
    return name.split("(")[0].split(":")[0].split("¶")[0].strip()


def questions(root: Path, entries_per_text: int = 3) -> dict:
    """SQuAD's JSON: each text is a few entries in a row, each question asks for one of them."""
    base, found = root / "usr/share/doc/python3.11/html", {}
    for page in [base / "glossary.html", *sorted((base / "library").glob("*.html"))]:
        parser = Entries()
        parser.feed(page.read_text("utf-8"))
        for name, text in parser.entries:
            sentence = re.match(r"(.{15,200}?[.!?])(?= |$)", text)
            if sentence and re.fullmatch(r"[\w. ]{2,60}", short_name(name)):
                found.setdefault(short_name(name), (text[:400].rsplit(" ", 1)[0], sentence[1]))
    names = list(found)
    random.Random(0).shuffle(names)
    paragraphs = []
    for first in range(0, len(names) - entries_per_text + 1, entries_per_text):
        context, marks = "", []
        for name in names[first : first + entries_per_text]:
            text, answer = found[name]
            if not text.startswith(answer):
                continue
            context += f"{name}: "
            marks.append((name, answer, len(context)))
            context += text + "\n"
        asked = [
            {"id": f"{first}-{i}", "question": f"What is {name}?", "answers": [{"text": answer, "answer_start": start}]}
            for i, (name, answer, start) in enumerate(marks)
        ]
        if asked:
            paragraphs.append({"context": context, "qas": asked})
    return {"version": "1.1", "data": [{"title": "Python's documentation", "paragraphs": paragraphs}]}


def sections(root: Path, each: int = 600) -> list[tuple[str, str]]:
    """(paragraph, part of the documentation), ``each`` of every part that has so many."""
    base, result = root / "usr/share/doc/python3.11/html/_sources", []
    for folder in ("c-api", "howto", "library", "tutorial", "whatsnew"):
        found = {}
        for path in sorted((base / folder).rglob("*.rst.txt")):
            for paragraph in path.read_text("utf-8").split("\n\n"):
                text = squeeze(paragraph)
                if len(text.split()) >= 12 and not paragraph.startswith((" ", ".. ", "\n")):
                    found[text] = None
        chosen = list(found)
        random.Random(0).shuffle(chosen)
        result += [(text, folder) for text in chosen[:each]]
    random.Random(1).shuffle(result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pairs", "questions", "sections"))
    parser.add_argument("root", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--words", type=int, default=1000, help="leave out pairs with a longer side")
    arguments = parser.parse_args()
    if arguments.what == "pairs":
        train, held, dropped = pairs(arguments.root, arguments.words)
        for path, part in ((arguments.out, train), (arguments.out.with_suffix(".held.tsv"), held)):
            path.write_text("".join(f"{a}\t{b}\n" for a, b in part), "utf-8")
            print(f"{path}: {len(part):,} pairs, {sum(len(a.split()) for a, _ in part):,} English words")
        for reason, count in dropped.most_common():
            print(f"dropped: {count:,} {reason}")
    elif arguments.what == "sections":
        made = sections(arguments.root)
        for path, part in ((arguments.out, made[:LABELLED]), (arguments.out.with_suffix(".held.csv"), made[LABELLED:])):
            with open(path, "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *part])
            print(f"{path}: {len(part):,} paragraphs")
    else:
        made = questions(arguments.root)
        arguments.out.write_text(json.dumps(made), "utf-8")
        paragraphs = made["data"][0]["paragraphs"]
        print(f"{sum(len(p['qas']) for p in paragraphs):,} questions about {len(paragraphs):,} texts")


if __name__ == "__main__":
    main()
