"""What stiffness gives: `python experiments/lifelong_properties.py RESULTS [--seeds 5] [--data-root FOLDER] [--only few-shot]`.

Each property of `Lifelong` has a criterion, which was written down here before any of the runs that count, seeds 0 to 4. Sizes,
rates and the strengths of EWC were chosen in trials with seed 100. What is finished is in the file RESULTS, a line a measurement,
and not run again. "Given" is the accuracy with the task given, "all" that where all classes seen so far compete.

Fashion-MNIST, unless it says otherwise: the first 608 images of a class to learn and 300 to test, batches of 32, 38 steps a pass,
an Mlp of 200 and 200, SGD 0.05 with momentum 0.9; five tasks of two classes. A relax pass: 38 steps on 20 stored samples a class.

    non-forgetting  a guarantee. The logits of 256 test images for old classes are the same bits after all later tasks in 5 of 5
                    seeds, and with 1e6 in place of infinity in none.
    controls        no criterion: all methods with 152 steps a task (four passes, or three and a relax pass), and what they store.
    forward         samples until 80 % of a task's test images are right, given, measured after each batch of 8, SGD 0.05 without
                    momentum, classes in the order of the seed; more than 960 count as 968. It holds if the mean over tasks 2 to 5
                    of log2(fresh / nearest_task) is above 0 in 4 of 5 seeds.
    backward        change of the given accuracy on older tasks by a relax pass, the mean of those after tasks 2 to 5. Backward
                    transfer holds if it is above 0 with b = 0.01 in 4 of 5 seeds; stiffness helps if it is greater than that of as
                    many plain replay steps, b = 0, from the same weights on the same samples, in 4 of 5 seeds.
    confusion       T-shirt, pullover, coat and shirt as one task; then a pass for the pair, until the error on its 40 stored
                    samples is below 0.05, or 38 steps. It holds if the pair's error on test images falls in 4 of 5 seeds, and the
                    accuracy over the four classes falls by more than 0.01 in at most one.
    few-shot        Omniglot: 136 characters, then three sessions of ten new ones with five drawings each; 20 passes, batches of 50,
                    Mlp of 400 and 400. It holds if the given accuracy on new characters, right after their 20 steps, is higher with
                    rows started at the nearest class than with fresh ones in 4 of 5 seeds.
    graceful        given accuracy, all tasks, after the run, when more and more weights are set to 0, those with the smallest b w^2
                    first, by the Fisher, and for comparison with the same b for all. It holds if up to a half no further tenth
                    costs more than 0.05, by the Fisher, in 4 of 5 seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from clstream.experiments.lifelong_table import by_method, table, verdicts
from clstream.strategies import EWC, Finetune, Lifelong, Replay
from clstream.strategies.lifelong import Consolidated, Relaxed
from clstream.streams import few_shot_tasks, split_fashion_mnist
from torch import Tensor, nn
from torch.optim import SGD

from clstream import BatchLearned, Strategy, Stream, Task, TaskEnded, TaskStarted, on, run
from clstream.eval_mode import evaluating
from clstream.models import Mlp
from clstream.seeds import isolated
from clstream.stream import Samples, Subset

Row = dict[str, Any]
STORED, STEPS = 20, 38
EWC_STRENGTH, FISHER_STRENGTH = 1e3, 1e5
RATE = partial(SGD, lr=0.05, momentum=0.9)
LARGE = dict.fromkeys(("old", "old_rows", "new_to_old"), 1e6)


def fewer(samples: Samples | Subset, many: int) -> Samples:
    """Return the first so many samples of each class."""
    return samples[torch.cat([(samples.y == label).nonzero().flatten()[:many] for label in samples.y.unique()]).sort().values]


def fashion(root: str | None, tasks: Any = 5, **options: Any) -> Stream:
    """Return Fashion-MNIST by class, with fewer samples."""
    stream = split_fashion_mnist(tasks=tasks, root=root, **options)
    return replace(stream, tasks=[replace(task, train=fewer(task.train, 608), test=fewer(task.test, 300)) for task in stream.tasks])


def built(make: Callable[[nn.Module], Strategy], stream: Stream, seed: int, width: int = 200, **inputs: Any) -> Any:
    """Return a strategy around a new network."""
    with isolated(seed, "model"):
        return make(Mlp(stream.input_shape, stream.classes, hidden=(width, width), **inputs))


def given(strategy: Strategy, tasks: Iterable[Task], told: bool = True) -> float:
    """Return the mean accuracy on the tests of some tasks, with the task given, or among all classes that came."""
    tests = [(task, task.test[:]) for task in tasks]
    right = [strategy.predict(samples.x, task if told else None) == samples.y for task, samples in tests]
    return statistics.mean(float(answers.double().mean()) for answers in right)


class OldLogits:
    """Keeps the logits of some images for the classes that came, after each task."""

    def __init__(self, strategy: Strategy, x: Tensor) -> None:
        self.strategy, self.x = strategy, x
        self.logits: list[Tensor] = []
        self.classes: list[int] = []

    @on(TaskEnded)
    def ask(self, event: TaskEnded) -> None:
        """Ask for them."""
        self.classes += event.task.classes
        with evaluating(self.strategy), torch.no_grad():
            self.logits.append(self.strategy.model(self.x)[:, self.classes])


def non_forgetting(seed: int, root: str | None) -> list[Row]:
    """Ask whether old logits are the same bits."""
    rows = []
    for method, policy in (("infinity", "guarantee"), ("1e6", LARGE)):
        stream = fashion(root, epochs=4)
        strategy = built(partial(Lifelong, optimizer=RATE, policy=policy), stream, seed)
        x = torch.cat([task.test[:52].x for task in stream.tasks])[:256]
        run(strategy, stream, old := OldLogits(strategy, x), seed=seed)
        gaps = [float((old.logits[-1][:, : logits.shape[1]] - logits).abs().max()) for logits in old.logits[:-1]]
        same = all(torch.equal(old.logits[-1][:, : logits.shape[1]], logits) for logits in old.logits[:-1])
        rows.append({"method": method, "same": same, "gap": max(gaps)})
    return rows


STIFF = partial(Lifelong, optimizer=RATE, relax_steps=STEPS, per_class=STORED, active_classes="seen")
CONTROLS: dict[str, tuple[int, int, Callable[[nn.Module], Strategy]]] = {
    "fine-tuning": (4, 0, partial(Finetune, optimizer=RATE, active_classes="seen")),
    "guarantee": (4, 0, STIFF),
    "guarantee, relax all": (3, STORED, partial(STIFF, relax="all")),
    "guarantee, relax pair": (3, STORED, partial(STIFF, relax="pair", pair_error=0.05)),
    "Fisher": (4, 0, partial(STIFF, policy="fisher", strength=FISHER_STRENGTH)),
    "Fisher, decay 0.5, prune 0.1": (4, 0, partial(STIFF, policy="fisher", strength=FISHER_STRENGTH, decay=0.5, prune=0.1)),
    "EWC": (4, 0, partial(EWC, optimizer=RATE, strength=EWC_STRENGTH, active_classes="seen")),
    "ER": (4, STORED, partial(Replay, optimizer=RATE, memory="class_balanced", per_class=STORED, active_classes="seen")),
}
"""By method: passes, samples of each class that are stored, and what builds it."""


def controls(seed: int, root: str | None) -> list[Row]:
    """Run all methods with the same number of steps."""
    rows = []
    for method, (epochs, stored, make) in CONTROLS.items():
        stream = fashion(root, epochs=epochs)
        result = run(built(make, stream, seed), stream, seed=seed)
        taught = float(result.task_accuracy.diagonal().mean())  # right after each task
        own = {"given_after_each": taught, "given": float(result.task_accuracy[-1].mean()), "all": result.average_accuracy}
        rows.append({"method": method, "stored": stored * 10, **own})
    return rows


class Reached:
    """Counts the samples of a task until 80 % of its test images are right."""

    def __init__(self, strategy: Strategy, batches: int = 120) -> None:
        self.strategy, self.batches = strategy, batches
        self.samples: list[int] = []

    @on(TaskStarted)
    def begin(self, event: TaskStarted) -> None:
        """Start to count."""
        self.task, self.count, self.reached = event.task, 0, False
        self.samples.append((self.batches + 1) * 8)

    @on(BatchLearned)
    def ask(self, event: BatchLearned) -> None:
        """Count a batch, and ask."""
        self.count += 1
        if not self.reached and self.count <= self.batches and given(self.strategy, [self.task]) >= 0.8:
            self.reached, self.samples[-1] = True, 8 * self.count


def starts(rate: Any, start: str, strength: float, per_class: int) -> dict[str, Callable[[nn.Module], Strategy]]:
    """Return what builds a guarantee with fresh units and with another start, and the controls."""
    return {
        "fresh": partial(Lifelong, optimizer=rate, active_classes="seen"),
        start: partial(Lifelong, optimizer=rate, start=start, active_classes="seen"),
        "EWC": partial(EWC, optimizer=rate, strength=strength, active_classes="seen"),
        "ER": partial(Replay, optimizer=rate, memory="class_balanced", per_class=per_class, active_classes="seen"),
    }


def forward(seed: int, root: str | None) -> list[Row]:
    """Count samples until a task is known, with new units started from those of the nearest task, and fresh ones."""
    rows = []
    for method, make in starts(partial(SGD, lr=0.05), "nearest_task", EWC_STRENGTH, STORED).items():
        stream = fashion(root, epochs=1, batch_size=8, class_order=seed, scenario="task")
        run(strategy := built(make, stream, seed), stream, reached := Reached(strategy), seed=seed)
        rows.append({"method": method, "samples": reached.samples})
    return rows


class Passes:
    """Takes passes over stored samples from the same weights, one of stiff weights and one of plain steps, after later tasks."""

    def __init__(self, strategy: Lifelong, stream: Stream) -> None:
        self.strategy, self.tasks, self.rows, self.finished = strategy, stream.tasks, list[Row](), 0

    @on(Consolidated)
    def compare(self, event: Consolidated) -> None:
        """Take both, and put the weights back."""
        strategy, older = self.strategy, self.tasks[: self.finished]
        self.finished += 1
        if not older or strategy.memory is None:
            return
        saved = deepcopy(strategy.model.state_dict())
        seen = self.tasks[: self.finished]
        for stiffness in (0.0, 0.01):
            strategy.relax_stiffness = stiffness
            before = given(strategy, older), given(strategy, seen, told=False)
            strategy.relax(strategy.memory.all())
            after = given(strategy, older), given(strategy, seen, told=False)
            self.rows.append({"method": f"b = {stiffness:g}", "given": after[0] - before[0], "all": after[1] - before[1]})
            strategy.model.load_state_dict(saved)
            strategy.set_reference()


def backward(seed: int, root: str | None) -> list[Row]:
    """Measure what a relax pass does for older tasks."""
    stream = fashion(root, epochs=3)
    strategy = built(partial(STIFF, relax="all"), stream, seed)
    run(strategy, stream, passes := Passes(strategy, stream), seed=seed)
    rows = []
    for method in ("b = 0", "b = 0.01"):
        own = [row for row in passes.rows if row["method"] == method]
        rows.append({"method": method} | {name: statistics.mean(row[name] for row in own) for name in ("given", "all")})
    return rows


class Pair:
    """Takes a pass for the pair that is confused most, and as many plain steps on all stored samples, from the same weights."""

    def __init__(self, strategy: Lifelong, stream: Stream) -> None:
        self.strategy, self.task, self.rows = strategy, stream.tasks[0], list[Row]()
        self.passed: Relaxed | None = None

    @on(Relaxed)
    def note(self, event: Relaxed) -> None:
        """Take notice of the pair and the steps."""
        self.passed = event if self.passed is None else self.passed

    @on(Consolidated)
    def compare(self, event: Consolidated) -> None:
        """Take both, and put the weights back."""
        strategy = self.strategy
        assert strategy.memory is not None
        kept, saved, before = strategy.memory.all(), deepcopy(strategy.model.state_dict()), self.scores()
        for kind, stiffness in (("pair", 0.01), ("all", 0.0)):
            strategy.relax_kind, strategy.relax_stiffness = kind, stiffness
            strategy.relax(kept)
            pair, steps = (self.passed.classes, self.passed.steps) if self.passed is not None else ((0, 6), 0)
            row = {"method": kind, "pair": pair, "steps": steps}
            for when, scores in (("before", before), ("after", self.scores())):
                row |= {f"{name}_{when}": value for name, value in self.errors(scores, pair).items()}
            self.rows.append(row)
            strategy.model.load_state_dict(saved)
            strategy.set_reference()
            strategy.relax_steps = max(1, steps)
        strategy.relax_kind, strategy.relax_steps = "pair", STEPS

    def scores(self) -> Tensor:
        """Return the scores of the task's test images."""
        return self.strategy.scores(self.task.test[:].x)

    def errors(self, scores: Tensor, pair: tuple[int, ...]) -> dict[str, float]:
        """Return the pair's error between its two classes, and the accuracy over all classes of the task."""
        y, labels, own = self.task.test[:].y, torch.tensor(pair), torch.tensor(self.task.classes)
        of_pair = torch.isin(y, labels)
        wrong = labels[scores[of_pair][:, labels].argmax(1)] != y[of_pair]
        right = own[scores[:, own].argmax(1)] == y
        return {"error": float(wrong.double().mean()), "accuracy": float(right.double().mean())}


