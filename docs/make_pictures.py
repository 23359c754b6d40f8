"""Render the pictures of the documentation: `python docs/make_pictures.py [NAME ...]`. The same versions give the same bytes.

The one of SHARP plays its anchor on Split MNIST, which takes minutes and needs MNIST (see `clstream.streams.split_mnist`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clstream.experiments.bench_hypernetwork import numbers_held
from clstream.strategies import ERACE, EWC, NCM, SHARP, Federated, Finetune, Hypernetwork, ICaRL, Replay
from clstream.strategies.sharp import UnitsFrozen
from clstream.streams import (
    feature_drift,
    federated,
    fuzzy_tasks,
    gaussian_schedule,
    label_shift,
    recurring_tasks,
    si_blurry,
    split_digits,
    split_mnist,
)
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from clstream import Result, Samples, Strategy, Stream, Task, TaskEnded, TaskStarted, on, run
from clstream.comparison import Record, record_of
from clstream.comparison.methods import panels_of
from clstream.comparison.pictures import final_values, forgetting_by_method, mean_curves
from clstream.federated import FederatedAccuracy
from clstream.figures import composition, composition_figure, forgetting_curves, method_style
from clstream.models import Mlp, MnistLike
from clstream.seeds import isolated

FOLDER = Path(__file__).parent / "images"


def play(method: Callable[[nn.Module], Strategy]) -> Result:
    """Run a method on the digits: seed 0 of the two configs of `make run`."""
    stream = split_digits()
    with isolated(0, "model"):
        model = Mlp(stream.input_shape, stream.classes, hidden=(100, 100))
    return run(method(model), stream, seed=0)


def drawn(figure: Figure, width: float, height: float) -> np.ndarray:
    """Return a figure of so many inches as (height, width, 3) bytes."""
    figure.set_size_inches(width, height)
    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3]


def curves() -> np.ndarray:
    """Draw the forgetting curves of fine-tuning, and below those of replay."""
    above, below = play(Finetune), play(partial(Replay, capacity=200))
    return np.vstack(
        [
            drawn(forgetting_curves(result.main, result.taught, title), 7.5, 3.6)
            for result, title in ((above, "Finetune on split_digits"), (below, "Replay (capacity 200) on split_digits"))
        ]
    )


class Recruited:
    """Counts SHARP's units by the episode that recruited them, at the end of each; 0 for those that are idle."""

    def __init__(self, strategy: SHARP) -> None:
        self.strategy, self.counts = strategy, list[list[list[int]]]()

    @on(UnitsFrozen)
    def count(self, event: UnitsFrozen) -> None:
        """Count: a unit of rank r was recruited r - 2 episodes ago."""
        since = [torch.where(ranks > 0, event.episode + 2 - ranks, 0) for ranks in self.strategy.ranks]
        self.counts.append([torch.bincount(labels, minlength=6).tolist() for labels in since])


def units() -> np.ndarray:
    """Draw the units of each layer of SHARP over the episodes of its anchor."""
    stream = split_mnist(epochs=30, batch_size=256, validation=0.01)
    with isolated(0, "model"):
        strategy = SHARP(MnistLike((1, 28, 28), stream.classes, mean=0.1307, std=0.3081))
    recruited = Recruited(strategy)
    run(strategy, stream, recruited, seed=0)
    counts = np.array(recruited.counts)  # (episodes, layers, recruited in)
    figure = Figure(layout="constrained")
    colours = ["#dddddd", "#08306b", "#2171b5", "#6baed6", "#fd8d3c", "#d94801"]
    for number, (axes, layer) in enumerate(zip(figure.subplots(1, 4), strategy.chain.layers, strict=True)):
        bottom = np.zeros(len(counts))
        for episode in (1, 2, 3, 4, 5, 0):
            label = f"episode {episode}" if episode else "idle"
            axes.bar(range(1, 6), counts[:, number, episode], bottom=bottom, color=colours[episode], label=label, width=0.85)
            bottom += counts[:, number, episode]
        axes.set(title=layer.name, xlabel="episode", ylim=(0, layer.units))
    figure.axes[0].set_ylabel("units, by when they were recruited")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return drawn(figure, 9, 3.4)


