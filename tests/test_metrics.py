"""Metrics against accuracy matrices worked out by hand, on one row per task and on every other kind of schedule."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nan

from clstream import metrics

approx = pytest.approx
SQUARE = torch.tensor([[0.8, 0.1, 0.2], [0.9, 0.5, 0.3], [0.65, 0.7, 0.6]], dtype=torch.float64)
BASELINE = torch.tensor([0.1, 0.05, 0.2])
JOINT = torch.tensor([0.9, 0.8, 0.85])

METRICS = {
    "average_accuracy": metrics.average_accuracy,
    "average_incremental_accuracy": metrics.average_incremental_accuracy,
    "anytime_average_accuracy": metrics.anytime_average_accuracy,
    "forgetting": metrics.forgetting,
    "forgetting_first_minus_last": metrics.forgetting_first_minus_last,
    "forgetting_max_minus_last": metrics.forgetting_max_minus_last,
    "backward_transfer": metrics.backward_transfer,
    "forward_transfer": lambda accuracy, taught=None: metrics.forward_transfer(accuracy, BASELINE, taught),
    "learning_accuracy": metrics.learning_accuracy,
    "intransigence": lambda accuracy, taught=None: metrics.intransigence(accuracy, JOINT, taught),
    "min_accuracy": metrics.min_accuracy,
    "worst_case_accuracy": metrics.worst_case_accuracy,
}


def taught(*tasks: int | tuple[int, ...], of: int) -> Tensor:
    """Return (rows, of) bool: which task, or tasks, each row taught."""
    marks = torch.zeros(len(tasks), of, dtype=torch.bool)
    for row, task in enumerate(tasks):
        marks[row, torch.tensor(task, dtype=torch.int64)] = True
    return marks


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# One row after each task -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("average_accuracy", 0.65),  # (.65 + .7 + .6) / 3
        ("average_incremental_accuracy", 2.15 / 3),  # .8; (.9 + .5) / 2 = .7; .65
        ("anytime_average_accuracy", 2.15 / 3),
        ("forgetting", 0.025),  # max(.8, .9) - .65 = .25; max(.1, .5) - .7 = -.2
        ("forgetting_first_minus_last", -0.025),  # .8 - .65 = .15; .5 - .7 = -.2
        ("forgetting_max_minus_last", 0.125),  # .9 - .65 = .25; .7 - .7 = 0
        ("backward_transfer", 0.025),  # .65 - .8; .7 - .5
        ("forward_transfer", 0.075),  # .1 - .05 = .05 before task 1; .3 - .2 = .1 before task 2
        ("learning_accuracy", 1.9 / 3),  # .8, .5, .6
        ("intransigence", 0.65 / 3),  # .9 - .8 = .1; .8 - .5 = .3; .85 - .6 = .25
        ("min_accuracy", 0.675),  # min(.9, .65) = .65; .7
        ("worst_case_accuracy", 0.65),  # 1/3 * .6 + 2/3 * .675
    ],
)
def test_square(name, expected):
    assert METRICS[name](SQUARE) == approx(expected)
    assert METRICS[name](SQUARE, torch.eye(3, dtype=torch.bool)) == approx(expected)  # taught spelled out
    assert METRICS[name](SQUARE.float()) == approx(expected)


def test_square_by_row_and_task():
    assert metrics.seen_averages(SQUARE).tolist() == approx([0.8, 0.7, 0.65])
    assert metrics.seen_averages(SQUARE.float()).dtype == torch.float64
    assert metrics.forgetting_max_earlier_minus_last(SQUARE).tolist() == approx([0.25, -0.2, nan], nan_ok=True)


def test_forgetting_is_negative_where_the_end_is_best():
    rising = matrix([0.5, 0.0], [0.8, 0.9])
    assert metrics.forgetting(rising) == approx(-0.3)  # .5 - .8
    assert metrics.forgetting_max_minus_last(rising) == 0  # .8 - .8


# Other schedules ---------------------------------------------------------------------------------------------------------


def test_many_sessions_for_each_task():
    rows = matrix([0.4, 0.0], [0.9, 0.1], [0.3, 0.5], [0.5, 0.8])
    marks = taught(0, 0, 1, 1, of=2)
    assert metrics.seen_averages(rows, marks).tolist() == approx([0.4, 0.9, 0.4, 0.65])
    assert metrics.average_accuracy(rows, marks) == approx(0.65)
    assert metrics.average_incremental_accuracy(rows, marks) == approx(2.35 / 4)
    assert metrics.forgetting(rows, marks) == approx(0.4)  # max(.4, .9, .3) - .5
    assert metrics.backward_transfer(rows, marks) == approx(-0.4)  # just taught is row 1: .5 - .9
    assert metrics.learning_accuracy(rows, marks) == approx(0.85)  # .9 and .8
    assert metrics.forward_transfer(rows, matrix([0.1, 0.3])[0], marks) == approx(-0.2)  # the row before task 1 is row 1: .1 - .3
    assert metrics.intransigence(rows, matrix([0.95, 0.9])[0], marks) == approx(0.075)  # .95 - .9 = .05; .9 - .8 = .1
    assert metrics.min_accuracy(rows, marks) == approx(0.3)  # min(.3, .5), rows 0 and 1 are not after task 0
    assert metrics.worst_case_accuracy(rows, marks) == approx(0.55)  # .8 / 2 + .3 / 2


def test_a_task_that_comes_back_at_the_end_is_not_forgotten():
    rows = matrix([0.9, 0.1], [0.5, 0.8], [0.7, 0.6])
    marks = taught(0, 1, 0, of=2)
    assert metrics.forgetting_max_earlier_minus_last(rows, marks).tolist() == approx([nan, 0.2], nan_ok=True)
    assert metrics.forgetting(rows, marks) == approx(0.2)  # task 1: max(.1, .8) - .6
    assert metrics.backward_transfer(rows, marks) == approx(-0.2)  # .6 - .8
    assert metrics.learning_accuracy(rows, marks) == approx(0.75)  # after the last sessions: .7 and .8
    assert metrics.forward_transfer(rows, matrix([0.0, 0.05])[0], marks) == approx(0.05)  # task 1: .1 - .05
    assert metrics.worst_case_accuracy(rows, marks) == approx(0.65)  # .7 / 2 + .6 / 2


def test_a_task_that_comes_back_is_just_taught_after_its_last_session():
    rows = matrix([0.9, 0.2], [0.5, 0.8], [0.7, 0.6], [0.6, 0.75])
    marks = taught(0, 1, 0, 1, of=2)
    assert metrics.backward_transfer(rows, marks) == approx(-0.1)  # .6 - .7
    assert metrics.forgetting(rows, marks) == approx(0.3)  # max(.9, .5, .7) - .6
    assert metrics.min_accuracy(rows, marks) == approx(0.6)  # .5 was before it came back
    assert metrics.forward_transfer(rows, torch.zeros(2), marks) == approx(0.2)  # task 1 is first taught in row 1


def test_a_run_cut_short_leaves_out_what_it_never_taught():
    rows = matrix([0.8, 0.1, 0.2], [0.5, 0.7, 0.3])
    marks = taught(0, 1, of=3)
    assert metrics.average_accuracy(rows, marks) == approx(0.6)  # (.5 + .7) / 2
    assert metrics.average_incremental_accuracy(rows, marks) == approx(0.7)  # .8, .6
    assert metrics.forgetting_max_earlier_minus_last(rows, marks).tolist() == approx([0.3, nan, nan], nan_ok=True)
    assert metrics.forgetting(rows, marks) == approx(0.3)
    assert metrics.learning_accuracy(rows, marks) == approx(0.75)
    assert metrics.forward_transfer(rows, BASELINE, marks) == approx(0.05)  # .1 - .05
    assert metrics.intransigence(rows, JOINT, marks) == approx(0.1)  # .9 - .8, .8 - .7
    assert metrics.worst_case_accuracy(rows, marks) == approx(0.6)  # .7 / 2 + .5 / 2


def test_probes_within_sessions():
    rows = matrix([0.3, 0.0], [0.6, 0.1], [0.9, 0.2], [0.2, 0.4], [0.5, 0.7], [0.6, 0.8])
    marks = taught(0, 0, 0, 1, 1, 1, of=2)
    assert metrics.anytime_average_accuracy(rows, marks) == approx(3.4 / 6)  # .3, .6, .9, .3, .6, .7
    assert metrics.min_accuracy(rows, marks) == approx(0.2)  # the gap right after the switch
    assert metrics.worst_case_accuracy(rows, marks) == approx(0.5)  # .8 / 2 + .2 / 2
    assert metrics.forgetting(rows, marks) == approx(0.3)  # .9 - .6


def test_rows_before_anything_was_taught():
    rows = matrix([0.4, 0.6], [0.8, 0.6], [0.5, 0.9])
    marks = taught((), 0, 1, of=2)
    assert metrics.seen_averages(rows, marks).tolist() == approx([nan, 0.8, 0.7], nan_ok=True)
    assert metrics.anytime_average_accuracy(rows, marks) == approx(0.75)  # rows 1 and 2 alone
    assert math.isnan(metrics.average_incremental_accuracy(rows, marks))
    assert metrics.forward_transfer(rows, torch.zeros(2), marks) == approx(0.5)  # .4 before task 0, .6 before task 1


def test_a_last_row_that_taught_nothing_has_no_current_task():
    rows = matrix([0.9, 0.1], [0.6, 0.8], [0.5, 0.7])
    marks = taught(0, 1, (), of=2)
    assert metrics.forgetting(rows, marks) == approx(0.25)  # .9 - .5, .8 - .7
    assert metrics.min_accuracy(rows, marks) == metrics.worst_case_accuracy(rows, marks) == approx(0.6)  # min(.6, .5), .7


def test_a_session_that_mixes_tasks():
    rows = matrix([0.9, 0.5, 0.1], [0.6, 0.7, 0.8])
    marks = taught((0, 1), (1, 2), of=3)
    assert metrics.forgetting(rows, marks) == approx(0.3)  # task 0 alone: .9 - .6
    assert metrics.worst_case_accuracy(rows, marks) == approx(0.7)  # 2/3 * (.7 + .8) / 2 + 1/3 * .6
    assert metrics.learning_accuracy(rows, marks) == approx(0.8)  # .9, .7, .8


# What is not defined -----------------------------------------------------------------------------------------------------


def test_one_task_has_no_forgetting_and_no_transfer():
    single = matrix([0.7])
    for name in ("forgetting", "forgetting_first_minus_last", "forgetting_max_minus_last", "backward_transfer", "min_accuracy"):
        assert math.isnan(METRICS[name](single))
    assert math.isnan(metrics.forward_transfer(single, torch.zeros(1)))
    for name in ("average_accuracy", "average_incremental_accuracy", "learning_accuracy", "worst_case_accuracy"):
        assert METRICS[name](single) == approx(0.7)


@pytest.mark.parametrize("name", METRICS)
def test_nothing_taught_has_no_metrics(name):
    assert math.isnan(METRICS[name](SQUARE, torch.zeros(3, 3, dtype=torch.bool)))


LOWER = {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}
FIRST_TWO_TASKS = LOWER - {(2, 2)}  # NaN above the diagonal: not seen, and not asked about
ENDS = {(0, 0), (2, 0), (1, 1), (2, 1)}
DIAGONAL = {(0, 0), (1, 1), (2, 2)}
USED = {
    "average_accuracy": {(2, 0), (2, 1), (2, 2)},
    "average_incremental_accuracy": LOWER,
    "anytime_average_accuracy": LOWER,
    "forgetting": FIRST_TWO_TASKS,
    "forgetting_first_minus_last": ENDS,
    "forgetting_max_minus_last": FIRST_TWO_TASKS,
    "backward_transfer": ENDS,
    "forward_transfer": set(),
    "learning_accuracy": DIAGONAL,
    "intransigence": DIAGONAL,
    "min_accuracy": {(1, 0), (2, 0), (2, 1)},
    "worst_case_accuracy": {(1, 0), (2, 0), (2, 1), (2, 2)},
}


def test_tasks_that_were_not_asked_about_before_they_were_seen_are_left_out():
    asked = SQUARE.masked_fill(~torch.ones(3, 3).tril().bool(), nan)
    assert metrics.seen_averages(asked).tolist() == metrics.seen_averages(SQUARE).tolist()
    for name in set(METRICS) - {"forward_transfer"}:  # in SQUARE no task is best before it is seen
        assert METRICS[name](asked) == METRICS[name](SQUARE), name
    rows = torch.tensor([[0.5, 0.9], [0.7, 0.4], [0.2, 0.1]])
    marks = taught(0, 1, 0, of=2)
    assert metrics.forgetting(rows, marks) == approx(0.8)  # of task 1, which was best before it was seen
    rows[0, 1] = nan
    assert metrics.forgetting(rows, marks) == metrics.forgetting_max_minus_last(rows, marks) == approx(0.3)
    assert math.isnan(metrics.forward_transfer(rows, torch.tensor([0.1, nan]), marks))  # it is not asked about: not defined
    partly = torch.tensor([[0.5, nan, 0.3], [0.5, 0.5, nan], [0.5, 0.5, 0.5]])
    assert math.isnan(metrics.forward_transfer(partly, torch.zeros(3)))
    partly[1, 2] = 0.4
    assert metrics.forward_transfer(partly, torch.tensor([nan, nan, 0.1])) == approx(0.3)  # of task 2 alone
    rows[1, 1] = nan
    assert math.isnan(metrics.forgetting(rows, marks))  # it was seen there: what it was answered is not known


@pytest.mark.parametrize("name", METRICS)
def test_nan_in_a_used_cell_and_only_there_makes_the_metric_nan(name):
    for row in range(3):
        for task in range(3):
            holed = SQUARE.clone()
            holed[row, task] = nan
            assert math.isnan(METRICS[name](holed)) == ((row, task) in USED[name]), (row, task)


def test_nan_of_baseline_and_joint():
    assert metrics.forward_transfer(SQUARE, torch.tensor([nan, 0.05, 0.2])) == approx(0.075)  # task 0 doesn't count
    assert math.isnan(metrics.forward_transfer(SQUARE, torch.tensor([0.1, 0.05, nan])))
    assert math.isnan(metrics.intransigence(SQUARE, torch.tensor([nan, 0.8, 0.85])))
    cut = torch.tensor([[0.8, 0.1]])
    assert metrics.intransigence(cut, torch.tensor([0.9, nan]), taught(0, of=2)) == approx(0.1)  # task 1 was never taught


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("accuracy", "marks", "message"),
    [
        (torch.zeros(3), None, "matrix"),
        (torch.zeros(1, 2, 2), None, "matrix"),
        (torch.zeros(0, 3), None, "matrix"),
        (torch.zeros(4, 3), None, "4 evaluations of 3 tasks"),
        (torch.zeros(3, 3), torch.zeros(3, 2, dtype=torch.bool), r"\(3, 3\), not \(3, 2\)"),
    ],
)
def test_bad_shapes(name, accuracy, marks, message):
    with pytest.raises(ValueError, match=message):
        METRICS[name](accuracy, marks)


@pytest.mark.parametrize("size", [2, 4])
def test_bad_baseline_and_joint(size):
    with pytest.raises(ValueError, match=r"baseline .* 3 tasks"):
        metrics.forward_transfer(SQUARE, torch.zeros(size))
    with pytest.raises(ValueError, match=r"joint .* 3 tasks"):
        metrics.intransigence(SQUARE, torch.zeros(size))


# Properties --------------------------------------------------------------------------------------------------------------


@st.composite
def runs(draw):
    """Draw an accuracy matrix, and which tasks each row taught."""
    rows, tasks = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    values = st.lists(st.floats(0, 1), min_size=rows * tasks, max_size=rows * tasks)
    marks = st.lists(st.booleans(), min_size=rows * tasks, max_size=rows * tasks)
    return torch.tensor(draw(values), dtype=torch.float64).view(rows, tasks), torch.tensor(draw(marks)).view(rows, tasks)


@given(runs())
def test_forgetting_definitions_are_ordered(run):
    highest, usual = metrics.forgetting_max_minus_last(*run), metrics.forgetting(*run)
    assert math.isnan(highest) == math.isnan(usual)
    if not math.isnan(highest):
        assert highest >= 0
        assert highest >= usual - 1e-12
        clipped = metrics.forgetting_max_earlier_minus_last(*run).clamp(min=0)
        assert highest == approx(float(clipped.nanmean()))  # task by task, they differ only where the end is best


@given(runs())
def test_backward_transfer_is_minus_the_first_definition_and_bounds_the_others(run):
    backward = metrics.backward_transfer(*run)
    assert backward == approx(-metrics.forgetting_first_minus_last(*run), nan_ok=True)
    if not math.isnan(backward):
        assert metrics.forgetting(*run) >= -backward - 1e-12  # the best earlier row is no worse than the one just taught


@pytest.mark.slow
@given(runs(), st.randoms())
def test_the_numbering_of_tasks_does_not_matter(run, random):
    accuracy, marks = run
    order = list(range(accuracy.shape[1]))
    random.shuffle(order)
    for name in METRICS.keys() - {"forward_transfer", "intransigence"}:
        assert METRICS[name](accuracy[:, order], marks[:, order]) == approx(METRICS[name](accuracy, marks), nan_ok=True)


def test_forgetting_of_rehearsal_free_studies():
    R = torch.tensor([[80, 0, 0], [60, 70, 0], [50, 55, 65]], dtype=torch.float64)
    assert metrics.forgetting_first_minus_later(R) == pytest.approx(12.5, abs=1e-9)
    assert metrics.forgetting_step_to_step(R) == pytest.approx(16.25, abs=1e-9)
    A = torch.tensor([[80, 0, 0], [75, 90, 0], [72, 88, 91]], dtype=torch.float64)
    assert metrics.forgetting_first_minus_last(A) == pytest.approx(5.0, abs=1e-9)
    assert math.isnan(metrics.forgetting_first_minus_later(R[:1, :1])) and math.isnan(metrics.forgetting_step_to_step(R[:1, :1]))


def test_where_less_is_better_a_rise_is_forgetting() -> None:
    errors = torch.tensor([[1.0, 9.0, 9.0], [4.0, 2.0, 9.0], [2.0, 3.0, 1.0]], dtype=torch.float64)
    accuracies, upper = -errors, torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64)
    less = {"higher_is_better": False}
    assert metrics.forgetting(errors, **less) == pytest.approx((1 + 1) / 2)  # 2 - 1 of task 0, 3 - 2 of task 1
    assert metrics.backward_transfer(errors, **less) == -1 and metrics.min_accuracy(errors, **less) == pytest.approx((4 + 3) / 2)
    assert metrics.worst_case_accuracy(errors, **less) == pytest.approx(1 / 3 + 2 / 3 * 3.5)
    for metric in (
        metrics.forgetting, metrics.forgetting_first_minus_last, metrics.forgetting_max_minus_last,
        metrics.forgetting_first_minus_later, metrics.forgetting_step_to_step, metrics.backward_transfer,
    ):  # fmt: skip
        assert metric(errors, **less) == metric(accuracies)
    assert metrics.forward_transfer(errors, upper, **less) == metrics.forward_transfer(accuracies, -upper)
    assert metrics.intransigence(errors, upper, **less) == metrics.intransigence(accuracies, -upper) == pytest.approx(1.5 / 3)
    assert metrics.average_accuracy(errors) == 2.0


def test_base_novel_and_their_harmonic_mean() -> None:
    matrix = torch.tensor([[0.9, 0.0, 0.0, 0.0], [0.8, 0.5, 0.0, 0.0], [0.6, 0.2, 0.4, 0.0]], dtype=torch.float64)
    taught = torch.eye(4, dtype=torch.bool)[:3]
    assert metrics.base(matrix, taught) == 0.6 and metrics.novel(matrix, taught) == pytest.approx(0.3)  # task 3 was not seen
    assert metrics.harmonic(matrix, taught) == pytest.approx(2 * 0.6 * 0.3 / 0.9)
    assert metrics.base(matrix, taught, tasks=2) == pytest.approx(0.4) and metrics.novel(matrix, taught, tasks=2) == 0.4
    assert math.isnan(metrics.novel(matrix[:1], taught[:1])) and math.isnan(metrics.harmonic(matrix[:1], taught[:1]))
    assert metrics.harmonic(torch.tensor([[0.5, 0.0], [0.5, 0.0]])) == 0
    for tasks in (0, 5, True, 1.0):
        with pytest.raises(ValueError, match="tasks must be how many of the 4 tasks are the base, from 1 up"):
            metrics.base(matrix, taught, tasks=tasks)
