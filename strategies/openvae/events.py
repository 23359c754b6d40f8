"""OpenVAE's event."""

from __future__ import annotations

from dataclasses import dataclass

from clstream.bus import Event


@dataclass(frozen=True, slots=True, eq=False)
class ReplayGenerated(Event):
    """A replay set was generated from the network as the last session left it.

    Args:
        size: images in the set.
        proposals: latents that were drawn for it.
        accepted: those of them that the filter let pass, whether there was room for them or not; all where there is no filter.
        unfiltered: images of the set whose class the filter starved, so that they came without it.
        missing: images that the set lacks, since too few latents were classified as their class.
        scale: what the latents of a unit normal were multiplied by.

    """

    size: int
    proposals: int
    accepted: int
    unfiltered: int
    missing: int
    scale: float

    def curves(self) -> dict[str, float]:
        """Return the size, the rate of acceptance, and the shares of the set that are unfiltered and missing, for the tracker."""
        wanted = max(1, self.size + self.missing)
        return {
            "replay/size": self.size,
            "replay/acceptance_rate": self.accepted / max(1, self.proposals),
            "replay/unfiltered": self.unfiltered / wanted,
            "replay/missing": self.missing / wanted,
        }
