"""How far episodes are, in lines."""

from __future__ import annotations

import sys
import time

from clstream.bus import on
from clstream.episodes.outcomes import EpisodeEnded

SAY_EVERY = 10.0
"""Seconds between two lines."""


class EpisodesProgress:
    """Says on the standard error, now and then, how many episodes are over, and how accurate they were on average.

    Args:
        count: how many there are.

    """

    def __init__(self, count: int) -> None:
        self.count, self.said = count, time.monotonic()
        self.accuracies: list[float] = []

    @on(EpisodeEnded)
    def say(self, event: EpisodeEnded) -> None:
        """Print a line, if it is time for it."""
        self.accuracies.append(event.outcome.accuracy)
        if time.monotonic() - self.said > SAY_EVERY:
            self.said = time.monotonic()
            mean = sum(self.accuracies) / len(self.accuracies)
            sys.stderr.write(f"episode {event.outcome.index + 1} of {self.count}: accuracy {mean:.4f} so far\n")
