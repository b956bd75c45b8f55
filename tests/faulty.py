"""Run by torchrun: rank 1 is killed in the first life, hangs in the second, and a third one ends the run."""

import os
import signal
import time

from several import MODEL, fastllm

from fastllm.training.objectives import CausalLM

life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["RANK"]
batch = CausalLM.batch


def note(text):
    with open("faults.txt", "a") as file:
        file.write(text + "\n")


def faulty(self, step, done=1.0):
    if rank == "1" and life == 0 and step == 4:
        note("killed")
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == "1" and life == 1 and step == 5:
        note("hung")
        time.sleep(600)
    return batch(self, step, done)


CausalLM.batch = faulty
fastllm("train", "--out", "run", *MODEL, "--dtype", "float32", "--hang-timeout", "3")
CausalLM.batch = batch
fastllm("train", "--out", "whole", *MODEL, "--dtype", "float32")
