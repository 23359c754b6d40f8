"""When pictures of a run that goes on are drawn."""

from __future__ import annotations

import time


class PictureTimer:
    """Says when a picture is due: at most every 30 seconds, and not before a twentieth of the time since the start has passed.

    So a run of a day has 130 of them, not 2,880.
    """

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def due(self) -> bool:
        """Return whether a picture is due now; the next one is due later."""
        now = time.monotonic()
        if now - self.last < max(30.0, (now - self.start) / 20):
            return False
        self.last = now
        return True
