"""What happens in a round, before its SessionEnded reaches observers; it ends with Merged, also where nothing was merged.

Rounds are counted from 1, clients from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clstream.bus import Event

if TYPE_CHECKING:
    from clstream.strategy import Strategy


@dataclass(frozen=True, slots=True, eq=False)
class ClientDispatched(Event):
    """A client goes into the field with so many bytes of the server's."""

    round: int
    client: int
    bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class ClientTrained(Event):
    """A client has learned its mission; `strategy` is its learner, and None where another process has it."""

    round: int
    client: int
    strategy: Strategy | None
    classes: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Uploaded(Event):
    """A client has sent so many bytes to the server."""

    round: int
    client: int
    bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class ClientLost(Event):
    """What a client learned in a round is not merged in it, for a reason; the round goes on."""

    round: int
    client: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Merged(Event):
    """The server has merged the uploads of a round.

    Args:
        round: its number.
        clients: whose uploads were merged, late ones of the round before first.
        classes: of their missions, sorted.
        bytes_up, bytes_down: that were sent so far in the run.

    """

    round: int
    clients: tuple[int, ...]
    classes: tuple[int, ...]
    bytes_up: int
    bytes_down: int

    def curves(self) -> dict[str, float]:
        """Return the bytes, and how many clients were merged, for the tracker."""
        return {
            "federated/bytes_up": float(self.bytes_up),
            "federated/bytes_down": float(self.bytes_down),
            "federated/clients_merged": float(len(self.clients)),
        }
