"""A result as a table: printed, in a file, as a frame, in a notebook."""

from __future__ import annotations

import warnings
from pathlib import Path

import pandas
import pytest
import torch
from clstream.strategies import Finetune, Refresh, Replay

from clstream import metrics, run
from clstream.checkpoint import Checkpointer, newest
from clstream.checks import example_model, example_stream
from clstream.results import Evaluation, Result


@pytest.fixture(scope="module")
def result() -> Result:
    return run(Finetune(example_model()), example_stream(epochs=2), seed=3)


def test_it_prints_as_a_small_table(result: Result) -> None:
    head, names, *rows = str(result).splitlines()
    numbers = f"accuracy {result.average_accuracy:.3f}, forgetting {result.forgetting:.3f}, {result.seconds:.1f} s"
    assert head == f"Finetune on example, seed 3: {numbers}"
    assert names.split() == ["sessions", "task_0", "task_1", "task_2", "mean"]
    assert [row.split()[1:4].count("-") for row in rows] == [2, 1, 0]  # tasks not taught yet
    last = [*result.main[-1].tolist(), result.average_accuracy]
    assert rows[-1].split() == ["3", *(f"{value:.3f}" for value in last)]
    assert repr(result) == str(result) and len({len(row) for row in (names, *rows)}) == 1


def test_a_large_one_is_abridged(result: Result) -> None:
    main = torch.rand(50, 40, dtype=torch.float64)
    start = Evaluation(
        (*(f"task_{task:02d}" for task in range(40)), "seen"), ("label",) * 40, "class", {"accuracy": torch.zeros(41)}
    )
    for session, row in enumerate(main):
        start = start.after({"accuracy": torch.cat([row, row[:1]])}, session % 40, session + 1, False, session + 1)
    large = Result(**{name: getattr(start, name) for name in ("test_sets", "targets", "scenario", "start", "rows")})
    lines = str(large).splitlines()
    assert len(lines) == 14 and max(map(len, lines)) < 132 and "task_39" in lines[1] and "task_20" not in lines[1]


def test_frame_and_file_have_all_numbers(result: Result, tmp_path: Path) -> None:
    frame = result.to_frame()
    assert torch.equal(torch.tensor(frame[["task_0", "task_1", "task_2"]].to_numpy()), result.main)
    assert frame["mean"].tolist() == metrics.seen_averages(result.main, result.taught).tolist()
    result.to_csv(tmp_path / "result.csv")
    pandas.testing.assert_frame_equal(
        pandas.read_csv(tmp_path / "result.csv", index_col="sessions_finished"), frame, check_exact=True
    )


def test_a_notebook_shows_a_table(result: Result) -> None:
    text = result._repr_html_()
    assert "<table" in text and "forgetting" in text and text.count("<td>") == 3 * 4


def test_a_strategy_that_was_run_is_not_run_again_without_a_word() -> None:
    strategy, stream = Replay(example_model()), example_stream()
    run(strategy, stream)
    with pytest.warns(
        UserWarning, match="this Replay was run before, and goes on from the weights and memories that it has: build"
    ):
        run(strategy, stream)
    with pytest.warns(UserWarning, match="this Replay was run before"):  # what a wrapper wraps, too
        run(Refresh(strategy), stream)


def test_a_fresh_strategy_and_one_that_is_resumed_are_run_without_a_word(tmp_path: Path) -> None:
    run(Replay(example_model()), example_stream(), Checkpointer(tmp_path, every_batches=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            run(Replay(example_model()), example_stream(), resume=newest(tmp_path))


def test_an_evaluation_goes_to_plain_values_and_back(result: Result) -> None:
    values = result.to_dict()
    again = Evaluation.from_dict(values)
    assert torch.equal(again.accuracy, result.accuracy) and again.probe_steps == result.probe_steps
    assert values.keys() == again.to_dict().keys()


@pytest.mark.parametrize(
    "odd",
    [
        {"scenario": 3}, {"more": 1}, {"batches": []}, {"measured": {"accuracy": torch.zeros(3, 2)}}, {"targets": ["label"]},
        {"start": {"accuracy": torch.zeros(())}}, {"taught": [[True]]}, {"test_sets": []}, {"sessions": [1, 2, True]},
        {"taught_since": torch.zeros(2)}, {"within_session": [0, 0, 0]}, {"targets": ["label", "label", "odd"]},
    ],
)  # fmt: skip
def test_values_that_are_none_of_an_evaluation_are_refused(result: Result, odd: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="can't be the values of an Evaluation"):
        Evaluation.from_dict({**result.to_dict(), **odd})
