"""What TAME costs: `python experiments/bench_tame.py [--experts 20]`.

Prints the time of a step with one expert and with more, in turns, for two networks: with every expert scored at each batch, as the
paper has it, and with `settle=True`, where only the active one is. The first can't reach 4 times the step of one expert at 20: four
forward passes (one to score, three to learn) become 23.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from clstream.strategies import TAME
from torch import nn

from clstream import Batch, Samples
from clstream.models import LeNet, Mlp

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "LeNet": lambda: LeNet((1, 28, 28), 10, mean=0.1307, std=0.3081),
    "Mlp 100-100": lambda: Mlp((1, 28, 28), 10, hidden=(100, 100)),
}


def tame(network: Callable[[], nn.Module], experts: int, settle: bool) -> TAME:
    """Return TAME with so many experts, which never switches."""
    strategy = TAME(network(), floor=1e9, settle=settle)
    strategy.experts += [strategy.new_expert() for _ in range(experts - 1)]
    return strategy


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=20)
    parser.add_argument("--turns", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(256, (128, 1, 28, 28), dtype=torch.uint8, generator=draw)
    batch = Batch(Samples(x, torch.randint(10, (128,), generator=draw)), None, 0, 1)  # a later epoch: memories rest
    for name, network in NETWORKS.items():
        ways = {
            "1 expert": tame(network, 1, False),
            f"{options.experts} experts": tame(network, options.experts, False),
            f"{options.experts} experts, settle": tame(network, options.experts, True),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(options.turns):
            for way, strategy in ways.items():
                start = time.perf_counter()
                strategy.learn(batch)
                if turn >= 5:
                    times[way].append(time.perf_counter() - start)
        first = times["1 expert"]
        for way, seconds in times.items():
            ratio = statistics.median(many / single for many, single in zip(seconds, first, strict=True))
            median, least = 1000 * statistics.median(seconds), 1000 * min(seconds)
            print(f"{name:12} {way:20} {median:7.2f} ms a step, least {least:7.2f}; {ratio:5.2f} x")


if __name__ == "__main__":
    main()
