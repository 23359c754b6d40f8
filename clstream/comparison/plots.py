"""Interactive pictures of methods against each other: what `pictures` draws for print, as figures of Plotly, in plain values."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clstream.comparison.changes import Change
from clstream.comparison.methods import COSTS, Panel, half_width
from clstream.comparison.statistics import Ranking
from clstream.figures import is_share, method_style, task_colour
from clstream.measures.cost import pareto_front

Plot = dict[str, Any]
"""A figure as Plotly takes it: "data" and "layout"."""

SYMBOLS = dict(zip("os^DvPX*", ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star"), strict=True))
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
GRID = "#dddddd"

MOST_BARS = 20
"""Sessions of curves that have a bar for the interval at each."""

MOST_TASKS = 10
"""Tasks that have curves of their own."""


def plots_of(panel: Panel) -> dict[str, Plot]:
    """Return the plots of the methods on one stream by what they show."""
    plots = {f"Final {panel.measure}": final_values(panel)}
    if any(method.curves for method in panel.methods):
        plots["Mean of the tasks seen"] = mean_curves(panel)
        plots["Forgetting curves"] = forgetting_by_method(panel)
        plots[f"Matrices of {panel.measure}"] = matrices(panel)
    if any(math.isfinite(float(method.cost(cost).mean())) for method in panel.methods for cost in COSTS):
        plots[f"{panel.measure.capitalize()} against cost"] = against_costs(panel)
    return plots


def final_values(panel: Panel) -> Plot:
    """Draw the mean of each method with its 95 % interval, and its seeds, the best one at the top."""
    data = []
    for number in reversed(panel.best_first):
        method, label = panel.methods[number], _name(panel, number)
        seeds = [f"seed {record.seed}" for record in method.records]
        marks = {"symbol": "line-ns-open", "color": "#999999", "size": 9}
        data.append(_points(method.finals, [label] * len(seeds), mode="markers", marker=marks, text=seeds, name=label))
        bar = {"type": "data", "array": _plain([half_width(method.finals)])}
        data.append(_points([method.mean], [label], mode="markers", error_x=bar, name=label, **_style(number, 10)))
    layout = _layout(f"average {panel.measure} after the last session", "", 26 * len(panel.methods) + 110)
    layout["yaxis"] |= {"type": "category"}
    return {"data": data, "layout": layout | {"showlegend": False}}


def mean_curves(panel: Panel) -> Plot:
    """Draw the mean over the tasks seen of each method against the sessions, in bands of 95 % intervals."""
    data: list[Plot] = []
    for number in panel.best_first:
        method, label = panel.methods[number], _name(panel, number)
        if not method.curves:
            continue
        values, group = method.seen_averages, str(number)
        if len(values) > 1:
            mean, half = values.mean(0), torch.tensor([half_width(column) for column in values.T], dtype=torch.float64)
            band = {"fill": "toself", "fillcolor": method_style(number)["color"], "opacity": 0.2, "line": {"width": 0}}
            around = torch.cat([mean + half, (mean - half).flip(0)])
            steps = [*method.sessions, *reversed(method.sessions)]
            data.append(_points(steps, around, mode="lines", hoverinfo="skip", legendgroup=group, showlegend=False, **band))
        data.append(_points(method.sessions, values.mean(0), mode="lines+markers", name=label, legendgroup=group, **_style(number)))
    layout = _layout("sessions finished", f"average {panel.measure} on the tasks seen", max(520, 21 * len(panel.methods) + 100))
    layout["yaxis"] |= _range(panel.measure)
    layout["xaxis"] |= _whole(max((step for method in panel.methods for step in method.sessions), default=1))
    return {"data": data, "layout": layout}


def forgetting_by_method(panel: Panel) -> Plot:
    """Draw for each method, in a panel of its own, each task from when it was taught on, and the mean over the tasks seen."""
    drawn = [number for number in panel.best_first if panel.methods[number].curves]
    layout = _grid([panel.methods[number].label for number in drawn], "sessions finished", panel.measure, _range(panel.measure))
    last = max(method.sessions[-1] for method in panel.methods if method.curves)
    _for_axes(layout, "x", _whole(last))
    data = []
    for place, number in enumerate(drawn):
        method, axes = panel.methods[number], _axes(place)
        tasks, steps, bands = (
            method.matrices.shape[2],
            method.sessions,
            len(method.curves) > 1 and len(method.sessions) <= MOST_BARS,
        )
        columns = [
            (task, f"task {task}", method.matrices[:, :, task], method.starts[task]) for task in method.tasks_shown(MOST_TASKS)
        ]
        for task, name, values, start in [*columns, (tasks, "mean of the tasks seen", method.seen_averages, 0)]:
            red, green, blue, _ = task_colour(task, tasks) if task < tasks else (0.0, 0.0, 0.0, 1.0)
            colour = f"rgb({255 * red:.0f},{255 * green:.0f},{255 * blue:.0f})"
            half = [half_width(column) for column in values[:, start:].T] if bands else []
            bars = {"error_y": {"type": "data", "array": _plain(half), "thickness": 0.8, "width": 2}} if bands else {}
            look = {"line": {"color": colour, "width": 1.5 if task < tasks else 3}, "marker": {"size": 4, "color": colour}}
            data.append(
                _points(
                    steps[start:], values[:, start:].mean(0), mode="lines+markers", name=name, legendgroup=name,
                    showlegend=place == 0, **axes, **bars, **look,
                )
            )  # fmt: skip
    return {"data": data, "layout": layout}


def matrices(panel: Panel) -> Plot:
    """Draw the matrix of each method, the mean over its seeds, side by side: tasks against sessions; blank: not asked."""
    drawn = [number for number in panel.best_first if panel.methods[number].curves]
    layout = _grid([panel.methods[number].label for number in drawn], "task", "sessions finished", {"autorange": "reversed"})
    tasks = max(panel.methods[number].matrices.shape[2] for number in drawn)
    _for_axes(layout, "x", _whole(tasks))
    scale = {"cmin": 0, "cmax": 1} if is_share(panel.measure) else {}
    layout["coloraxis"] = {"colorscale": "Viridis", "colorbar": {"title": {"text": html.escape(panel.measure)}}, **scale}
    data = []
    for place, number in enumerate(drawn):
        method = panel.methods[number]
        mean = method.matrices.mean(0).round(decimals=4)
        shown = {"texttemplate": "%{z:.2f}"} if mean.shape[1] <= 6 else {}
        hover = "after %{y} sessions, task %{x}: %{z:.4f}<extra></extra>"
        data.append(
            {
                "type": "heatmap", "x": list(range(mean.shape[1])), "y": list(method.sessions),
                "z": [_plain(row) for row in mean], "coloraxis": "coloraxis", "hovertemplate": hover, **_axes(place), **shown,
            }
        )  # fmt: skip
    return {"data": data, "layout": layout}


def against_costs(panel: Panel) -> Plot:
    """Draw what each method reached against memory, FLOPs and seconds, with 95 % intervals and the Pareto fronts."""
    layout = _layout("", "", 480)
    data: list[Plot] = []
    for place, cost in enumerate(COSTS):
        spent = [method.cost(cost) for method in panel.methods]
        priced = [number for number in panel.best_first if math.isfinite(float(spent[number].mean()))]
        costs = torch.tensor([float(spent[number].mean()) for number in priced], dtype=torch.float64)
        reached = torch.tensor([panel.methods[number].mean for number in priced], dtype=torch.float64)
        front, axes = pareto_front(costs, reached), _axes(place)
        line = {"color": "#999999", "width": 1.5, "shape": "hv"}
        shown = {"name": "Pareto front", "legendgroup": "front", "showlegend": place == 0}
        data.append(_points(costs[front], reached[front], mode="lines", line=line, hoverinfo="skip", **shown, **axes))
        for number in priced:
            method = panel.methods[number]
            bars = {
                side: {"type": "data", "array": _plain([half_width(values)]), "thickness": 1}
                for side, values in (("error_x", spent[number]), ("error_y", method.finals))
            }
            first = all(trace.get("legendgroup") != str(number) for trace in data)
            shown = {"name": _name(panel, number), "legendgroup": str(number), "showlegend": first}
            data.append(
                _points([float(spent[number].mean())], [method.mean], mode="markers", **shown, **bars, **axes, **_style(number, 10))
            )
        positive = bool(len(costs)) and bool((costs > 0).all()) and float(costs.amax()) > 10 * float(costs.amin())
        layout[f"xaxis{place + 1 if place else ''}"] = {
            "title": {"text": cost}, "domain": [place / 3 + 0.02, (place + 1) / 3 - 0.02], "gridcolor": GRID,
            "anchor": axes["yaxis"],
            "exponentformat": "SI", **({"type": "log", "dtick": 1} if positive else {}),
        }  # fmt: skip
        layout[f"yaxis{place + 1 if place else ''}"] = {
            "anchor": axes["xaxis"], "gridcolor": GRID, "showticklabels": place == 0,
            **({"matches": "y"} if place else {"title": {"text": html.escape(f"average {panel.measure}")}}),
        }  # fmt: skip
    return {"data": data, "layout": layout | {"legend": {"orientation": "h", "y": -0.2}}}


def ranks_of(labels: Sequence[str], ranks: Ranking) -> Plot:
    """Draw the average ranks of methods over streams, in bars of half a critical difference: who differ have bars apart."""
    order = sorted(range(len(labels)), key=lambda number: -ranks.average[number])
    names, averages = [html.escape(labels[number]) for number in order], [ranks.average[number] for number in order]
    bars = {"type": "data", "array": [ranks.critical_difference / 2] * len(order)}
    data = _points(averages, names, mode="markers", error_x=bars, marker={"size": 9, "color": method_style(0)["color"]})
    layout = _layout("average rank over the streams, 1 is the best", "", 26 * len(order) + 110)
    layout["yaxis"] |= {"type": "category"}
    return {"data": [data], "layout": layout | {"showlegend": False}}


def changes_plot(changes: Sequence[Change], names: tuple[str, str]) -> Plot:
    """Draw the means of methods in two sweeps, with 95 % intervals: a row for each method on each stream."""
    rows = [html.escape(f"{change.method} on {change.stream}") for change in changes][::-1]
    data = []
    for place, name in enumerate(names):
        means = [(change.before, change.after)[place] for change in changes][::-1]
        half = [0.0 if mean is None or math.isnan(mean.half_width) else mean.half_width for mean in means]
        bars = {"type": "data", "array": half, "thickness": 1.2}
        marker = {"color": method_style(place)["color"], "size": 10, "symbol": ("circle-open", "diamond")[place]}
        values = [math.nan if mean is None else mean.mean for mean in means]
        data.append(_points(values, rows, mode="markers", name=html.escape(name), error_x=bars, marker=marker))
    layout = _layout("average of the main measure after the last session", "", 30 * len(rows) + 140)
    layout["yaxis"] |= {"type": "category"}
    return {"data": data, "layout": layout}


def _name(panel: Panel, number: int) -> str:
    """Return a method's label as Plotly shows it: the few tags of HTML that it knows are text here."""
    return html.escape(panel.methods[number].label)


