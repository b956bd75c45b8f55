"""Web pages with the text that a person marked in each, or that their sources hold."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..data.clean.encodings import decode_page

_WORD = re.compile(r"\w+")
_ADDRESS = re.compile(
    r"""<link\b(?=[^>]*rel\s*=\s*["']?canonical)[^>]*href\s*=\s*["']?https?://([^/"'\s>]+)"""
    r"""|<meta\b(?=[^>]*og:url)[^>]*content\s*=\s*["']?https?://([^/"'\s>]+)""",
    re.IGNORECASE,
)


def words(text: str) -> Counter[str]:
    """How often each word occurs: lower case, runs of letters, digits and underscores."""
    return Counter(_WORD.findall(text.lower()))


@dataclass(frozen=True)
class MarkedPage:
    """A page and its main text. ``type`` is the set's own name for the kind of page."""

    id: str
    type: str
    html: str
    text: str

    @cached_property
    def words(self) -> Counter[str]:
        return words(self.text)

    @cached_property
    def site(self) -> str:
        """The site that the page names as its own, without subdomains; its id where it names none."""
        found = _ADDRESS.search(self.html)
        if not found:
            return self.id
        parts = (found[1] or found[2]).lower().split(".")
        # co.uk and the like: a short second-level name is no site.
        return ".".join(parts[-3:] if len(parts) > 2 and len(parts[-2]) <= 3 else parts[-2:])


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of a folder or of a tar archive."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and (file.name == "truth.jsonl" or file.suffix == ".html"):
                yield str(file.relative_to(path)), file.read_bytes()
        return
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, content.read()


def read_marked(path: Path) -> list[MarkedPage]:
    """The pages of a folder, or of a tar archive, of ``truth.jsonl`` (``id``, ``type``, ``main_content`` in each line)
    and ``html/ID.html``; or of Sphinx's HTML with its ``_sources``, each of which is what its page should hold.

    Raises:
        FileNotFoundError: there is neither in ``path``.
    """
    path = Path(path)
    if path.is_dir() and (path / "_sources").is_dir():
        found = []
        for source in sorted((path / "_sources").rglob("*.rst.txt")):
            name = str(source.relative_to(path / "_sources")).replace(".rst.txt", ".html")
            if (path / name).exists():
                html, text = (path / name).read_text("utf-8"), source.read_text("utf-8")
                found.append(MarkedPage(name, "sphinx", html, text))
        return found
    if path.is_dir() and not (path / "truth.jsonl").exists():
        archives = sorted(path.glob("*.tar*"))
        if not archives:
            raise FileNotFoundError(f"{path}: expected truth.jsonl and html/, an archive of them, or _sources/")
        path = archives[0]
    truth, pages = [], {}
    for name, content in _files(path):
        if name.endswith("truth.jsonl"):
            truth = [json.loads(line) for line in content.splitlines() if line.strip()]
        elif name.endswith(".html"):
            pages[Path(name).stem] = content
    if not truth:
        raise FileNotFoundError(f"{path}: expected a truth.jsonl in it")
    return [
        MarkedPage(line["id"], line.get("type", "page"), decode_page(pages[line["id"]])[0], line["main_content"])
        for line in truth
        if line["id"] in pages
    ]
