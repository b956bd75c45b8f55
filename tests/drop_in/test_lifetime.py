"""Models that come and go: nothing keeps them alive, and cycles of accelerate and revert leave nothing behind."""

import copy
import gc
import subprocess
import sys
import threading
import tracemalloc
import weakref

import pytest
import torch
from architectures import build
from torch import nn

import fastllm
from fastllm.drop_in import configuration, swap

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Norm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def block(eps=1e-6):
    return nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8), Norm(8, eps), nn.MultiheadAttention(8, 2))


def grown(run, warm: int, times: int) -> float:
    """Bytes that one call of ``run`` leaves behind, once ``warm`` calls have been made."""
    tracemalloc.start()  # before the first calls, whose caches are then replaced by counted ones
    try:
        for i in range(warm):
            run(i)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for i in range(times):
            run(warm + i)
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before) / times
    finally:
        tracemalloc.stop()


def alive() -> int:
    """How many classes, modules and switches there are."""
    gc.collect()
    kinds = (type, nn.Module, configuration.Switch)
    return sum(any(issubclass(type(o), kind) for kind in kinds) for o in gc.get_objects())


def test_a_thousand_cycles_on_one_model_leave_nothing_behind():
    model = block()
    classes = [type(m) for m in model.modules()]

    def cycle(_):
        fastllm.accelerate(model, verify=False)
        fastllm.revert(model)

    assert grown(cycle, 20, 1000) < 8
    assert [type(m) for m in model.modules()] == classes
    assert all("_fastllm" not in name for m in model.modules() for name in vars(m))


def test_models_that_each_differ_leave_nothing_behind():
    """Each has an eps of its own, so each gets classes of its own."""

    def come_and_go(i):
        model = block(eps=1e-6 * (1 + i / 64))
        fastllm.accelerate(model)
        fastllm.revert(model)

    come_and_go(0)
    kept, before = len(swap._classes), alive()
    for i in range(1, 20):
        come_and_go(i)
    assert alive() <= before
    assert len(swap._classes) <= kept


def test_classes_that_a_program_makes_can_go():
    """A class defined inside a function, as in a notebook's cell that is run again."""

    def make():
        class Local(nn.LayerNorm):
            pass

        model = nn.Sequential(Local(8))
        assert fastllm.accelerate(model).swapped
        return weakref.ref(Local), weakref.ref(model)

    for reference in make():
        gc.collect()
        assert reference() is None


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_transformers_model_goes_with_its_configuration(name):
    pytest.importorskip("transformers")
    model, inputs = build(name)
    report = fastllm.accelerate(model)
    outputs = model(**inputs)
    outputs.loss.backward()
    references = [weakref.ref(model), weakref.ref(model.lm_head.weight)]
    del model, outputs
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert report.swapped


def test_cycles_on_a_transformers_model_leave_nothing_behind():
    pytest.importorskip("transformers")
    model, inputs = build("gemma2")
    states = [dict(vars(m)) for m in model.modules()]

    def cycle(_):
        fastllm.accelerate(model, only="attention")
        fastllm.revert(model)

    cycle(0)
    before = alive()
    for i in range(30):
        cycle(i)
    assert alive() == before
    for module, state in zip(model.modules(), states, strict=True):
        assert vars(module).keys() == state.keys()
        assert vars(module).get("config") is state.get("config")
    assert model(**inputs).loss.isfinite()


def test_two_threads_accelerate_and_run_models_of_their_own():
    """Classes are made once for all threads."""
    failures = []
    ready = threading.Barrier(4)
    expected = None
    model = nn.Sequential(Norm(8, 3e-6), nn.LayerNorm(8))
    x = torch.randn(5, 8)
    expected = model(x)

    def run():
        try:
            mine = copy.deepcopy(model)
            ready.wait()
            for _ in range(20):
                fastllm.accelerate(mine)
                torch.testing.assert_close(mine(x), expected)
                fastllm.revert(mine)
                assert type(mine[0]) is Norm
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_one_model_run_by_two_threads():
    model = block()
    model[3] = nn.RMSNorm(8)
    ids = torch.arange(6)[None]
    expected = model(ids)
    fastllm.accelerate(model)
    outputs = [None] * 4

    def run(i):
        for _ in range(10):
            outputs[i] = model(ids)
            outputs[i].sum().backward()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output in outputs:
        torch.testing.assert_close(output, expected)


SHARED = """
import torch
import torch.multiprocessing as processes
import fastllm

def child(model, ids, queue):
    with torch.no_grad():
        model[1].weight.mul_(2)
        queue.put(model(ids).tolist())

if __name__ == "__main__":
    model = torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.LayerNorm(8), torch.nn.RMSNorm(8))
    ids = torch.arange(6)[None]
    fastllm.accelerate(model)
    model.share_memory()
    context = processes.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(model, ids, queue))
    process.start()
    got = torch.tensor(queue.get(timeout=120))
    process.join(60)
    assert bool((model[1].weight == 2).all())
    with torch.no_grad():
        torch.testing.assert_close(got, model(ids))
    assert fastllm.revert(model) == 3
"""


def test_one_model_in_two_processes(tmp_path):
    """Its parameters lie in shared memory; the other process gets the accelerated model by pickling."""
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
