"""Run by torchrun: one start of the interpreter for all ways of training together, and then for one process alone."""

import json
import os
import sys

from toy import shorten_runs

from fastllm.cli import main

MODEL = [
    "--vocab-size",
    "300",
    "--context-length",
    "32",
    "--num-layers",
    "2",
    "--num-heads",
    "2",
    "--hidden-size",
    "32",
    # As many outputs as the vocabulary: AdamW's, beside a table that --tensor-parallel splits.
    "--intermediate-size",
    "300",
    "--dropout",
    "0.1",
    "--data",
    "prose.txt",
    "--device",
    "cpu",
    "--batch-size",
    "4",
    "--eval-interval",
    "3",
    "--checkpoint-interval",
    "2",
    "--steps",
    "6",
    "--quiet",
]
WAYS = {
    "ddp": ["--micro-batch-size", "1"],
    "fsdp": ["--parallel", "fsdp", "--micro-batch-size", "1", "--checkpoint-activations"],
    "vocabulary": ["--tensor-parallel", "2"],
    "bf16": ["--parallel", "fsdp", "--dtype", "bfloat16"],
}


PAIRS = "".join(
    json.dumps({"prompt": "the", "chosen": f" {word}.", "rejected": f" {word} {word}."}) + "\n"
    for word in ("cat", "dog", "bird", "fish", "cow", "hen")
)


def fastllm(*arguments):
    # Here, not at the import: tests read MODEL from this file, and their own runs have pictures.
    shorten_runs()
    assert main([*arguments]) == 0, arguments


def resume(name, steps, *more):
    fastllm("train", "--resume", name, "--steps", str(steps), "--quiet", *more)


def prefer(out, *more):
    """Two steps of dpo on the run "ddp"."""
    fastllm(
        "train", "--objective", "dpo", "--pretrained", "ddp", "--data", "pairs.jsonl", "--out", out, "--steps", "2",
        "--batch-size", "2", "--device", "cpu", "--dtype", "float32", "--quiet", *more,
    )  # fmt: skip


def run_all():
    for name, more in WAYS.items():
        fastllm("train", "--out", name, *MODEL, *(more if "bf16" in name else ["--dtype", "float32", *more]))
        # Another way of training takes over in between.
        resume(name, 7, "--parallel", "ddp" if name == "fsdp" else "fsdp", "--tensor-parallel", "1")
        if os.environ["RANK"] == "0":
            print(name, "done", file=sys.stderr, flush=True)
    prefer("dpo-vocabulary", "--tensor-parallel", "2")
    prefer("dpo-fsdp", "--parallel", "fsdp")
    if os.environ["RANK"] == "0":
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[variable]
        prefer("dpo-alone")
        # Back to one process; and one process from the beginning.
        for name in WAYS:
            resume(name, 8, "--parallel", "ddp")
        fastllm("train", "--out", "alone", *MODEL, "--dtype", "float32")
        resume("alone", 7)
        resume("alone", 8)


if __name__ == "__main__":
    run_all()
