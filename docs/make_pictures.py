"""Render the pictures of the documentation: `python docs/make_pictures.py [NAME ...]`. The same versions give the same bytes.

The one of SHARP plays its anchor on Split MNIST, which takes minutes and needs MNIST (see `clstream.streams.split_mnist`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from clstream.strategies import SHARP, Finetune, Replay
from clstream.strategies.sharp import UnitsFrozen
from clstream.streams import (
    feature_drift,
    fuzzy_tasks,
    gaussian_schedule,
    label_shift,
    recurring_tasks,
    si_blurry,
    split_digits,
    split_mnist,
)
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from clstream import Result, Strategy, Stream, on, run
from clstream.figures import composition_figure, forgetting_curves
from clstream.models import Mlp, MnistLike
from clstream.seeds import isolated
from clstream.showing import composition

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
        self.counts.append([torch.bincount(each, minlength=6).tolist() for each in since])


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


PICTURES = {"forgetting-curves": curves, "sharp-units": units, "drift": drifts}


def main() -> None:
    """Render those that are named, or all."""
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        image.imsave(FOLDER / f"{name}.png", np.ascontiguousarray(PICTURES[name]()), metadata={"Software": None})


if __name__ == "__main__":
    main()
