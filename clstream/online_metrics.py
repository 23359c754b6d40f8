"""Online metrics, which observers measure on the way: prequential accuracy, late labels, boundaries, few shots, plasticity."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clstream import metrics
from clstream.bus import Event, ObserverError, on
from clstream.drift_detection import ShiftDetected
from clstream.engine import InputsArrived, SessionArrived
from clstream.evaluation import evaluating
from clstream.events import BatchLearned, BatchReady, Evaluated, RunStarted, SessionEnded, SessionStarted
from clstream.models.units import hidden_units, noting
from clstream.params import check_integer


@dataclass(frozen=True, slots=True, eq=False)
class PrequentialMeasured(Event):
    """A session is over: the accuracy on its samples, and on all samples so far, before they were learned."""

    session: float
    mean: float

    def curves(self) -> dict[str, float]:
        """Return both, for the tracker."""
        return {"prequential/session": self.session, "prequential/mean": self.mean}


class Prequential:
    """Measures prequential accuracy (test-then-train): the strategy predicts each batch before it learns it.

    Nothing in the run is changed by that. The first epoch of a session counts alone: later ones bring what was learned. It asks
    `Strategy.predict_online`. It is for labels: a stream with other targets is refused where the run starts. Hits stay on the
    device until they are asked for. When a session ends it emits `PrequentialMeasured`, so the tracker draws it.

    Args:
        every: ask at every so many batches.

    """

    def __init__(self, every: int = 1) -> None:
        check_integer(1, every=every)
        self.every = every
        self._begin()

    def _begin(self) -> None:
        self.hits: list[Tensor] = []
        self.sizes: list[int] = []
        self.first = 0  # of this session's, among them
        self.before = torch.zeros(2, dtype=torch.int64)  # hits and samples of the sessions before

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Forget the run before. Raises ObserverError for a stream with other targets than labels."""
        stream: Any = event.stream
        if others := [target for target in stream.targets if target != "label"]:
            raise ObserverError(f"prequential accuracy is of labels, and {stream.name} has {others[0]} ones: leave Prequential out")
        self.started = event
        self._begin()

    @on(BatchReady)
    def ask(self, event: BatchReady) -> None:
        """Have the strategy predict the batch's labels, and count the hits."""
        batch = event.batch
        if batch.epoch or batch.index % self.every:
            return
        strategy, samples = self.started.strategy, batch.samples
        with evaluating(strategy):
            self.hits.append((strategy.predict_online(samples.x) == samples.y).sum())
        self.sizes.append(len(samples))

    @property
    def counts(self) -> tuple[Tensor, Tensor]:
        """Hits and samples of each batch that was asked: two (batches,), int64, on the CPU."""
        hits = torch.stack(self.hits).cpu() if self.hits else torch.zeros(0, dtype=torch.int64)
        return hits, torch.tensor(self.sizes, dtype=torch.int64)

    def _sums(self, first: int) -> Tensor:
        """Return hits and samples since some batch: (2,), int64."""
        hits = int(torch.stack(self.hits[first:]).sum()) if self.hits[first:] else 0
        return torch.tensor([hits, sum(self.sizes[first:])])

    @property
    def accuracy(self) -> float:
        """The accuracy on all samples so far; NaN if there are none."""
        return _share(self._sums(0))

    def curve(self, window: int = 100) -> Tensor:
        """Return the accuracy over the newest `window` batches that were asked, at each of them: (batches,), float64."""
        check_integer(1, window=window)
        sums = [counts.cumsum(0).double() for counts in self.counts]
        late = [total - torch.cat([total.new_zeros(min(window, len(total))), total[:-window]]) for total in sums]
        return late[0] / late[1]

    @on(SessionEnded)
    def emit_measured(self, event: SessionEnded) -> None:
        """Emit what was measured."""
        session = self._sums(self.first)
        self.first, self.before = len(self.sizes), self.before + session
        measured = PrequentialMeasured(_share(session), _share(self.before))
        if self.started.run is not None:
            self.started.run.emit_to_observers(measured)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"hits": self.counts[0], "sizes": list(self.sizes), "first": self.first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        device = self.started.stream.device or "cpu"
        self.hits = list(state["hits"].to(device).unbind())
        self.sizes, self.first = list(state["sizes"]), state["first"]
        self.before = torch.stack([state["hits"][: self.first].sum(), torch.tensor(sum(self.sizes[: self.first]))])


