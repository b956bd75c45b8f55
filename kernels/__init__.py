"""fastllm's Triton kernels: launchers that allocate outputs and compute, without autograd or registration."""

import sys


def _is_probe() -> bool:
    """Whether this import is transformers' way of asking for the version of Hugging Face's package 'kernels'.

    It does so for any folder of that name on sys.path, and passes an ImportError on as its own. A module without
    ``__file__`` counts as not installed there.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.utils.import_utils":
            return True
        frame = frame.f_back
    return False


if __name__ != "fastllm.kernels":
    if not _is_probe():
        raise ImportError(
            f"these are fastllm's kernels, imported as {__name__!r} from a source tree on sys.path; "
            "they install as fastllm.kernels (pip install -e .), and this is not Hugging Face's package 'kernels'"
        )
    __file__ = None