def _style(number: int, size: int = 6) -> Plot:
    """Return the colour, symbol and line of a method, which are those of print."""
    style = method_style(number)
    line = {"color": style["color"], "width": 2, "dash": DASHES[style["linestyle"]]}
    return {"marker": {"color": style["color"], "symbol": SYMBOLS[style["marker"]], "size": size}, "line": line}


def _points(x: Sequence[Any] | Tensor, y: Sequence[Any] | Tensor, **look: Any) -> Plot:
    return {"type": "scatter", "x": _plain(x), "y": _plain(y), **look}


def _plain(values: Sequence[Any] | Tensor) -> list[Any]:
    """Return values as JSON has them: null for what is not a finite number."""
    listed = values.tolist() if isinstance(values, Tensor) else list(values)
    return [None if isinstance(value, float) and not math.isfinite(value) else value for value in listed]


def _range(measure: str) -> Plot:
    return {"range": [-0.02, 1.02]} if is_share(measure) else {}


def _whole(most: int) -> Plot:
    """Return what marks an axis of so many whole numbers at some of these."""
    return {"tick0": 0, "dtick": -(-most // 10)}


def _for_axes(layout: Plot, axis: str, look: Plot) -> None:
    for name in layout:
        if name.startswith(f"{axis}axis"):
            layout[name] |= look


def _layout(xtitle: str, ytitle: str, height: int) -> Plot:
    axes = ({"title": {"text": html.escape(title)}, "gridcolor": GRID, "automargin": True} for title in (xtitle, ytitle))
    margin = {"l": 60, "r": 20, "t": 20, "b": 50}
    return {"height": height, "margin": margin, "plot_bgcolor": "white", **dict(zip(("xaxis", "yaxis"), axes, strict=True))}


def _axes(place: int) -> dict[str, str]:
    """Return the names of the axes of a panel of a plot, as its traces say them."""
    number = "" if place == 0 else str(place + 1)
    return {"xaxis": f"x{number}", "yaxis": f"y{number}"}


def _grid(titles: Sequence[str], xtitle: str, ytitle: str, yaxis: Plot) -> Plot:
    """Return the layout of a plot with a panel for each title, up to four beside each other, which share their axes."""
    columns = min(4, len(titles))
    rows = -(-len(titles) // columns)
    height = 210 * rows + 120
    layout = _layout("", "", height) | {"legend": {"orientation": "h", "y": -60 / height, "yanchor": "top"}, "annotations": []}
    layout["margin"] = layout["margin"] | {"t": 30, "b": 60}
    for place, title in enumerate(titles):
        row, column = divmod(place, columns)
        left, right = column / columns + 0.015, (column + 1) / columns - 0.015
        top, bottom = 1 - row / rows - 34 / height, 1 - (row + 1) / rows + 26 / height
        axes, number, last = _axes(place), "" if place == 0 else str(place + 1), place + columns >= len(titles)
        for axis, other, domain, title_here, shown, more in (
            ("x", "yaxis", [left, right], xtitle, last, {}),
            ("y", "xaxis", [bottom, top], ytitle, column == 0, yaxis),
        ):
            layout[f"{axis}axis{number}"] = {
                "domain": domain, "anchor": axes[other], "showticklabels": shown, "gridcolor": GRID, "tickfont": {"size": 10},
                "title": {"text": html.escape(title_here) if shown else "", "font": {"size": 11}},
                **({"matches": axis} if place else {}), **more,
            }  # fmt: skip
        short = html.escape(title if len(title) <= 34 else title[:33] + "…")
        layout["annotations"].append(
            {
                "text": short, "x": (left + right) / 2, "y": top, "xref": "paper", "yref": "paper", "xanchor": "center",
                "yanchor": "bottom", "showarrow": False, "font": {"size": 12}, "hovertext": html.escape(title),
            }
        )  # fmt: skip
    return layout
