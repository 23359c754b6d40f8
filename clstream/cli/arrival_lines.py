"""Lines about what arrives: what is learned, what is set aside, and what waits."""

from __future__ import annotations

import time

from rich.console import Console

from clstream.bus import on
from clstream.cli.errors import printable
from clstream.drift_detection import ShiftDetected
from clstream.engine import InputsArrived, SessionArrived, SetAside
from clstream.events import Evaluated, NothingArrived
from clstream.metrics import average_accuracy
from clstream.online_metrics import DelayedMeasured, PrequentialMeasured


class ArrivalLines:
    """Prints a line for what arrives, and for what becomes of it."""

    joins_late = True
    """Whether it has a place in a run that is resumed, and that it did not see before."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.name, self.before = "", ""

    def say(self, text: str) -> None:
        """Print a line, with the time."""
        clock = time.strftime("%H:%M:%S")
        self.console.print(printable(f"{clock} {text}"), markup=False, highlight=False, soft_wrap=True)

    @on(SessionArrived)
    def arrived(self, event: SessionArrived) -> None:
        """Say what is learned now."""
        self.name, self.before = event.name, ""
        self.say(f"{event.name}: {event.samples:,} samples to learn, {event.test_samples:,} to test")

    @on(PrequentialMeasured)
    def measured(self, event: PrequentialMeasured) -> None:
        """Keep the accuracy on the session before it was learned."""
        self.before = f"accuracy {event.session:.3f} before it was learned, "

    @on(Evaluated)
    def evaluated(self, event: Evaluated) -> None:
        """Say how the session went."""
        evaluation = event.evaluation
        if not evaluation.within_session:
            mean = average_accuracy(evaluation.main, evaluation.taught)
            self.say(f"{self.name}: {self.before}{evaluation.main_name} {mean:.3f} over {len(evaluation.targets)} test sets")

    @on(SetAside)
    def set_aside(self, event: SetAside) -> None:
        """Name what can't be learned."""
        self.say(f"{event.name} is set aside: {event.reason}")

    @on(InputsArrived)
    def answered(self, event: InputsArrived) -> None:
        """Name what waits for its labels."""
        self.say(f"{event.name}: {len(event.x):,} samples, whose labels are to come")

    @on(DelayedMeasured)
    def judged(self, event: DelayedMeasured) -> None:
        """Say how many answers were right."""
        self.say(f"{event.name}: the labels came, accuracy {event.session:.3f} when the samples did")

    @on(ShiftDetected)
    def alarm(self, event: ShiftDetected) -> None:
        """Say that the loss has risen."""
        self.say(f"{self.name}: drift, the loss has risen to {event.smoothed:.3f}, above {event.threshold:.3f}")

    @on(NothingArrived)
    def waits(self, event: NothingArrived) -> None:
        """Say that all was learned that came."""
        if not event.ended:
            self.say(f"{event.sessions} sessions learned, waiting for more: Ctrl-C stops, and the same command goes on")
