"""Regression in domains: ranges of a feature, and a synthetic function whose best possible r2 is known."""

from __future__ import annotations

import pytest
import torch
from clstream.streams import split_regression
from clstream.streams.split_regression import FEATURES, synthetic

from clstream.stream import Subset


def test_tasks_of_the_diabetes_data_are_ranges_of_a_feature() -> None:
    for feature, tasks in (("bp", 3), ("age", 5), ("sex", 2)):
        stream = split_regression(feature=feature, tasks=tasks)
        column = FEATURES.index(feature)
        highest = -float("inf")
        for task in stream.tasks:
            values = torch.cat([task.train.x[:, column], task.test.x[:, column]])
            assert values.min() > highest, "ranges don't overlap, and equal values are of one task"
            highest = float(values.max())
        assert sum(len(task.train) for task in stream.tasks) == 332 and sum(len(task.test) for task in stream.tasks) == 110
        assert stream.outputs == 1 and stream.scenario == "domain" and f"ranges of the feature {feature}" in str(stream)
    assert max(len(task.train) for task in split_regression().tasks) < 1.2 * 332 / 3


def test_inputs_and_targets_have_mean_0_and_deviation_1_over_all_training_rows() -> None:
    for stream in (split_regression(), split_regression("synthetic")):
        assert stream.data is not None
        train = stream.data.parts["train"]
        parts = (train.x, train.y) if stream.name.endswith("diabetes") else (train.y,)
        for rows in parts:
            assert rows.mean(0).abs().max() < 1e-5 and (rows.std(0, correction=0) - 1).abs().max() < 1e-5


def r2(predicted: torch.Tensor, y: torch.Tensor) -> float:
    return 1 - float((predicted - y).square().sum() / (y - y.mean()).square().sum())


@pytest.mark.parametrize("drift", ["inputs", "function", "both"])
def test_inputs_drift_or_the_function_as_it_says(drift: str) -> None:
    """The nearest training row of all tasks tells the value where they share the function, and only one of the task where not."""
    drawn = synthetic(3, drift, 3000, 300, 2, 0.0, 0)
    means = torch.stack([drawn.train.x[drawn.group == number].mean(0) for number in range(3)])
    assert float((means[2] - means[0]).norm()) == pytest.approx(0 if drift == "function" else 6, abs=0.2)
    far = torch.cdist(drawn.test.x, drawn.train.x)
    same_task = drawn.group == drawn.test_group[:, None]
    assert r2(drawn.train.y[far.masked_fill(~same_task, 99).argmin(1)], drawn.test.y) > 0.95
    assert (r2(drawn.train.y[far.argmin(1)], drawn.test.y) > 0.95) == (drift == "inputs")
    assert drawn.best == [1.0, 1.0, 1.0]


def test_noise_is_as_large_as_it_says_and_the_card_has_the_best_r2() -> None:
    exact, noisy = synthetic(3, "both", 3000, 3000, 4, 0.0, 0), synthetic(3, "both", 3000, 3000, 4, 0.3, 0)
    with_mean = torch.cat([exact.train.y, torch.ones(3000, 1)], 1).double()
    fit = torch.linalg.lstsq(with_mean, noisy.train.y.double()).solution
    assert r2(with_mean @ fit, noisy.train.y) == pytest.approx(1 / 1.09, abs=0.01)
    for number in range(3):
        own = noisy.test_group == number
        known = exact.test.y[own] * fit[0] + fit[1]
        assert r2(known, noisy.test.y[own]) == pytest.approx(noisy.best[number], abs=0.01)
    shown = ", ".join(f"{value:.3f}" for value in synthetic(3, "both", 1500, 600, 8, 0.2, 0).best)
    assert f"best possible r2 of each task on its test rows: {shown}" in str(split_regression("synthetic", drift="both"))


def test_it_is_a_pure_function_of_its_options() -> None:
    first = split_regression("synthetic", seed=3)
    assert first.fingerprint == split_regression("synthetic", seed=3).fingerprint != split_regression("synthetic").fingerprint
    assert isinstance(first.tasks[0].train, Subset) and first.tasks[0].train.source.x is first.tasks[1].train.source.x  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "boston"}, "data must be one of diabetes, synthetic, not 'boston'"),
        ({"feature": "bloodpressure"}, "feature must be one of age, sex"),
        ({"feature": "sex"}, "the feature sex has 2 values, too few rows for 3 tasks"),
        ({"tasks": 400}, "too few rows for 400 tasks"),
        ({"data": "synthetic", "feature": "bp"}, "feature goes with the diabetes data, not with synthetic"),
        ({"data": "synthetic", "drift": "all"}, "drift must be one of inputs, function, both, not 'all'"),
        ({"data": "synthetic", "train": 5}, "too few for 3 tasks"),
        ({"data": "synthetic", "features": 1}, "features must be 2 or more"),
        ({"data": "synthetic", "noise": float("nan")}, "noise must be a finite number"),
        ({"tasks": [1, 2]}, "tasks must be a whole number"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_regression(**options)  # type: ignore[arg-type]
