"""A run's rows by case, and two runs side by side."""

from fastllm.bench import report, run
from fastllm.bench.results import Case, Row, in_cases
from fastllm.bench.timing import Quartiles


def _row(provider, *samples, direction="forward"):
    return Row("op", "shape", "bfloat16", direction, provider, None, list(samples), first_call=0.0)


def test_losses_are_seen_first():
    rows = [
        _row(run.OURS, 1.0, 1.0), _row(run.EAGER, 3.0, 3.0),
        _row(run.OURS, 2.0, 2.0, direction="backward"), _row(run.EAGER, 1.0, 1.0, direction="backward"),
    ]  # fmt: skip
    found = in_cases(rows)
    assert [(case.rows[0].direction, case.lead) for case in found] == [("backward", 0.5), ("forward", 3.0)]


def test_a_case_names_the_best_other():
    case = Case([_row(run.OURS, 2.0), _row(run.EAGER, 3.0), _row("rival", 1.0), _row("none")])
    assert case.best_rival.provider == "rival"
    assert case.lead == 0.5
    assert case.lead_over(case.of(run.EAGER)) == 1.5
    assert case.lead_over(case.of("none")) is None


def test_verdicts_need_quartiles_that_do_not_meet():
    assert report.verdict(Quartiles(2, 3, 4), Quartiles(0.5, 1, 1.9)) == "faster"
    assert report.verdict(Quartiles(2, 3, 4), Quartiles(4.1, 5, 6)) == "slower"
    assert report.verdict(Quartiles(2, 3, 4), Quartiles(1, 2, 2.5)) == "within the noise"
    before = [_row("a", 1.0, 1.0), _row("b", 2.0, 2.0), _row("gone", 1.0)]
    after = [_row("a", 3.0, 3.0), _row("b", 1.0, 1.0), _row("new", 1.0)]
    found = [((a or b).provider, words) for a, b, words in report.comparison(before, after)]
    assert found[:2] == [("a", "slower"), ("b", "faster")]
    assert sorted(found[2:]) == [("gone", "only in one"), ("new", "only in one")]