@dataclass(frozen=True, slots=True, eq=False)
class DelayedMeasured(Event):
    """The labels of inputs came that were answered when they arrived: the accuracy of those answers, and of all such so far."""

    name: str
    session: float
    mean: float

    def curves(self) -> dict[str, float]:
        """Return both, for the tracker."""
        return {"delayed/session": self.session, "delayed/mean": self.mean}


class Delayed:
    """Measures answers to inputs whose labels come later: the strategy predicts when they arrive, and the labels judge that.

    Prequential accuracy asks when a batch is about to be learned; by then the strategy may have learned what came in between. It
    is for labels. When the labels come it emits `DelayedMeasured`, so the tracker draws it.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Tensor] = {}  # predictions, (n,), int64, on the CPU, by the name of the session
        self.hits, self.samples = 0, 0

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Forget the run before. Raises ObserverError for a stream with other targets than labels."""
        if event.stream.target != "label":
            raise ObserverError(f"Delayed is of labels, and {event.stream.name} has {event.stream.target} ones: leave it out")
        self.started, self.answers, self.hits, self.samples = event, {}, 0, 0

    @on(InputsArrived)
    def answer(self, event: InputsArrived) -> None:
        """Have the strategy predict the labels, once."""
        if event.name not in self.answers:
            strategy = self.started.strategy
            with evaluating(strategy):
                parts = [strategy.predict_online(x) for x in event.x.split(1024)]
            self.answers[event.name] = torch.cat(parts).cpu()

    @on(SessionArrived)
    def judge(self, event: SessionArrived) -> None:
        """Emit how many answers were right, if the session's inputs were answered when they arrived."""
        answers = self.answers.pop(event.name, None)
        if answers is None or self.started.run is None:
            return
        right = int((answers == event.y.cpu()).sum())
        self.hits, self.samples = self.hits + right, self.samples + len(answers)
        measured = DelayedMeasured(event.name, right / len(answers), self.hits / self.samples)
        self.started.run.emit_to_observers(measured)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"answers": dict(self.answers), "hits": self.hits, "samples": self.samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.answers, self.hits, self.samples = dict(state["answers"]), state["hits"], state["samples"]


@dataclass(frozen=True, slots=True, eq=False)
class FewShotMeasured(Event):
    """A session was evaluated: accuracy on base and novel classes, their harmonic mean, that over all classes seen, the drop."""

    base: float
    novel: float
    harmonic: float
    seen: float
    drop: float

    def curves(self) -> dict[str, float]:
        """Return those that are defined, for the tracker: after the base session there are no novel classes."""
        named = {name: getattr(self, name) for name in ("base", "novel", "harmonic", "seen", "drop")}
        return {f"few_shot/{name}": value for name, value in named.items() if not math.isnan(value)}


