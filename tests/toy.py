"""The smallest model that has all the parts, and what tests of its runs share."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch

from fastllm.config import InputError
from fastllm.models import TransformerConfig
from fastllm.training import RunConfig, resume, run, train

TOY = TransformerConfig(
    vocab_size=300, context_length=32, num_layers=2, num_heads=2, hidden_size=32, positions="rotary", norm="rms",
    activation="relu2", bias=False, dropout=0.1, qk_norm=True,
)  # fmt: skip


def weights(folder: Path) -> bytes:
    """The finished model's weights, as stored."""
    return (folder / "model" / "model.safetensors").read_bytes()


def shorten_runs(replace: Callable[[object, str, object], None] = setattr) -> None:
    """Runs make no picture and no samples and measure no rate, which take longer than a toy's training.

    Args:
        replace: monkeypatch.setattr, where the process goes on to other tests.
    """
    replace(run, "plot_loss", lambda *args: None)
    replace(run, "write_samples", lambda *args: "")
    replace(run, "matmul_flops", lambda *args: 1e11)


def train_or_resume(config: RunConfig, folder: Path, changes: dict) -> None:
    """Resume the run in ``folder``, or begin it: for a process that may be killed."""
    torch.set_num_threads(1)
    shorten_runs()
    try:
        resume(folder, changes, quiet=True)
    except InputError:  # killed before there was a checkpoint
        train(config, folder, quiet=True)


def processes() -> multiprocessing.context.BaseContext:
    """Starts processes that have imported everything already, forked from one that has used nothing of it yet."""
    context = multiprocessing.get_context("forkserver")
    # Not this module: Python 3.11's forkserver does not look where sys.path says.
    context.set_forkserver_preload(["fastllm.training", "fastllm.training.checkpoints.saving", "safetensors.torch"])
    return context
