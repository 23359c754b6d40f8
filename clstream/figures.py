"""Figures of what streams deliver and runs measure, by matplotlib (without its global state), and small ones for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clstream.measures.cost import pareto_front
from clstream.metrics import seen_averages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from clstream.stream import Stream

BARS = " ▁▂▃▄▅▆▇█"

SHARES = ("accuracy", "map")
"""Measures whose axes go from 0 to 1."""


COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#555555")
"""Colours that colour-blind people tell apart too: those of Okabe and Ito (2008), without yellow, which is too pale for paper."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")


def method_style(number: int) -> dict[str, Any]:
    """Return colour, marker and line of the method of a number, as keywords of matplotlib: no two of 56 share colour and marker."""
    line = LINES[number // len(COLOURS) % len(LINES)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "linestyle": line}


def task_colour(task: int, tasks: int) -> tuple[float, float, float, float]:
    """Return the colour of a task, from dark to light as tasks come; the palest yellow is left out, so that paper shows it."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.92 * task / max(1, tasks - 1))


def is_share(measure: str) -> bool:
    """Return whether values of a measure, or of several joined by a slash, go from 0 to 1."""
    return all(part.removeprefix("task_") in SHARES for part in measure.split("/"))


def forgetting_curves(
    accuracy: Tensor,
    taught: Tensor | None = None,
    title: str = "",
    begun: Tensor | None = None,
    sessions: Sequence[int] | None = None,
    measure: str = "accuracy",
) -> Figure:
    """Draw each task's accuracy over the sessions, from the first that taught it on, and the mean over the tasks seen.

    Of several seeds the means are drawn, in bands of a standard deviation to either side.

    Args:
        accuracy, taught: (evaluations, tasks), as in `clstream.metrics`, or (seeds, evaluations, tasks).
        title: of the figure.
        begun: like `taught`, bool: which tasks a session had any samples of; the curves start there. None: where it was taught.
        sessions: for each evaluation, the sessions finished by then. None: it came after each.
        measure: what is drawn, if that isn't the accuracy.

    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    by_seed, marks = _by_seed(accuracy, taught)
    tasks = by_seed.shape[2]
    starts = torch.stack([_first(*pair) for pair in zip(*_by_seed(accuracy, taught if begun is None else begun), strict=True)])
    figure = Figure(figsize=(4.8, 5.0), layout="constrained")
    axes = figure.subplots()
    for task, start in enumerate(starts.amax(0).tolist()):  # a mean needs all seeds
        colour = task_colour(task, tasks)
        label = f"task {task}" if tasks <= 10 else None
        draw_mean(axes, by_seed[:, :, task], start, sessions, color=colour, marker="o", markersize=3, linewidth=1.2, label=label)
    means = torch.stack([seen_averages(*pair) for pair in zip(by_seed, marks, strict=True)])
    draw_mean(axes, means, 0, sessions, color="black", linewidth=2.5, label="mean of the tasks seen")
    label_axes(axes, title, measure)
    if tasks > 10:
        colours = ListedColormap([task_colour(task, tasks) for task in range(tasks)])
        bar = figure.colorbar(ScalarMappable(Normalize(0, tasks - 1), colours), ax=axes, label="task")
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", frameon=False, ncols=3)
    return figure


def compared_curves(
    runs: Mapping[str, tuple[Tensor, Tensor | None]],
    title: str = "",
    sessions: Mapping[str, Sequence[int]] | None = None,
    measure: str = "accuracy",
) -> Figure:
    """Draw runs against each other: the mean accuracy of the tasks seen, and below it single tasks, from when they were taught on.

    Args:
        runs: by name, accuracy and `taught`, as in `forgetting_curves`.
        title: of the figure.
        sessions: by name, as in `forgetting_curves`.
        measure: what is drawn, if that isn't the accuracy.

    """
    from matplotlib.figure import Figure

    curves = {name: _by_seed(*pair) for name, pair in runs.items()}
    tasks = min(by_seed.shape[2] for by_seed, _ in curves.values())
    shown = sorted({round(task) for task in torch.linspace(0, tasks - 2, min(4, tasks - 1)).tolist()})
    figure = Figure(figsize=(4.8, 5.0), layout="constrained")
    names = [["mean"] * max(1, len(shown))] * 2 + ([shown] if shown else [])
    panels = figure.subplot_mosaic(names)
    for number, (name, (by_seed, marks)) in enumerate(curves.items()):
        style = method_style(number)
        means = torch.stack([seen_averages(*pair) for pair in zip(by_seed, marks, strict=True)])
        steps = None if sessions is None else sessions[name]
        draw_mean(panels["mean"], means, 0, steps, linewidth=2, markersize=4, label=name, **style)
        starts = torch.stack([_first(*pair) for pair in zip(by_seed, marks, strict=True)]).amax(0)
        for task in shown:
            draw_mean(panels[task], by_seed[:, :, task], int(starts[task]), steps, linewidth=1.2, markersize=3, **style)
    label_axes(panels["mean"], title or "mean of the tasks seen", measure)
    for task in shown:
        label_axes(panels[task], f"task {task}", measure)
        panels[task].set(xlabel="", ylabel="", xlim=panels["mean"].get_xlim())
        panels[task].title.set_fontsize(9)
        panels[task].tick_params(labelsize=7, labelleft=task == shown[0])
    figure.legend(loc="outside lower center", frameon=False, ncols=2 if max(map(len, curves)) > 16 else 3)
    return figure


def accuracy_against_cost(
    runs: Mapping[str, tuple[Tensor, Tensor]], title: str = "", cost: str = "training FLOPs", measure: str = "accuracy"
) -> Figure:
    """Draw what accuracy runs reached against what they cost, with the Pareto front: the runs that no other one beats in both.

    Of several seeds the means are drawn, with a standard deviation to each side.

    Args:
        runs: by name, accuracies and costs of the seeds: two of (seeds,).
        title: of the figure.
        cost: what costs are counted in.
        measure: what was reached, if that isn't accuracy.

    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 4.2), layout="constrained")
    axes = figure.subplots()
    accuracies, costs = (torch.stack([pair[part].double().mean() for pair in runs.values()]) for part in (0, 1))
    front = pareto_front(costs, accuracies)
    axes.step(costs[front].numpy(), accuracies[front].numpy(), where="post", color="grey", linewidth=1, label="Pareto front")
    for number, (name, (values, spent)) in enumerate(runs.items()):
        style = method_style(number) | {"linestyle": "none"}
        high, wide = (float(part.double().std()) if len(part) > 1 else 0.0 for part in (values, spent))
        axes.errorbar(float(costs[number]), float(accuracies[number]), high or None, wide or None, label=name, **style)
    axes.set(xlabel=cost, ylabel=f"average {measure}", ylim=(-0.02, 1.02) if is_share(measure) else None, title=title)
    axes.title.set_fontsize(10)
    positive = costs[costs > 0]
    if len(positive) and float(positive.amax()) > 10 * float(positive.amin()) and len(positive) == len(costs):
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", frameon=False, ncols=2 if max(map(len, runs)) > 16 else 3)
    return figure


def _by_seed(accuracy: Tensor, taught: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return accuracy and `taught` as (seeds, evaluations, tasks)."""
    taught = torch.eye(*accuracy.shape[-2:], dtype=torch.bool).expand(accuracy.shape) if taught is None else taught
    return (accuracy[None], taught[None]) if accuracy.dim() == 2 else (accuracy, taught)


def draw_mean(
    axes: Axes, values: Tensor, start: int, sessions: Sequence[int] | None, deviations: float = 1.0, **style: Any
) -> None:
    """Draw the mean of (seeds, evaluations) from a row on, in a band of so many standard deviations to either side."""
    steps = list(range(1, 1 + values.shape[1]) if sessions is None else sessions)[start:]
    values = values[:, start:]
    if not values.shape[1]:
        return
    mean = values.mean(0)
    axes.plot(steps, mean.numpy(), **style)
    if len(values) > 1:
        half = deviations * values.std(0)
        axes.fill_between(steps, (mean - half).numpy(), (mean + half).numpy(), color=style["color"], alpha=0.2, linewidth=0)


def label_axes(axes: Axes, title: str, measure: str) -> None:
    """Name the axes of curves over sessions; shares go from 0 to 1."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="sessions finished", ylabel=measure, ylim=(-0.02, 1.02) if is_share(measure) else None, title=title)
    axes.title.set_fontsize(10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def accuracy_matrix(accuracy: Tensor, title: str = "", sessions: Sequence[int] | None = None, measure: str = "accuracy") -> Figure:
    """Draw the accuracy on each task at each evaluation as a picture of the matrix; where there is none, it is blank.

    `sessions` is for each evaluation how many were finished; None: it came after each.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, tasks = accuracy.shape
    figure = Figure(figsize=(max(4.0, 0.55 * min(tasks, 30) + 2), max(3.0, 0.4 * min(rows, 30) + 1.5)), layout="constrained")
    axes = figure.subplots()
    low, high = (0.0, 1.0) if is_share(measure) else (None, None)
    image = axes.imshow(accuracy.numpy(), vmin=low, vmax=high, cmap="viridis", aspect="auto")
    if rows * tasks <= 400:
        for row in range(rows):
            for task in range(tasks):
                value = float(accuracy[row, task])
                if math.isnan(value):
                    continue
                axes.text(
                    task, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="black" if value > 0.6 else "white"
                )
    axes.set(xlabel="task", ylabel="after session", title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    if sessions is not None and list(sessions) != list(range(1, rows + 1)):
        axes.yaxis.set_major_formatter(lambda row, _: str(sessions[int(row)] - 1) if 0 <= row < rows else "")
    figure.colorbar(image, label=measure)
    return figure


def confusion_matrix(counts: Tensor, names: Sequence[str], title: str = "") -> Figure:
    """Draw a confusion matrix: for each right label, in a row, the share of its samples that were given each answer.

    Args:
        counts: (labels, labels), int64: rows are the right ones, columns the answers.
        names: of the labels.
        title: of the figure.

    """
    from matplotlib.figure import Figure

    labels = len(names)
    side = min(0.42 * labels, 9.0) + 2.2
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="equal")
    if labels <= 12:
        for row, column in counts.nonzero().tolist():
            colour = "black" if float(shares[row, column]) > 0.6 else "white"
            text = f"{int(counts[row, column])}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    step = -(-labels // 30)
    places = list(range(0, labels, step))
    shown = [str(names[place])[:20].replace("$", r"\$") for place in places]
    turned = any(len(name) > 3 for name in shown)
    axes.set_xticks(places, shown, rotation=90 if turned else 0, fontsize=8)
    axes.set_yticks(places, shown, fontsize=8)
    axes.set(xlabel="answer", ylabel="right label", title=title)
    axes.title.set_fontsize(10)
    figure.colorbar(image, label="share of the right label's samples")
    return figure


def sparklines(accuracy: Tensor, taught: Tensor | None = None, width: int = 60) -> list[str]:
    """Return a line of text for each task: a bar for its accuracy after each session from the first that taught it on.

    More sessions than `width` are shown by every so many of them. Each line ends in the accuracy when just taught and the last.
    Bars go from 0 to 1 or, where values of another measure are outside, as far as these do; "?" stands for one that is not defined.
    """
    rows, tasks = accuracy.shape
    finite = accuracy[accuracy.isfinite()].tolist()
    low, high = min([0.0, *finite]), max([1.0, *finite])
    first = _first(accuracy, taught)
    shown = torch.linspace(0, rows - 1, min(rows, width)).round().long().tolist()
    lines = []
    for task in range(tasks):
        start = int(first[task])
        if start >= rows:
            continue
        values = [float(accuracy[row, task]) for row in shown]
        heights = [BARS[1 + round((value - low) / (high - low) * 7)] if math.isfinite(value) else "?" for value in values]
        bars = "".join(" " if row < start else height for row, height in zip(shown, heights, strict=True))
        lines.append(f"task {task:<3}{bars}  {float(accuracy[start, task]):.2f} -> {float(accuracy[-1, task]):.2f}")
    return lines


def composition_figure(counts: Tensor, sessions: Tensor, names: Sequence[int | str], by: str, title: str = "") -> Figure:
    """Draw how many samples of each class or task come in each session, one above the other.

    Args:
        counts: (shown, names), for the sessions that are shown.
        sessions: (shown,), their numbers.
        names: what the classes or tasks are called.
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


def composition_lines(counts: Tensor, names: Sequence[int | str], by: str, width: int = 60) -> list[str]:
    """Return a line of text for each class or task: a bar for its samples in each session, the highest for the most of any.

    More sessions than `width` are shown by every so many of them. Each line ends in the samples of all sessions in `counts`.
    """
    shown = torch.linspace(0, len(counts) - 1, min(len(counts), width)).round().long()
    most = max(1, int(counts.max()))
    wide = max([4, *(1 + len(str(name)) for name in names)])
    heights = (counts[shown] > 0) + (counts[shown] * (len(BARS) - 2) / most).round().long()  # what comes at all has a bar
    return [
        f"{by} {name:<{wide}}{''.join(BARS[height] for height in heights[:, place].tolist())}  {int(counts[:, place].sum()):,}"
        for place, name in enumerate(names)
    ]


def _first(accuracy: Tensor, taught: Tensor | None) -> Tensor:
    """Return for each task the first row that taught it; the number of rows if none did."""
    if taught is None:
        return torch.arange(accuracy.shape[1])
    return torch.where(taught.any(0), taught.int().argmax(0), len(accuracy))


MOST = 240
"""Sessions that are looked at; of more, every so many of them."""


@dataclass(frozen=True, eq=False)
class Composition:
    """How many samples of each class or task the sessions of a stream deliver.

    Args:
        by: "class" or "task".
        names: what the classes or tasks are called: their numbers, or the stream's names of its classes.
        sessions: (shown,), int64: the numbers of the sessions that were looked at.
        counts: (shown, names), int64.

    """

    by: str
    names: tuple[int | str, ...]
    sessions: Tensor
    counts: Tensor


def composition(stream: Stream, by: str | None = None, most: int = MOST) -> Composition:
    """Return what a stream delivers, by "class" or by "task"; None: by task if the tasks share their classes, else by class.

    Of multi-label targets the positives of each class are counted, so a sample counts for each of its classes; values have none.
    Raises ValueError for classes of a stream that has values.
    """
    by = by or ("task" if stream.scenario == "domain" or "value" in stream.targets else "class")
    if by == "class" and "value" in stream.targets:
        raise ValueError(f"{stream.name} has values for targets, and values have no classes: what it delivers is counted by task")
    if by not in ("class", "task"):
        raise ValueError(f"by must be class or task, not {by!r}")
    sessions = torch.linspace(0, len(stream) - 1, min(len(stream), most), dtype=torch.float64).round().long()
    if by == "task":
        counts = torch.stack([stream.mix(number) for number in sessions.tolist()])
        return Composition(by, tuple(range(len(stream.tasks))), sessions, counts)
    labels = sorted({label for task in stream.tasks for label in task.classes})
    names: list[int | str] = [stream.class_name(label) if stream.class_names else label for label in labels]
    per_session = [_counted(stream.labels(number), stream.classes) for number in sessions.tolist()]
    return Composition(by, tuple(names), sessions, torch.stack(per_session)[:, labels])


def _counted(y: Tensor, classes: int) -> Tensor:
    """Return the number of samples of each class, from labels or multi-label targets."""
    return y.bincount(minlength=classes) if y.dim() == 1 else y.sum(0).long()[:classes]


def episodes_figure(accuracy: Tensor, by_set: Tensor, chance: float, nearest: Tensor | None = None, title: str = "") -> Figure:
    """Draw how episodes ended: a histogram of their accuracies, and the mean accuracy by support set, in the order of these.

    Args:
        accuracy: (episodes,), over all targets of each episode.
        by_set: (episodes, sets), over the targets of each support set.
        chance: the accuracy of a guess.
        nearest: (episodes,), of the nearest neighbour among raw inputs.
        title: of the figure.

    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(accuracy.tolist(), bins=20, range=(0, 1), color=COLOURS[4])
    left.axvline(float(accuracy.mean()), color=COLOURS[0], label=f"mean {float(accuracy.mean()):.3f}")
    if nearest is not None:
        left.axvline(float(nearest.mean()), color=COLOURS[1], linestyle="--", label=f"1-NN {float(nearest.mean()):.3f}")
    left.axvline(chance, color=COLOURS[6], linestyle=":", label=f"chance {chance:.3f}")
    left.set(xlabel="accuracy of an episode", ylabel="episodes", xlim=(0, 1))
    left.legend(frameon=False)
    sets = range(1, by_set.shape[1] + 1)
    error = by_set.std(0) / max(1, len(by_set)) ** 0.5 if len(by_set) > 1 else torch.zeros(by_set.shape[1])
    right.errorbar(sets, by_set.mean(0).tolist(), 1.96 * error, color=COLOURS[0], marker="o", markersize=3, capsize=2)
    right.axhline(chance, color=COLOURS[6], linestyle=":")
    right.set(xlabel="support set, as they came", ylabel="accuracy on its targets", ylim=(0, 1.02))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    if title:
        figure.suptitle(title)
    return figure