class FewShot:
    """Measures few-shot class-incremental runs after each session, and emits `FewShotMeasured`, so the tracker draws it.

    `base`, `novel` and `harmonic` are those of `clstream.metrics`, means over tasks; `seen` is the accuracy on all test samples of
    the classes seen so far, and `drop` how much lower that is than after the first session. It is for labels.

    Args:
        tasks: how many of the first tasks are the base.

    """

    def __init__(self, tasks: int = 1) -> None:
        check_integer(1, tasks=tasks)
        self.tasks = tasks

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Keep the run. Raises ObserverError for a stream with other targets than labels, or without so many tasks."""
        stream: Any = event.stream
        if others := [target for target in stream.targets if target != "label"]:
            raise ObserverError(f"few-shot accuracies are of labels, and {stream.name} has {others[0]} ones: leave FewShot out")
        if self.tasks > len(stream.tasks):
            raise ObserverError(f"{stream.name} has {len(stream.tasks)} tasks, so no {self.tasks} of them are the base of FewShot")
        self.started = event

    @on(Evaluated)
    def emit_measured(self, event: Evaluated) -> None:
        """Emit what was measured; not within a session."""
        evaluation = event.evaluation
        if evaluation.within_session or self.started.run is None:
            return
        marks, seen = evaluation.taught, evaluation.measured["accuracy"][:, -1]
        newest = {name: float(curve[-1]) for name, curve in metrics.few_shot_curves(evaluation.accuracy, marks, self.tasks).items()}
        self.started.run.emit_to_observers(FewShotMeasured(**newest, seen=float(seen[-1]), drop=metrics.performance_drop(seen)))


@dataclass(frozen=True, slots=True, eq=False)
class PlasticityMeasured(Event):
    """A session is over: what tells whether the network can still learn."""

    newest: float
    dead: float
    effective_rank: float
    weight_norm: float

    def curves(self) -> dict[str, float]:
        """Return all of it, for the tracker."""
        return {f"plasticity/{name}": getattr(self, name) for name in ("newest", "dead", "effective_rank", "weight_norm")}


class Plasticity:
    """Measures after each session whether a network can still learn, and emits `PlasticityMeasured`, so the tracker draws it.

    newest          the accuracy on test samples of the task that was just learned, for labels: it falls where plasticity is lost
    dead            the share of hidden units that are 0 for all samples: no gradient reaches a ReLU there
    effective_rank  of the hidden activations, the mean over layers (Roy & Vetterli 2007): exp of the entropy of the singular
                    values, as shares of their sum; a channel of a convolution counts with its mean over places
    weight_norm     the Euclidean length of all parameters together

    Hidden units are those of `clstream.models.units`; a network without any has neither of the two in the middle (NaN).

    Args:
        samples: how many of the session's samples, and of its task's test samples, are asked about, at most.

    """

    def __init__(self, samples: int = 500) -> None:
        check_integer(2, samples=samples)
        self.samples = samples
        self.measured: list[PlasticityMeasured] = []

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Forget the run before. Raises ObserverError for a stream with other targets than labels."""
        stream: Any = event.stream
        if others := [target for target in stream.targets if target != "label"]:
            raise ObserverError(f"Plasticity is of labels, and {stream.name} has {others[0]} ones: leave it out")
        self.started, self.measured = event, []

    @on(SessionEnded)
    def measure(self, event: SessionEnded) -> None:
        """Ask the strategy and its network, and emit what was measured."""
        strategy, stream = self.started.strategy, self.started.stream
        model: Any = strategy.model
        weights = list(model.parameters())
        x = event.session.samples[: self.samples].x.to(weights[0].device)
        test = stream.tasks[stream.task_of(event.session.index)].test[: self.samples].to(weights[0].device)
        dead, rank = math.nan, math.nan
        with evaluating(strategy):
            newest = float((strategy.predict(test.x) == test.y).double().mean())
            try:
                units = hidden_units(model, x[:8])
            except ValueError:  # there are none
                units = []
            if units:
                with noting(units) as noted:
                    model(x)
                dead = float(torch.cat([(layer == 0).all(2).all(0) for layer in noted]).double().mean())
                rank = float(torch.stack([effective_rank(layer.mean(2)) for layer in noted]).mean())
            norm = float(torch.stack([weight.detach().double().square().sum() for weight in weights]).sum().sqrt())
        self.measured.append(PlasticityMeasured(newest, dead, rank, norm))
        if self.started.run is not None:
            self.started.run.emit_to_observers(self.measured[-1])

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"measured": [[m.newest, m.dead, m.effective_rank, m.weight_norm] for m in self.measured]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.measured = [PlasticityMeasured(*numbers) for numbers in state["measured"]]


def effective_rank(activations: Tensor) -> Tensor:
    """Return exp of the entropy of the singular values of (n, units) activations, as shares of their sum: a scalar; 0 of zeros."""
    shares = torch.linalg.svdvals(activations.double())
    total = shares.sum()
    shares = shares / total.clamp(min=torch.finfo(shares.dtype).tiny)
    return torch.where(total > 0, torch.special.entr(shares).sum().exp(), 0.0)


