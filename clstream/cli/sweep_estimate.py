"""How long the runs of a sweep take: from what was measured before, and else from a look at their first batches."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch

from clstream.bus import on
from clstream.cli.build import build_strategy, build_stream, measures_of, steps_of
from clstream.cli.parser import parse_run
from clstream.cli.sweep_plan import Planned
from clstream.cli.yaml_files import parse_yaml
from clstream.engine import run
from clstream.events import BatchLearned, EpochStarted, RunStarted, SessionStarted

LOOK = 1.0
"""Seconds for which a run is tried."""

WARM_UP = 3
"""Batches before the clock runs."""

MOST_LOOKS = 30
"""Combinations that are tried; further ones are taken to be like them."""


class Estimate(NamedTuple):
    """How long a run takes.

    Args:
        seconds: NaN: unknown.
        source: "as measured", "tried" or "like the others".

    """

    seconds: float
    source: str


def estimates(groups: dict[str, list[Planned]], measured: dict[str, list[float]], threads: int) -> dict[str, Estimate]:
    """Return how long one run of each group takes; what was not measured is tried for a second."""
    known: dict[str, Estimate] = {}
    looks = 0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for group, runs in groups.items():
            if measured.get(group):
                known[group] = Estimate(fmean(measured[group]), "as measured")
            elif looks < MOST_LOOKS:
                looks += 1
                known[group] = Estimate(_tried(runs[0]), "tried")
    finally:
        torch.set_num_threads(before)
    finite = [estimate.seconds for estimate in known.values() if math.isfinite(estimate.seconds)]
    usual = Estimate(fmean(finite) if finite else math.nan, "like the others")
    return {group: known[group] if group in known and math.isfinite(known[group].seconds) else usual for group in groups}


def total(seconds: Sequence[float], workers: int) -> float:
    """Return how long runs take together with so many of them at a time."""
    return max(sum(seconds) / workers, max(seconds, default=0.0))


def _tried(planned: Planned) -> float:
    """Return how long a run would take if it went on as its first second; NaN if it can't be begun."""
    name, trusted = "config.yaml", [f"--trust={','.join(planned.trust)}"] if planned.trust else []
    parser, options = parse_run(["--config", name, *trusted], {name: parse_yaml(planned.config.encode(), "the config")})
    stream = build_stream(parser, options)
    strategy = build_strategy(parser, options, stream, planned.seed)
    stopwatch = _Stopwatch(LOOK)
    began = time.perf_counter()
    try:
        run(
            strategy, stream, stopwatch, seed=planned.seed, device=options.device, evaluate_at=options.evaluate_at,
            evaluate_on=options.evaluate_on, evaluate_every=options.evaluate_every, measures=measures_of(options),
            max_sessions=options.max_sessions, **steps_of(options) | {"compile": False},
        )  # fmt: skip
    except _EnoughError:
        return stopwatch.seconds
    except Exception:  # noqa: BLE001  # it fails in the sweep too, and is listed there
        return math.nan
    return time.perf_counter() - began


class _EnoughError(KeyboardInterrupt):
    """The look at a run is over."""


class _Stopwatch:
    """Ends a run after some seconds of learning, and says how long the whole of it would take."""

    def __init__(self, look: float) -> None:
        self.look = look
        self.batches, self.of, self.sessions = 0, 0, 1
        self.began = self.warm = self.evaluating = 0.0

    @on(RunStarted)
    def start(self, event: RunStarted) -> None:
        """Start the clock of the evaluation of the untrained strategy."""
        self.began = time.perf_counter()
        self.sessions = len(event.stream) if event.run is None else event.run.sessions

    @on(SessionStarted)
    def begin(self, _event: SessionStarted) -> None:
        """Note how long that took: one evaluation."""
        self.evaluating = self.evaluating or time.perf_counter() - self.began

    @on(EpochStarted)
    def size(self, event: EpochStarted) -> None:
        """Take all sessions to be as long as the first one."""
        self.of = self.of or len(event.epoch) * event.epoch.session.epochs * self.sessions

    @on(BatchLearned)
    def count(self, _event: BatchLearned) -> None:
        """End the run once there is enough to go by."""
        self.batches += 1
        now = time.perf_counter()
        if self.batches == WARM_UP:
            self.warm = now
        elif self.batches > WARM_UP and now - self.warm > self.look:
            raise _EnoughError

    @property
    def seconds(self) -> float:
        """How long the run would take."""
        learning = (time.perf_counter() - self.warm) / (self.batches - WARM_UP) * self.of
        return learning + self.evaluating * (self.sessions + 1)
