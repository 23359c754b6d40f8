"""Measuring: each method of ours and of Avalanche's on one stream, from the same weights, seed by seed; and what is said of it.

Theirs runs twice: on our engine, through `AvalancheStrategy`, with the very batches of ours and our evaluation, which the results
are compared by; and in Avalanche's own loop, which the time is taken from, the evaluation of each kind left out.
"""

from __future__ import annotations

import copy
import csv
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from clstream.experiments.parity.methods import BATCH, METHODS, Method
from clstream.strategies import AvalancheStrategy
from clstream.strategies.avalanche.session_dataset import quiet
from clstream.streams import from_tensors, split_digits, split_mnist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from clstream import Evaluated, SessionStarted, Strategy, Stream, TaskEnded, metrics, on, run
from clstream.avalanche.imports import import_avalanche
from clstream.models import Mlp
from clstream.seeds import isolated
from clstream.strategy.answers import allowed
from clstream.stream import Task

LEVEL = 0.01
"""Of Welch's test, below which two means are said to differ: there are some sixty tests in a table."""

KINDS = ("ours", "theirs", "their loop")


@dataclass(frozen=True)
class Measured:
    """What one run gave.

    Args:
        method: of `METHODS`, by name.
        kind: of `KINDS`.
        seed: of the initial weights, of the order of batches and of all draws.
        accuracy, task_accuracy: mean over tasks at the end, without and with the task given; both with it, on a task-incremental
            stream.
        forgetting: best earlier minus last, mean over tasks but the last.
        seconds: that the training took.

    """

    method: str
    kind: str
    seed: int
    accuracy: float
    task_accuracy: float
    forgetting: float
    seconds: float


class Labelled(TensorDataset):
    """A TensorDataset with the `targets` that Avalanche asks for, and labels that are whole numbers, as torchvision's."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y)
        self.targets: list[int] = y.tolist()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:  # type: ignore[override]
        return self.tensors[0][index], self.targets[index]


class Stopwatch:
    """An observer that takes the time of the training, without the evaluation."""

    def __init__(self) -> None:
        self.seconds, self.began = 0.0, 0.0

    @on(SessionStarted)
    def start(self, event: SessionStarted) -> None:
        """Start the first session: what the strategy does when it starts is not seen from here."""
        self.began = self.began or time.perf_counter()

    @on(Evaluated)
    def go_on(self, event: Evaluated) -> None:
        """Start after the evaluation of the session before."""
        self.began = time.perf_counter()

    @on(TaskEnded)
    def stop(self, event: TaskEnded) -> None:
        """Stop before the evaluation."""
        self.seconds += time.perf_counter() - self.began


def make_stream(data: str, per_task: int | None) -> Stream:
    """Return the stream: five tasks of two classes, flat floats from 0 to 1; of each task `per_task` training samples, if given.

    Args:
        data: "mnist" or "digits".
        per_task: at least 1, or None for all.

    """
    if data not in ("mnist", "digits"):
        raise ValueError(f"data must be mnist or digits, not {data!r}")
    tasks = (split_mnist() if data == "mnist" else split_digits()).tasks
    train, test = [task.train[:per_task] for task in tasks], [task.test[:] for task in tasks]
    scale = 255 if data == "mnist" else 1
    x, x_test = (torch.cat([part.x for part in parts]).flatten(1) / scale for parts in (train, test))
    y, y_test = (torch.cat([part.y for part in parts]) for parts in (train, test))
    return from_tensors(x, y, x_test, y_test, f"split_{data}", batch_size=BATCH)


def make_model(stream: Stream, seed: int) -> nn.Module:
    """Return the net, with the initial weights of a seed."""
    with isolated(seed, "parity"):
        return Mlp(stream.input_shape, stream.classes, (100, 100), init="xavier")


def sort_by_class(stream: Stream) -> Stream:
    """Return a stream whose tasks have their training samples class by class, as `nc_benchmark` lays them; not shuffled again."""

    def laid(task: Task) -> Task:
        samples = task.train[:]
        return replace(task, train=samples[samples.y.argsort(stable=True)])

    return replace(stream, tasks=[laid(task) for task in stream.tasks])


def run_on_our_engine(strategy: Strategy, stream: Stream, seed: int) -> tuple[Tensor, Tensor, float]:
    """Return the accuracy matrices, without and with the task given, and the seconds of training."""
    watch = Stopwatch()
    try:
        result = run(strategy, stream, watch, seed=seed)
    except FloatingPointError:  # it diverged: there is nothing to compare
        nothing = torch.full((len(stream.tasks), len(stream.tasks)), math.nan)
        return nothing, nothing, math.nan
    return result.accuracy, result.task_accuracy, watch.seconds


def run_in_their_loop(strategy: Any, stream: Stream, seed: int) -> tuple[Tensor, Tensor, float]:
    """Return the same of Avalanche's own loop over the same samples, in an order of its own; the answers are judged here.

    On a task-incremental stream a task that has not come yet has none: 0.
    """
    told, parts = stream.scenario == "task", [task.train[:] for task in stream.tasks]
    data = Labelled(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
    order = [label for task in stream.tasks for label in task.classes]
    make = import_avalanche("benchmarks").nc_benchmark
    benchmark = make(data, data, len(parts), task_labels=told, fixed_class_order=order)
    forward = import_avalanche("models").avalanche_forward
    tests = [(task, task.test[:]) for task in stream.tasks]
    rows, task_rows, seconds = list[list[float]](), list[list[float]](), 0.0
    with isolated(seed, "their loop"):
        for experience in benchmark.train_stream:
            begin = time.perf_counter()
            with quiet():
                strategy.train(experience)
            seconds += time.perf_counter() - begin
            strategy.model.eval()
            row, task_row = [], []
            with torch.no_grad():  # their PackNet writes to its masks when it is asked
                for task, samples in tests:
                    if told and task.id > len(rows):
                        row.append(0.0)
                        task_row.append(0.0)
                        continue
                    scores = forward(strategy.model, samples.x, torch.full_like(samples.y, task.id * told))
                    lacking = stream.classes - scores.shape[1]  # of classes to come: a score below all others
                    scores = F.pad(scores, (0, lacking), value=torch.finfo(scores.dtype).min)
                    inside = scores.masked_fill(~allowed(task, scores), float("-inf"))
                    row.append(float((scores.argmax(1) == samples.y).double().mean()))
                    task_row.append(float((inside.argmax(1) == samples.y).double().mean()))
            rows.append(row)
            task_rows.append(task_row)
    return torch.tensor(rows), torch.tensor(task_rows), seconds


def measure(method: Method, stream: Stream, seed: int) -> Iterator[Measured]:
    """Yield the runs of a method with one seed, of each kind."""
    stream = replace(stream, scenario=method.scenario, epochs=method.epochs)
    net = make_model(stream, seed)
    given = sort_by_class(stream) if method.by_class else stream

    def of(kind: str) -> tuple[Tensor, Tensor, float]:
        own = copy.deepcopy(net)
        if kind == "ours":
            with isolated(seed, "parity strategy"):
                ours = method.ours(own)
            return run_on_our_engine(ours, stream, seed)
        with method.within(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of loggers that aren't there
            with isolated(seed, "parity strategy"):
                strategy = method.theirs(own)
            if kind == "theirs":
                return run_on_our_engine(AvalancheStrategy(strategy), given, seed)
            return run_in_their_loop(strategy, given, seed)

    for kind in KINDS:
        accuracy, task_accuracy, seconds = of(kind)
        if method.scenario == "task":
            accuracy = task_accuracy
        yield Measured(
            method.name, kind, seed, metrics.average_accuracy(accuracy), metrics.average_accuracy(task_accuracy),
            metrics.forgetting(accuracy), seconds,
        )  # fmt: skip


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Return the difference of two means, half of its 95 % interval, and the p-value of Welch's test."""
    from scipy.stats import t

    difference = statistics.mean(a) - statistics.mean(b)
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    if not va + vb:
        return difference, 0.0, 1.0 if not difference else 0.0
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    error = math.sqrt(va + vb)
    return difference, float(t.ppf(0.975, freedom)) * error, float(2 * t.sf(abs(difference) / error, freedom))


