"""Pre-training: a run of a strategy on one task, and the card of what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from clstream.adapters import adapter_params
from clstream.bus import on
from clstream.engine import check_fits, run
from clstream.evaluation import evaluate
from clstream.events import BatchLearned, Evaluated, RunStarted
from clstream.params import check_choice, check_number
from clstream.pretraining.probe import linear_probe
from clstream.pretraining.schedule import SCHEDULES, LearningRateSchedule
from clstream.strategy import Strategy
from clstream.stream import Stream

EVALUATIONS = 20
"""How often validation samples are asked about, at most, and never more than once an epoch."""

PROBED = 5000
"""Training samples of a linear probe on the way, at most; that of the card has all."""


def pretrain(
    strategy: Strategy,
    stream: Stream,
    *observers: object,
    schedule: str = "cosine",
    warmup: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    resume: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a strategy on a stream of one task, as `join_tasks` makes it, and return the card of its model, for `save_weights`.

    Where the stream holds back validation samples, they are what is asked about on the way: observers hear it as `Evaluated`. The
    test samples are asked about once, at the end.

    Args:
        strategy: whose model learns: Finetune, say, for supervised training, or SimCLR.
        stream: what it learns.
        observers: as in `clstream.run`; with a `Checkpointer` it can be resumed.
        schedule: of the learning rate: "cosine" or "constant", see `LearningRateSchedule`.
        warmup: epochs of linear warm-up, less than the stream has.
        seed, device, resume: as in `clstream.run`.

    Returns:
        "objective" (the strategy), "stream", "data" (the stream's fingerprint), "labels", "samples", "epochs", "accuracy" (of the
        strategy on the test samples), "linear_probe" (see `linear_probe`; None for a model without `features`), "seconds", and the
        params of the strategy, of adapters and of the run.

    Raises:
        ValueError, TypeError: for what doesn't fit together, before anything is learned.
        FloatingPointError: if a loss is not finite.

    """
    check_pretraining(strategy, stream, schedule, warmup, device)
    strategy.parts = (*strategy.parts, LearningRateSchedule(strategy.optimizer, schedule, warmup))
    strategy.params |= {"schedule": schedule, "warmup": warmup}  # a checkpoint is of one schedule
    held = stream.tasks[0].validation is not None
    every = len(next(iter(stream.session(0)))) * max(1, -(-stream.epochs // EVALUATIONS)) if held else None
    learned = stream.for_tuning() if held else stream
    result = run(strategy, learned, *observers, seed=seed, device=device, evaluate_every=every, resume=resume)
    accuracy = float(evaluate(strategy, stream.to(device))[0]) if held else result.average_accuracy
    model, task = strategy.model, stream.tasks[0]
    probed = linear_probe(model, task.train, task.test) if has_features(model) else None
    return {
        "objective": type(strategy).__name__,
        "stream": stream.name,
        "data": stream.fingerprint,
        "labels": list(task.classes),
        "samples": len(task.train),
        "epochs": stream.epochs,
        "accuracy": accuracy,
        "linear_probe": probed,
        "seconds": result.seconds,
        **adapter_params(model),
    } | {name: value for name, value in result.params.items() if name.startswith(("strategy.", "seed", "device", "stream.batch"))}


def check_pretraining(
    strategy: Strategy, stream: Stream, schedule: str = "cosine", warmup: float = 0.0, device: str | torch.device = "cpu"
) -> None:
    """Refuse, in one sentence, what `pretrain` can't do."""
    check_choice(SCHEDULES, schedule=schedule)
    check_number(0, warmup=warmup)
    if warmup >= stream.epochs:
        raise ValueError(f"warmup must be less than the epochs that there are, {stream.epochs}, not {warmup:g}")
    if stream.targets != ("label",):
        raise ValueError(f"{stream.name} has {' and '.join(stream.targets)} targets: pre-training is on labels")
    if len(stream) != 1:
        raise ValueError(f"{stream.name} has {len(stream)} sessions: pre-training is on one, as join_tasks makes it")
    check_fits(strategy, stream, device)


class ValidationLines:
    """Says after an epoch how well validation samples are answered, and what a linear probe reaches on them.

    Args:
        say: is given each line.

    """

    joins_late = True
    """Whether it has a place in a run that is resumed, and that it did not see before."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say, self.epoch = say, 0

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Keep the model, and the task, whose test samples are those for validation."""
        self.model, self.task = event.strategy.model, event.stream.tasks[0]

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        """Keep the number of the epoch; the first batch of a resumed run may lie within one."""
        self.epoch = event.batch.epoch + 1

    @on(Evaluated)
    def tell(self, event: Evaluated) -> None:
        """Print the accuracies of an evaluation within the session."""
        if event.evaluation.within_session:
            accuracy = float(event.evaluation.rows[-1].values["accuracy"][0])
            train = self.task.train[:: -(-len(self.task.train) // PROBED)]
            probed = linear_probe(self.model, train, self.task.test) if has_features(self.model) else float("nan")
            self.say(f"epoch {self.epoch}: validation accuracy {accuracy:.4f}, of a linear probe {probed:.4f}")


def has_features(model: nn.Module) -> bool:
    """Return whether a linear probe can be made of a model."""
    return callable(getattr(model, "features", None))
