"""The parser of a command's arguments, and what it says of a command."""

from __future__ import annotations

import argparse
import difflib


def first_paragraph(doc: str | None) -> str:
    """The first paragraph of a docstring on one line; "" where ``python -OO`` has left docstrings out."""
    return " ".join((doc or "").partition("\n\n")[0].split())


class Parser(argparse.ArgumentParser):
    """argparse's, with errors on one line, no abbreviated flags, and the nearest flag to one that does not exist."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        namespace, extras = super().parse_known_args(args, namespace)
        if extras:
            near = difflib.get_close_matches(extras[0].partition("=")[0], self._option_string_actions, n=1)
            self.error(f"unrecognized arguments: {' '.join(extras)}" + (f"; did you mean {near[0]}?" if near else ""))
        return namespace, extras

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")