MEASURES = {"accuracy": "accuracy", "task_accuracy": "with the task given", "forgetting": "forgetting"}
COLUMNS = ("method", *(cell for what in MEASURES.values() for cell in (f"{what}: ours", "theirs", "difference (p)")),
           "seconds: ours", "theirs", "ratio", "")  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def table_row(method: Method, runs: Sequence[Measured]) -> str:
    """Return a method's row of the table."""
    cells, agrees = [method.name], True
    for what in MEASURES:
        ours, theirs = ([getattr(measured, what) for measured in runs if measured.kind == kind] for kind in KINDS[:2])
        if any(map(math.isnan, ours + theirs)):
            cells += ["diverged" if any(map(math.isnan, values)) else f"{statistics.mean(values):.3f}" for values in (ours, theirs)]
            cells.append("")
            agrees = False
            continue
        difference, half, p = welch(ours, theirs)
        agrees &= p >= LEVEL
        cells += [f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in (ours, theirs)]
        cells.append(f"{difference:+.3f} ± {half:.3f} ({p:.2f})")
    own, loop = (statistics.median(item.seconds for item in runs if item.kind == kind) for kind in ("ours", "their loop"))
    cells += [f"{own:.2f}", f"{loop:.2f}", f"{loop / own:.1f}"]
    cells.append("agree" if agrees else "differ, as known" if method.apart else "DIFFER")
    return f"| {' | '.join(cells)} |"


def select_methods(names: str | None) -> list[Method]:
    """Return the methods whose names begin with one of some, with commas. Raises ValueError for one that begins none."""
    if names is None:
        return list(METHODS)
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if not name or not any(method.name.startswith(name) for method in METHODS):
            raise ValueError(f"there is no method {name!r}: there are {'; '.join(method.name for method in METHODS)}")
    return [method for method in METHODS if method.name.startswith(tuple(wanted))]


def compare(
    methods: Sequence[Method], seeds: Sequence[int], stream: Stream, out: Path | None, say: Callable[[str], None]
) -> list[Measured]:
    """Measure the methods, say a row of the table for each when it is done, and write each run to `out`, a CSV file."""
    done: list[Measured] = []
    say(HEAD)
    for method in methods:
        runs = [measured for seed in seeds for measured in measure(method, stream, seed)]
        done += runs
        say(table_row(method, runs))
        if out is not None:
            with out.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [field.name for field in fields(Measured)])
                writer.writeheader()
                writer.writerows(asdict(measured) for measured in done)
    return done
