"""A search inside a task: trials that differ in their learning rate take each step side by side, and the best one is kept.

NEVIS'22 (Bornschein et al., arXiv 2211.11747; JMLR 24(308), 2023), as its code (google-deepmind/dm_nevis, 2022-12-13) has it.

task      start    a model chosen by the learner: see `clstream.strategies.nevis.learners`
          trials   a copy of it for each learning rate
step      each trial takes one on the batch, with a rate that rises from 0 and falls along a cosine: see `warmup_cosine`
end       error    of each trial's last weights on the task's validation samples: 1 - accuracy, or 1 - mean average precision
          keep     the weights of the trial with the least error: the final model of the task's key

A task's key is its kind of targets and its classes. A question that names a task is answered by the final model of its key, so what
was learned of it is never forgotten; a task whose classes come again replaces it. Without the task the newest model answers, and
its classes alone compete.

What a trial costs and what is kept of it go by one criterion, its last weights. The authors' code ranks trials by the last
validation and keeps the best state of each, which may be another one.

Trials go side by side so that a checkpoint within a session has all of the search, and a resumed run ends as it would have. Their
steps count as learning FLOPs, all of them; validation, and the choice of a start, as consolidating FLOPs, which the authors' code
leaves out. All trials see the same batches.

Deviations: the searched option is the rate alone (code: label smoothing too); a task is learned for a number of epochs (code: up to
50,000 steps, validated every 1,000), and its rate falls along them; the warm-up is one epoch unless said otherwise (code: 7); "from
scratch" is from the weights that the learner was built with, the same for all tasks and trials of a run.

Nothing published can be verified with it: see `docs/nevis.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from clstream.strategies.nevis.events import StartChosen, TrialEnded
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from clstream.bus import on
from clstream.eval_mode import evaluating
from clstream.events import RunStarted, SessionStarted, TaskEnded
from clstream.losses import mean_loss
from clstream.measures.flops import consolidating
from clstream.measures.multilabel import average_precisions, with_positives
from clstream.models.heads import GrowingHead
from clstream.params import check_integer, check_positive
from clstream.seeds import derive
from clstream.strategy import OptimizerFactory, Strategy
from clstream.strategy.answers import mask_logits
from clstream.stream import Batch, Samples, Session, Subset, Task

Key = tuple[str, tuple[int, ...]]
"""What a model is kept for: a kind of targets, and classes."""

LAST_RATE = 1e-8
"""What the learning rate falls to."""

CHUNK = 256
"""Samples that are answered together."""


def key_of(task: Task) -> Key:
    """Return the key of a task."""
    return task.target, task.classes


def warmup_cosine(step: int, peak: float, warmup: int, steps: int, last: float = LAST_RATE) -> float:
    """Return the learning rate of a step: it rises from 0 to `peak` in `warmup` steps, then falls along a cosine to `last`."""
    if step < warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return last + (peak - last) * (1 + math.cos(math.pi * done)) / 2


@dataclass
class Trial:
    """One learning rate of a search: its network, and what steps it."""

    network: nn.Module
    optimizer: Optimizer
    rate: float


@dataclass
class FinalModel:
    """What a search kept: the network, and the number of the task that it learned last."""

    network: nn.Module
    task: int


class TaskSearch(Strategy):
    """The base of NEVIS's learners: a subclass says what a task starts from (`start`).

    `model` keeps the weights that it came with. A fixed head has the heads of all tasks as its rows.

    Args:
        model: (n, *input_shape) raw inputs to (n, classes) logits, with a fixed head.
        optimizer: makes the optimizer of each trial.
        rates: the learning rates to search, or, with `trials`, the lowest and the highest. None: the optimizer's own, no search.
        trials: so many rates, drawn log-uniformly from the run's seed and the task. None: each of `rates` once.
        warmup: epochs in which the rate rises, at most all steps but one.

    Raises:
        ValueError: for options out of range and for a growing head; where a run starts, for a stream that holds back no
            validation samples to compare several rates by.

    """

    checkpoint_modules = ("clstream.strategies.nevis.search",)
    fixed_classes = "the classes of the task"
    needs_task = True
    takes_regularisers = False
    learns_targets = ("label", "multilabel")
    mixes_targets = True
    bce_mean = "competing"
    exempt = {"grows": "each task has its head from the start, as rows of a fixed one"}  # noqa: RUF012  # as the base has it

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory = partial(SGD, lr=0.03, momentum=0.9, nesterov=True, weight_decay=1e-4),
        rates: list[float] | None = None,
        trials: int | None = None,
        warmup: int = 1,
    ) -> None:
        super().__init__(model, optimizer)
        check_rates(rates, trials)
        check_integer(0, warmup=warmup)
        if any(isinstance(module, GrowingHead) for module in model.modules()):
            raise ValueError(f"{type(self).__name__} has a head for each task from the start: give the model head='fixed'")
        self.make_optimizer, self.rates, self.drawn, self.warmup = optimizer, rates, trials, warmup
        self.seed, self.step, self.steps, self.rising = 0, 0, 1, 0
        self.key: Key | None = None  # of the task that is learned, or was the newest
        self.trials: list[Trial] = []
        self.finals: dict[Key, FinalModel] = {}  # the newest last

    # What subclasses say

    @property
    def network(self) -> nn.Module:
        """What is copied and learned: here the whole model."""
        return self.model

    def inputs(self, x: Tensor) -> Tensor:
        """Return what networks are given for raw inputs: here these."""
        return x

    def start(self, session: Session) -> FinalModel | None:
        """Return the final model that a task starts from; None for the weights that the learner came with, as here."""
        return None

    # Learning

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Take the run's seed; refuse a stream on which rates can't be compared."""
        self.seed = event.seed
        rates = self.drawn or len(self.rates or (0.0,))
        if rates > 1 and any(task.validation is None for task in event.stream.tasks):
            raise ValueError(
                f"{type(self).__name__} compares {rates} learning rates on held-out samples, and {event.stream.name} holds back "
                "none: build it with validation=0.15, say, or give one rate"
            )

    @on(SessionStarted)
    def start_trials(self, event: SessionStarted) -> None:
        """Start a task's trials; a further session of the task goes on with them, and its rates rise and fall anew."""
        session = event.session
        if not self.trials:
            with consolidating():
                start = self.start(session) if self.finals else None
            self.key = key_of(session.task)
            self.emit(StartChosen(session.task.id, -1 if start is None else start.task))
            network = self.network if start is None else start.network
            for rate in self.rates_of(session):
                trial = deepcopy(network)
                optimizer = self.make_optimizer(trial.parameters())
                self.trials.append(Trial(trial, optimizer, optimizer.param_groups[0]["lr"] if rate is None else rate))
        epoch = len(next(iter(session)))
        self.step, self.steps = 0, epoch * len(session)
        self.rising = min(self.steps - 1, self.warmup * epoch)

    def rates_of(self, session: Session) -> list[float] | list[None]:
        """Return the learning rates of a session's task; None is the optimizer's own."""
        if self.rates is None:
            return [None]
        if self.drawn is None:
            return self.rates
        draw = torch.Generator().manual_seed(derive(self.seed, "rates", session.index))
        low, high = min(self.rates), max(self.rates)
        rates: list[float] = (low * (high / low) ** torch.rand(self.drawn, generator=draw, dtype=torch.float64)).tolist()
        return rates

    def learn(self, batch: Batch) -> Tensor:
        """Have each trial take its step; return the least of their losses, since one that diverges ends no run."""
        samples = batch.samples
        x = self.inputs(samples.x if self.augment is None else self.augment(samples.x))
        losses = torch.stack([self.take_step(trial, x, samples) for trial in self.trials])
        self.step += 1
        return losses.nan_to_num(nan=math.inf, posinf=math.inf).amin()

    def take_step(self, trial: Trial, x: Tensor, samples: Samples) -> Tensor:
        """Have a trial take its step, and return its loss: a detached scalar."""
        for group in trial.optimizer.param_groups:
            group["lr"] = warmup_cosine(self.step, trial.rate, self.rising, self.steps)
        loss = mean_loss(self.of_key(trial.network(x)), samples.y, samples.target, self.bce_mean)
        trial.optimizer.zero_grad()
        loss.backward()
        trial.optimizer.step()
        return loss.detach()

    def of_key(self, outputs: Tensor) -> Tensor:
        """Return outputs with those of other classes than the newest task's masked with -inf."""
        assert self.key is not None
        return mask_logits(outputs, torch.tensor(self.key[1], device=outputs.device))

    @on(TaskEnded)
    def keep_best(self, event: TaskEnded) -> None:
        """Keep the network of the trial with the least error, and tell of each trial."""
        held = event.task.validation
        with evaluating(self):
            errors = [math.nan if held is None else self.error(trial.network, held) for trial in self.trials]
        best = min(range(len(errors)), key=lambda number: errors[number])
        for number, (trial, error) in enumerate(zip(self.trials, errors, strict=True)):
            self.emit(TrialEnded(event.task.id, number, trial.rate, error, number == best))
        assert self.key is not None
        self.finals.pop(self.key, None)
        self.finals[self.key] = FinalModel(self.trials[best].network, event.task.id)
        self.trials = []

    def error(self, network: nn.Module, held: Samples | Subset) -> float:
        """Return 1 - accuracy, or 1 - mean average precision, of a network on samples; infinite if its outputs are not finite."""
        device, parts = next(network.parameters()).device, list[Tensor]()
        for rows in torch.arange(len(held)).split(CHUNK):
            x = held[rows.to(held.y.device)].x.to(device)
            parts.append(self.of_key(network(self.inputs(x))))
        scores, y = torch.cat(parts), held.y.to(device)
        assert self.key is not None
        own = scores[:, list(self.key[1])]
        return 1 - quality(scores, y, held.target) if bool(own.isfinite().all()) else math.inf

    # Answering

    def answering(self, task: Task | None) -> tuple[nn.Module, Key | None]:
        """Return the network that answers, and what it was learned for, if it was."""
        key = self.key if task is None else key_of(task)
        if self.trials and key == self.key:
            return self.trials[0].network, key  # the search is not over: the first trial
        if key in self.finals:
            return self.finals[key].network, key
        return self.newest.network if self.newest else self.network, None

    @property
    def newest(self) -> FinalModel | None:
        """The final model of the newest task; None before there is one."""
        return next(reversed(self.finals.values()), None)

    def scores(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Return (n, outputs): of the task's final model if the question names the task, else of the newest one."""
        network, key = self.answering(task)
        outputs: Tensor = network(self.inputs(x))
        return outputs if key is None else mask_logits(outputs, torch.tensor(key[1], device=outputs.device))

    def answering_weights(self) -> Iterator[Tensor]:
        """Yield the parameters and buffers of all final models; before there is one, of the model."""
        for network in [final.network for final in self.finals.values()] or [self.model]:
            yield from (*network.parameters(), *network.buffers())


def quality(scores: Tensor, y: Tensor, target: str) -> float:
    """Return the accuracy of (n, classes) scores or, of multi-label ones, the mean average precision; NaN without a positive."""
    if target == "label":
        return float((scores.argmax(1) == y).double().mean())
    columns = with_positives(y, None)
    return float(average_precisions(scores[:, columns], y[:, columns]).mean()) if len(columns) else math.nan


def check_rates(rates: object, trials: object) -> None:
    """Raise ValueError, in one sentence, for what is no search over learning rates."""
    check_integer(1, none=True, trials=trials)
    if rates is not None and (not isinstance(rates, (list, tuple)) or not rates):
        raise ValueError(f"rates must be a list of learning rates, as [0.01, 0.1], or None, not {rates!r:.100}")
    for position, rate in enumerate(rates or ()):
        check_positive(**{f"rates[{position}]": rate})
    if trials is not None and (rates is None or len(rates) < 2 or min(rates) == max(rates)):
        raise ValueError(f"trials={trials} draws rates between the lowest and the highest of `rates`: give two, not {rates!r:.100}")
