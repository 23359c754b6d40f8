"""What SHARP costs: `python experiments/bench_sharp.py [--data-root FOLDER] [--profile]`.

Plays two episodes of Split MNIST with the authors' settings for it, cut to `--epochs` epochs, and prints: the time of a step
against that of the loop below, which does the same by hand in the usual way (the whole masked network in every step), in turns,
median of the ratios; steps a second; the share of a run that phase boundaries and episodes' ends take; the time of an
evaluation's k-nearest-neighbour answers. `--profile` adds where a step's time goes, by operator.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import chain

import torch
from clstream.strategies import SHARP
from clstream.strategies.sharp.memories import ShortTerm, quantise
from clstream.streams import split_mnist
from torch import Tensor, nn
from torch.nn import functional as F

from clstream import Batch, BatchLearned, EpochStarted, Samples, SessionEnded, on, run
from clstream.evaluation import evaluating
from clstream.models import MnistLike
from clstream.seeds import isolated

BATCH = 256


class ByHand:
    """SHARP's step on its MNIST network as a careful user would write it, with masks and frozen rows given."""

    def __init__(self, masks: list[Tensor], frozen: list[Tensor], alive: Tensor) -> None:
        modules = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(784, 500), nn.Linear(500, 500)
        self.layers: list[tuple[nn.Parameter, nn.Parameter]] = [tuple(module.parameters()) for module in modules]  # type: ignore[misc]
        self.masks = [mask.float()[..., None, None] if number < 2 else mask.float() for number, mask in enumerate(masks)]
        self.frozen, self.alive = frozen, alive.float()
        self.parameters = list(chain.from_iterable(self.layers))
        self.optimizer = torch.optim.Adadelta(self.parameters, lr=1.0)

    def step(self, x: Tensor, y: Tensor, past: Tensor, labels: Tensor) -> Tensor:
        """Take one step on raw images and stored activations."""
        (w1, b1), (w2, b2), (w3, b3), (w4, b4) = self.layers
        m1, m2, m3, m4 = self.masks
        h = (x.float() / 255 - 0.1307) / 0.3081
        h = F.max_pool2d(F.relu(F.conv2d(h, w1 * m1, b1, padding=1)), 2)
        h = F.max_pool2d(F.relu(F.conv2d(h, w2 * m2, b2, padding=1)), 2)
        h = torch.cat([h, past]).flatten(1)
        h = F.relu(F.linear(h, w3 * m3, b3))
        h = F.relu(F.linear(h, w4 * m4, b4)) * self.alive
        z, labels = F.normalize(h, dim=1), torch.cat([y, labels])
        similar = z @ z.T / 0.1
        itself = torch.eye(len(z), dtype=torch.bool)
        same = (labels[:, None] == labels) & ~itself
        log = similar - similar.masked_fill(itself, -1e9).logsumexp(1, keepdim=True)
        loss = -((log * same).sum(1) / same.sum(1)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        for parameters, frozen in zip(self.layers, self.frozen, strict=True):
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad[frozen] = 0
        self.optimizer.step()
        return loss.detach()


class Clock:
    """An observer that adds up the time between batches: phase boundaries, which come before a batch, and ends."""

    def __init__(self) -> None:
        self.learning = self.boundaries = self.ends = 0.0
        self.steps, self.mark = 0, time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        last, self.mark = self.mark, time.perf_counter()
        return self.mark - last

    @on(BatchLearned)
    def learned(self, event: BatchLearned) -> None:
        """Count a step."""
        self.learning += self.lap()
        self.steps += 1


class Timed(SHARP):
    """SHARP with a clock around what it does between batches."""

    not_state: tuple[str, ...] = ("clock",)
    clock = Clock()

    @on(EpochStarted)
    def begin_phase(self, event: EpochStarted) -> None:
        """Time a phase boundary."""
        self.clock.lap()
        super().begin_phase(event)
        self.clock.boundaries += self.clock.lap()

    @on(SessionEnded)
    def consolidate(self, event: SessionEnded) -> None:
        """Time an episode's end."""
        self.clock.lap()
        super().consolidate(event)
        self.clock.ends += self.clock.lap()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder with MNIST, in torchvision's layout")
    parser.add_argument("--epochs", type=int, default=6, help="of each episode")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stream = split_mnist(epochs=options.epochs, batch_size=BATCH, validation=0.01, root=options.data_root)
    with isolated(0, "model"):
        own = Timed(MnistLike((1, 28, 28), stream.classes, mean=0.1307, std=0.3081))
    run(own, stream, own.clock, max_sessions=2)
    clock = own.clock
    whole = clock.learning + clock.boundaries + clock.ends
    print(f"two episodes of {options.epochs} epochs: {clock.steps} steps, {clock.steps / clock.learning:.1f} steps a second")
    print(f"phase boundaries {clock.boundaries / whole:.2%}, ends of episodes {clock.ends / whole:.2%} (budget for both 5 %)")
    living = ", ".join(f"{name} {sum(counts.values()) - counts['idle']}" for name, counts in own.count_units().items())
    print(f"units that are not idle: {living}")

    samples = stream.tasks[2].train[:BATCH]
    stored = quantise(torch.rand(2, 25, 16, 7, 7))
    own.short_term = ShortTerm(torch.tensor([2, 3]), torch.tensor([2, 2]), torch.tensor([25, 25]), *stored)
    own.clear_caches()
    hand = ByHand(own.masks, own.frozen, own.ranks[-1] > 0)
    past, labels = torch.rand(BATCH, 16, 7, 7), torch.arange(BATCH) % 2 + 2
    times: dict[str, list[float]] = {"SHARP": [], "by hand": []}
    batch = Batch(Samples(samples.x, samples.y), None, 0, 0)
    for turn in range(60):
        for name in times:
            start = time.perf_counter()
            if name == "SHARP":
                own.learn(batch)
            else:
                hand.step(samples.x, samples.y, past, labels)
            if turn >= 10:
                times[name].append(time.perf_counter() - start)
    ratio = statistics.median(ours / hand for ours, hand in zip(times["SHARP"], times["by hand"], strict=True))
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"a step with replay, {name:8} {1000 * median:6.1f} ms, {1 / median:6.1f} a second")
    print(f"SHARP / by hand: {ratio:.2f} (budget 1.15)")

    x = torch.cat([task.test.x for task in stream.tasks])
    with evaluating(own):
        start = time.perf_counter()
        own.features(own.chain.below(x))
        forward = time.perf_counter() - start
        own.scores(x)
    print(f"10,000 answers: {time.perf_counter() - start - forward:.2f} s, of which the forward pass takes {forward:.2f} s")
    if options.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(10):
                own.learn(batch)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40))


if __name__ == "__main__":
    main()
