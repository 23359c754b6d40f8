"""SHARP's events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clstream.bus import Event

Units = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True, eq=False)
class PhaseStarted(Event):
    """Units were selected for the next epochs: `quota` is q in percent, `units` their number by layer and state.

    `phase` counts from 1 in each episode. The states are idle, learning, fine-tuning and frozen.
    """

    episode: int
    phase: int
    quota: float
    units: Units

    def curves(self) -> dict[str, float]:
        """Return the numbers of units, for the tracker."""
        return _curves(self.units)


@dataclass(frozen=True, slots=True, eq=False)
class UnitsFrozen(Event):
    """An episode is over: units were promoted, and some frozen; `units` is their number by layer and state."""

    episode: int
    units: Units

    def curves(self) -> dict[str, float]:
        """Return the numbers of units, for the tracker."""
        return _curves(self.units)


@dataclass(frozen=True, slots=True, eq=False)
class ActivationsStored(Event):
    """Both memories were written: classes and bytes of what they hold now."""

    episode: int
    classes: tuple[int, ...]
    short_term_bytes: int
    long_term_bytes: int

    def curves(self) -> dict[str, float]:
        """Return the bytes, for the tracker."""
        return {"memory/short_term_bytes": self.short_term_bytes, "memory/long_term_bytes": self.long_term_bytes}


def _curves(units: Units) -> dict[str, float]:
    return {f"units/{layer}/{state}": count for layer, counts in units.items() for state, count in counts.items()}
