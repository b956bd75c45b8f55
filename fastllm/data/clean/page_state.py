"""The text of a page that a script makes of JSON, where the page itself shows none: Next.js, Nuxt and the like.

What is found comes back as markup, so that it is read and judged like a page that shows it.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import Any

_JSON = re.compile(
    r"""<script\b(?=[^>]{0,500}(?:type\s*=\s*["']?application/json|id\s*=\s*["']?__NEXT_DATA__))[^>]{0,1000}>"""
    r"""((?s:.)*?)(?:</script|\Z)""",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    r"""\b__?[A-Za-z][A-Za-z_]*(?:STATE|DATA|state|data|preloads)_{0,2}\s*=\s*(?=[{\[]|JSON\.parse\()"""
)
_PARSED = re.compile(r"JSON\.parse\(\s*")
_TAG = re.compile(r"</(?:p|div|h\d|li|ul|section)>|<br\s*/?>", re.IGNORECASE)
_SENTENCE = re.compile(r"\w[.!?\u3002\uff01\uff1f]|[,;:] \w")
# A text's fewest characters, and those of all texts of its kind; those outside links that a page shows, so that its
# data is not looked for. Guesses.
_TEXT, _ALL, SHOWN = 80, 300, 300
# What other texts have at most beside an article, of its characters, and a copy's beginning. Guesses.
_MOST_BESIDE, _BEGINNING = 0.6, 60
_ANY_TAG = re.compile(r"<[^<>]*>")
_TITLES = ("headline", "title", "heading", "name")
# What is said about a page, or to nobody.
_NOT_SHOWN = re.compile(
    r"(?:^|_)(?:seo|meta|alt|excerpt|teaser|css|style|svg|script|i18n|translations?|messages|locales?|query|errors?)(?:$|_)",
    re.IGNORECASE,
)
_INLINE = ("children", "content", "nodes", "spans", "runs", "leaves", "inlines")
# JSON that nests deeper holds no text for readers. The second is the most values that are read for a page. Guesses.
_DEEPEST, _MOST = 40, 200_000
# Each is read to its end, wherever that is: a bound on the time that a page takes. A guess.
_ASSIGNMENTS = 20


@dataclass(frozen=True)
class _Found:
    """A string in a page's data: its value, the keys and numbers on the way to it, and the title nearest to it."""

    text: str
    path: tuple[str | int, ...]
    title: str

    @property
    def kind(self) -> tuple[str, ...]:
        """The way to it, the same for all members of a list."""
        return tuple("[]" if isinstance(step, int) else step for step in self.path)


def _values(page: str) -> Iterator[Any]:
    for found in _JSON.finditer(page):
        yield from _loaded(found[1])
    for found in islice(_ASSIGNED.finditer(page), _ASSIGNMENTS):
        begin = found.end()
        if parsed := _PARSED.match(page, begin):
            for text in _loaded(page[parsed.end() :]):
                yield from _loaded(text) if isinstance(text, str) else ()
        else:
            yield from _loaded(page[begin:])


def _loaded(text: str) -> list[Any]:
    """The value that ``text`` begins with, if it is JSON."""
    try:
        return [json.JSONDecoder(strict=False).raw_decode(text.lstrip())[0]]
    except (ValueError, RecursionError):
        return []


def _strings(value: Any) -> Iterator[_Found]:
    # A stack, last in first out: members are pushed in reverse.
    stack: list[tuple[Any, tuple[str | int, ...], str]] = [(value, (), "")]
    for _ in range(_MOST):
        if not stack:
            return
        value, path, title = stack.pop()
        if isinstance(value, str):
            yield _Found(value, path, title)
        elif len(path) > _DEEPEST:
            continue
        elif isinstance(value, list):
            stack += [(part, (*path, number), title) for number, part in reversed([*enumerate(value)])]
        elif isinstance(value, dict):
            names = [value[key] for key in _TITLES if isinstance(value.get(key), str) and value[key].strip()]
            title = names[0] if names else title
            members = [(part, (*path, key), title) for key, part in value.items() if not _NOT_SHOWN.search(key)]
            stack += reversed(members)


def _is_text(text: str) -> bool:
    """Whether a string is text for readers: sentences, or markup of them."""
    if len(text) < _TEXT or text[:1] in "{[" or text.startswith(("http", "data:", "/")):
        return False
    if _TAG.search(text):
        return True
    letters = sum(map(str.isalpha, text[:500]))
    return letters > 0.7 * min(len(text), 500) and _SENTENCE.search(text) is not None


def _paragraphs(found: list[_Found]) -> Iterator[str]:
    """The texts, those of a paragraph's parts together."""
    previous: tuple[str | int, ...] | None = None
    part = ""
    for item in found:
        # .../children/3/text: the third part of a paragraph.
        inline = len(item.path) > 2 and item.path[-3] in _INLINE and isinstance(item.path[-2], int)
        within = item.path[:-2] if inline else None
        if part and (within is None or within != previous):
            yield part
            part = ""
        part += item.text
        previous = within
    if part:
        yield part


def state_markup(page: str) -> str:
    """The markup of the text that ``page`` carries as a script's data, or nothing."""
    kinds: dict[tuple[str, ...], list[_Found]] = defaultdict(list)
    for number, value in enumerate(_values(page)):
        for found in _strings(value):
            kinds[(str(number), *found.kind)].append(found)
    groups: list[tuple[int, list[_Found]]] = []
    for found in kinds.values():
        texts = {item.text: item.title for item in found if _is_text(item.text)}
        groups.append((sum(map(len, texts)) if len(set(texts.values())) == 1 else 0, found))
    groups.sort(key=lambda group: -group[0])
    if not groups or groups[0][0] < _ALL:
        return ""
    size, best = groups[0]
    whole = _ANY_TAG.sub("", "".join(item.text for item in best))
    for other, found in groups[1:]:
        # An article is most of what there is to read, but for its own copies. The parts of a shop are alike.
        first = next((item.text for item in found if _is_text(item.text)), "")
        if other > _MOST_BESIDE * size and _ANY_TAG.sub("", first)[:_BEGINNING] not in whole:
            return ""
    parts = [f"<h1>{escape(best[0].title)}</h1>"] if best[0].title else []
    for text in dict.fromkeys(_paragraphs(best)):
        if _TAG.search(text):
            parts.append(f"<div>{text}</div>")
        else:
            parts += [f"<p>{escape(line)}</p>" for line in text.split("\n\n") if line.strip()]
    return f"<main><article>{''.join(parts)}</article></main>"
