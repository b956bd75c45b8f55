"""The command line, called in this process."""

import os
import re

from fastllm.cli import main


def run(*arguments) -> int | str | None:
    """The exit code of ``fastllm`` with these arguments."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as exit_:
        return exit_.code


def check_refused(capsys, pattern: str, *arguments) -> None:
    """The command is refused: exit code 2, one line on stderr that matches, nothing else, nothing made."""
    before = sorted(os.listdir())
    capsys.readouterr()
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert re.search(pattern, err), err
    assert err.startswith(f"fastllm {arguments[0]}: error: ")
    assert sorted(os.listdir()) == before
