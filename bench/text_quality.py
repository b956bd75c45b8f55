"""How well ``--quality-reference`` tells the main text of web pages from what stands around it.

``python -m fastllm.bench.text_quality PAGES``: marked pages as :mod:`.marked_pages` reads them. The marked text of half
of the sites is the reference. Of the other half the marked texts should stay; what the pages show beyond the lines of
their marked text should go. Texts of fewer than 50 words are left out.
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from pathlib import Path

from ..data.clean import Document, Rejection
from ..data.clean.html import EXTRACTORS
from ..data.clean.unigram import like_reference
from ..parser import first_paragraph
from .marked_pages import read_marked, words

# Shares of the good texts that are kept.
SHARES = (0.99, 0.95, 0.9, 0.8, 0.7)
# Words below which a text is not judged. A guess.
FEWEST_WORDS = 50


def around(html: str, text: str) -> str:
    """The visible lines of a page most words of which its marked text does not have."""
    known = words(text)
    return "\n".join(
        line for line in EXTRACTORS["all"](html).split("\n")
        if (found := words(line)) and sum((found & known).values()) < 0.5 * sum(found.values())
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser("python -m fastllm.bench.text_quality", description=first_paragraph(__doc__))
    parser.add_argument("pages", type=Path)
    pages = read_marked(parser.parse_args(argv).pages)
    # By a checksum of the site, so that no site is on both sides.
    halves = [[page for page in pages if zlib.crc32(page.site.encode()) % 2 == half] for half in range(2)]
    main_texts = [page.text for page in halves[1]]
    rests = [around(page.html, page.text) for page in halves[1]]
    good, bad = ([text for text in texts if sum(words(text).values()) >= FEWEST_WORDS] for texts in (main_texts, rests))
    print(f"{len(halves[0])} pages as reference; {len(good)} marked texts and {len(bad)} others to tell apart\n")
    print("| --quality-share | precision | recall | others removed |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.txt"
        path.write_text("\n".join(page.text for page in halves[0]), "utf-8")
        for share in SHARES:
            kept = [
                sum(not isinstance(like_reference(Document("x", text), str(path), share), Rejection) for text in texts)
                for texts in (good, bad)
            ]
            print(
                f"| {share} | {kept[0] / max(1, sum(kept)):.3f} | {kept[0] / len(good):.3f} | "
                f"{1 - kept[1] / len(bad):.3f} |"
            )


if __name__ == "__main__":
    main()
