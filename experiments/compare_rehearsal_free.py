"""Learning without a memory, compared: `python experiments/compare_rehearsal_free.py [--seeds 0,1,2] [--data-root ROOT] [--tune]`.

Split Fashion-MNIST, 5 tasks, one net. Each strategy learns the stream with the task not given (class-IL) and given (task-IL); PRD
learns the same way in both, so it is run once, and asked both questions. Replay with 200 and 500 samples marks what a memory is
worth. Strategies of OTHERS that clstream has by now are run with their default options, but among classes seen. With `--tune` a
tenth of the training samples is held back and tested on in place of the test set: settings were chosen so.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import clstream.strategies as zoo
import torch
from clstream.streams import split_fashion_mnist
from torch import nn
from torch.optim import SGD

from clstream import Strategy, metrics, run
from clstream.models import ConvNet
from clstream.params import describe
from clstream.seeds import isolated

EPOCHS, BATCH, FIRST = 1, 128, 5  # FIRST: of PRD, the steps for each batch of the first task
NET = partial(ConvNet, channels=(16, 32, 32), mean=0.286, std=0.353)
FASTER, SLOWER = partial(SGD, lr=0.05), partial(SGD, lr=0.02)  # with replay, and without
OTHERS = ("L2", "EWC", "SI", "LwF", "LwFMC")

Make = Callable[[nn.Module], Strategy]


def entries() -> dict[str, Make]:
    """Return what builds each strategy, by the name of its row."""
    rows: dict[str, Make] = {
        "Finetune": partial(zoo.Finetune, optimizer=SLOWER),
        "Replay, 200": partial(zoo.Replay, optimizer=FASTER, capacity=200),
        "Replay, 500": partial(zoo.Replay, optimizer=FASTER, capacity=500),
        "PRD": partial(zoo.PRD, first_task_steps=FIRST),
        "PRD, beta 0": partial(zoo.PRD, first_task_steps=FIRST, beta=0.0),
        "PRD, samples": partial(zoo.PRD, first_task_steps=FIRST, relation="samples", relation_temperature=0.1, beta=8.0),
    }
    others = {name: getattr(zoo, name) for name in OTHERS if name in zoo.__all__}
    return rows | {name: partial(cls, optimizer=SLOWER, active_classes="seen") for name, cls in others.items()}


def measure(make: Make, scenario: str, seed: int, root: str | None, tune: bool) -> tuple[float, float, float]:
    """Return the average accuracy without and with the task given, and the seconds."""
    stream = split_fashion_mnist(scenario=scenario, epochs=EPOCHS, batch_size=BATCH, root=root, validation=0.1 if tune else 0.0)
    stream = stream.for_tuning() if tune else stream
    channels, height, width = stream.input_shape
    with isolated(seed, "model"):
        strategy = make(NET((channels, height, width), stream.classes))
    result = run(strategy, stream, seed=seed)
    both = [metrics.average_accuracy(matrix, result.taught) for matrix in (result.accuracy, result.task_accuracy)]
    return both[0], both[1], result.seconds


def main() -> None:
    """Print a row for each strategy: each seed, mean and standard deviation, and the seconds of a run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="0,1,2", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--data-root")
    parser.add_argument("--only", help="the rows to run, with semicolons between them; by default all")
    parser.add_argument("--tune", action="store_true", help="test on samples held back from training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"split_fashion_mnist, {EPOCHS} epoch, batch {BATCH}, {describe(NET)}, seeds {options.seeds}")
    for name, make in entries().items():
        if options.only and name not in options.only.split(";"):
            continue
        runs = [measure(make, "class", seed, options.data_root, options.tune) for seed in options.seeds]
        given = (
            runs if name.startswith("PRD") else [measure(make, "task", s, options.data_root, options.tune) for s in options.seeds]
        )
        for question, values in (
            ("class-IL", [measured[0] for measured in runs]),
            ("task-IL", [measured[1] for measured in given]),
        ):
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            shown = ", ".join(f"{value:.4f}" for value in values)
            print(f"{name:14} {question:9} {statistics.mean(values):.3f}{spread}   {shown}", flush=True)
        print(f"{name:14} {statistics.mean(row[2] for row in runs):.0f} s a run", flush=True)


if __name__ == "__main__":
    main()
