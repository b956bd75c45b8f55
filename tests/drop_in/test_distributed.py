"""An accelerated model in two gloo processes: gradients as those of one process on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drop_in_worker import DIRECTIONS, MODES, build, linear_losses, loss_of, post_training

WORKER = Path(__file__).parents[1] / "drop_in_worker.py"


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """Of two processes, for each mode."""
    out = tmp_path_factory.mktemp("distributed") / "grads.pt"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(out)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = []
    try:
        for worker in workers:
            said.append(worker.communicate(timeout=240)[0])
    finally:
        for worker in workers:
            worker.kill()
    assert [w.returncode for w in workers] == [0, 0], "\n".join(said)
    return torch.load(out)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_two_processes_are_those_of_one(mode, gradients):
    model, ids, labels = build(tied=mode == "fsdp_tied")
    loss_of(model, ids, labels).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[mode][name], p.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_tensor_parallel_modules_take_the_forward_from_before(gradients):
    assert gradients["dtensor"]


def test_linear_losses_of_dtensors_are_those_of_tensors(gradients):
    assert len(gradients["linear losses"]) == 4  # whole, split by vocabulary, by features, within loss_parallel()
    for found in gradients["linear losses"]:
        torch.testing.assert_close(found, linear_losses())


def test_post_training_losses_of_a_split_vocabulary_are_those_of_a_whole_one(gradients):
    for name, expected in post_training("alone").items():
        for found, tensor in zip(gradients["split vocabulary"][name], expected, strict=True):
            torch.testing.assert_close(
                found, tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_post_training_losses_under_fsdp_are_those_of_one_process(gradients):
    for name, (value, of_rows, of_head) in post_training("alone").items():
        values, rows, heads = zip(*(half[name] for half in gradients["halves"]), strict=True)
        # A divergence is a mean over the rows that count, as many in each half. FSDP takes the mean over the ranks.
        is_mean = name in DIRECTIONS
        torch.testing.assert_close(sum(values) / (2 if is_mean else 1), value)
        torch.testing.assert_close(torch.cat(rows) / (2 if is_mean else 1), of_rows, rtol=1e-4, atol=1e-5)
        for head in heads:
            torch.testing.assert_close(head * (1 if is_mean else 2), of_head, rtol=1e-4, atol=1e-5)
