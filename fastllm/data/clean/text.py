"""Unicode repaired and normalised, control codes removed, white space in order: str -> str."""

from __future__ import annotations

import re

from ..optional import require

# Control codes but tab and newline, C1 controls, what marks direction or width without showing, byte order marks,
# tags (U+E00xx), private use, noncharacters and halves of surrogate pairs. Zero-width joiners stay: scripts need them.
# So does U+FFFD: a reader must see that something is missing. The tags of a flag stay, such as England's, and so do the
# selectors of a Chinese character's form (U+E0100 to U+E01EF).
_UNSEEN = re.compile(
    "(\U0001f3f4[\U000e0020-\U000e007e]{1,8}\U000e007f)"
    "|[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufdd0-\ufdef\ufff0-\ufffc\ufffe"
    "\uffff\ue000-\uf8ff\ud800-\udfff\U000e0000-\U000e00ff\U000e01f0-\U000e0fff\U000f0000-\U0010ffff]"
)
# What a control code stands in for: a line or a page ended.
_BREAKS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")


def repair(text: str, entities: bool = True) -> str:
    """Mojibake undone and NFC, line by line; no letter is replaced for its looks.

    Args:
        entities: resolve HTML entities in lines that hold no tag. Text that came out of HTML has none left over.

    Raises:
        InputError: ftfy is not installed.
    """
    ftfy = require("ftfy", "ftfy", "repairing Unicode")
    config = ftfy.TextFixerConfig(
        unescape_html="auto" if entities else False, uncurl_quotes=False, fix_latin_ligatures=False,
        fix_character_width=False, remove_terminal_escapes=True, remove_control_chars=False, fix_line_breaks=False,
        normalization="NFC", max_decode_length=1 << 16, explain=False,
    )  # fmt: skip
    lines = text.split("\n")
    for number, line in enumerate(lines):
        # Most lines have nothing that could be repaired, and ftfy takes longer than all the rest.
        if not line.isascii() or "\x1b" in line or (entities and "&" in line):
            lines[number] = ftfy.fix_text(line, config)
    return "\n".join(lines)


def tidy(text: str, keep_indentation: bool = True) -> str:
    """One kind of line end, no control codes, no space at line ends, at most one blank line, none around the text.

    Spaces and tabs inside a line stay: code and plain-text tables are aligned by them.

    Args:
        keep_indentation: keep the space that lines begin with, as source code needs it.
    """
    text = _BREAKS.sub("\n", text)
    text = _SPACES.sub(" ", text)
    text = _UNSEEN.sub(lambda found: found[1] or "", text)
    lines = []
    for line in text.split("\n"):
        line = line.rstrip()
        if not keep_indentation:
            line = line.lstrip()
        if line or (lines and lines[-1]):
            lines.append(line)
    # A first line's own indentation means nothing.
    return "\n".join(lines).strip()
