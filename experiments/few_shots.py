"""What the tricks of FSCIL are worth: `python experiments/few_shots.py RESULTS [--seeds 5] [--draws 3] [--methods baseline,all]`.

On Omniglot (136 characters, then ten sessions of ten ways and five shots) or, with `--data cifar10-jpeg.zip`, on ten classes of
images (six, then four sessions of one way), a small convolutional network learns the base session from scratch. A seed is a
training, a draw says which few samples there are. The base session of a seed is trained once: its other draws go on from the state
after it, to the same bits as runs of their own. What is finished is in the file RESULTS, a line a run, and not run again.

The table has, after the last session, the accuracy over all classes seen, the performance drop, and base, novel and harmonic
accuracy: means of all runs, with 95 % confidence intervals (t) over seeds, each of which counts with its mean over draws. The last
two columns are standard deviations of the harmonic accuracy: over seeds in one draw, and over draws in one seed, means of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from clstream.experiments.pretrained_features import interval
from clstream.strategies import FSCIL
from clstream.streams import few_shot_tasks
from torch.nn import functional as F
from torch.optim import SGD

from clstream import Evaluated, RunStarted, Stream, metrics, on, run
from clstream.models import ConvNet
from clstream.seeds import isolated
from clstream.stream import Samples, Subset

START = {"self_supervised": 5}
METHODS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "contrast": {"contrast": 1.0},
    "columns untuned": {"etf": "columns", "neck_steps": 0},
    "columns tuned": {"etf": "columns"},
    "columns as means": {"etf": "means"},
    "pseudo-classes": {"copies": "half_turn"},
    "subnet": {"subnet": 0.1},
    "self-supervised": START,
    "rotation": {"rotation": 0.5},
    "all": {"contrast": 1.0, "etf": "means", "copies": "half_turn", "subnet": 0.1, "rotation": 0.5, **START},
}
"""The options of FSCIL; a self-supervised start has its passes on top of the others."""

SHOWN = ("seen", "drop", "base", "novel", "harmonic")

IMAGES = (400, 200)
"""Of each class of photographs: to learn in the base session, and to test on. The first ones of the data set."""


class AfterBase:
    """An observer that keeps the state of a run after its base session."""

    state: Mapping[str, Any]

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Hear of the run."""
        assert event.run is not None
        self.run = event.run

    @on(Evaluated)
    def evaluated(self, event: Evaluated) -> None:
        """Keep the state if the base session was the last one."""
        if event.evaluation.sessions_finished == 1:
            self.run.defer(self.keep)

    def keep(self) -> None:
        """Keep a copy of the state."""
        self.state = deepcopy(self.run.state())


def fewer(samples: Samples | Subset, many: int) -> Samples:
    """Return the first so many photographs of each class, or all where there are fewer; each pixel is the mean of four."""
    first = torch.cat([(samples.y == label).nonzero().flatten()[:many] for label in samples.y.unique()]).sort().values
    part = samples[first]
    return Samples(F.avg_pool2d(part.x.float(), 2).round().to(torch.uint8), part.y)


def sessions(data: str, root: str | None, draw: int, passes: int) -> Stream:
    """Return the base session and those after it."""
    options: dict[str, Any] = {"shots": 5, "support": draw, "epochs": passes, "batch_size": 64, "root": root}
    if data == "omniglot":
        return few_shot_tasks(data, base=136, tasks=11, way=10, **options)
    stream = few_shot_tasks(data, base=6, tasks=5, way=1, **options)
    tasks = [replace(task, train=fewer(task.train, IMAGES[0]), test=fewer(task.test, IMAGES[1])) for task in stream.tasks]
    return replace(stream, tasks=tasks)


def play(
    method: str, data: str, root: str | None, seed: int, draw: int, epochs: int, base: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Run a method; return what a line of the results has, and the state after the base session.

    With `base`, such a state of another draw, the run goes on from there: its strategy and random numbers are those of this draw
    too, and nothing but the later sessions' samples differs.
    """
    options = METHODS[method]
    stream = sessions(data, root, draw, epochs + options.get("self_supervised", 0))
    normalised: dict[str, Any] = {"mean": 0.92, "std": 0.27} if data == "omniglot" else {"mean": 0.47, "std": 0.25}
    channels, height, width = stream.input_shape
    with isolated(seed, "model"):
        net = ConvNet((channels, height, width), stream.classes, channels=(16, 32, 64), hidden=512, **normalised)
        strategy = FSCIL(net, partial(SGD, lr=0.02, momentum=0.9, weight_decay=5e-4), smallest=0.4, **options)
    state = base and {**base, "identity": {**base["identity"], "data fingerprint": stream.fingerprint}}
    result = run(strategy, stream, *([after := AfterBase()] if base is None else []), seed=seed, resume=state)
    curves = metrics.few_shot_curves(result.accuracy, result.taught)
    seen = result.measured["accuracy"][:, -1]
    measured = {name: curve.tolist() for name, curve in curves.items()} | {"seen": seen.tolist()}
    row = {"method": method, "data": data, "seed": seed, "draw": draw, "epochs": epochs, "seconds": result.seconds} | measured
    return row, after.state if base is None else base


def last(row: dict[str, Any], name: str) -> float:
    """Return a number of a run: the drop of what is seen, or the last value of a curve."""
    return float(row["seen"][0] - row["seen"][-1] if name == "drop" else row[name][-1])


def spread(rows: list[dict[str, Any]], within: str) -> str:
    """Return the standard deviation of the harmonic accuracy of runs with one seed, or in one draw; the mean of them."""
    groups = [[last(row, "harmonic") for row in rows if row[within] == value] for value in sorted({row[within] for row in rows})]
    return f"{statistics.mean(map(statistics.stdev, groups)):.3f}" if min(map(len, groups)) > 1 else "-"


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the results, a row for each method."""
    lines = [f"| method | {' | '.join(SHOWN)} | over seeds | over draws |", "|---|" + "---|" * (len(SHOWN) + 2)]
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        seeds = sorted({row["seed"] for row in own})
        means = {name: [statistics.mean(last(row, name) for row in own if row["seed"] == seed) for seed in seeds] for name in SHOWN}
        if own:
            cells = [interval(means[name]) for name in SHOWN]
            lines.append(f"| {method} | {' | '.join(cells)} | {spread(own, 'draw')} | {spread(own, 'seed')} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", default="omniglot")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--data-root")
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods = options.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"there is no method {sorted(unknown)[0]!r}: take {', '.join(METHODS)}")
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    rows = [row for row in rows if (row["data"], row["epochs"]) == (options.data, options.epochs)]
    done = {(row["method"], row["seed"], row["draw"]) for row in rows}
    for seed, method in product(range(options.seeds), methods):
        base = None
        for draw in range(options.draws):
            if (method, seed, draw) in done:
                continue
            row, base = play(method, options.data, options.data_root, seed, draw, options.epochs, base)
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
            shown = ", ".join(f"{name} {last(row, name):.3f}" for name in SHOWN)
            print(f"{method}, seed {seed}, draw {draw}: {shown}, {row['seconds']:.0f} s", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