DRIFTS: dict[str, Callable[[], Stream]] = {
    "fuzzy tasks": partial(fuzzy_tasks, sessions=40),
    "recurring tasks": partial(recurring_tasks, order=(0, 1, 2, 1, 3)),
    "Si-Blurry": partial(si_blurry, blur=0.3, seed=2),
    "Gaussian schedule": gaussian_schedule,
    "label shift": partial(label_shift, sessions=50),
    "feature drift (breast cancer, by mean radius)": partial(feature_drift, softness=0.2),
}


def drifts() -> np.ndarray:
    """Draw what six streams deliver over time."""
    panels = []
    for title, make in DRIFTS.items():
        found = composition(make())
        panels.append(drawn(composition_figure(found.counts, found.sessions, found.names, found.by, title), 6.2, 2.7))
    return np.vstack([np.hstack(panels[row : row + 2]) for row in range(0, len(panels), 2)])


def methods() -> np.ndarray:
    """Draw five methods against each other, with five seeds each: final accuracy, the mean of the tasks seen, and each task."""
    stream, records = split_digits(epochs=3), list[Record]()
    makes = {
        "Finetune": Finetune, "EWC": EWC, "Replay, capacity 50": partial(Replay, capacity=50),
        "Replay, capacity 200": partial(Replay, capacity=200), "ERACE": ERACE,
    }  # fmt: skip
    for label, make in makes.items():
        for seed in range(5):
            with isolated(seed, "model"):
                model = Mlp(stream.input_shape, stream.classes, hidden=(100, 100))
            records.append(record_of(run(make(model), stream, seed=seed), label=label, fingerprint=stream.fingerprint))
    (panel,) = panels_of(records)
    figures = [final_values(panel), mean_curves(panel), forgetting_by_method(panel)]
    return np.vstack([drawn(figure, *figure.get_size_inches()) for figure in figures])


BLUES, GREENS, ORANGE, GRAY = ("#c6dbef", "#6baed6", "#2171b5"), ("#e5f5e0", "#a1d99b", "#41ab5d"), "#fd8d3c", "#777777"


