"""Pictures of methods against each other, by matplotlib, for print: what they reached, how they forgot, and what it cost."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clstream.comparison.methods import COSTS, Method, Panel, half_width, panels_of, rank_methods
from clstream.comparison.records import Record
from clstream.comparison.statistics import Ranking, cliques
from clstream.figures import draw_mean, is_share, label_axes, method_style, task_colour
from clstream.measures.cost import pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

WIDTH = 6.9
"""Inches: two columns of a page."""

MOST_TASKS = 20
"""Tasks that have curves of their own."""

FORMATS = ("pdf", "png", "svg")


def draw(records: Sequence[Record], folder: str | Path, formats: Sequence[str] = ("pdf", "png")) -> list[Path]:
    """Draw all pictures of some runs into files of a folder, which is made, and return these files.

    Of each stream there are final_accuracy, mean_curves, forgetting_curves, matrices and cost, of several streams
    critical_difference too. Runs that failed are left out.

    Args:
        records: of the runs.
        folder: where the files go; those of an earlier call are replaced.
        formats: "pdf", "png", "svg".

    Raises:
        OSError: if the folder can't be written.
        ValueError: for a format that there is not, and if no run ended well.

    """
    import matplotlib

    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"there are no pictures in the format {unknown[0]!r}: choose among {', '.join(FORMATS)}")
    place, files = Path(folder), list[Path]()
    for name, figure in figures_of(records):
        place.mkdir(parents=True, exist_ok=True)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, so that it is the same in all formats
        for ending in formats:
            files.append(place / f"{name}.{ending}")
            undated = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[ending]
            with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "clstream"}):  # text in a PDF stays text
                figure.savefig(files[-1], dpi=200, metadata=undated)
    return files


def figures_of(records: Sequence[Record]) -> Iterator[tuple[str, Figure]]:
    """Yield each picture of some runs, and the name of its file."""
    panels = panels_of(records)
    for panel in panels:
        name = re.sub(r"[^\w.-]+", "_", f"{panel.stream}-{panel.scenario}-{panel.measure}")
        yield f"{name}-final_{panel.measure.replace('/', '_')}", final_values(panel)
        if any(method.curves for method in panel.methods):
            yield f"{name}-mean_curves", mean_curves(panel)
            yield f"{name}-forgetting_curves", forgetting_by_method(panel)
            yield f"{name}-matrices", matrices(panel)
        if any(math.isfinite(float(method.cost(cost).mean())) for method in panel.methods for cost in COSTS):
            yield f"{name}-cost", against_costs(panel)
    if (ranks := rank_methods(panels)) is not None:
        yield "critical_difference", critical_difference(*ranks, len(panels))


def final_values(panel: Panel) -> Figure:
    """Draw the mean of each method after the last session, with its 95 % interval and its seeds, the best one at the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.21 * len(panel.methods) + 1.0), layout="constrained")
    axes = figure.subplots()
    for height, number in enumerate(reversed(panel.best_first)):
        method, style = panel.methods[number], method_style(number) | {"linestyle": "none"}
        axes.plot(method.finals.numpy(), [height] * len(method.records), "|", color="#aaaaaa", markersize=7, zorder=1)
        axes.errorbar(method.mean, height, xerr=half_width(method.finals) or None, capsize=2.5, markersize=5, zorder=2, **style)
    axes.set_yticks(range(len(panel.methods)), [_text(panel.methods[number].label, 40) for number in reversed(panel.best_first)])
    axes.set(ylim=(-0.6, len(panel.methods) - 0.4), xlabel=f"average {panel.measure} after the last session")
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    _title(axes, f"{panel.title} ({_spread(panel)})", 60)
    return figure


