"""Loss of plasticity on permuted digits, and what four methods do against it: see docs/plasticity.md.

    python experiments/plasticity.py experiments/results/plasticity.jsonl --seeds 3

Each run is a line of the file; what is there already is not run again. A table is printed in the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clstream.strategies import ContinualBackprop, Finetune, L2Init, ReDo, ShrinkAndPerturb
from clstream.streams import permuted_digits
from torch import nn
from torch.optim import SGD

from clstream import Strategy, run
from clstream.models import Mlp
from clstream.online_metrics import Plasticity
from clstream.seeds import isolated

TASKS, BATCH, LR, HIDDEN = 100, 16, 0.4, (100, 100, 100)

METHODS: dict[str, Callable[[nn.Module, Any], Strategy]] = {
    "SGD": Finetune,
    "SGD, a new network for each task": Finetune,
    "L2 init": partial(L2Init, strength=1e-3),
    "shrink and perturb": lambda model, optimizer: ShrinkAndPerturb(Finetune(model, optimizer)),
    "ReDo": lambda model, optimizer: ReDo(Finetune(model, optimizer), period=100),
    "continual backprop": lambda model, optimizer: ContinualBackprop(Finetune(model, optimizer), rate=1e-3),
}

NEW = "SGD, a new network for each task"
"""What a network can learn of a task that has learned nothing before."""


def measure(method: str, seed: int) -> dict[str, Any]:
    """Run a method with a seed; return what was measured in each task, rounded."""
    optimizer, plasticity = partial(SGD, lr=LR), Plasticity()
    stream = permuted_digits(TASKS, batch_size=BATCH, seed=seed)

    def model(number: int) -> nn.Module:
        with isolated(seed, "plasticity", number):
            return Mlp(stream.input_shape, 10, HIDDEN)

    measured = []
    if method == NEW:
        for number in range(0, TASKS, 10):  # it is the same whenever the task comes
            alone = replace(stream, schedule=(number,))
            run(METHODS[method](model(number), optimizer), alone, plasticity, seed=seed, evaluate_at="end", evaluate_on="seen")
            measured += plasticity.measured
    else:
        run(METHODS[method](model(0), optimizer), stream, plasticity, seed=seed, evaluate_at="end", evaluate_on="seen")
        measured = plasticity.measured
    names = ("newest", "dead", "effective_rank", "weight_norm")
    return {"method": method, "seed": seed} | {name: [round(getattr(m, name), 4) for m in measured] for name in names}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of means over seeds, and standard deviations of the accuracies."""
    lines = ["| | accuracy, tasks 1-20 | tasks 81-100 | dead units | effective rank | weight norm |", "|---|---|---|---|---|---|"]
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        cells = []
        for part in (slice(0, 20), slice(-20, None)):
            values = [statistics.mean(row["newest"][part]) for row in own]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        for name, digits in (("dead", 2), ("effective_rank", 1), ("weight_norm", 1)):
            cells.append(f"{statistics.mean(statistics.mean(row[name][-20:]) for row in own):.{digits}f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def read(file: Path) -> list[dict[str, Any]]:
    """Return the runs of a file, if there is one."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def main() -> None:
    """Run what is not in the file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = {(row["method"], row["seed"]) for row in read(options.file)}
    for seed in range(options.seeds):
        for method in METHODS:
            if (method, seed) not in done:
                with options.file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(measure(method, seed)) + "\n")
    print("\n".join(table(read(options.file))))


if __name__ == "__main__":
    main()