def confusion(seed: int, root: str | None) -> list[Row]:
    """Measure what a pass for a pair does."""
    stream = fashion(root, tasks=[[0, 2, 4, 6], [1, 3, 5, 7, 8, 9]], epochs=4)
    make = partial(STIFF, relax="pair", pair_error=0.05)
    strategy = built(make, stream, seed)
    run(strategy, stream, pair := Pair(strategy, stream), seed=seed, max_sessions=1)
    return pair.rows


def few_shot(seed: int, root: str | None) -> list[Row]:
    """Measure what is known of new characters after a few steps on a few drawings."""
    rows = []
    for method, make in starts(RATE, "nearest_class", 10.0, 5).items():  # EWC's steps with 100 are not stable here
        stream = few_shot_tasks("omniglot", base=136, tasks=4, way=10, shots=5, support=seed, epochs=20, batch_size=50, root=root)
        result = run(built(make, stream, seed, width=400, mean=0.92, std=0.27), stream, seed=seed)
        own = {"given": result.task_accuracy, "all": result.accuracy}
        new = {name: float(matrix.diagonal()[1:].mean()) for name, matrix in own.items()}
        rows.append({"method": method, **new, "base": float(result.accuracy[-1, 0])})
    return rows


def graceful(seed: int, root: str | None) -> list[Row]:
    """Measure the accuracy when more and more weights are set to 0, from the same weights by two kinds of stiffness."""
    stream = fashion(root, epochs=4)
    make = partial(STIFF, policy="fisher", strength=FISHER_STRENGTH)
    strategy = built(make, stream, seed)
    run(strategy, stream, seed=seed)
    saved = deepcopy(strategy.model.state_dict())
    alike = {name: torch.ones_like(weight) for name, weight in strategy.reference.items()}
    rows = []
    for method, stiffness in (("Fisher", strategy.stiffness), ("alike", alike)):
        curve = []
        for share in [number / 10 for number in range(10)]:  # each from the whole network
            strategy.model.load_state_dict(saved)
            strategy.set_reference()
            strategy.stiffness = dict(stiffness)
            strategy.prune(share)
            curve.append(given(strategy, stream.tasks))
        rows.append({"method": method, "given": curve})
    return rows


PROPERTIES: dict[str, Callable[[int, str | None], list[Row]]] = {
    "non-forgetting": non_forgetting,
    "controls": controls,
    "forward": forward,
    "backward": backward,
    "confusion": confusion,
    "few-shot": few_shot,
    "graceful": graceful,
}


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", choices=PROPERTIES, nargs="*", default=list(PROPERTIES))
    parser.add_argument("--data-root")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for seed, name in product(seeds, options.only):
        if (name, seed) not in {(row["property"], row["seed"]) for row in rows}:
            new = [{"property": name, "seed": seed, **row} for row in PROPERTIES[name](seed, options.data_root)]
            with options.results.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in new))
            rows += new
            print(*new, sep="\n", flush=True)
    for name in options.only:
        measured = [row for row in rows if row["seed"] in seeds]
        print("", table(name, measured), "", *verdicts(name, by_method(name, measured)), sep="\n")


if __name__ == "__main__":
    main()
