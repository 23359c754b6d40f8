"""A trial: one run of a search, with values that the search chose, and what came of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from clstream import metrics
from clstream.bus import on
from clstream.engine import run
from clstream.events import Evaluated
from clstream.results import Evaluation
from clstream.strategy import Strategy
from clstream.stream import Stream
from clstream.training import Training

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

STARTUP = 4
"""Trials that are never pruned: to be worse than fewer says little."""

KEPT = 75.0
"""Percent of the earlier trials that a trial must be among, at the same evaluation, or it ends."""

EVALUATIONS = 4
"""Evaluations of a session, where the run doesn't say."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a trial.

    Args:
        state: "complete", "pruned" (it was among the worst quarter of those before), "diverged" (a loss or the measure was not
            finite: it counts as worst) or "failed" (an error).
        value: the main measure's average over the tasks, on held-out samples, at the end; -inf of a trial that diverged; NaN of
            others that did not come to their end.
        curve: at each evaluation the anytime average: the mean of the averages over tasks seen so far, from the second session on.
        seconds: how long it took.
        note: what went wrong, in one sentence; "" if nothing did.

    """

    state: str
    value: float
    curve: tuple[float, ...] = ()
    seconds: float = 0.0
    note: str = ""


class Pruned(Exception):  # noqa: N818  # nothing is wrong
    """A trial is among the worst of those before it."""


class Pruner:
    """Ends a run whose anytime average is in the worst quarter of earlier trials at the same evaluation, by Optuna's pruner.

    The average is over evaluations after the first session: before, nothing can be forgotten, and what learns slowly is not worse.

    Args:
        earlier: the trials that are over.
        warmup: evaluations that are not compared: the pruner takes the best one of a trial, and the first ones are high.

    """

    def __init__(self, earlier: Sequence[FrozenTrial], warmup: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize", pruner=optuna.pruners.PercentilePruner(KEPT, STARTUP))
        study.add_trials(earlier)
        self.trial = study.ask()
        self.curve, self.warmup = list[float](), warmup

    @on(Evaluated)
    def report(self, event: Evaluated) -> None:
        """Report the anytime average. Raises Pruned if it is too low."""
        evaluation = event.evaluation
        average = anytime(evaluation)
        place = len(evaluation.rows)  # one at the end of a session takes the place of one at the same batch within it
        is_new, self.curve[place - 1 :] = place > len(self.curve), [average]
        if is_new and place > self.warmup and math.isfinite(average):  # a method may have nothing to answer by yet
            self.trial.report(average, place)
            if self.trial.should_prune():
                raise Pruned


def anytime(evaluation: Evaluation) -> float:
    """Return the mean of the averages over tasks seen at the evaluations after the first session; in it, at those so far."""
    averages = metrics.seen_averages(evaluation.probes, evaluation.probe_taught)
    later = torch.tensor([row.sessions + row.within_session > 1 for row in evaluation.rows])
    return float(averages[later if later.any() else slice(None)].mean())


def run_trial(
    strategy: Strategy,
    stream: Stream,
    earlier: Sequence[FrozenTrial] = (),
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    evaluate_every: int | None = None,
    max_sessions: int | None = None,
    precision: str = "fp32",
    deterministic: bool = False,
    compile: bool = False,  # noqa: A002  # as torch calls it
    train: Training | None = None,
) -> Outcome:
    """Run a strategy on the stream of a search, and return what came of it. A loss that is not finite is no error here.

    Args:
        strategy: built with the values of the trial.
        stream: as `trial_stream` returns it.
        earlier: Optuna's trials that are over; this one ends early if it is in their worst quarter, though not before its second
            session (in a stream of one session: not before half of it).
        seed, device, max_sessions, precision, deterministic, compile, train: see `run`.
        evaluate_every: see `run`. None: four times a session, as long as the first one.

    Raises:
        ValueError, TypeError: for what `run` refuses.

    """
    sessions = min(len(stream), max_sessions or len(stream))
    steps = stream.epochs * math.ceil(stream.size_of(0) / stream.batch_size)
    every = evaluate_every or max(1, steps // EVALUATIONS)
    pruner = Pruner(earlier, math.ceil(steps / every) if sessions > 1 else steps // every // 2)
    began = time.perf_counter()
    options: dict[str, Any] = {
        "seed": seed, "device": device, "evaluate_every": every, "max_sessions": max_sessions, "precision": precision,
        "deterministic": deterministic, "compile": compile, "train": train,
    }  # fmt: skip
    state, value, note = "complete", math.nan, ""
    try:
        value = run(strategy, stream, pruner, **options).average
    except Pruned:
        state = "pruned"
    except FloatingPointError as error:
        state, value, note = "diverged", -math.inf, str(error)
    if state == "complete" and not math.isfinite(value):
        state, value, note = "diverged", -math.inf, f"its average on held-out samples is {value}"
    return Outcome(state, value, tuple(pruner.curve), time.perf_counter() - began, note)
