"""Figures of what streams deliver and runs measure, by matplotlib (without its global state), and small ones for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clstream.metrics import seen_averages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BARS = " ▁▂▃▄▅▆▇█"


def forgetting_curves(accuracy: Tensor, taught: Tensor | None = None, title: str = "") -> Figure:
    """Draw each task's accuracy over the sessions, from the first that taught it on, and the mean over the tasks seen.

    `accuracy` and `taught` are (evaluations, tasks), as in `clstream.metrics`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, tasks = accuracy.shape
    steps = range(1, rows + 1)
    first = _first(accuracy, taught)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for task in range(tasks):
        if first[task] < rows:
            shown = slice(int(first[task]), rows)
            label = f"task {task}" if tasks <= 20 else None
            axes.plot(steps[shown], accuracy[shown, task].numpy(), marker="o", markersize=3, linewidth=1.2, label=label)
    axes.plot(steps, seen_averages(accuracy, taught).numpy(), color="black", linewidth=2.5, label="mean of the tasks seen")
    axes.set(xlabel="sessions finished", ylabel="accuracy", ylim=(-0.02, 1.02), title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def accuracy_matrix(accuracy: Tensor, title: str = "") -> Figure:
    """Draw the accuracy on each task after each session as a picture of the matrix."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, tasks = accuracy.shape
    figure = Figure(figsize=(max(4.0, 0.55 * min(tasks, 30) + 2), max(3.0, 0.4 * min(rows, 30) + 1.5)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(accuracy.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    if rows * tasks <= 400:
        for row in range(rows):
            for task in range(tasks):
                value = float(accuracy[row, task])
                axes.text(
                    task, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="black" if value > 0.6 else "white"
                )
    axes.set(xlabel="task", ylabel="after session", title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, label="accuracy")
    return figure


def sparklines(accuracy: Tensor, taught: Tensor | None = None, width: int = 60) -> list[str]:
    """Return a line of text for each task: a bar for its accuracy after each session from the first that taught it on.

    More sessions than `width` are shown by every so many of them. Each line ends in the accuracy when just taught and the last.
    """
    rows, tasks = accuracy.shape
    first = _first(accuracy, taught)
    shown = torch.linspace(0, rows - 1, min(rows, width)).round().long().tolist()
    lines = []
    for task in range(tasks):
        start = int(first[task])
        if start >= rows:
            continue
        bars = "".join(" " if row < start else BARS[1 + round(float(accuracy[row, task]) * 7)] for row in shown)
        lines.append(f"task {task:<3}{bars}  {float(accuracy[start, task]):.2f} -> {float(accuracy[-1, task]):.2f}")
    return lines


def composition_figure(counts: Tensor, sessions: Tensor, names: Sequence[int], by: str, title: str = "") -> Figure:
    """Draw how many samples of each class or task come in each session, one above the other.

    Args:
        counts: (shown, names), for the sessions that are shown.
        sessions: (shown,), their numbers.
        names: the numbers of the classes or tasks.
        by: what they are: "class" or "task".
        title: of the figure.

    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    edges = [*sessions.tolist(), int(sessions[-1]) + 1]
    tops = torch.cat([counts.new_zeros(len(counts), 1), counts.cumsum(1)], 1)
    heights = torch.cat([tops, tops[-1:]]).numpy()  # a step ends where the next one begins
    for place, name in enumerate(names):
        colour = colormaps["tab20"](place) if len(names) <= 20 else colormaps["viridis"](place / (len(names) - 1))
        label = f"{by} {name}" if len(names) <= 20 else None
        axes.fill_between(edges, heights[:, place], heights[:, place + 1], step="post", color=colour, linewidth=0, label=label)
    axes.set(xlabel="session", ylabel="samples", xlim=(edges[0], edges[-1]), ylim=(0, None), title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(names) <= 20:
        figure.legend(loc="outside right upper", frameon=False, reverse=True, ncols=1 + len(names) // 11)
    return figure


def composition_lines(counts: Tensor, names: Sequence[int], by: str, width: int = 60) -> list[str]:
    """Return a line of text for each class or task: a bar for its samples in each session, the highest for the most of any.

    More sessions than `width` are shown by every so many of them. Each line ends in the samples of all sessions in `counts`.
    """
    shown = torch.linspace(0, len(counts) - 1, min(len(counts), width)).round().long()
    most = max(1, int(counts.max()))
    heights = (counts[shown] > 0) + (counts[shown] * (len(BARS) - 2) / most).round().long()  # what comes at all has a bar
    return [
        f"{by} {name:<4}{''.join(BARS[height] for height in heights[:, place].tolist())}  {int(counts[:, place].sum()):,}"
        for place, name in enumerate(names)
    ]


def _first(accuracy: Tensor, taught: Tensor | None) -> Tensor:
    """Return for each task the first row that taught it; the number of rows if none did."""
    if taught is None:
        return torch.arange(accuracy.shape[1])
    return torch.where(taught.any(0), taught.int().argmax(0), len(accuracy))
