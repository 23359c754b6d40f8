"""A client: it takes over what the server sent, learns its mission, and says what the server is to merge."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clstream.bus import Bus
from clstream.eval_mode import as_written
from clstream.events import BatchLearned, BatchReady, EpochEnded, EpochStarted, SessionEnded, SessionStarted
from clstream.federated.payloads import payload_bytes
from clstream.seeds import derive, isolated
from clstream.strategy import Strategy
from clstream.strategy.merging import Payload
from clstream.stream import Samples, Session, Subset


@dataclass(frozen=True, slots=True, eq=False)
class Mission:
    """What a client learns in a round.

    Args:
        round: its number, from 1.
        client: the number of the client, from 0.
        samples: to learn.
        epochs, batch_size: of its learning.
        seed: of the order of its batches, and of what is random in its learning.

    """

    round: int
    client: int
    samples: Samples
    epochs: int = 1
    batch_size: int = 32
    seed: int = 0

    @property
    def classes(self) -> tuple[int, ...]:
        """The labels of its samples, sorted."""
        return tuple(self.samples.y.unique().tolist())


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """What a client sends to the server.

    Args:
        client: the number of the client.
        classes: of its mission.
        samples: how many it learned.
        payload: what it learned.
        bytes: that the payload is on its way.

    """

    client: int
    classes: tuple[int, ...]
    samples: int
    payload: dict[str, Tensor] = field(repr=False)
    bytes: int = 0


def missions_of(samples: Samples | Subset, number: int, epochs: int, batch_size: int, seed: int) -> list[Mission]:
    """Return the mission of each client that has samples of a round, by the number of the client: `extra["client"]`."""
    whole = samples[:]
    owner = whole.extra["client"]
    missions = []
    for client in owner.unique().tolist():
        rows = owner == client
        own = Samples(whole.x[rows], whole.y[rows], target=whole.target)
        missions.append(Mission(number, client, own, epochs, batch_size, derive(seed, "mission", number, client)))
    return missions


def learn_mission(blank: Strategy, down: Payload, mission: Mission) -> tuple[Strategy, Upload]:
    """Have a copy of a strategy that has learned nothing take over what the server sent, and learn a mission.

    Nothing of it depends on other clients, nor on who runs first.

    Args:
        blank: the strategy, told of the stream, before it learned anything; it stays as it is.
        down: what the server exported.
        mission: what is learned.

    Returns: the learner, and its upload.

    Raises FloatingPointError for a loss that is not finite.

    """
    learner = deepcopy(blank)
    session = Session(mission.round, None, mission.samples, mission.epochs, mission.batch_size, mission.seed)
    bus = Bus(learner, learner=learner)
    with isolated(mission.seed, "client", device=mission.samples.y.device), as_written():
        if down:
            learner.take_over(down)
        bus.emit(SessionStarted(session))
        for epoch in session:
            bus.emit(EpochStarted(epoch))
            losses = []
            for batch in epoch:
                bus.emit(BatchReady(batch))
                losses.append(learner.learn(batch))
                bus.emit(BatchLearned(batch, losses[-1]))
            if not bool(torch.stack(losses).isfinite().all()):
                raise FloatingPointError(f"its loss is not finite in epoch {epoch.index}")
            bus.emit(EpochEnded(epoch))
        bus.emit(SessionEnded(session))
        payload = learner.export(since=down or None)
    return learner, Upload(mission.client, mission.classes, len(mission.samples), payload, payload_bytes(payload))
