"""The pictures of curves: where they start, what their bands are, what is drawn against what."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from torch import Tensor

from clstream.figures import accuracy_against_cost, compared_curves, forgetting_curves

ONE = torch.tensor([[0.9, 0.0, 0.0], [0.5, 0.8, 0.1], [0.3, 0.4, 0.7]], dtype=torch.float64)
TWO = ONE - 0.1 * torch.tril(torch.ones(3, 3, dtype=torch.float64))


def drawn(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_a_curve_starts_where_its_task_was_taught() -> None:
    found = drawn(forgetting_curves(ONE).axes[0])
    assert found["task 0"] == ([1, 2, 3], [0.9, 0.5, 0.3]) and found["task 2"] == ([3], [0.7])
    assert found["mean of the tasks seen"][1] == pytest.approx([0.9, 0.65, 1.4 / 3])
    again = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.bool)
    found = drawn(forgetting_curves(ONE, again).axes[0])
    assert found["task 1"][0] == [1, 2, 3] and found["task 0"][0] == [2, 3] and "task 2" not in found
    begun = torch.ones(3, 3, dtype=torch.bool)
    assert drawn(forgetting_curves(ONE, again, begun=begun).axes[0])["task 2"] == ([1, 2, 3], [0.0, 0.1, 0.7])


def test_of_several_seeds_the_mean_is_drawn_in_a_band_of_a_standard_deviation() -> None:
    axes = forgetting_curves(torch.stack([ONE, TWO])).axes[0]
    assert drawn(axes)["task 0"][1] == pytest.approx([0.85, 0.45, 0.25])
    band = axes.collections[0].get_paths()[0].vertices
    half = float(torch.tensor([0.0, 0.1]).std())
    assert band[band[:, 0] == 1][:, 1] == pytest.approx(np.array([0.85 - half, 0.85 + half, 0.85 + half]), abs=1e-6) or set(
        np.round(band[band[:, 0] == 1][:, 1], 6)
    ) == {round(0.85 - half, 6), round(0.85 + half, 6)}


def test_a_seed_that_was_taught_later_starts_the_mean() -> None:
    marks = torch.eye(3, dtype=torch.bool)
    found = drawn(forgetting_curves(torch.stack([ONE, TWO]), torch.stack([marks, marks.roll(1, 0)])).axes[0])
    assert found["task 0"][0] == [2, 3] and found["task 2"][0] == [3]


@pytest.mark.parametrize("tasks", [10, 11, 60])
def test_colours_tell_tasks_apart(tasks: int) -> None:
    figure = forgetting_curves(torch.rand(tasks, tasks, dtype=torch.float64))
    colours = {str(line.get_color()) for line in figure.axes[0].lines}
    assert len(colours) == tasks + 1
    assert (len(figure.axes) == 2) == (tasks > 10)  # a scale in place of names


def test_runs_against_each_other_share_their_scales() -> None:
    def seeds(low: float) -> Tensor:
        return torch.stack([ONE - low, TWO - low])

    figure = compared_curves(
        {"one": (seeds(0.0), None), "two": (seeds(0.1), None), "short": (ONE[:2], torch.eye(3, dtype=torch.bool)[:2])}
    )
    mean, *tasks = figure.axes
    assert {name: len(points) for name, (points, _) in drawn(mean).items()} == {"one": 3, "two": 3, "short": 2}
    assert [axes.get_title() for axes in tasks] == ["task 0", "task 1"]  # the last one has a single point
    assert len({axes.get_xlim() for axes in figure.axes}) == 1 and {axes.get_ylim() for axes in figure.axes} == {(-0.02, 1.02)}
    compared_curves({"one": (torch.rand(1, 1, dtype=torch.float64), None), "two": (torch.rand(1, 1, dtype=torch.float64), None)})


def test_accuracy_against_cost_with_the_pareto_front() -> None:
    runs = {
        "a": (torch.tensor([0.5, 0.7]), torch.tensor([1e9, 1e9])),
        "b": (torch.tensor([0.5, 0.6]), torch.tensor([2e9, 3e9])),
        "c": (torch.tensor([0.9, 0.9]), torch.tensor([5e10, 5e10], dtype=torch.float64)),
    }
    axes = accuracy_against_cost(runs).axes[0]
    front = next(line for line in axes.lines if line.get_label() == "Pareto front")
    assert list(front.get_xdata()) == [1e9, 5e10] and list(front.get_ydata()) == pytest.approx([0.6, 0.9])  # b costs more than a
    assert axes.get_xscale() == "log"
    points = {container.get_label(): container[0].get_xydata()[0].tolist() for container in axes.containers}
    assert points == {"a": pytest.approx([1e9, 0.6]), "b": pytest.approx([2.5e9, 0.55]), "c": pytest.approx([5e10, 0.9])}
    alone = accuracy_against_cost({"a": (torch.tensor([0.5]), torch.tensor([0.0]))}).axes[0]
    assert alone.get_xscale() == "linear"
