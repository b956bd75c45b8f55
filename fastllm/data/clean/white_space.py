"""Which elements keep their white space: by their style, or by the names that highlighters of code give them."""

from __future__ import annotations

import re

# What becomes of white space: it is collapsed; lines stay; all of it stays; all of it stays, and the blocks inside are
# lines of one text.
COLLAPSED, LINES, KEPT, CODE = range(4)
_VALUES = {
    "pre": CODE, "pre-wrap": KEPT, "break-spaces": KEPT, "preserve": KEPT, "preserve-spaces": KEPT, "pre-line": LINES,
    "preserve-breaks": LINES, "normal": COLLAPSED, "nowrap": COLLAPSED, "collapse": COLLAPSED,
}  # fmt: skip
_STYLE = re.compile(r"""[\s"';]white-space(?:-collapse)?\s*:\s*([a-z-]+)""", re.IGNORECASE)
_BLOCK_STYLE = re.compile(r"display\s*:\s*(?:block|flex|grid|table\b)", re.IGNORECASE)
_NAME = r"""(?<![\w-])class\s*=\s*(?:"[^"]*?|'[^']*?|)(?<![\w-])(?:{})(?![\w-])"""
# GitHub and gists, Crayon, CodeMirror, Monaco, Ace, highlight.js, SyntaxHighlighter, Prism in React, gitweb, Doxygen.
_CODE = re.compile(
    _NAME.format(
        "blob-code|blob-code-inner|js-file-line|react-code-lines|react-code-text|crayon-pre|crayon-line|CodeMirror-code"
        "|CodeMirror-line|cm-content|cm-line|view-lines|view-line|ace_line|hljs-ln|hljs-ln-code|token-line|prism-code"
        "|syntaxhighlighter"
    )
    + r"""|^\s*class\s*=\s*["']fragment["']\s*$""",
    re.IGNORECASE,
)
_CODE_HINTS = ("blob-code", "file-line", "react-code", "crayon-", "CodeMirror-", "cm-", "view-line", "ace_line",
               "hljs-ln", "token-line", "prism-code", "syntaxhighlighter", "fragment")  # fmt: skip
# Columns of line numbers; the second are such inside code and as cells alone.
_NUMBERS = re.compile(
    _NAME.format(
        "linenos?|linenumbers?|linenr|line-number|blob-num|hljs-ln-numbers|hljs-ln-n|crayon-nums?|react-line-numbers?"
        "|react-line-number|CodeMirror-linenumber|CodeMirror-gutters?|cm-gutters|ace_gutter"
    ),
    re.IGNORECASE,
)
_NUMBERS_IN_CODE = re.compile(_NAME.format("lnt?|line-numbers|line-num|linenum|line_number|gutter"), re.IGNORECASE)
_NUMBER_HINTS = ("line", "blob-num", "hljs-ln", "crayon-num", "gutter", "ln")
# Names stand at the beginning of a tag: a bound on the time that a tag takes.
_NAMES = 1000
# Elements of these tags hold code, whatever its numbers are called.
_HOLDERS = ("pre", "code", "table", "body")

# A space, a tab and the end of a line that stay; a page's own control characters are removed.
LINE_MARK, SPACE_MARK, TAB_MARK = "\x01", "\x03", "\x04"
_MARKS = str.maketrans({SPACE_MARK: " ", TAB_MARK: "\t"})


def kept_space(tag: str, attributes: str) -> int | None:
    """What an element's attributes say of its white space; None if they say nothing."""
    if "white-space" in attributes and (found := _STYLE.search(attributes)):
        return _VALUES.get(found[1].lower())
    attributes = attributes[:_NAMES]
    if tag not in ("table", "body") and any(map(attributes.__contains__, _CODE_HINTS)) and _CODE.search(attributes):
        return CODE
    return None


def is_shown_as_block(attributes: str) -> bool:
    """Whether the style of an element's attributes makes a block of it."""
    return "display" in attributes and _BLOCK_STYLE.search(attributes) is not None


def line_numbers(tag: str, attributes: str) -> int:
    """Whether an element is a line's number, or a column of them: 2 anywhere, 1 inside code, or 0."""
    if tag in _HOLDERS or not any(map(attributes.__contains__, _NUMBER_HINTS)):
        return 0
    attributes = attributes[:_NAMES]
    if _NUMBERS.search(attributes):
        return 2 if tag in ("td", "th", "div") else 1
    return (2 if tag == "td" else 1) if _NUMBERS_IN_CODE.search(attributes) else 0


def with_marks(text: str, space: int) -> str:
    """``text`` with marks where white space stays, for text that is collapsed later on."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", LINE_MARK)
    if space == LINES:
        return text
    return text.replace("\t", TAB_MARK).replace("&nbsp;", " ").replace("\u00a0", " ").replace(" ", SPACE_MARK)


def unmarked(text: str) -> str:
    """``text`` with the spaces and tabs that marks stand for."""
    return text.translate(_MARKS) if SPACE_MARK in text or TAB_MARK in text else text
