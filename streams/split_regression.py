"""Regression in domains: the rows of a table by ranges of a feature, or points of a known function that drift."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from clstream.streams.options import check_options
from clstream.streams.targets import domains
from torch import Tensor

from clstream.params import check_choice, check_integer, check_number
from clstream.seeds import derive
from clstream.stream import DataSource, Samples, Stream

FEATURES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
"""Of the diabetes data: age, sex, body mass index, blood pressure, and six measurements of blood serum."""

DRIFTS = ("inputs", "function", "both")

MOST_NUMBERS = 1 << 25
"""Numbers that are drawn at most."""


def split_regression(
    data: str = "diabetes",
    tasks: int = 3,
    feature: str | None = None,
    drift: str = "inputs",
    train: int = 1500,
    test: int = 600,
    features: int = 8,
    noise: float = 0.2,
    epochs: int = 10,
    batch_size: int = 10,
    sessions_per_task: int = 1,
    validation: float = 0.0,
    seed: int = 0,
    boundaries: bool = True,
    drop_last: bool = False,
) -> Stream:
    """A real number to predict, in domains: scikit-learn's diabetes, or a synthetic function.

    "diabetes" is 442 patients of ten features each, and how far the disease went within a year. Every fourth row is for the test. A
    task is a range of one feature, with as many training rows as the others, so the inputs shift from task to task. Within a range
    there is less to explain, so r2, which compares with the mean of the task's own rows, is lower than over all rows.

    "synthetic" draws x around a centre of each task, with deviation 1 in each feature, and y = tanh(a x) tanh(b x) + noise,
    for unit vectors a and b. With drift "inputs" the centres lie along a line, from -3 to 3, and the function stays; with
    "function" the centres are 0, and b turns by 90 degrees from the first task to the last, so no single function fits all tasks;
    "both" does both. The card has the r2 of the function without noise, which is the best possible where the task is known.

    Inputs (diabetes) and targets have mean 0 and standard deviation 1 over the training rows of all tasks: a change of units alone,
    that leaves r2 as it is.

    Args:
        data: "diabetes" or "synthetic".
        tasks: how many domains.
        feature: of the diabetes data: "age", "sex" (two tasks), "bmi", "bp", "s1" to "s6". None: "bp".
        drift: of the synthetic data: "inputs", "function" or "both".
        train, test: rows of the synthetic data, over all tasks.
        features: of the synthetic data.
        noise: its standard deviation, as a share of that of the synthetic function.
        epochs, batch_size, sessions_per_task, validation, boundaries, drop_last: see `from_tensors`.
        seed: of the synthetic data, and of what validation holds back.

    """
    check_options({name: value for name, value in locals().items() if name not in ("data", "feature")})
    check_choice(("diabetes", "synthetic"), data=data)
    _check_synthetic(tasks, drift, train, test, features, noise, seed)
    if data == "diabetes":
        feature = "bp" if feature is None else feature
        check_choice(FEATURES, feature=feature)
        part, tested = diabetes()
        column, test_column = (of.x[:, FEATURES.index(feature)].contiguous() for of in (part, tested))
        groups, test_groups = _ranges(column, test_column, tasks, feature)
        note = f"tasks are ranges of the feature {feature}, from low to high"
        source = DataSource({"train": part, "test": tested}, "split_regression", {"data": data})
    else:
        if feature is not None:
            raise ValueError(f"split_regression: feature goes with the diabetes data, not with {data}")
        drawn = synthetic(tasks, drift, train, test, features, noise, seed)
        part, tested, groups, test_groups = drawn.train, drawn.test, drawn.group, drawn.test_group
        best = ", ".join(f"{value:.3f}" for value in drawn.best)
        drifts = "inputs and function" if drift == "both" else drift
        note = f"drift of {drifts}; best possible r2 of each task on its test rows: {best}"
        options: dict[str, int | float | str | None] = {
            "data": data, "tasks": int(tasks), "drift": drift, "train": int(train), "test": int(test), "features": int(features),
            "noise": float(noise), "seed": int(seed),
        }  # fmt: skip
        source = DataSource({"train": part, "test": tested}, "split_regression", options)
    name = f"split_regression_{data}"
    rows, test_rows = ([(of == number).nonzero().flatten() for number in range(tasks)] for of in (groups, test_groups))
    built = domains(name, part, tested, rows, test_rows, validation, seed)
    schedule = [number for number in range(tasks) for _ in range(sessions_per_task)]
    notes = (note, "targets have mean 0 and standard deviation 1 over the training rows of all tasks")
    return Stream(
        name, built, schedule, epochs, batch_size, "domain", seed, boundaries, notes=notes, data=source, drop_last=drop_last
    )


def diabetes() -> tuple[Samples, Samples]:
    """Return scikit-learn's diabetes, standardised: see `split_regression`."""
    from sklearn.datasets import load_diabetes

    rows, values = load_diabetes(return_X_y=True, scaled=False)
    x, y = torch.tensor(rows), torch.tensor(values)[:, None]
    tested = torch.arange(len(y)) % 4 == 3
    x, y = ((of - of[~tested].mean(0)) / of[~tested].std(0, correction=0) for of in (x, y))
    train, test = (Samples(x[own].float(), y[own].float(), target="value") for own in (~tested, tested))
    return train, test


