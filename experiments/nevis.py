"""NEVIS's learners on mini_nevis: `python experiments/nevis.py RESULTS [--seeds 3] [--learners Independent] [--picture FILE.png]`.

Each learner learns the tasks in their order, searches four learning rates in each, and is tested on all tasks at the end, on each
by the final model that it kept of it. A seed is one of everything: images and splits, weights, and the order of batches. What is
finished is in the file RESULTS, a line a run, and not run again.

The first table has the mean error over the tasks (1 - accuracy, or 1 - mean average precision), that of the tail alone, and
training FLOPs: of the steps of all trials, and of what a search spends beside them (validation, neighbours), which is a share of
them; and the weights that answer. They are means of the seeds, with 95 % confidence intervals (t). The second one has the Pareto
front over learners and seeds, the third the relations that were asked for: differences of errors of one seed, in percentage
points, below 0 if the first learner is better.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from clstream.experiments.pretrained_features import interval
from clstream.strategies.nevis import DynamicKNN, FrozenLinear, Independent, Previous, StartChosen, TrialEnded
from clstream.strategies.nevis.search import TaskSearch
from clstream.streams import mini_nevis
from torch import nn
from torch.optim import SGD

from clstream import on, run
from clstream.figures import accuracy_against_cost
from clstream.measures import pareto_front
from clstream.models import ConvNet
from clstream.models.pretrained import Pretrained
from clstream.results import Result
from clstream.seeds import isolated

RATES = [0.003, 0.01, 0.03, 0.1]

LEARNERS: dict[str, Callable[..., TaskSearch]] = {
    "Independent": Independent,
    "Previous": Previous,
    "DynamicKNN": DynamicKNN,
    "DynamicKNN without scratch": partial(DynamicKNN, scratch_counts=False),
    "FrozenLinear": FrozenLinear,
}

TITLE = "mini_nevis, not comparable with the paper"

ALPHABETS = (4, 5, 6, 7, 11, 12, 13)
"""The tasks that are an alphabet, after an alphabet."""

TAIL = (11, 12, 13)

RECURRENCE = 9
"""MNIST, again."""

BODY = 64
"""Pixels of a side that the pre-trained backbone has images resized to."""


class Searches:
    """An observer that keeps what tasks started from, and the rates that were kept."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.rates: list[float] = []

    @on(StartChosen)
    def start(self, event: StartChosen) -> None:
        """Keep the start."""
        self.starts.append(event.start)

    @on(TrialEnded)
    def trial(self, event: TrialEnded) -> None:
        """Keep the rate of the best trial."""
        self.rates += [event.rate] * event.kept


def point(result: Result) -> tuple[float, float]:
    """Return the mean error over the tasks, and the training FLOPs; NaN, with a warning, where no operation could be counted."""
    flops = float(result.cost.training_flops.sum())
    if not float(result.cost.learning_flops.sum()):
        name = result.params["strategy"]
        warnings.warn(f"no operation of {name}'s steps is one that the FLOP counter knows: its FLOPs are NaN", stacklevel=2)
        flops = math.nan
    return 1 - result.average, flops