def mean_curves(panel: Panel) -> Figure:
    """Draw the mean over the tasks seen of each method against the sessions, in bands of 95 % intervals."""
    from matplotlib.figure import Figure

    drawn = [number for number in panel.best_first if panel.methods[number].curves]
    lines = sum(1 + _text(panel.methods[number].label, 34).count("\n") for number in drawn)
    columns = 1 + (lines - 1) // 40
    figure = Figure(figsize=(WIDTH, max(3.4, 0.17 * -(-lines // columns) + 0.6)), layout="constrained")
    axes = figure.subplots()
    for number in drawn:
        method, label = panel.methods[number], _text(panel.methods[number].label, 34)
        style = method_style(number) | {"linewidth": 1.5, "markersize": 4, "label": label}
        draw_mean(axes, method.seen_averages, 0, method.sessions, _deviations(len(method.curves)), **style)
    label_axes(axes, panel.title, f"average {panel.measure} on the tasks seen")
    axes.set_ylim(*_limits(panel.measure))
    axes.set_xlabel(f"sessions finished ({_spread(panel)})")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, ncols=columns)
    return figure


def forgetting_by_method(panel: Panel) -> Figure:
    """Draw for each method, in a panel of its own, each task from when it was taught on, and the mean over the tasks seen."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    drawn = [panel.methods[number] for number in panel.best_first if panel.methods[number].curves]
    figure, grid = _grid(drawn, 1.45, "sessions finished", panel.measure)
    tasks = max(method.matrices.shape[2] for method in drawn)
    for axes, method in zip(grid, drawn, strict=False):
        deviations = _deviations(len(method.curves))
        for task in method.tasks_shown(MOST_TASKS):
            style = {"color": task_colour(task, tasks), "linewidth": 1.1, "marker": "o", "markersize": 2}
            label = f"task {task}" if tasks <= 10 else None
            draw_mean(axes, method.matrices[:, :, task], method.starts[task], method.sessions, deviations, label=label, **style)
        averages = method.seen_averages
        draw_mean(axes, averages, 0, method.sessions, deviations, color="black", linewidth=2, label="mean of the tasks seen")
        axes.set_ylim(*_limits(panel.measure))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(alpha=0.3)
    figure.suptitle(_text(f"{panel.title} ({_spread(panel)})", 90), fontsize=10)
    if tasks > 10:
        colours = ListedColormap([task_colour(task, tasks) for task in range(tasks)])
        bar = figure.colorbar(ScalarMappable(Normalize(0, tasks - 1), colours), ax=grid, location="bottom", aspect=50)
        _label_bar(bar, "task", MaxNLocator(10, integer=True))
    else:
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=6 if len(grid) > 2 else 3, fontsize=8)
    return figure


def matrices(panel: Panel) -> Figure:
    """Draw the matrix of each method, the mean over its seeds, side by side: tasks against sessions; blank: not asked."""
    drawn = [panel.methods[number] for number in panel.best_first if panel.methods[number].curves]
    figure, grid = _grid(drawn, 1.5, "task", "sessions finished")
    means = [method.matrices.mean(0) for method in drawn]
    finite = torch.cat([mean[mean.isfinite()] for mean in means])
    low, high = (0.0, 1.0) if is_share(panel.measure) else (float(finite.amin()), float(finite.amax()))
    for axes, method, mean in zip(grid, drawn, means, strict=False):
        image = axes.imshow(mean.numpy(), vmin=low, vmax=high, cmap="viridis", aspect="auto")
        if mean.shape[1] <= 6 and len(mean) <= 12:
            for row, task in mean.isfinite().nonzero().tolist():
                value = float(mean[row, task])
                colour = "black" if value - low > 0.6 * (high - low) else "white"
                axes.text(task, row, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=6, color=colour)
        rows = range(0, len(mean), -(-len(mean) // 6))
        axes.set_yticks(rows, [str(method.sessions[row]) for row in rows])
        axes.set_xticks(range(0, mean.shape[1], -(-mean.shape[1] // 6)))
    figure.suptitle(_text(f"{panel.title} (mean of {panel.seeds})", 90), fontsize=10)
    _label_bar(figure.colorbar(image, ax=grid, location="bottom", aspect=50), panel.measure)
    return figure


def against_costs(panel: Panel) -> Figure:
    """Draw what each method reached against memory, FLOPs and seconds, with 95 % intervals and the Pareto fronts."""
    from matplotlib.figure import Figure

    longest = min(30, max(len(method.label) for method in panel.methods))
    columns = max(1, int(WIDTH * 72 / (longest * 4.2 + 32)))
    rows = -(-(1 + len(panel.methods)) // columns)
    figure = Figure(figsize=(WIDTH, 2.7 + 0.165 * rows), layout="constrained")
    for axes, cost in zip(figure.subplots(1, len(COSTS), sharey=True), COSTS, strict=True):
        priced = [number for number, method in enumerate(panel.methods) if math.isfinite(float(method.cost(cost).mean()))]
        costs = torch.tensor([float(panel.methods[number].cost(cost).mean()) for number in priced], dtype=torch.float64)
        reached = torch.tensor([panel.methods[number].mean for number in priced], dtype=torch.float64)
        front = pareto_front(costs, reached)
        step = {"color": "#aaaaaa", "linewidth": 1.2, "zorder": 1}
        axes.step(costs[front].numpy(), reached[front].numpy(), where="post", label="Pareto front", **step)
        for number in (number for number in panel.best_first if number in priced):
            method, style = panel.methods[number], method_style(number) | {"linestyle": "none", "markersize": 5, "elinewidth": 1}
            spent = method.cost(cost)
            high, wide = half_width(method.finals) or None, half_width(spent) or None
            label = _text(method.label, 30)
            axes.errorbar(float(spent.mean()), method.mean, high, wide, label=label, zorder=2, **style)
        _scale(axes, costs)
        axes.set_xlabel(cost, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"average {panel.measure}", fontsize=9)
    figure.suptitle(_text(f"{panel.title} ({_spread(panel)})", 90), fontsize=10)
    names: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            names.setdefault(label, handle)
    figure.legend(list(names.values()), list(names), loc="outside lower center", frameon=False, ncols=columns, fontsize=8)
    return figure


def critical_difference(labels: Sequence[str], ranks: Ranking, streams: int) -> Figure:
    """Draw the average ranks of methods over streams; a bar joins those that aren't shown to differ (Demsar 2006, figure 1).

    Args:
        labels: of the methods.
        ranks: of the methods, over the streams.
        streams: how many there are.

    """
    from matplotlib.figure import Figure

    order = sorted(range(len(labels)), key=lambda number: ranks.average[number])
    middle = -(-len(order) // 2)
    groups = cliques(ranks.average, ranks.critical_difference)
    top, deepest = 0.5 + 0.3 * len(groups), 0.0
    low, high = 1.0, float(max(len(labels), 2))
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for side, numbers, edge in (("right", order[:middle], low), ("left", order[middle:][::-1], high)):
        depth, outside = top, edge + 0.015 * (edge - (low + high) / 2)
        for number in numbers:
            lines = _text(labels[number], 34)
            depth += 0.35 * (1 + lines.count("\n"))
            rank = ranks.average[number]
            axes.plot([rank, rank, edge], [0, -depth, -depth], color="black", linewidth=0.8, clip_on=False)
            axes.text(outside, -depth, f"{lines} ({rank:.2f})", ha=side, va="center", fontsize=8)
            depth += 0.35 * (1 + lines.count("\n"))
        deepest = max(deepest, depth)
    for place, group in enumerate(groups):
        ends = [min(ranks.average[number] for number in group) - 0.04, max(ranks.average[number] for number in group) + 0.04]
        axes.plot(ends, [-0.45 - 0.3 * place] * 2, color=method_style(0)["color"], linewidth=3.5, solid_capstyle="butt")
    axes.plot([low, low + ranks.critical_difference], [1.6, 1.6], "|-", color="black", linewidth=1.2, clip_on=False)
    axes.text(low, 2.0, f"critical difference {ranks.critical_difference:.2f}", fontsize=8, va="bottom")
    step = max(1, len(labels) // 12)
    for tick in range(1, len(labels) + 1, step):
        axes.plot([tick, tick], [0, 0.25], color="black", linewidth=0.8)
        axes.text(tick, 0.45, str(tick), ha="center", va="bottom", fontsize=8)
    axes.plot([low, high], [0, 0], color="black", linewidth=1.2)
    axes.set(xlim=(low, high), ylim=(-deepest, 2.6))
    axes.set_axis_off()
    _title(axes, f"average ranks over {streams} streams, 1 is the best", 60)
    figure.set_size_inches(WIDTH, 0.22 * (deepest + 2.6) + 0.5)
    return figure


def _scale(axes: Axes, costs: Tensor) -> None:
    """Make the axis of costs logarithmic if they differ by more than a decade; with 0 in its place if one is 0."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, SymmetricalLogLocator

    positive = costs[costs > 0]
    least, most = (float(positive.amin()), float(positive.amax())) if len(positive) else (0.0, 0.0)
    if most <= 10 * least:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    elif len(positive) == len(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 100 * least else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        threshold = 10 ** math.floor(math.log10(least))
        axes.set_xscale("symlog", linthresh=threshold, linscale=0.5)
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=threshold))
        axes.set_xlim(left=-0.4 * threshold)
    if most >= 1000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _grid(methods: Sequence[Method], height: float, xlabel: str, ylabel: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel for each method, up to four beside each other, and these, titled; they share their axes."""
    from matplotlib.figure import Figure

    columns = min(4, len(methods))
    rows = -(-len(methods) // columns)
    figure = Figure(figsize=(max(4.0, WIDTH * columns / 4), height * rows + 1.2), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    for place, axes in enumerate(panels):
        axes.set_visible(place < len(methods))
        axes.tick_params(labelsize=7, labelbottom=place + columns >= len(methods))
        axes.set_xlabel(xlabel if place + columns >= len(methods) else "", fontsize=8)
        axes.set_ylabel(ylabel if place % columns == 0 else "", fontsize=8)
    for axes, method in zip(panels, methods, strict=False):
        _title(axes, method.label, 25, 7.5)
    return figure, panels[: len(methods)]


def _label_bar(bar: Colorbar, label: str, ticks: Locator | None = None) -> None:
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if ticks is not None:
        bar.ax.xaxis.set_major_locator(ticks)


def _deviations(seeds: int) -> float:
    """Return half the width of the 95 % interval of a mean over so many seeds, in standard deviations of these."""
    from scipy.stats import t

    return float(t.ppf(0.975, seeds - 1)) / math.sqrt(seeds) if seeds > 1 else math.nan


def _spread(panel: Panel) -> str:
    """Return what the pictures show of the seeds."""
    return f"{panel.seeds}, no interval" if panel.seeds == "1 seed" else f"mean of {panel.seeds}, 95 % interval"


def _limits(measure: str) -> tuple[float | None, float | None]:
    return (-0.02, 1.02) if is_share(measure) else (None, None)


def _title(axes: Axes, text: str, width: int, size: float = 10) -> None:
    axes.set_title(_text(text, width), fontsize=size)


def _text(text: str, width: int) -> str:
    """Return a text in lines of at most so many characters, as matplotlib shows it: a dollar is one."""
    return "\n".join(textwrap.wrap(text, width)).replace("$", r"\$")