def _ranges(values: Tensor, test_values: Tensor, tasks: int, feature: str) -> tuple[Tensor, Tensor]:
    """Return the task of each training and test row: ranges of a feature with as many training rows each, or its values."""
    distinct = values.unique()
    if len(distinct) == tasks:
        bounds = distinct[:-1]
    else:
        bounds = values.sort().values[[len(values) * number // tasks - 1 for number in range(1, tasks)]]
    groups, test_groups = torch.bucketize(values, bounds), torch.bucketize(test_values, bounds)
    if min(groups.bincount(minlength=tasks).min(), test_groups.bincount(minlength=tasks).min()) == 0:
        raise ValueError(f"split_regression: the feature {feature} has {len(distinct)} values, too few rows for {tasks} tasks")
    return groups, test_groups


@dataclass(frozen=True, eq=False)
class Drawn:
    """Synthetic rows, the task of each, and for each task the r2 of the function without noise on its test rows."""

    train: Samples
    test: Samples
    group: Tensor
    test_group: Tensor
    best: list[float]


def synthetic(tasks: int, drift: str, train: int, test: int, features: int, noise: float, seed: int) -> Drawn:
    """Return the synthetic rows: see `split_regression`. Raises ValueError for options that are not what they must be."""
    _check_synthetic(tasks, drift, train, test, features, noise, seed)
    if min(train, test) < 2 * tasks:
        raise ValueError(
            f"split_regression: {train} training and {test} test rows are too few for {tasks} tasks: two each are needed"
        )
    if features < 2 or features * (train + test) > MOST_NUMBERS:
        raise ValueError(f"split_regression: features must be 2 or more, and rows times features at most {MOST_NUMBERS:,}")
    draw = torch.Generator().manual_seed(derive(seed, "regression"))
    a, b, turned, line = torch.randn(4, features, generator=draw, dtype=torch.float64)
    turned = turned - b * (turned * b).sum() / b.square().sum()  # at a right angle to b
    a, b, turned, line = (vector / vector.square().sum().sqrt() for vector in (a, b, turned, line))

    def rows(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        group = torch.arange(count) * tasks // count
        moment = (group / max(1, tasks - 1)).double()[:, None]
        x = torch.randn(count, features, generator=draw, dtype=torch.float64)
        if drift != "function":
            x = x + (6 * moment - 3) * line
        angle = math.pi / 2 * (moment if drift != "inputs" else torch.zeros_like(moment))
        exact = (x * a).sum(1).tanh() * (x * (angle.cos() * b + angle.sin() * turned)).sum(1).tanh()
        return group, x, exact, torch.randn(count, generator=draw, dtype=torch.float64)

    drawn, drawn_test = rows(train), rows(test)
    spread = drawn[2].std(correction=0)
    y, y_test = (exact + noise * spread * error for _, _, exact, error in (drawn, drawn_test))
    mean, deviation = y.mean(), y.std(correction=0)
    parts = [
        Samples(x.float(), ((values - mean) / deviation).float()[:, None], target="value")
        for (_, x, _, _), values in ((drawn, y), (drawn_test, y_test))
    ]
    best = []
    for number in range(tasks):
        own = drawn_test[0] == number
        wrong = (y_test[own] - drawn_test[2][own]).square().sum()
        best.append(1 - float(wrong / (y_test[own] - y_test[own].mean()).square().sum()))
    return Drawn(parts[0], parts[1], drawn[0], drawn_test[0], best)


def _check_synthetic(tasks: int, drift: str, train: int, test: int, features: int, noise: float, seed: int) -> None:
    check_integer(1, tasks=tasks, train=train, test=test, features=features)
    check_integer(0, seed=seed)
    check_choice(DRIFTS, drift=drift)
    check_number(0, noise=noise)
