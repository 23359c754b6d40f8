"""Rejection: after each session, which samples a strategy would turn away as novel, by thresholds from held-out samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clstream.bus import Event, ObserverError, on
from clstream.eval_mode import evaluating
from clstream.events import Evaluated, RunStarted
from clstream.measures import MEASURES
from clstream.params import check_share
from clstream.stream import Samples, Stream, Subset, TestSet

TOGETHER = 1024
"""Samples that are answered together."""


@dataclass(frozen=True, slots=True, eq=False)
class RejectionMeasured(Event):
    """A session was evaluated: what would be rejected, in numbers by name, as `evt/rejected/known`; see `Rejection`."""

    numbers: Mapping[str, float]

    def curves(self) -> dict[str, float]:
        """Return the numbers that are defined, for the tracker."""
        return {f"open_set/{name}": number for name, number in self.numbers.items() if not math.isnan(number)}


class Rejection:
    """Measures rejection after each session, and emits `RejectionMeasured`, so the tracker draws it.

    A sample is rejected if its novelty is above a threshold: the least one at which at most a `share` of the calibration samples is
    rejected. These are every other one of the validation samples of the tasks seen so far, right or wrong; no test sample is. A
    strategy that has `novelties` is measured by each kind of novelty there, any other by `novelty`. The curves are
    `open_set/KIND/...`, where a SET is a test set that the stream has as a probe:

        threshold                 the threshold
        rejected/calibration      share of the calibration samples that is rejected, at most `share`
        rejected/held_out         the same of the other validation samples
        rejected/known            the same of the test samples of the tasks seen
        accepted_accuracy/known   accuracy among those of them that are accepted; NaN is left out
        rejected/SET              share of a probe's samples that is rejected: of a strange one more is better
        accepted_accuracy/SET     accuracy among the accepted ones of a probe of known classes
        auroc/SET, fpr95/SET      of a strange probe against the test samples of the tasks seen: see `clstream.measures`

    Of a probe whose classes are strange until they are taught, those count that were not taught. It is for labels.

    Args:
        share: of the calibration samples, that may be rejected; from 0 to below 1.

    """

    def __init__(self, share: float = 0.05) -> None:
        check_share(share=share)
        self.share = share

    @on(RunStarted)
    def begin(self, event: RunStarted) -> None:
        """Keep the run. Raises ObserverError for a stream without held-out samples, and for what tells no novelty."""
        stream: Any = event.stream
        if stream.targets != ("label",):
            raise ObserverError(f"rejection is of labels, and {stream.name} has others: leave Rejection out")
        if any(task.validation is None for task in stream.tasks):
            raise ObserverError(
                f"Rejection takes its thresholds from held-out samples, and {stream.name} holds none back: build it with "
                "validation=0.1, say"
            )
        if not event.strategy.tells_novelty(stream.targets):
            raise ObserverError(f"{type(event.strategy).__name__} can't tell how strange inputs are: leave Rejection out")
        self.started, self.stream = event, stream

    @on(Evaluated)
    def emit_measured(self, event: Evaluated) -> None:
        """Emit what was measured; not within a session."""
        if event.evaluation.within_session or self.started.run is None:
            return
        seen = event.evaluation.after_sessions[-1].seen
        self.started.run.emit_to_observers(RejectionMeasured(self.measure(seen)))

    def measure(self, seen: Tensor) -> dict[str, float]:
        """Return the numbers after the tasks seen, (tasks,) bool, were taught."""
        stream: Stream = self.stream
        tasks = [task for task in stream.tasks if bool(seen[task.id])]
        held = [part for task in tasks for part in self._halves(task.validation)]
        calibration, other = self._asked(held[::2]), self._asked(held[1::2])
        known = self._asked([task.test for task in tasks])
        taught = stream.task_heads[seen].any(0)
        probes = {probe: self._asked([_untaught(probe, taught)]) for probe in stream.probes}
        numbers = {}
        for kind, novelty in calibration.novelties.items():
            threshold = threshold_of(novelty, self.share)
            numbers[f"{kind}/threshold"] = threshold
            for name, asked in (("calibration", calibration), ("held_out", other), ("known", known)):
                numbers[f"{kind}/rejected/{name}"] = asked.rejected(kind, threshold)
            numbers[f"{kind}/accepted_accuracy/known"] = known.accepted_accuracy(kind, threshold)
            for probe, asked in probes.items():
                if not len(asked.right):
                    continue  # all of its classes were taught
                numbers[f"{kind}/rejected/{probe.name}"] = asked.rejected(kind, threshold)
                if probe.known is True:
                    numbers[f"{kind}/accepted_accuracy/{probe.name}"] = asked.accepted_accuracy(kind, threshold)
                else:
                    for name in ("auroc", "fpr95"):
                        numbers[f"{kind}/{name}/{probe.name}"] = _compared(name, known.novelties[kind], asked.novelties[kind])
        return numbers

    @staticmethod
    def _halves(part: Samples | Subset | None) -> tuple[Samples, Samples]:
        assert part is not None
        return part[::2], part[1::2]

    def _asked(self, parts: Sequence[Samples | Subset]) -> _Asked:
        """Return the strategy's answers about samples."""
        strategy, device = self.started.strategy, self.stream.device or "cpu"
        novelties: dict[str, list[Tensor]] = {}
        right = [torch.zeros(0, dtype=torch.bool)]
        with evaluating(strategy):
            for samples in _in_parts(parts):
                x = samples.x.to(device)
                several = getattr(strategy, "novelties", None)
                for kind, novelty in (several(x) if callable(several) else {"novelty": strategy.novelty(x)}).items():
                    novelties.setdefault(kind, []).append(novelty.double().cpu())
                right.append(strategy.predict(x).cpu() == samples.y.cpu())
        return _Asked({kind: torch.cat(values) for kind, values in novelties.items()}, torch.cat(right))


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """What a strategy answered about samples: (n,) novelties by kind, and (n,) bool, whether the label is right."""

    novelties: Mapping[str, Tensor]
    right: Tensor

    def rejected(self, kind: str, threshold: float) -> float:
        """Return the share that is above the threshold; NaN of none."""
        return float((self.novelties[kind] > threshold).double().mean())

    def accepted_accuracy(self, kind: str, threshold: float) -> float:
        """Return the accuracy of those that are not; NaN of none."""
        return float(self.right[self.novelties[kind] <= threshold].double().mean())


