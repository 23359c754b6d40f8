"""What the tricks of FSCIL are worth: `python experiments/few_shots.py RESULTS [--seeds 5] [--draws 3] [--methods baseline,all]`.

On Omniglot (136 characters, then ten sessions of ten ways and five shots) or, with `--data cifar10-jpeg.zip`, on ten classes of
images (six, then four sessions of one way), a small convolutional network learns the base session from scratch. A seed is a
training, a draw says which few samples there are. What is finished is in the file RESULTS, a line a run, and not run again.

The table has, after the last session, the accuracy over all classes seen, the performance drop, and base, novel and harmonic
accuracy: means of all runs, with 95 % confidence intervals (t) over seeds, each of which counts with its mean over draws. The last
two columns are standard deviations of the harmonic accuracy: over seeds in one draw, and over draws in one seed, means of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clstream.experiments.pretrained_features import interval
from clstream.strategies import FSCIL
from clstream.streams import few_shot_tasks
from torch.optim import SGD

from clstream import metrics, run
from clstream.models import ConvNet
from clstream.seeds import isolated

START = {"self_supervised": 10}
METHODS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "contrast": {"contrast": 1.0},
    "columns untuned": {"etf": "columns", "neck_steps": 0},
    "columns tuned": {"etf": "columns"},
    "columns as means": {"etf": "means"},
    "pseudo-classes": {"copies": "half_turn"},
    "subnet": {"subnet": 0.1},
    "self-supervised start": START,
    "rotation": {"rotation": 0.5},
    "all": {"contrast": 1.0, "etf": "means", "copies": "half_turn", "subnet": 0.1, "rotation": 0.5, **START},
}
"""The options of FSCIL; a self-supervised start has its passes on top of the others."""

SHOWN = ("seen", "drop", "base", "novel", "harmonic")


def play(method: str, data: str, root: str | None, seed: int, draw: int, epochs: int) -> dict[str, Any]:
    """Run a method; return what a line of the results has."""
    options = METHODS[method]
    sizes: dict[str, Any] = {"base": 136, "tasks": 11, "way": 10} if data == "omniglot" else {"base": 6, "tasks": 5, "way": 1}
    passes = epochs + options.get("self_supervised", 0)
    stream = few_shot_tasks(data, shots=5, support=draw, epochs=passes, batch_size=64, root=root, **sizes)
    normalised: dict[str, Any] = {"mean": 0.92, "std": 0.27} if data == "omniglot" else {"mean": 0.47, "std": 0.25}
    channels, height, width = stream.input_shape
    with isolated(seed, "model"):
        net = ConvNet((channels, height, width), stream.classes, channels=(16, 32, 64), hidden=512, **normalised)
        strategy = FSCIL(net, partial(SGD, lr=0.02, momentum=0.9, weight_decay=5e-4), smallest=0.4, **options)
    result = run(strategy, stream, seed=seed)
    curves = metrics.few_shot_curves(result.accuracy, result.taught)
    seen = result.measured["accuracy"][:, -1]
    measured = {name: curve.tolist() for name, curve in curves.items()} | {"seen": seen.tolist()}
    return {"method": method, "data": data, "seed": seed, "draw": draw, "epochs": epochs, "seconds": result.seconds} | measured


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
    parser.add_argument("--epochs", type=int, default=30)
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
    for seed in range(options.seeds):
        for draw in range(options.draws):
            for method in methods:
                if (method, seed, draw) in done:
                    continue
                row = play(method, options.data, options.data_root, seed, draw, options.epochs)
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                rows.append(row)
                shown = ", ".join(f"{name} {last(row, name):.3f}" for name in SHOWN)
                print(f"{method}, seed {seed}, draw {draw}: {shown}, {row['seconds']:.0f} s", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
