"""What a hypernetwork costs: `python experiments/bench_hypernetwork.py [--old 10]`.

Prints the time of a step without old tasks, with one and with more, in turns, for some settings: these steps differ by the
regulariser alone. Budget: 3 times the step of one old task at 10 old ones. And it prints how many numbers are held.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from clstream.strategies import Hypernetwork
from torch import Tensor
from torch.optim import Adam

from clstream import Batch, Samples, Task, TaskEnded, TaskStarted
from clstream.models import Mlp

SETTINGS: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
    "mlp, 400-400, batch 128": ((400, 400), 128, {}),
    "mlp, 100-100, batch 32": (
        (100, 100),
        32,
        {"hidden": (10, 10, 10, 10), "chunk": 8000, "task_size": 32, "chunk_size": 32, "lookahead": False},
    ),
    "lstm, 400-400, batch 128": (
        (400, 400),
        128,
        {"generator": "lstm", "hidden": (16,), "chunk": 25_000, "task_size": 32, "chunk_size": 32},
    ),
}


def at_task(hidden: tuple[int, ...], old: int, options: dict[str, Any], samples: Samples) -> Hypernetwork:
    """Return a strategy that has so many old tasks, of which nothing was learned: that takes the same time."""
    strategy = Hypernetwork(Mlp((1, 28, 28), 10, hidden=hidden), partial(Adam, lr=1e-3), **options)
    for number in range(old + 1):
        task = Task(number, (0, 1), samples, samples)
        strategy.open_task(TaskStarted(task))
        if number < old:
            strategy.close_task(TaskEnded(task))
    return strategy


def numbers_held(strategy: Hypernetwork) -> dict[str, int]:
    """Return how many numbers a strategy holds, by what for: to answer (the first four), to learn, and beside.

    `cached` are the weights of all tasks' networks, from when answers are asked for until something is learned; `unused` is the
    model that was given.
    """
    tasks = list(strategy.tasks.values())
    optimizers = (strategy.optimizer, *([strategy.embedding_optimizer] if tasks else []))
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return {
        "generator": count(strategy.generator.parameters()),
        "embeddings": count(parameter for task in tasks for parameter in task.parameters()),
        "statistics": count(buffer for task in tasks for buffer in task.statistics.values()),
        "copies": count(weight for task in tasks for weight in task.copy.values()),
        "targets": count(strategy.targets or ()),
        "importance": count([strategy.coefficients, *(task.fisher for task in tasks)]),
        "optimizers": count(value for value in states if isinstance(value, Tensor)),
        "cached": count(weight for network in strategy.cached_weights.values() for weight in network.values()),
        "unused": strategy.network.size,
    }


def count(tensors: Iterable[Tensor | None]) -> int:
    """Return how many numbers some tensors hold together."""
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=int, default=10, help="old tasks")
    parser.add_argument("--turns", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    for name, (hidden, n, settings) in SETTINGS.items():
        x = torch.randint(256, (n, 1, 28, 28), dtype=torch.uint8, generator=draw)
        samples = Samples(x, torch.randint(2, (n,), generator=draw))
        ways = {old: at_task(hidden, old, settings, samples) for old in (0, 1, options.old)}
        times: dict[int, list[float]] = {old: [] for old in ways}
        for turn in range(options.turns):
            for old, strategy in ways.items():
                start = time.perf_counter()
                strategy.learn(Batch(samples, None, 0, 0))
                if turn >= 5:
                    times[old].append(time.perf_counter() - start)
        for old, seconds in times.items():
            ratio = statistics.median(many / single for many, single in zip(seconds, times[1], strict=True))
            held = numbers_held(ways[old])
            print(
                f"{name:26} {old:3} old tasks: {1000 * statistics.median(seconds):7.2f} ms a step, least "
                f"{1000 * min(seconds):7.2f}; {ratio:5.2f} x; {held['generator']} numbers in the generator, "
                f"{held['targets']} in targets"
            )


if __name__ == "__main__":
    main()
