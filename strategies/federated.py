"""Clients that learn apart and a server that merges what they upload, around any strategy that merges.

The protocol of Hendryx, KC, Walls, Morrison 2021, "Federated Reconnaissance: Efficient, Distributed, Class-Incremental Learning",
on streams of `clstream.streams.federated`. The wrapped strategy is the server: it learns the base session as usual. Each later
session is a round. Every client starts as the strategy was before it learned anything, takes over what the server exports, learns
the samples that are its own, in `epochs` passes, and uploads what it learned since; when the session ends, the server merges.

What that is, is the wrapped strategy's: `NCM` around an encoder is their prototypical network, whose merge is exact (the means of
all samples, in any order and grouping), `Finetune` is federated averaging of the whole network, `ICaRL` sends exemplars beside it.
`merging="published"` is the authors' code for prototypes instead, which mixes a client's prototype in with too small a weight where
the server knew the class already. Uploads are checked before they are merged. One that has numbers which are not finite, or other
shapes, is left out; so is a client whose loss is not finite; each is told, as `ClientLost` and as a warning, and the round goes on.

On a stream without clients it is the wrapped strategy. Clients are played one after another; no network is simulated. Memories and
optimizers of clients begin anew in each round, as far as the wrapped strategy does not export them.
"""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Protocol

import torch
from torch import Tensor

from clstream.bus import Event, Handler, on, subscriptions
from clstream.events import Evaluated, RunStarted, SessionEnded, SessionStarted, TaskEnded, TaskStarted
from clstream.federated.client import Mission, Upload, learn_mission, missions_of
from clstream.federated.events import ClientDispatched, ClientLost, ClientTrained, Merged, Uploaded
from clstream.federated.payloads import payload_bytes, shifted_as_published
from clstream.models import GrowingHead
from clstream.params import check_choice, check_integer, check_share
from clstream.seeds import derive
from clstream.strategy import Strategy, Wrapper, needs
from clstream.strategy.frozen_features import FrozenFeatures
from clstream.stream import Batch


class Engine(Protocol):
    """Plays clients elsewhere: see `clstream.federated.flower`."""

    def play(self, server: Federated, missions: list[Mission], down: dict[str, Tensor], session: int) -> None:
        """Have the missions of a round learned, and the server merge what is uploaded."""
        ...


