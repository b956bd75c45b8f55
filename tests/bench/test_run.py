"""``fastllm bench``: parity before times, one failure stops nothing, the budget holds, runs compare."""

import re
import signal
import time

import pytest
import torch
import torch.nn.functional as F
from alarm import ring

from fastllm import OPS
from fastllm.bench import cases, parity, run
from fastllm.bench.results import NOT_COMPILED
from fastllm.bench.timing import Timer, Workload, host_seconds
from fastllm.registry import Cost
from fastllm.time_limit import OutOfTime, time_limit

CPU = torch.device("cpu")
# Seconds: more than a busy machine takes.
BUDGET = 36000.0


def _run(op, **options):
    planned = run.plan([op], options.pop("shape", [""]))
    told = {name: options.pop(name) for name in ("environment", "keep") if name in options}
    settings = dict(dtypes=["bfloat16"], rounds=3, budget=BUDGET, only=["wrong", "failing", "missing"])
    found = run.run(planned, CPU, run.Request(**(settings | options)), tell=lambda line: None, **told)
    return found.rows, found.left_out


def test_only_what_is_right_gets_a_time(small):
    rows, left_out = _run(small, shape=["first"])
    assert not left_out
    assert {row.direction for row in rows} == set(run.DIRECTIONS)
    for row in rows:
        if row.provider in (run.OURS, run.EAGER):
            assert len(row.samples) == 3
            assert row.problem is None
            assert 0 < row.seconds.low <= row.seconds.median <= row.seconds.high
        else:
            assert not row.samples
    problems = {row.provider: row.problem for row in rows if row.problem}
    assert "error" in problems["wrong"]
    assert problems["failing"] == "RuntimeError: no kernel image"
    assert problems["missing"] == "not installed (a_package_that_nobody_has)"


def test_wrong_gradients_get_no_time(small, monkeypatch):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return dx / 2

    rival = {"wrong": lambda: lambda x, *rest, **more: F.layer_norm(Halved.apply(x), *rest, **more)}
    monkeypatch.setattr(cases.importlib.import_module("fastllm.bench.layer_norm"), "rivals", rival)
    rows, _ = _run(small, shape=["first"])
    assert all(not row.samples for row in rows if row.provider == "wrong")
    assert any(row.samples for row in rows)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # Inductor's own
# .ci/run runs it at two levels, which share Inductor's folder.
@pytest.mark.cpu_level
def test_the_compiler_is_a_provider(small, monkeypatch):
    rows, _ = _run(small, shape=["first"], only=[run.COMPILED], rounds=2)
    assert not [row.problem for row in rows if row.problem]
    assert {row.provider for row in rows} == {run.OURS, run.EAGER, run.COMPILED}


def test_where_eager_fails_the_rest_is_still_timed(small, monkeypatch):
    real = run.providers

    def without_eager(op):
        return real(op) | {run.EAGER: cases.rivals_of("layer_norm")["failing"]}

    monkeypatch.setattr(run, "providers", without_eager)
    rows, _ = _run(small, shape=["first"])
    assert {row.provider for row in rows if row.samples} == {run.OURS}
    assert {row.problem for row in rows if row.provider == run.EAGER} == {"RuntimeError: no kernel image"}


def test_a_case_that_fails_stops_nothing_and_results_are_kept_as_they_come(small, monkeypatch):
    real, kept = run.measure, []

    def measure(op, sample, *rest, **sweep):
        if sample.name == "first":
            raise RuntimeError("device lost")
        return real(op, sample, *rest, **sweep)

    monkeypatch.setattr(run, "measure", measure)
    rows, left_out = _run(small, keep=lambda found: kept.append((len(found.rows), len(found.left_out))))
    assert {row.shape for row in rows} == {"second"}
    assert left_out == ["layer_norm, first, bfloat16: RuntimeError: device lost"]
    assert kept == [(0, 1), (len(rows), 1)]


def test_a_spent_budget_leaves_out_and_says_so(small):
    rows, left_out = _run(small, budget=1e-9)
    assert not rows
    assert left_out == [
        f"layer_norm, {name}, bfloat16: the budget of 1e-09 s was spent" for name in ("first", "second")
    ]


def test_what_is_too_large_is_left_out(small, monkeypatch):
    monkeypatch.setitem(run.LARGEST, "cpu", (3 + 1 + 1) * 24 * 2)
    rows, left_out = _run(small)
    assert {row.shape for row in rows} == {"first"}
    assert left_out == ["layer_norm, second, bfloat16: too large for this device"]


def test_first_shapes_of_all_ops_come_first():
    order = run.plan([OPS["layer_norm"], OPS["rms_norm"]], [""])
    assert [case.op.name for case in order[:4]] == ["layer_norm", "rms_norm"] * 2
    assert order[0].name == order[1].name
    swept = run.plan([OPS["layer_norm"], OPS["embedding"]], [""], sweep=True)
    sizes = [case.size for case in swept if case.size]
    assert sizes == sorted(sizes) == [case.size for case in swept[-len(sizes) :]]
    assert {(case.op.name, case.axis) for case in swept if case.size} == {("layer_norm", "columns")}
    assert [case.name for case in run.plan([OPS["layer_norm"]], ["columns 1024"], sweep=True)] == ["columns 1024"]


