"""The command line, called in this process."""

from fastllm.cli import main


def run(*arguments) -> int | str | None:
    """The exit code of ``fastllm`` with these arguments."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as exit_:
        return exit_.code
