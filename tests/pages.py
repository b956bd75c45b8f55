"""Pages, dumps and archives of our own making, for the tests that prepare data."""

import gzip
import json
import random

TOPICS = [
    "lighthouse", "violin", "glacier", "harbour", "beehive", "telescope", "orchard", "railway", "pottery", "canal",
    "windmill", "library", "volcano", "market", "compass", "garden", "bridge", "observatory", "quarry", "bakery",
]  # fmt: skip
HEADLINES = [
    "Council votes to rebuild the old harbour wall after winter storms",
    "Why the night train to the coast is running again",
    "Scientists find a glacier that has stopped shrinking",
    "Small bakeries are winning back their towns",
    "A museum of clocks opens in a former railway station",
    "The last ferry pilot on the river retires at seventy",
]
SECTIONS = ["Home", "World", "Politics", "Business", "Sport", "Culture", "Science", "Opinion", "Video", "Subscribe"]
_TEXT = (
    "morning light story careful hand people town reason river quiet afternoon winter road plan hills history flour "
    "work years song ending weather letter window silver mountain paper summer engine bread clock teacher island "
    "corner winter stone music ladder kitchen shadow market sailor number forest copper thread candle answer basket "
    "wheel supper meadow journey castle butter pencil cousin thunder blanket harvest signal tunnel mirror soldier "
    "feather painter slowly gently rarely brightly together almost never always perhaps again opened carried "
    "painted followed answered measured gathered promised repaired remembered wandered collected finished described "
    "borrowed counted folded "
)
_WORDS = _TEXT.split()
_SMALL = ["the", "and", "of", "to", "with", "that", "have", "in", "on", "for"]


def paragraph(topic: str, draw: random.Random, sentences: int = 4) -> str:
    """Sentences that no rule objects to, different for each draw."""
    written = []
    for _ in range(sentences):
        words = [draw.choice(_SMALL) if i % 3 == 2 else draw.choice(_WORDS) for i in range(draw.randrange(12, 24))]
        written.append(f"The {topic} {' '.join(words)} {draw.choice(_WORDS)}.")
    return " ".join(written)


def article(number: int, paragraphs: int = 4) -> str:
    """A text about one of the topics; the same number gives the same text."""
    draw = random.Random(number)
    return "\n\n".join(paragraph(TOPICS[number % len(TOPICS)], draw) for _ in range(paragraphs))


def page(text: str, title: str = "A page", main: bool = True) -> str:
    """``text`` as a web page with everything around it that a web page has."""
    body = "".join(f"<p>{part}</p>" for part in text.split("\n\n"))
    links = "".join(f'<li><a href="/{i}">Chapter {i}</a></li>' for i in range(8))
    inner = f"<h1>{title}<a class=headerlink href=#t>\u00b6</a></h1>{body}"
    content = f"<main>{inner}</main>" if main else f'<div class="content">{inner}</div>'
    return (
        f"<!doctype html><html><head><title>{title}</title><style>p {{color: red}}</style></head><body>"
        f"<nav><ul>{links}</ul></nav><div class=sidebar><p>Subscribe to our newsletter today</p></div>"
        f"<script>var tracked = 1 < 2;</script>{content}<ul>{links}</ul>"
        "<footer><p>Copyright notice. All rights reserved.</p></footer></body></html>"
    )


def warc(pages: list[bytes], content_type: str = "text/html; charset=utf-8", compress: bool = True) -> bytes:
    """A WARC file with a response for each page, and an info record before them."""
    found = [("warcinfo", "application/warc-fields", b"software: test\r\n", "")]
    for number, content in enumerate(pages):
        block = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n\r\n".encode() + content
        found.append(("response", "application/http; msgtype=response", block, f"http://example.org/{number}"))
    records = []
    for number, (kind, media, block, url) in enumerate(found):
        target = f"WARC-Target-URI: {url}\r\n" if url else ""
        head = (
            f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{number:032d}>\r\n{target}"
            f"WARC-Date: 2024-01-01T00:00:00Z\r\nContent-Type: {media}\r\nContent-Length: {len(block)}\r\n\r\n"
        )
        records.append(head.encode() + block + b"\r\n\r\n")
    return b"".join(map(gzipped, records) if compress else records)


def dump(pages: list[tuple[str, str, str]]) -> str:
    """A MediaWiki dump: (title, name space, wikitext) for each page; a text of ``#REDIRECT`` makes a redirect."""
    parts = []
    for title, space, text in pages:
        redirect = '<redirect title="elsewhere"/>' if text.startswith("#REDIRECT") else ""
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        parts.append(
            f"<page><title>{title}</title><ns>{space}</ns><id>1</id>{redirect}"
            f"<revision><id>2</id><text>{escaped}</text></revision></page>"
        )
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">{"".join(parts)}</mediawiki>'


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def tree(folder):
    """The bytes of each file in ``folder``, by its path in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def texts(folder):
    """The documents of a prepared folder."""
    manifest = json.loads((folder / "prepared.json").read_text())
    found = []
    for shard in manifest["shards"]:
        with gzip.open(folder / shard["name"], "rt", encoding="utf-8") as lines:
            found += map(json.loads, lines)
    return found
