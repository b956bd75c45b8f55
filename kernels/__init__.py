"""fastllm's Triton kernels: launchers that allocate outputs and compute, without autograd or registration."""

if __name__ != "fastllm.kernels":
    raise ImportError(
        f"these are fastllm's kernels, imported as {__name__!r} from a source tree on sys.path; "
        "they install as fastllm.kernels (pip install -e .), and this is not Hugging Face's package 'kernels'"
    )
