"""A page as a table of its elements and blocks."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Markup:
    """A page's elements and blocks, each a column in the order of the page; element 0 is the body.

    Attributes:
        tags, attributes, parents: each element's name, its tag's inside, and the number of its parent (or -1).
        starts, ends: the number of the first block in each element, and of the first block after it.
        rows, cells, items: the table row, the table cell and the list item that each element lies in, or -1.
        unshown, preformatted: whether each element is hidden, and whether its white space counts.
        texts: each block's text, its white space tidied except in ``preformatted`` ones.
        places: the element that each block lies in.
        linked: about how many characters of each block are in links.
        links: how many links begin in each block.
        carried: what the page carries as data, as text.
        descriptions: what the page says of itself in its head, with single spaces.
    """

    tags: list[str] = field(default_factory=list)
    attributes: list[str] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    unshown: list[bool] = field(default_factory=list)
    preformatted: list[bool] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    linked: list[int] = field(default_factory=list)
    links: list[int] = field(default_factory=list)
    carried: str = ""
    descriptions: list[str] = field(default_factory=list)