def front(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs that no other one beats in FLOPs and error, cheapest first; one whose FLOPs are NaN is not among them."""
    costs, errors = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in ("flops", "error"))
    return [rows[place] for place in pareto_front(costs, 1 - errors).tolist()]


def play(learner: str, seed: int, images: int, epochs: int) -> dict[str, Any]:
    """Run a learner; return what a line of the results has."""
    stream = mini_nevis("all", "test", images=images, epochs=epochs, seed=seed)
    channels, height, width = stream.input_shape
    with isolated(seed, "model"):
        model: nn.Module = ConvNet((channels, height, width), stream.outputs, channels=(8, 16, 32), hidden=64)
        if learner == "FrozenLinear":
            model = Pretrained((channels, height, width), stream.outputs, size=BODY)
        strategy = LEARNERS[learner](model, partial(SGD, lr=0.03, momentum=0.9, nesterov=True, weight_decay=1e-4), rates=RATES)
    result = run(strategy, stream, searches := Searches(), seed=seed, evaluate_at="end")
    error, flops = point(result)
    cost = result.cost
    return {
        "learner": learner, "seed": seed, "images": images, "epochs": epochs, "error": error, "flops": flops,
        "errors": (1 - result.main[-1]).tolist(), "learning_flops": cost.learning_flops.tolist(),
        "consolidating_flops": cost.consolidating_flops.tolist(), "evaluating_flops": cost.evaluating_flops.tolist(),
        "parameters": float(cost.parameters[-1]), "memory_bytes": float(cost.memory_bytes[-1]), "starts": searches.starts,
        "rates": searches.rates, "seconds": result.seconds,
    }  # fmt: skip


def mean_error(row: dict[str, Any], tasks: Sequence[int]) -> float:
    """Return the mean error of a run over some tasks."""
    return float(statistics.mean(row["errors"][task] for task in tasks))


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the learners."""
    lines = [
        f"| {TITLE} | error | on the tail | TFLOPs | beside steps | weights |",
        "|---|---|---|---|---|---|",
    ]
    for learner in LEARNERS:
        if own := [row for row in rows if row["learner"] == learner]:
            beside = [sum(row["consolidating_flops"]) / row["flops"] for row in own]
            spent = [row["flops"] / 1e12 for row in own]
            shown = "unknown" if any(map(math.isnan, spent)) else f"{statistics.mean(spent):.2f}"
            cells = [interval([row["error"] for row in own]), interval([mean_error(row, TAIL) for row in own]), shown]
            cells += [f"{100 * statistics.mean(beside):.1f} %", f"{own[0]['parameters'] / 1e6:.1f} M"]
            lines.append(f"| {learner} | {' | '.join(cells)} |")
    return "\n".join(lines)


def front_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the Pareto front over learners and seeds."""
    lines = ["| on the front | seed | training TFLOPs | error |", "|---|---|---|---|"]
    lines += [f"| {row['learner']} | {row['seed']} | {row['flops'] / 1e12:.2f} | {row['error']:.3f} |" for row in front(rows)]
    return "\n".join(lines)


def relations(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the relations between learners."""
    by = {(row["learner"], row["seed"]): row for row in rows}
    asked = [
        ("Previous - Independent, alphabets after alphabets", "Previous", "Independent", ALPHABETS),
        ("DynamicKNN - Independent, MNIST again", "DynamicKNN", "Independent", (RECURRENCE,)),
        ("DynamicKNN - Previous, MNIST again", "DynamicKNN", "Previous", (RECURRENCE,)),
        ("DynamicKNN - Previous, all tasks", "DynamicKNN", "Previous", range(14)),
        ("DynamicKNN without scratch - DynamicKNN, all tasks", "DynamicKNN without scratch", "DynamicKNN", range(14)),
    ]
    lines = ["| relation | difference of errors |", "|---|---|"]
    for name, first, second, tasks in asked:
        seeds = [seed for learner, seed in by if learner == first and (second, seed) in by]
        if seeds:
            values = [100 * (mean_error(by[first, seed], tasks) - mean_error(by[second, seed], tasks)) for seed in seeds]
            lines.append(f"| {name} | {interval(values)} |")
    own = [row for row in rows if row["learner"] == "DynamicKNN"]
    if own:
        picked = sum(row["starts"][RECURRENCE] == 0 for row in own)
        scratch = statistics.mean(sum(start < 0 for start in row["starts"][1:]) for row in own)
        lines.append(f"| DynamicKNN starts MNIST again from its own model | in {picked} of {len(own)} runs |")
        lines.append(f"| DynamicKNN starts later tasks from scratch | {scratch:.1f} of 13, mean of {len(own)} runs |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learners", default=",".join(LEARNERS))
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    learners = options.learners.split(",")
    if unknown := set(learners) - set(LEARNERS):
        parser.error(f"there is no learner {sorted(unknown)[0]!r}: take {', '.join(LEARNERS)}")
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    rows = [row for row in rows if (row["images"], row["epochs"]) == (options.images, options.epochs)]
    done = {(row["learner"], row["seed"]) for row in rows}
    for seed, learner in product(range(options.seeds), learners):
        if (learner, seed) in done:
            continue
        row = play(learner, seed, options.images, options.epochs)
        with options.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(f"{learner}, seed {seed}: error {row['error']:.3f}, {row['flops']:.3g} FLOPs, {row['seconds']:.0f} s", flush=True)
    print(f"{table(rows)}\n\n{front_table(rows)}\n\n{relations(rows)}")
    if options.picture is not None:
        drawn = {}
        for learner in learners:
            if own := [row for row in rows if row["learner"] == learner and not math.isnan(row["flops"])]:
                errors, flops = (torch.tensor([row[name] for row in own]) for name in ("error", "flops"))
                drawn[learner] = 1 - errors, flops
        picture = accuracy_against_cost(drawn, TITLE, "training FLOPs, searches included", "accuracy or mAP")
        picture.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
