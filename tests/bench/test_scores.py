"""Intervals of medians, speed-ups and fast_p."""

import random
import statistics

import pytest
from json_schema import BENCH, problems

from fastllm.bench.results import EAGER, NOT_INSTALLED, OURS, Row, Run
from fastllm.bench.scores import derived, document, fast_p, interval


def test_a_medians_interval_holds_it_as_often_as_it_says():
    """Over draws from a skewed distribution whose median is known; and no more often than the next narrower would."""
    draw = random.Random(0)
    for n in (6, 9, 15, 40):
        held = 0
        for _ in range(2000):
            low, high = interval([draw.expovariate(1.0) for _ in range(n)])
            held += low <= 0.6931471805599453 <= high
        assert 0.94 < held / 2000 < 0.985, n


def test_the_ranks_are_those_of_the_tables():
    """The widest interval for 6 samples; ranks 4 and 12 of 15, 40 and 61 of 100; none below 6."""
    assert interval(range(5)) is None
    ranks = {n: interval(range(1, n + 1)) for n in (6, 15, 100)}
    assert ranks == {6: (1, 6), 15: (4, 12), 100: (40, 61)}
    assert interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (1.0, 6.0)


def _row(provider, *samples, shape="a", direction="both", **more):
    return Row("op", shape, "float32", direction, provider, None, list(samples), first_call=0.0, **more)


def test_speed_ups_are_of_the_same_round():
    rows = [_row(EAGER, 2.0, 20.0, 4.0), _row(OURS, 1.0, 10.0, 1.0), _row("other", 1.0, 1.0)]
    found = derived(rows)
    assert found[id(rows[1])]["speedup"] == {"median": 2.0, "interval": None}
    assert found[id(rows[1])]["median"] == statistics.median([1.0, 10.0, 1.0])
    assert found[id(rows[2])]["speedup"] is None  # other rounds than eager's


def test_fast_p_counts_what_is_wrong_and_not_what_is_missing():
    rows = [
        _row(EAGER, 3.0), _row(OURS, 1.0), _row("twice", 1.5),
        _row(EAGER, 3.0, direction="forward"), _row(OURS, 9.0, direction="forward"),
        _row(EAGER, 1.0, shape="b", direction="forward"), _row(OURS, 1.0, shape="b", direction="forward"),
        Row("op", "b", "float32", "forward", "twice", "result 0: error"),
        Row("op", "b", "float32", "forward", "absent", f"{NOT_INSTALLED} (absent)"),
        Row("op", "c", "float32", "both", EAGER, "failed"), _row(OURS, 1.0, shape="c"),
    ]  # fmt: skip
    found = fast_p(rows)
    assert found == {
        OURS: {"calls": 2, "right": 2, "fast_p": {"1": 0.5, "1.2": 0.5, "1.5": 0.5, "2": 0.5}},
        "twice": {"calls": 2, "right": 1, "fast_p": {"1": 0.5, "1.2": 0.5, "1.5": 0.5, "2": 0.0}},
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda run: run.pop("scores"), "$: scores is missing"),
        (lambda run: run["rows"][0].update(extra=1), "$.rows[0]: extra is not in the schema"),
        (lambda run: run["rows"][0].update(direction="sideways"), "$.rows[0].direction: 'sideways' is none of"),
        (lambda run: run["rows"][0]["samples"].append("1"), "$.rows[0].samples[1]: '1' is not of type number"),
        (lambda run: run["rows"][0].update(interval=[1.0]), "$.rows[0].interval: 1 items"),
        (
            lambda run: run["scores"][OURS]["fast_p"].update({"2": 1.5}),
            "$.scores.fastllm.fast_p.2: 1.5 is out of range",
        ),
    ],
)
def test_the_schema_refuses_what_it_does_not_describe(change, problem):
    where = dict.fromkeys(("date", "fastllm", "python", "system", "device"), "") | {"commit": None, "packages": {}}
    run = document(Run(where | {"rates": {"copy": 1.0, "matrix": 1.0}}, [_row(EAGER, 2.0), _row(OURS, 1.0)]))
    assert not problems(run, BENCH)
    change(run)
    (found,) = problems(run, BENCH)
    assert found.startswith(problem)