def test_a_call_that_the_budget_has_no_room_for_is_left_out(small, monkeypatch):
    rates = {"copy": 1e9, "matrix": 1e9}
    _, left_out = _run(small, budget=1e-2, environment={"rates": {"copy": 1.0, "matrix": 1.0}})
    assert len(left_out) == 2
    assert "longer than the 0 s that a call may take" in left_out[0]
    monkeypatch.setattr(run, "first_calls", lambda *args: {"forward": 5.0})
    monkeypatch.setitem(run.CASE, "cpu", 10.0)
    monkeypatch.setitem(run.CASE_SHARE, "cpu", 0.0)
    rows, left_out = _run(small, shape=["first"], environment={"rates": rates})
    assert not rows
    assert left_out == ["layer_norm, first, bfloat16: a call takes 5.0 s, 10 s are left"]


def test_compiling_has_its_share_of_the_budget_and_the_calls_go_on_without(small, monkeypatch):
    compiled = []

    def providers(op):
        def slow():
            compiled.append(1)
            time.sleep(0.3)
            return F.layer_norm

        return {run.OURS: lambda: op.function, run.EAGER: lambda: F.layer_norm, run.COMPILED: slow}

    monkeypatch.setattr(run, "providers", providers)
    monkeypatch.setattr(run, "set_up_compiler", lambda device: None)
    monkeypatch.setitem(run.COMPILING, "cpu", 0.2 / BUDGET)
    rows, left_out = _run(small, only=[run.COMPILED])
    assert not left_out
    assert len(compiled) == 1
    found = {(row.shape, row.provider): row for row in rows if row.direction == "both"}
    assert found["first", run.COMPILED].samples
    late = found["second", run.COMPILED]
    assert (late.samples, late.problem, late.missing) == ([], NOT_COMPILED, True)
    assert found["second", run.OURS].samples


def test_torch_compile_serves_only_the_ops_that_are_asked_for(small, monkeypatch):
    both = {run.OURS: lambda: F.layer_norm, run.EAGER: lambda: F.layer_norm, run.COMPILED: lambda: F.layer_norm}
    monkeypatch.setattr(run, "providers", lambda op: both)
    for compiled, expected in ((None, set(both)), ({"layer_norm"}, set(both)), ({"attention"}, {run.OURS, run.EAGER})):
        for only in ((), [run.COMPILED]):
            rows, _ = _run(small, shape=["first"], only=only, compiled=compiled)
            assert {row.provider for row in rows} == expected


def test_on_a_cpu_calls_go_from_small_to_large_after_those_for_cpus():
    for name in OPS:
        calls = run.plan([OPS[name]], [""], device="cpu") if cases.shapes_of(name) else []
        first = list(cases.cpu_shapes_of(name)) if calls else []
        assert [planned.name for planned in calls[: len(first)]] == first
        sizes = [planned.held_bytes for planned in calls[len(first) :]]
        assert sizes == sorted(sizes)
        assert len(calls) == len(cases.shapes_of(name, "cpu"))


def test_a_case_that_takes_too_long_is_stopped_and_the_next_goes_on(small, monkeypatch):
    real = run.measure

    def measure(op, sample, *rest, **more):
        rows = real(op, sample, *rest, **more)
        yield next(rows)
        if sample.name == "first":
            ring()
        yield from rows

    monkeypatch.setattr(run, "measure", measure)
    rows, left_out = _run(small, only=["none"])
    assert left_out == [f"layer_norm, first, bfloat16: stopped after {run.CASE['cpu']:.0f} s"]
    assert len([row for row in rows if row.shape == "first"]) == 1
    assert {row.direction for row in rows if row.shape == "second"} == set(run.DIRECTIONS)


def test_a_rival_that_hangs_is_stopped_and_the_others_are_timed(small, monkeypatch):
    rivals = {"hangs": ring, "right": lambda: F.layer_norm}
    monkeypatch.setattr(cases.importlib.import_module("fastllm.bench.layer_norm"), "rivals", rivals)
    monkeypatch.setattr(run, "RIVAL_SHARE", 0.01)
    rows, left_out = _run(small, shape=["first"], only=list(rivals))
    assert not left_out
    (problem,) = {row.problem for row in rows if row.provider == "hangs"}
    assert re.fullmatch(r"stopped after [5-9]\d s", problem)  # its share of what is left
    assert {row.provider for row in rows if row.samples} == {run.OURS, run.EAGER, "right"}


