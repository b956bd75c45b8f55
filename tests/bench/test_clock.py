"""The bench's clock on a GPU, with a model of one: a queue of launches, which the host fills and the device empties."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastllm.bench import timing
from fastllm.bench.timing import Timer, Workload

GPU = torch.device("cuda")
CYCLE = 0.5e-9
FLUSH = 60e-6


class Machine:
    """Seconds that host and device have come to. A launch costs the host ``cost`` and runs ``lasts`` on the device."""

    def __init__(self):
        self.host = self.device = 0.0

    def launch(self, lasts: float, cost: float = 5e-6) -> None:
        self.host += cost
        self.device = max(self.device, self.host) + lasts

    def wait(self, device=None) -> None:
        self.host = max(self.host, self.device)


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            machine.launch(0.0, 1e-6)
            self.at = machine.device

        def query(self):
            return self.at <= machine.host

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: machine.launch(cycles * CYCLE))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    monkeypatch.setattr(timing, "synchronize", machine.wait)
    return machine


@pytest.fixture(params=["cold", "hot"])
def timer(request, machine):
    timer = Timer(GPU, cold=False)
    if request.param == "cold":
        timer.flush = SimpleNamespace(zero_=lambda: machine.launch(FLUSH), numel=lambda: 0)
    return timer


def call(machine, launches: int, lasts: float, cost: float) -> Workload:
    return Workload("ours", lambda: None, lambda _: [machine.launch(lasts, cost) for _ in range(launches)])


@pytest.mark.parametrize(("launches", "cost"), [(1, 10e-6), (3, 40e-6), (12, 200e-6), (100, 100e-6)])
def test_a_short_kernels_time_is_the_devices_whatever_the_host_takes(machine, timer, launches, cost):
    seen = [timer(call(machine, launches, 30e-6, cost), GPU) for _ in range(3)]
    assert seen == pytest.approx([launches * 30e-6] * 3, abs=1.5e-6)
    assert not timer.behind


def test_the_wait_grows_once_and_stays(machine, timer):
    ours = call(machine, 12, 30e-6, 200e-6)
    timer(ours, GPU)
    grown = timer.waits["ours"]
    assert grown * CYCLE < 4 * 12 * 200e-6
    timer(ours, GPU)
    assert timer.waits["ours"] == grown
    timer(Workload("other", lambda: None, lambda _: machine.launch(1e-5)), GPU)
    assert timer.waits["other"] == timing.WAIT


def test_a_call_that_waits_for_the_device_is_named_and_measured_all_the_same(machine, timer):
    def run(_):
        machine.launch(30e-6)
        machine.wait()
        machine.launch(30e-6, 50e-6)

    assert timer(Workload("reads back", lambda: None, run), GPU) == pytest.approx(110e-6, abs=2e-6)
    assert timer.behind == {"reads back"}
    before = machine.host
    timer(Workload("reads back", lambda: None, run), GPU)
    assert machine.host - before < 1e-3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_glibc_takes_the_settings_that_keep_freed_memory():
    """Whether a block is laid where one was freed is up to glibc: on a loaded machine one of 256 MB once was not."""
    program = "from fastllm.bench.timing import keep_freed_memory; print(keep_freed_memory())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
