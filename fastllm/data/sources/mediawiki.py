"""Articles out of a MediaWiki XML dump, page by page, with a memory that the dump's length does not change."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

from .compressed import open_stream
from .limits import Failure, Limits, Raw, Unreadable, one_line
from .plan import SourceEntry


class _Guarded:
    """The stream that the parser reads: no more than a few documents' bytes between two pages, and no DTD."""

    def __init__(self, stream, limits: Limits):
        self._stream, self._limits = stream, limits
        self._count = 0

    def read(self, size: int = 1 << 16, /) -> bytes:
        content = self._stream.read1(min(size, 1 << 16))
        self._count += len(content)
        if self._count > 4 * self._limits.document:
            raise Unreadable("too_large", f"more than {4 * self._limits.document:,} bytes without the end of a page")
        # Dumps have no document type; an XML bomb begins with one.
        if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
            raise Unreadable("damaged", "an XML dump with a document type declaration")
        return content

    def page_ended(self) -> None:
        self._count = 0


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


# Name spaces by their numbers, and the names that every wiki knows for them.
_CANONICAL = {"-2": "Media", "6": "File", "14": "Category"}


class _NameSpaces:
    """The names that a dump's ``siteinfo`` gives its name spaces of files and categories."""

    def __init__(self):
        self._names: dict[str, str] = {}
        self._link: re.Pattern[str] | None = None

    def learn(self, siteinfo: ElementTree.Element) -> None:
        for element in siteinfo.iter():
            canonical = _CANONICAL.get(element.get("key", ""))
            if _local(element.tag) == "namespace" and canonical and element.text:
                self._names[_plain(element.text)] = canonical
        if self._names:
            # A space in a name may be written as an underscore, and case means nothing.
            names = "|".join(re.escape(name).replace(r"\ ", "[ _]+") for name in self._names)
            self._link = re.compile(rf"\[\[[\s_]*({names})[\s_]*:", re.IGNORECASE)

    def canonical(self, wikitext: str) -> str:
        """``wikitext`` whose links into these name spaces have the names that every wiki knows."""
        if self._link is None:
            return wikitext
        return self._link.sub(lambda match: f"[[{self._names.get(_plain(match[1]), match[1])}:", wikitext)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def read_mediawiki(entry: SourceEntry, limits: Limits) -> Iterator[Raw | Failure]:
    """The latest revision of each article (name space 0); redirects and other name spaces are skipped and counted.

    Links to files and categories get the names that every wiki knows, by the dump's own ``siteinfo``.
    """
    with open_stream(entry.path, limits) as stream:
        guarded = _Guarded(stream, limits)
        path: list[ElementTree.Element] = []
        number = -1
        spaces = _NameSpaces()
        try:
            for event, element in ElementTree.iterparse(guarded, events=("start", "end")):
                if event == "start":
                    path.append(element)
                    if len(path) > 64:
                        raise Unreadable("damaged", "elements nested deeper than any dump's")
                    continue
                path.pop()
                if _local(element.tag) == "siteinfo":
                    spaces.learn(element)
                if _local(element.tag) == "page":
                    number += 1
                    guarded.page_ended()
                    yield _page(element, f"{entry.id}#{number}", limits, spaces)
                if len(path) == 1:
                    # What has been read of the dump would stay in memory.
                    path[0].clear()
        except ElementTree.ParseError as error:
            reason = "truncated" if "no element found" in str(error) or "unclosed" in str(error) else "damaged"
            raise Unreadable(reason, one_line(error)) from error


def _page(page: ElementTree.Element, id: str, limits: Limits, spaces: _NameSpaces) -> Raw | Failure:
    fields = {_local(child.tag): child for child in page}
    title = (fields["title"].text or "") if "title" in fields else ""
    if "redirect" in fields:
        return Failure(id, "redirect", {"title": title})
    if "ns" in fields and (fields["ns"].text or "0").strip() != "0":
        return Failure(id, "name_space", {"title": title})
    if "revision" not in fields:
        return Failure(id, "damaged", {"error": "a page without a revision"})
    texts = [child.text or "" for child in fields["revision"] if _local(child.tag) == "text"]
    content = spaces.canonical("".join(texts)).encode("utf-8", "replace")
    if len(content) > limits.document:
        return Failure(id, "too_large", {"limit": limits.document})
    return Raw(id, content, "wikitext", {"title": title}, "utf-8")