def test_time_limits_nest():
    def both():
        with time_limit(3600):
            with pytest.raises(OutOfTime, match="after 0 s"), time_limit(0.01):
                time.sleep(60)
            assert 60 < left() < 3600
            with time_limit(60):
                assert 0 < left() <= 60
            assert 60 < left() < 3600
            reached.append("inner")
            ring()

    def left():
        return signal.getitimer(signal.ITIMER_REAL)[0]

    reached, before = [], signal.getsignal(signal.SIGALRM)
    with pytest.raises(OutOfTime, match="after 3600 s"):
        both()
    assert reached == ["inner"]
    assert (left(), signal.getsignal(signal.SIGALRM)) == (0, before)
    # Of a budget that is spent nothing is left.
    with pytest.raises(OutOfTime, match="after 0 s"), time_limit(-3):
        time.sleep(60)


def test_a_limit_that_passes_at_the_very_end_leaves_the_outer_one_in_force(monkeypatch):
    real, rung = signal.setitimer, []

    def setitimer(which, seconds):
        if seconds == 0 and not rung:
            rung.append(1)
            signal.getsignal(signal.SIGALRM)()
        return real(which, seconds)

    before = signal.getsignal(signal.SIGALRM)
    with time_limit(3600):
        outer = signal.getsignal(signal.SIGALRM)
        with monkeypatch.context() as patch:
            patch.setattr(signal, "setitimer", setitimer)
            with pytest.raises(OutOfTime, match="after 900 s"), time_limit(900):
                pass
        assert signal.getsignal(signal.SIGALRM) is outer
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] < 3600
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_calls_floor_takes_the_matrix_rate_of_its_precision():
    rates = {"copy": 1.0, "matrix": 8.0, "matrix float32": 8.0, "matrix bfloat16": 2.0}
    cost = Cost(1, 1, 16, 16)
    found = {dtype: run._floor(cost, rates, dtype) for dtype in ("float32", "bfloat16", "float16")}
    assert found == {"float32": 4.0, "bfloat16": 16.0, "float16": 4.0}


def test_ops_whose_cost_depends_on_values_are_timed():
    found = run.run(
        run.plan([OPS["embedding"]], ["one token"]), CPU, run.Request(["bfloat16"], 2, BUDGET, ["none"]),
        environment={"rates": {"copy": 1e10, "matrix": 1e11}}, tell=lambda line: None,
    )  # fmt: skip
    assert not found.left_out
    assert {row.provider for row in found.rows if row.samples} == {run.OURS, run.EAGER}


def test_first_calls_are_timed_each_way(small):
    rows, _ = _run(small, shape=["first"], only=["none"])
    first = {row.direction: row.first_call for row in rows if row.provider == run.OURS}
    assert first["both"] == first["forward"] + first["backward"]
    assert min(first.values()) > 0


def test_one_that_overwrites_its_arguments_spoils_nothing(small, monkeypatch):
    def scribbles(x, shape, weight, bias):
        y = F.layer_norm(x * 1, shape, weight, bias)
        x.data.zero_()
        return y

    rival = cases.Overwriting(scribbles)

    monkeypatch.setattr(cases.importlib.import_module("fastllm.bench.layer_norm"), "rivals", {"it": lambda: rival})
    rows, _ = _run(small, shape=["first"], only=["it"])
    assert not [row.problem for row in rows if row.problem]
    sample = cases.shapes_of("layer_norm")["first"](CPU, torch.float32)
    before = sample.args[0].detach().clone()
    assert parity.Judge(small, small.reference, sample, torch.float32).problem(rival) is None
    assert torch.equal(sample.args[0], before)


def test_the_host_is_timed_without_the_wait(monkeypatch):
    waits = []
    monkeypatch.setattr("fastllm.bench.timing.synchronize", waits.append)
    calls = []
    found = host_seconds(Workload("it", lambda: len(calls), calls.append), CPU, samples=4)
    assert len(found) == 4
    assert all(seconds > 0 for seconds in found)
    assert len(calls) == 4 * 20
    assert len(waits) == 2 * 4  # around each sample, none within


def test_a_sample_on_a_cpu_repeats_what_is_short():
    calls = []
    call = Workload("it", lambda: None, calls.append)
    timer = Timer(CPU, cold=False)
    timer.calibrate(call, CPU)
    assert timer.repeats > 10
    calls.clear()
    assert timer(call, CPU) > 0
    assert len(calls) == timer.repeats


def test_attention_is_judged_by_one_head_at_a_time():
    op = OPS["attention"]
    calls = [s for s in op.samples(CPU, torch.float64) if not s.kwargs.get("return_lse")]
    assert len(calls) > 3
    for sample in calls:
        wide = parity.widened(sample, torch.float64)
        whole, parts = (parity.results(f, wide) for f in (op.reference, cases.reference_of(op)))
        for a, b in zip(whole, parts, strict=True):
            if a is None or b is None:
                assert a is b is None
            else:
                torch.testing.assert_close(a, b, equal_nan=True)
