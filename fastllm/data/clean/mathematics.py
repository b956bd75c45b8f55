"""Formulas as text: the TeX that MathML carries, or else its own characters in a line."""

from __future__ import annotations

import re
from html import unescape

_TEX = re.compile(
    r"""<(?:\w+:)?annotation\b[^>]{0,500}encoding\s*=\s*["']?[^"'>]{0,40}\b(?:la)?tex\b[^>]{0,500}>([^<]*)""",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(r"""\balttext\s*=\s*(?:"([^"]*)"|'([^']*)')""", re.IGNORECASE)
_DISPLAYED = re.compile(r"""\bdisplay\s*=\s*["']?block""", re.IGNORECASE)
_STYLE = re.compile(r"^\s*\{\s*\\(?:display|text)style\b(.*)\}\s*$", re.DOTALL)
_PART = re.compile(r"<(/?)(?:\w+:)?([a-zA-Z][\w-]*)([^>]*)>|([^<]+)")
# What stands between the parts of an element: a fraction's two, a base and what is above or below it.
_BETWEEN = {
    "mfrac": "/", "msup": "^", "mover": "^", "msub": "_", "munder": "_", "mmultiscripts": "_", "mroot": "^1/",
}  # fmt: skip
_TWO_BETWEEN = {"msubsup": "_^", "munderover": "_^"}
# An image of a formula, whose alternative text is its TeX.
_IMAGE = re.compile(
    r"""\bclass\s*=\s*["']?[^"'>]*(?<![\w-])(?:latex|tex|mathjax|equation|math|ql-img-\w+-equation)(?![\w-])""", re.I
)
_IMAGE_TEXT = re.compile(r"""\balt\s*=\s*(?:"([^"]*)"|'([^']*)')""", re.IGNORECASE)
# Names stand at the beginning of a tag: a bound on the time that a tag takes. A guess.
_NAMES = 1000
# What shows a formula that the page also has as MathML or TeX, for the eyes alone.
_DRAWN = re.compile(
    r"""\bclass\s*=\s*["']?[^"'>]*(?<![\w-])(katex-html|MathJax(?:_Preview|_Display|_CHTML|_SVG)?|mjx-math)(?![\w-])"""
)
# Elements that nest deeper are read as a row. A guess.
_DEEPEST = 200


def formula(attributes: str, inner: str) -> str:
    """The text of ``<math>`` or of ``<script type="math/tex">``, its character references still in it."""
    if "math/tex" in attributes:
        return _in_signs(inner, "mode=display" in attributes.replace(" ", ""))
    found = _TEX.search(inner)
    alternative = _ALTERNATIVE.search(attributes)
    tex = found[1] if found else (alternative[1] or alternative[2] or "") if alternative else ""
    if tex.strip():
        return _in_signs(tex, _DISPLAYED.search(attributes) is not None)
    return _in_a_line(inner)


def image_formula(attributes: str) -> str:
    """The TeX of an image's tag, if it shows a formula."""
    if "class" not in attributes or not _IMAGE.search(attributes[:_NAMES]):
        return ""
    found = _IMAGE_TEXT.search(attributes)
    tex = (found[1] or found[2] or "") if found else ""
    return _in_signs(tex, False) if tex.strip() else ""


def is_drawn(attributes: str, after_formula: bool) -> bool:
    """Whether an element shows a formula for the eyes, which the page also has as MathML or TeX.

    KaTeX puts MathML before it, or none at all: what is not ``after_formula`` is all that its page has.
    """
    if not ("katex" in attributes or "MathJax" in attributes or "mjx" in attributes):
        return False
    found = _DRAWN.search(attributes[:_NAMES])
    return found is not None and (after_formula or found[1] != "katex-html")


def _in_signs(tex: str, displayed: bool) -> str:
    tex = " ".join(tex.split())
    if styled := _STYLE.match(tex):
        tex = styled[1].strip()
    tex = tex.strip("$")
    sign = "$$" if displayed else "$"
    return f"{sign}{tex}{sign}" if tex else ""


def _in_a_line(inner: str) -> str:
    """The characters of MathML without TeX, with signs for fractions, powers and indices."""
    # Of each open element: its tag, and the texts of its children.
    open_: list[tuple[str, list[str]]] = [("mrow", [])]
    for closing, tag, attributes, text in _PART.findall(inner):
        if text:
            open_[-1][1].append(" ".join(text.split()))
        elif not closing:
            if not attributes.endswith("/") and len(open_) < _DEEPEST:
                open_.append((tag.lower(), []))
        elif len(open_) > 1 and open_[-1][0] == tag.lower():
            name, parts = open_.pop()
            open_[-1][1].append(_joined(name, parts))
    while len(open_) > 1:
        name, parts = open_.pop()
        open_[-1][1].append(_joined(name, parts))
    return "".join(open_[0][1])


def _joined(tag: str, parts: list[str]) -> str:
    parts = [part for part in parts if part]
    if tag.startswith("annotation"):
        return ""
    if tag in _TWO_BETWEEN and len(parts) == 3:
        first, second = _TWO_BETWEEN[tag]
        return f"{parts[0]}{first}{_grouped(parts[1])}{second}{_grouped(parts[2])}"
    if tag in _BETWEEN and len(parts) == 2:
        base = _grouped(parts[0]) if tag == "mfrac" else parts[0]
        return f"{base}{_BETWEEN[tag]}{_grouped(parts[1])}"
    if tag == "msqrt":
        return f"\u221a{_grouped(''.join(parts))}"
    if tag == "mtr":
        return " ".join(parts) + "; "
    if tag in ("mo", "mtext") and parts:
        text = unescape(parts[0])
        # Signs that relate two sides stand apart.
        return f" {parts[0]} " if text in "=<>\u2264\u2265\u2260\u2248\u2261\u2192\u21d2\u2208" else parts[0]
    return "".join(parts)


def _grouped(text: str) -> str:
    text = text.strip()
    return text if len(unescape(text)) < 2 or text.isalnum() else f"({text})"
