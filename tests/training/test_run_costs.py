"""What saving adds to training, and how long a resumed run takes to its first step.

``FASTLLM_TESTS=thorough pytest -n 0 -s tests/training/test_run_costs.py`` measures both and prints them, in a
minute on an idle machine.
"""

import statistics
import subprocess
import sys
import time

import torch
from prose import prose
from thorough import THOROUGH

from fastllm.cli import main
from fastllm.cpu import precision
from fastllm.data import Tokenizer
from fastllm.models import PRESETS, Transformer
from fastllm.training import TrainingConfig
from fastllm.training.checkpoints.checkpoint import Keep, State, checkpoints
from fastllm.training.checkpoints.saving import Saver
from fastllm.training.objectives import CausalLM
from fastllm.training.optimizer import Optimizers
from fastllm.training.step import StepSettings, train_step

# A run that stops where its first step would be computed, and says how it came there.
FIRST_STEP = """
import os, sys, time

with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
    age = float(uptime.read().split()[0]) - int(stat.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
start = time.monotonic() - age
import torch
imported = time.monotonic() - start
from fastllm.cli import main
from fastllm.training import launch, session; from fastllm.training.parallel import ranks

reading = 0.0

def timed(function):
    def run(*arguments):
        global reading
        begin = time.monotonic()
        try:
            return function(*arguments)
        finally:
            reading += time.monotonic() - begin
    return run

launch.find_checkpoint = timed(launch.find_checkpoint)
launch.reopen_data = timed(launch.reopen_data)
ranks.Ranks.load = timed(ranks.Ranks.load)

def first(*arguments, **options):
    heavy = [name for name in ("torch._dynamo", "sympy", "triton", "matplotlib", "torch.distributed.fsdp")
             if name in sys.modules]
    print(time.monotonic() - start, imported, reading, ",".join(heavy))
    sys.stdout.flush()
    os._exit(0)

session.batch_gradients = first
main(["train", "--resume", "run", "--steps", "3", "--quiet"])
"""


def first_step() -> tuple[float, float, float, str]:
    """Seconds from the start of a process to the first step of ``run``, resumed; to torch's import; in reading."""
    result = subprocess.run([sys.executable, "-c", FIRST_STEP], capture_output=True, text=True, check=True)
    total, imported, reading, *heavy = result.stdout.split()
    return float(total), float(imported), float(reading), "".join(heavy)


def make_run(*shape):
    with open("prose.txt", "w") as file:
        file.write(prose(300))
    settings = ["--dtype", "float32", "--device", "cpu", "--eval-interval", "0", "--batch-size", "2", "--quiet"]
    assert main(["train", "--data", "prose.txt", "--out", "run", "--steps", "2", *settings, *shape]) == 0


def test_a_resumed_run_comes_to_its_first_step_without_what_it_does_not_need(tmp_path, monkeypatch, short_runs):
    monkeypatch.chdir(tmp_path)
    make_run("--vocab-size", "300", "--hidden-size", "32", "--num-heads", "2", "--num-layers", "1")
    assert first_step()[3] == ""


@THOROUGH
def test_a_resumed_run_comes_to_its_first_step_within_two_seconds(tmp_path, monkeypatch, short_runs):
    monkeypatch.chdir(tmp_path)
    make_run("--preset", "small", "--vocab-size", "300")
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # an installed package has its bytecode
    first_step()
    times = [first_step() for _ in range(5)]
    total, imported, reading, _ = min(times, key=lambda one: one[0] - one[2])
    print(f"\nfirst step {total:.2f} s after the process began: torch {imported:.2f} s, reading {reading:.2f} s")
    assert total - reading < 2.0


@THOROUGH
def test_saving_costs_less_than_two_percent(tmp_path):
    # In seconds of one core's work, the writing thread's too: other processes on the machine change wall time more than
    # a save does.
    torch.set_num_threads(1)
    model = Transformer(PRESETS["small"])
    dtype = precision(torch.device("cpu"))
    optimizers = Optimizers(model, TrainingConfig())
    batch = {name: torch.randint(96, (TrainingConfig().batch_size, 256)) for name in ("tokens", "targets")}
    saver = Saver(tmp_path, model, Tokenizer.train([prose(60)], 300), Keep(2), print)
    saves, stalls = 0, []

    def seconds(save: bool) -> float:
        """The time of two steps and of one save beside them, until it is on the disk."""
        nonlocal saves
        begin = time.process_time()
        if save:
            saves += 1
            saver.save(State(saves, 0.0, 0, dtype, ""), optimizers.state_dict())
            stalls.append(time.process_time() - begin)
        for _ in range(2):
            train_step(CausalLM, model, optimizers, batch, StepSettings(len(batch["tokens"]), 1.0, dtype))
        saver.wait()
        return time.process_time() - begin

    seconds(True)
    added, alone = [], []
    for index in range(5):
        taken = {save: seconds(save) for save in ((False, True) if index % 2 else (True, False))}
        alone.append(taken[False] / 2)
        added.append(taken[True] - taken[False])
    step, one = statistics.median(alone), statistics.median(added)
    interval = TrainingConfig().checkpoint_interval
    size = sum(file.stat().st_size for file in checkpoints(tmp_path)[-1].iterdir())
    print(
        f"\n{model.num_parameters() / 1e6:.2f}M parameters, {size / 2**20:.0f} MiB: a step takes {step * 1e3:.0f} ms "
        f"of a core, a save {one * 1e3:.0f} ms, of which training waits for {statistics.median(stalls) * 1e3:.0f}: "
        f"{one / (2 * step):.1%} if every 2nd step saves, {one / (interval * step):.3%} at every {interval}th"
    )
    assert one / (interval * step) < 0.02
