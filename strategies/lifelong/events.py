"""The events of the lifelong framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clstream.bus import Event


@dataclass(frozen=True, slots=True, eq=False)
class Consolidated(Event):
    """A task is over: the references of all weights are their values now, and each has its stiffness from here on.

    Args:
        policy: its name, or "groups" for one that was given as a stiffness for each group.
        mean: of the finite stiffnesses.
        quantiles: by layer: "q10", "q50" and "q90" of the finite ones, and "held", the share of weights of infinite stiffness.
        penalty: the sum of stiffness times squared distance to the reference, as the task left it; infinite ones give 0.
        capacity: the share of units that belong to a task; without groups that of weights whose stiffness is above 0.
        samples: how many are kept for relax passes.

    """

    policy: str
    mean: float
    quantiles: Mapping[str, Mapping[str, float]]
    penalty: float
    capacity: float
    samples: int

    def curves(self) -> dict[str, float]:
        """Return the numbers, for the tracker."""
        layers = {f"stiffness/{layer}/{name}": value for layer, row in self.quantiles.items() for name, value in row.items()}
        whole = {"mean": self.mean, "penalty": self.penalty, "capacity": self.capacity, "samples": float(self.samples)}
        return {f"stiffness/{name}": value for name, value in whole.items()} | layers


@dataclass(frozen=True, slots=True, eq=False)
class Relaxed(Event):
    """A relax pass is over: weights were free to move a little, and kept samples were learned.

    Args:
        classes: the pair of classes that was to be told apart, or all classes that samples are kept of.
        samples, steps: how many samples were learned, and in how many steps.
        before, after: the share of these samples that was answered wrongly; of a pair, for the other class of it.

    """

    classes: tuple[int, ...]
    samples: int
    steps: int
    before: float
    after: float

    def curves(self) -> dict[str, float]:
        """Return the numbers, for the tracker."""
        return {"relax/steps": self.steps, "relax/error_before": self.before, "relax/error_after": self.after}


@dataclass(frozen=True, slots=True, eq=False)
class Pruned(Event):
    """So many weights were set to 0, and are free to move."""

    weights: int

    def curves(self) -> dict[str, float]:
        """Return the number, for the tracker."""
        return {"stiffness/pruned": self.weights}
