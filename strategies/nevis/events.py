"""Events of learners that search inside a task."""

from __future__ import annotations

from dataclasses import dataclass

from clstream.bus import Event


@dataclass(frozen=True, slots=True, eq=False)
class StartChosen(Event):
    """A task's trials start from the final model of task `start`; -1: from the weights that the learner came with."""

    task: int
    start: int

    def curves(self) -> dict[str, float]:
        """Return the start, for the tracker."""
        return {"search/start": self.start}


@dataclass(frozen=True, slots=True, eq=False)
class TrialEnded(Event):
    """A trial of a task's search is over.

    Args:
        task: its number.
        trial: the number of the trial.
        rate: the peak of its learning rate.
        error: 1 - accuracy, or 1 - mean average precision, on the task's validation samples, of the weights that the trial ended
            with; NaN where there are none. Infinite: it diverged.
        kept: whether these weights are the task's final model.

    """

    task: int
    trial: int
    rate: float
    error: float
    kept: bool

    def curves(self) -> dict[str, float]:
        """Return the rate and the error of the trial that is kept, for the tracker."""
        return {"search/rate": self.rate, "search/validation_error": self.error} if self.kept else {}