def threshold_of(novelty: Tensor, share: float) -> float:
    """Return the least of (n,) novelties above which at most a share of them is. Raises ValueError for none."""
    if not len(novelty):
        raise ValueError("a threshold needs held-out samples, and there are none: hold back more of them")
    return float(novelty.sort().values[max(0, math.ceil(len(novelty) * (1 - share) - 1e-9) - 1)])


def _compared(name: str, known: Tensor, strange: Tensor) -> float:
    """Return a measure of novelty, by name, of strange samples against known ones."""
    measure: Any = MEASURES[name]()
    y = torch.cat([torch.zeros(len(known)), torch.ones(len(strange))]).long()
    return float(measure.value(torch.cat([known, strange]), y))


def _untaught(probe: TestSet, taught: Tensor) -> Samples | Subset:
    """Return a probe's samples, without those of classes that are no longer strange."""
    if probe.known != "taught":
        return probe.samples
    rows = (~taught[probe.samples.y.cpu()]).nonzero().flatten()
    return probe.samples[rows.to(probe.samples.y.device)]


def _in_parts(parts: Sequence[Samples | Subset]) -> Iterator[Samples]:
    """Yield the samples of all parts, at most `TOGETHER` at a time."""
    for part in parts:
        for start in range(0, len(part), TOGETHER):
            yield part[start : start + TOGETHER]
