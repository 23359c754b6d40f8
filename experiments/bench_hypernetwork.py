"""What a hypernetwork costs: `python experiments/bench_hypernetwork.py [--old 10]`.

Prints the time of a step without old tasks, with one and with more, in turns, for some settings: these steps differ by the
regulariser alone. Budget: 3 times the step of one old task at 10 old ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch
from clstream.strategies import Hypernetwork
from torch.optim import Adam

from clstream import Batch, Samples, Task, TaskEnded, TaskStarted
from clstream.models import Mlp

SETTINGS: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
    "mlp, 400-400, batch 128": ((400, 400), 128, {}),
    "mlp, 400-400, cached": ((400, 400), 128, {"targets": "cached"}),
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
    made = Hypernetwork(Mlp((1, 28, 28), 10, hidden=hidden), partial(Adam, lr=1e-3), **options)
    for number in range(old + 1):
        task = Task(number, (0, 1), samples, samples)
        made.open_task(TaskStarted(task))
        if number < old:
            made.close_task(TaskEnded(task))
    return made


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
        for old, each in times.items():
            ratio = statistics.median(one / two for one, two in zip(each, times[1], strict=True))
            memory = ways[old].memory()
            print(
                f"{name:26} {old:3} old tasks: {1000 * statistics.median(each):7.2f} ms a step, least {1000 * min(each):7.2f}; "
                f"{ratio:5.2f} x; {memory['generator']} numbers in the generator, {memory['targets']} in targets"
            )


if __name__ == "__main__":
    main()
