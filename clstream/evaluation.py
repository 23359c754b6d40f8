"""Evaluation: one pass over the union of the test sets gives the class-IL and the task-IL row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clstream.state import held
from clstream.strategy import Strategy
from clstream.stream import Samples, Stream, Subset

CHUNK = 2048
"""Test samples that are scored together."""


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What a run has measured so far; the newest evaluation is the last row.

    Args:
        rows: class-IL accuracy on each task after each session: [(tasks,), float64].
        task_rows: the same with the task given at test.
        taught: which tasks were taught in the session of each row: [(tasks,), bool].
        probes: rows of the main matrix at each evaluation there was: also those of `evaluate_every`, within sessions.
        probe_taught, probe_steps: for each probe, the tasks taught since the one before, and the batches learned by then.
        baseline, task_baseline: the rows of the untrained strategy.
        step: batches learned so far.
        scenario: of the stream; it says which of both matrices is the main one.
        within_session: whether this evaluation came within a session, from `evaluate_every`; then no row was added.

    """

    rows: list[Tensor]
    task_rows: list[Tensor]
    taught: list[Tensor]
    probes: list[Tensor]
    probe_taught: list[Tensor]
    probe_steps: list[int]
    baseline: Tensor
    task_baseline: Tensor
    step: int
    scenario: str
    within_session: bool

    @property
    def accuracy(self) -> Tensor:
        """(evaluations, tasks), float64: class-IL, or domain-IL where tasks share classes; a row for each session that ended."""
        return torch.stack(self.rows) if self.rows else self.baseline.new_empty(0, len(self.baseline))

    @property
    def task_accuracy(self) -> Tensor:
        """(evaluations, tasks), float64: with the task given at test."""
        return torch.stack(self.task_rows) if self.task_rows else self.task_baseline.new_empty(0, len(self.task_baseline))

    @property
    def taught_matrix(self) -> Tensor:
        """(evaluations, tasks), bool: which tasks were taught in the session before each row; for `metrics`."""
        return torch.stack(self.taught) if self.taught else torch.zeros(0, len(self.baseline), dtype=torch.bool)

    @property
    def main(self) -> Tensor:
        """The accuracy matrix that the scenario asks for: `task_accuracy` if it is task-incremental, else `accuracy`."""
        return self.task_accuracy if self.scenario == "task" else self.accuracy


@contextmanager
def evaluating(strategy: Strategy) -> Iterator[None]:
    """Put every module that the strategy holds in evaluation mode, keep gradients off, and leave no trace of it afterwards."""
    modules = [module for _, root in held(strategy, nn.Module) for module in root.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module in modules:
            module.training = True


def evaluate(strategy: Strategy, stream: Stream) -> tuple[Tensor, Tensor]:
    """Return the accuracy on each task of the stream, without and with the task given: two (tasks,), float64, on the CPU.

    A strategy that keeps the base's `scores` and `predict` answers both questions from one forward pass; one that overrides
    them is asked twice, since its answer may depend on the task.

    Raises:
        ValueError: if the scores have the wrong shape or hold NaN.

    """
    once = type(strategy).scores is Strategy.scores and type(strategy).predict is Strategy.predict
    hits: list[Tensor] = []
    with evaluating(strategy):
        for task in stream.tasks:
            others = torch.ones(stream.classes, dtype=torch.bool, device=stream.device)
            others[list(task.classes)] = False
            right = torch.zeros(2, dtype=torch.float64, device=stream.device)
            for samples in chunks(task.test, stream.device):
                if once:
                    scores = strategy.scores(samples.x)
                    check_scores(scores, samples, stream, strategy)
                    answers = scores.argmax(1), scores.masked_fill(others, float("-inf")).argmax(1)
                else:
                    answers = strategy.predict(samples.x), strategy.predict(samples.x, task)
                    check_labels(answers, samples, strategy)
                right += torch.stack([(answer == samples.y).sum() for answer in answers])
            hits.append(right / len(task.test))
    rows = torch.stack(hits).cpu()
    return rows[:, 0].contiguous(), rows[:, 1].contiguous()


def chunks(part: Samples | Subset, device: torch.device | None) -> Iterator[Samples]:
    """Yield samples a chunk at a time, on `device`."""
    for start in range(0, len(part), CHUNK):
        chunk = part[start : start + CHUNK]
        yield chunk if device is None else chunk.to(device)


def check_scores(scores: Tensor, samples: Samples, stream: Stream, strategy: Strategy) -> None:
    """Refuse scores that are not (samples, classes)."""
    if scores.dim() != 2 or len(scores) != len(samples) or scores.shape[1] < stream.classes:
        model = getattr(strategy, "model", strategy)
        raise ValueError(
            f"{type(model).__name__} answers {len(samples)} samples with {tuple(scores.shape)}, but {stream.name} asks for "
            f"{(len(samples), stream.classes)}: build it with classes={stream.classes}"
        )


def check_labels(answers: tuple[Tensor, ...], samples: Samples, strategy: Strategy) -> None:
    """Refuse answers of `predict` that are not one label a sample."""
    for answer in answers:
        if answer.shape != samples.y.shape:
            raise ValueError(
                f"{type(strategy).__name__}.predict answers {len(samples)} samples with {tuple(answer.shape)}, not one label each"
            )