def _share(sums: Tensor) -> float:
    hits, samples = sums.tolist()
    return hits / samples if samples else math.nan


def delays(alarms: Sequence[int], boundaries: Sequence[int], within: int | None = None) -> list[int | None]:
    """Return for each boundary the steps until it is detected; None for one that is not."""
    steps: list[int | None] = []
    raised, ordered = sorted(alarms), sorted(boundaries)
    for first, end in zip(ordered, [*ordered[1:], math.inf][: len(ordered)], strict=True):
        last = end if within is None else min(end, first + within + 1)
        place = bisect_left(raised, first)
        steps.append(raised[place] - first if place < len(raised) and raised[place] < last else None)
    return steps


def precision(alarms: Sequence[int], boundaries: Sequence[int], within: int | None = None) -> float:
    """Return the share of alarms that detect a boundary; NaN without alarms."""
    return _fraction(sum(delay is not None for delay in delays(alarms, boundaries, within)), len(alarms))


def recall(alarms: Sequence[int], boundaries: Sequence[int], within: int | None = None) -> float:
    """Return the share of boundaries that are detected; NaN without boundaries."""
    return _fraction(sum(delay is not None for delay in delays(alarms, boundaries, within)), len(boundaries))


def mean_delay(alarms: Sequence[int], boundaries: Sequence[int], within: int | None = None) -> float:
    """Return the mean number of steps until a boundary is detected, over those that are; NaN if none is."""
    detected = [delay for delay in delays(alarms, boundaries, within) if delay is not None]
    return _fraction(sum(detected), len(detected))


def _fraction(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


@dataclass(frozen=True, slots=True, eq=False)
class DetectionMeasured(Event):
    """A session is over: how well the boundaries so far were detected."""

    precision: float
    recall: float
    delay: float
    false_alarms: int

    def curves(self) -> dict[str, float]:
        """Return all of it, for the tracker."""
        return {
            "detection/precision": self.precision,
            "detection/recall": self.recall,
            "detection/delay": self.delay,
            "detection/false_alarms": self.false_alarms,
        }


class Detection:
    """Measures drift detection: the alarms (`ShiftDetected`) against the true boundaries, which it takes from the stream.

    A boundary is where a session draws from another task than the one before. When a session ends it emits `DetectionMeasured`,
    so the tracker draws it.

    Args:
        within: steps after which an alarm no longer counts for a boundary. None: until the next one.

    """

    def __init__(self, within: int | None = None) -> None:
        check_integer(0, none=True, within=within)
        self.within = within
        self.alarms: list[int] = []
        self.boundaries: list[int] = []
        self.step = 0

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Forget the run before."""
        self.started = event
        self.alarms, self.boundaries, self.step = [], [], 0

    @on(SessionStarted)
    def note_boundary(self, event: SessionStarted) -> None:
        """Note a boundary if the session draws from another task than the one before."""
        index, task_of = event.session.index, self.started.stream.task_of
        if index and task_of(index) != task_of(index - 1):
            self.boundaries.append(self.step)

    @on(ShiftDetected)
    def note_alarm(self, event: ShiftDetected) -> None:
        """Note an alarm; it comes before the batch is learned."""
        self.alarms.append(self.step)

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        """Count a batch."""
        self.step += 1

    @property
    def delays(self) -> list[int | None]:
        """For each boundary the steps until it was detected; None for one that was not."""
        return delays(self.alarms, self.boundaries, self.within)

    @property
    def measured(self) -> DetectionMeasured:
        """How well the boundaries so far were detected."""
        given = self.alarms, self.boundaries, self.within
        hits = sum(delay is not None for delay in self.delays)
        return DetectionMeasured(precision(*given), recall(*given), mean_delay(*given), len(self.alarms) - hits)

    @on(SessionEnded)
    def emit_measured(self, event: SessionEnded) -> None:
        """Emit what was measured."""
        if self.started.run is not None:
            self.started.run.emit_to_observers(self.measured)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"alarms": list(self.alarms), "boundaries": list(self.boundaries), "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.alarms, self.boundaries, self.step = list(state["alarms"]), list(state["boundaries"]), state["step"]
