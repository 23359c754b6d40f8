"""TAME's events."""

from __future__ import annotations

from dataclasses import dataclass

from clstream.bus import Event


@dataclass(frozen=True, slots=True, eq=False)
class ExpertChosen(Event):
    """From the batch `step` on, expert `expert` of `experts` learns; ExpertAdded or ExpertReactivated says why."""

    step: int
    expert: int
    experts: int

    def curves(self) -> dict[str, float]:
        """Return how many experts there are, and which one learns, for the tracker."""
        return {"experts/number": self.experts, "experts/active": self.expert}


@dataclass(frozen=True, slots=True, eq=False)
class ExpertAdded(ExpertChosen):
    """An expert was added, since none knew what the stream draws from now."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertReactivated(ExpertChosen):
    """An expert learns again, since it knew what the stream draws from now."""