class Federated(Wrapper):
    """Have clients learn apart, and merge what they upload.

    Args:
        base: the server's strategy, and that of each client; it has a `merge`.
        epochs: passes of a client over its samples of a round.
        batch_size: samples of a client's step.
        merging: "exact" (as the strategy merges), or "published" (prototypes as the authors' code has it).
        weigh: what a client weighs in an average of models: "samples" (their number, as FedAvg has it) or "equally".
        dropout: the share of missions whose client drops out, and learns nothing, from 0 to below 1.
        late: the share of uploads that come a round late, from 0 to below 1; those of the last round are never merged.

    """

    not_state = ("handlers", "blank", "engine")
    checkpoint_modules = ("clstream.federated.client",)  # uploads that come late
    fixed_classes = "as in the wrapped strategy"

    def __init__(
        self,
        base: Strategy,
        epochs: int = 1,
        batch_size: int = 32,
        merging: str = "exact",
        weigh: str = "samples",
        dropout: float = 0.0,
        late: float = 0.0,
    ) -> None:
        super().__init__(base)
        self.parts = ()  # all that the base hears, it hears from here: the samples of clients are not for it
        check_integer(1, epochs=epochs, batch_size=batch_size)
        check_choice(("exact", "published"), merging=merging)
        check_choice(("samples", "equally"), weigh=weigh)
        check_share(dropout=dropout, late=late)
        for need, reason in needs(base).items():
            raise ValueError(f"clients have sessions and no tasks, and {type(base).__name__} needs {need} ({reason})")
        if merging == "published" and getattr(type(base), "start", None) is not FrozenFeatures.start:
            raise ValueError(f"merging='published' is of prototypes, as NCM has them, and {type(base).__name__} has others")
        self.epochs, self.batch_size, self.merging, self.weigh = epochs, batch_size, merging, weigh
        self.dropout, self.late = dropout, late
        self.handlers: list[tuple[type[Event], Handler]] = []
        self.blank: Strategy | None = None  # what clients start from
        self.engine: Engine | None = None  # what plays clients elsewhere; None: here, one after another
        self.begin(0)

    def begin(self, seed: int) -> None:
        """Start with no round played."""
        self.seed, self.round, self.in_round = seed, 0, False
        self.bytes_up, self.bytes_down = 0, 0
        self.delayed: list[Upload] = []  # that come late

    @property
    def sent_bytes(self) -> tuple[int, int]:
        """The bytes that were uploaded, and that clients took over, so far in the run."""
        return self.bytes_up, self.bytes_down

    @on(Event)
    def relay(self, event: Event) -> None:
        """Pass what is not of a round on to the wrapped strategy."""
        if isinstance(event, RunStarted):
            self.handlers = list(subscriptions(self.base))
        if self.in_round or isinstance(event, (TaskStarted, TaskEnded, Evaluated)):
            return
        for kind, handler in self.handlers:
            if isinstance(event, kind):
                handler(event)

    @on(RunStarted)
    def keep_blank(self, event: RunStarted) -> None:
        """Keep what clients start from: the strategy, told of the stream, before it learns anything."""
        self.begin(event.seed)
        self.base.bus = self.bus
        self.blank = deepcopy(self.base)

    @on(SessionStarted)
    def grow_head(self, event: SessionStarted) -> None:
        """See whether a round begins; the wrapped strategy grows its head, in sessions of its own.

        Raises ValueError for a round of models that grow.
        """
        owner = event.session.samples[:1].extra.get("client")
        self.in_round = owner is not None and int(owner) >= 0
        growing = any(isinstance(module, GrowingHead) for module in self.model.modules())
        if self.in_round and growing and any(name.startswith("model.") for name in self.base.export()):
            raise ValueError("models of clients have one shape, and a growing head another after each mission: take head='fixed'")

    def learn(self, batch: Batch) -> Tensor:
        """Have the wrapped strategy take its step; in a round clients learn when it ends, and the loss here is 0."""
        return torch.zeros((), device=batch.samples.y.device) if self.in_round else self.base.learn(batch)

    @on(SessionEnded)
    def play_round(self, event: SessionEnded) -> None:
        """In a round, have each client learn its mission, and merge what they upload."""
        if not self.in_round:
            return
        self.round += 1
        down, missions = self.base.export(), []
        for mission in missions_of(event.session.samples, self.round, self.epochs, self.batch_size, self.seed):
            self.bytes_down += (size := payload_bytes(down))
            self.emit(ClientDispatched(self.round, mission.client, size))
            if self.happens(self.dropout, "dropout", mission.client):
                self.lose(mission.client, "it dropped out", warn=False)
            else:
                missions.append(mission)
        if self.engine is not None:
            self.engine.play(self, missions, down, event.session.index)
        else:
            learned = [self.train(mission, down) for mission in missions]
            self.merge_uploads([upload for upload in learned if upload is not None], down)
        self.in_round = False

    def train(self, mission: Mission, down: dict[str, Tensor]) -> Upload | None:
        """Have a client learn a mission; return its upload, None if it is lost."""
        assert self.blank is not None
        try:
            learner, upload = learn_mission(self.blank, down, mission)
        except FloatingPointError as error:
            self.lose(mission.client, str(error))
            return None
        self.emit(ClientTrained(self.round, mission.client, learner, mission.classes))
        return upload

    def merge_uploads(self, uploads: list[Upload], down: dict[str, Tensor]) -> None:
        """Take the uploads of a round in the order of clients, leave out what can't be merged, and merge the others."""
        merged, self.delayed = self.delayed, []
        for upload in sorted(uploads, key=lambda upload: upload.client):
            self.bytes_up += upload.bytes
            self.emit(Uploaded(self.round, upload.client, upload.bytes))
            try:
                self.base.check_payload(upload.payload)
            except ValueError as error:
                self.lose(upload.client, f"its upload can't be merged: {error}")
                continue
            if self.happens(self.late, "late", upload.client):
                self.delayed.append(upload)
                self.lose(upload.client, "its upload comes a round late", warn=False)
            else:
                merged.append(upload)
        if merged and self.merging == "published":
            self.merge_as_published(merged, down)
        elif merged:
            weights = [upload.samples for upload in merged] if self.weigh == "samples" else None
            self.base.merge([upload.payload for upload in merged], weights)
        classes = tuple(sorted({label for upload in merged for label in upload.classes}))
        self.emit(Merged(self.round, tuple(upload.client for upload in merged), classes, self.bytes_up, self.bytes_down))

    def merge_as_published(self, uploads: list[Upload], down: dict[str, Tensor]) -> None:
        """Take up prototypes client by client as the authors' code does."""
        for upload in uploads:
            self.base.merge(shifted_as_published(self.base.export(), down, upload.payload))

    def happens(self, share: float, what: str, client: int) -> bool:
        """Return whether something that happens to a share of missions happens to this one: a function of the seed alone."""
        return derive(self.seed, what, self.round, client) < share * 2**63

    def lose(self, client: int, reason: str, warn: bool = True) -> None:
        """Tell that what a client learned is not merged in this round."""
        self.emit(ClientLost(self.round, client, reason))
        if warn:
            warnings.warn(f"round {self.round} goes on without client {client}: {reason}", RuntimeWarning, stacklevel=2)