def box(axes: Axes, corner: tuple[float, float], width: float, height: float, colour: str, text: str = "", size: int = 9) -> None:
    """Draw a rectangle with a text in it."""
    axes.add_patch(Rectangle(corner, width, height, facecolor=colour, edgecolor="black", linewidth=0.7))
    axes.text(corner[0] + width / 2, corner[1] + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-", colour: str = "black") -> None:
    """Draw an arrow."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "linestyle": style, "color": colour, "shrinkA": 0, "shrinkB": 0})


def making(axes: Axes) -> None:
    """Draw how the weights of a network are made."""
    axes.set(xlim=(0, 10), ylim=(0, 8.4))
    axes.axis("off")
    axes.set_title("how the weights of a task's network are made", fontsize=10)
    box(axes, (0.1, 7.0), 1.5, 0.8, ORANGE, "$e_t$: task")
    for place in range(4):
        y = 5.7 - 1.45 * place
        name = ("$c_1$", "$c_2$", "...", "$c_N$")[place]
        box(axes, (0.1, y), 1.5, 0.8, BLUES[0], f"{name}: chunk" if place != 2 else "...")
        box(axes, (2.9, y), 1.7, 0.8, BLUES[1], "generator")
        arrow(axes, (1.6, y + 0.4), (2.9, y + 0.4))
        arrow(axes, (2.1, 7.4), (2.9, y + 0.62), colour=ORANGE)
        arrow(axes, (4.6, y + 0.4), (5.5, y + 0.4))
        if place:
            arrow(axes, (3.75, y + 1.45), (3.75, y + 0.8), "--", GRAY)
    axes.plot((1.6, 2.1), (7.4, 7.4), color=ORANGE, linewidth=1.2)
    axes.text(4.0, 5.3, "LSTM only", fontsize=7.5, color=GRAY, va="center")
    for place, name in enumerate(("chunk 1", "chunk 2", "...", "chunk N")):
        box(axes, (5.5, 5.7 - 1.45 * place), 1.3, 0.8, "white", name, 8)
        arrow(axes, (6.8, 6.1 - 1.45 * place), (7.4, 5.95 - 1.3 * place))
    top, heights = 6.6, (3.3, 1.75, 0.25)
    for number, height in enumerate(heights):
        box(axes, (7.4, top - height), 0.45, height, GREENS[number])
        axes.text(7.98, top - height / 2, ("784 to 400", "400 to 400", "400 to 10")[number], fontsize=8, va="center")
        top -= height
    box(axes, (7.4, top - 0.35), 0.45, 0.35, "#eeeeee")
    axes.text(7.98, top - 0.18, "surplus, dropped", fontsize=8, va="center", color=GRAY)
    axes.text(7.4, 7.1, "$W_t$, the weights of\nthe target network", fontsize=9, va="center")
    axes.text(0.1, 0.35, "blue: shared by all tasks.  orange: one for each task.  green: made, not kept", fontsize=8.5, va="center")


def held(tasks: int, **options: Any) -> dict[str, np.ndarray]:
    """Return what a strategy for Split MNIST holds while the last of 1, 2, ... tasks is learned, in millions of numbers."""
    strategy = Hypernetwork(Mlp((1, 28, 28), 10, hidden=(400, 400)), **options)
    samples = Samples(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.arange(2))
    counts = []
    for number in range(tasks):
        task = Task(number, (0, 1), samples, samples)
        strategy.open_task(TaskStarted(task))
        strategy.close_task(TaskEnded(task))
        counts.append(numbers_held(strategy))
    return {name: np.array([held[name] for held in counts]) / 1e6 for name in counts[0]}


def hypernetworks() -> np.ndarray:
    """Draw how weights are made, and what is held to answer and to learn, counted on strategies that met so many tasks."""
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    making(left)
    lstm: dict[str, Any] = {"generator": "lstm", "hidden": (16,), "chunk": 27_000, "task_size": 32, "chunk_size": 32}
    tasks = np.arange(1, 11)
    right.plot(tasks, 0.47841 * tasks, color="#cccccc", linewidth=5, label="a network for each task")
    for name, options, colour in (
        ("mlp", {}, BLUES[2]),
        ("lstm", lstm, ORANGE),
        ("lstm, growth", lstm | {"growth": True}, "#a63603"),
    ):
        numbers = held(10, **options)
        answering = numbers["generator"] + numbers["embeddings"] + numbers["copies"]
        right.plot(
            tasks, answering, color=colour, label=f"{name}: to answer", linewidth=2, linestyle=":" if name == "lstm" else "-"
        )
    learning = held(10)
    right.plot(
        tasks, learning["generator"] + learning["embeddings"] + learning["targets"], "--", color=BLUES[1], label="mlp: with targets"
    )
    right.set(title="numbers held, in millions", xlabel="tasks", xlim=(1, 10), ylim=(0, None))
    right.title.set_fontsize(10)
    right.legend(fontsize=8, frameon=False)
    return drawn(figure, 10.5, 4.2)


def federated_rounds() -> np.ndarray:
    """Draw what a server knows on the digits, round by round: prototypes, their published merge, averaged networks, iCaRL."""
    stream = federated("digits", base=5, clients=5, way=2, shots=10, epochs=20)
    with isolated(0, "model"):
        network = Mlp(stream.input_shape, stream.classes, hidden=(100,))
    run(Finetune(network), stream, max_sessions=1)  # the base classes, that all start from
    methods = {
        "prototypes, exact": Federated(NCM(deepcopy(network))),
        "prototypes, published": Federated(NCM(deepcopy(network)), merging="published"),
        "FedAvg": Federated(Finetune(deepcopy(network)), epochs=5, batch_size=10),
        "iCaRL": Federated(ICaRL(deepcopy(network), capacity=200, merge_epochs=10), epochs=5, batch_size=10),
    }
    figure = Figure(layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for name, strategy in methods.items():
        run(strategy, stream, accuracy := FederatedAccuracy(), evaluate_at="end")
        rows = accuracy.server()
        axes[0].plot([row.round for row in rows], [row.base for row in rows], marker="o", markersize=3, label=name)
        axes[1].plot([row.round for row in rows], [row.field for row in rows], marker="o", markersize=3, label=name)
    for panel, title in zip(axes, ("the 5 base classes", "the field classes merged so far"), strict=True):
        panel.set(title=title, xlabel="rounds merged", ylim=(-0.02, 1.02))
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy of the server")
    axes[1].legend(fontsize=8)
    return drawn(figure, 8, 3)


def few_shots() -> np.ndarray:
    """Draw base, novel and harmonic accuracy over the sessions, of the runs in experiments/results: means over them."""
    lines = (FOLDER.parent.parent / "experiments" / "results" / "few_shots.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    figure = Figure(layout="constrained")
    for axes, name in zip(figure.subplots(1, 3, sharey=True), ("base", "novel", "harmonic"), strict=True):
        for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            curve = np.mean([row[name] for row in rows if row["method"] == method], 0)
            axes.plot(range(1, 1 + len(curve)), curve, label=method, markersize=4, linewidth=1.5, **method_style(number))
        axes.set(title=name, xlabel="sessions", ylim=(0, 1))
    figure.axes[0].set_ylabel("accuracy")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return drawn(figure, 9.5, 4.0)


def lifelong() -> np.ndarray:
    """Draw what pruning costs and what the methods keep, of the runs in experiments/results: means over seeds, and each seed."""
    lines = (FOLDER.parent.parent / "experiments" / "results" / "lifelong_properties.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    figure = Figure(layout="constrained")
    pruned, kept = figure.subplots(1, 2)
    for method, colour in (("Fisher", "C0"), ("alike", "C1")):
        curves = np.array([row["given"] for row in rows if (row["property"], row["method"]) == ("graceful", method)])
        pruned.plot(np.arange(10) / 10, curves.T, color=colour, linewidth=0.5)
        pruned.plot(np.arange(10) / 10, curves.mean(0), color=colour, linewidth=2, marker="o", markersize=4, label=method)
    pruned.set(xlabel="share of weights set to 0", ylabel="accuracy, task given", ylim=(0.4, 1))
    pruned.legend(frameon=False, title="smallest b w²")
    controls = [row for row in rows if row["property"] == "controls"]
    for number, method in enumerate(dict.fromkeys(row["method"] for row in controls)):
        own = [row for row in controls if row["method"] == method]
        style = {**method_style(number), "linestyle": "none"}
        kept.plot([row["given"] for row in own], [row["all"] for row in own], label=method, markersize=5, **style)
    kept.set(xlabel="accuracy, task given", ylabel="accuracy, all classes compete", xlim=(0.4, 1), ylim=(0, 1))
    figure.legend(*kept.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return drawn(figure, 10.5, 3.6)


PICTURES = {
    "federated": federated_rounds,
    "few-shots": few_shots,
    "forgetting-curves": curves,
    "sharp-units": units,
    "drift": drifts,
    "hypernetworks": hypernetworks,
    "lifelong": lifelong,
    "methods": methods,
}


def main() -> None:
    """Render those that are named, or all."""
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        image.imsave(FOLDER / f"{name}.png", np.ascontiguousarray(PICTURES[name]()), metadata={"Software": None})


if __name__ == "__main__":
    main()
