"""Federated streams: a base session for the server, then rounds in which clients have samples of their own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from clstream.streams.data import NAMES
from clstream.streams.few_shots import named
from clstream.streams.options import Tasks, check_options
from clstream.streams.task_free import split_source
from torch import Tensor

from clstream.params import check_integer, check_positive
from clstream.seeds import derive
from clstream.stream import Samples, Stream, Subset


@dataclass(frozen=True, eq=False, repr=False)
class Missions:
    """A schedule: the base session, then rounds. Which client has which sample is drawn beforehand, so it depends on no order.

    Args:
        name: how the missions were drawn, in a few words.
        session: (samples,), int64: the session of each training sample of the stream; -1 for none.
        client: (samples,), int64: the client that has it; -1 for the server.

    """

    name: str
    session: Tensor
    client: Tensor

    @property
    def once(self) -> bool:
        """Whether a training sample comes in one session at most: it does."""
        return True

    def __len__(self) -> int:
        """Return the number of sessions."""
        return int(self.session.max()) + 1

    def __repr__(self) -> str:
        content = torch.stack([self.session, self.client]).numpy().tobytes()
        return f"{self.name}, {len(self) - 1} rounds, drawn as {hashlib.sha256(content).hexdigest()[:12]}"

    def draw(self, session: int) -> Tensor:
        """Return the samples of a session, those of client 0 first: (n,), int64."""
        rows = (self.session == session).nonzero().flatten()
        return rows[self.client[rows].argsort(stable=True)]


def federated(
    data: str = "digits",
    base: int = 5,
    clients: int = 5,
    way: int = 2,
    shots: int = 10,
    rounds: int | None = None,
    alpha: float | None = None,
    epochs: int = 1,
    batch_size: int = 32,
    class_order: int | list[int] | None = None,
    validation: float = 0.0,
    seed: int = 0,
    root: str | Path | None = None,
    drop_last: bool = False,
) -> Stream:
    """Federated reconnaissance: the server has base classes, and clients bring samples of field classes, round by round.

    The first session has the base classes with all of their samples. Each later one is a round: the samples that clients have in
    it, and the number of the client as `extra["client"]`, -1 in the base session. `clstream.strategies.Federated` plays clients
    apart; any other strategy learns a round as one session, which is the sequential lower bound (`Finetune`) or the upper one
    (`Joint`).

    Missions are drawn as in Hendryx, KC, Walls, Morrison 2021, "Federated Reconnaissance": in each round the clients, in a random
    order, draw `way` of the field classes that have unused images, and `shots` unused ones of each, or as many as are left. No
    image is drawn twice; the stream ends when all are used. With `alpha` the field images of each class are dealt to the clients
    in shares from a Dirichlet distribution instead (Hsu, Qi, Brown 2019), and each client brings its own in equal parts, round by
    round.

    Args:
        data: "digits", "MNIST" or another data set; "omniglot" (136 characters of the first small set, then 106 new ones); or a
            folder or zip archive of images. See `few_shot_tasks`.
        base: how many classes the server has, the first ones of the order; all others are field classes.
        clients: how many there are.
        way: field classes of a mission; at most as many as there are.
        shots: images of each of them; at most as many as a class has.
        rounds: how many. None: with missions, until all images are used; with `alpha` 5.
        alpha: of the Dirichlet distribution: the smaller, the more unlike are the clients. None: missions.
        epochs, batch_size: of the base session, and of what learns rounds as sessions; those of clients are options of `Federated`.
        class_order: None for the natural order, a number to shuffle by, or the labels in their order.
        validation: share of the training samples held back.
        seed: of the missions, of the order of batches, and of what validation holds back.
        root: the folder with the data, as in `split_mnist`.
        drop_last: as in `split_mnist`, of the sessions.

    Raises:
        ValueError: for more ways or shots than there are, and for a client that would have no sample.

    """
    check_options({name: value for name, value in locals().items() if name != "data"}, "alpha")
    check_integer(1, base=base, clients=clients, way=way)
    check_integer(1, none=True, rounds=rounds)
    check_positive(none=True, alpha=alpha)

    def load(tasks: Tasks) -> Stream:
        if data in NAMES:
            return split_source("federated", data, root, tasks, epochs, batch_size, class_order, validation, seed)
        loaded = named(data, root, tasks, class_order, epochs=epochs, batch_size=batch_size, validation=validation, seed=seed)
        return replace(loaded, name=loaded.name.replace("few_shot", "federated", 1))

    classes = len(load(1).tasks[0].classes)
    if base >= classes:
        raise ValueError(f"base={base} classes leave no field classes: {data} has {classes}, so take at most {classes - 1}")
    stream = load([base, classes - base])
    field = stream.tasks[1].train.y
    if alpha is None:
        drawn = drawn_missions(field, clients, way, shots, rounds, seed)
        name = f"missions of {way} classes and {shots} images each for {clients} clients"
    else:
        drawn = dirichlet_shares(field, clients, alpha, rounds or 5, seed)
        name = f"Dirichlet({alpha:g}) shares of {clients} clients"
    return replace(of_clients(stream, name, *drawn), drop_last=drop_last)


def of_clients(stream: Stream, name: str, session: Tensor, client: Tensor) -> Stream:
    """Return a stream whose second task comes in rounds: (samples,) the round of each, from 1, and its client; -1 for none."""
    before, field = (task.train for task in stream.tasks)
    assert isinstance(before, Subset)  # as `from_tensors` makes them
    assert isinstance(field, Subset)
    owner = torch.full((len(before.source),), -1)
    owner[field.index] = client
    source = Samples(before.source.x, before.source.y, {"client": owner})
    parts = [replace(part, source=source) for part in (before, field)]
    tasks = [replace(task, train=part) for task, part in zip(stream.tasks, parts, strict=True)]
    server = torch.zeros(len(before), dtype=torch.int64)
    missions = Missions(name, torch.cat([server, session]), torch.cat([server - 1, client]))
    brought = int((session > 0).sum())
    note = f"{name}: {len(missions) - 1} rounds bring {brought:,} of {len(field):,} field samples"
    return replace(stream, tasks=tasks, schedule=missions, notes=(*stream.notes, note))


def drawn_missions(y: Tensor, clients: int, way: int, shots: int, rounds: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Return the round, from 1, and the client of each of (samples,) field labels; -1 for those that no mission has.

    Raises ValueError for more ways than classes, more shots than a class has samples, and clients without any.
    """
    labels, counts = y.unique(return_counts=True)
    if way > len(labels):
        raise ValueError(f"way={way} is more than the {len(labels)} field classes: take at most so many")
    if shots > int(counts.min()):
        raise ValueError(f"shots={shots} is more than the {int(counts.min())} samples that a field class has: take at most so many")
    draw = torch.Generator().manual_seed(derive(seed, "missions"))
    unused = [rows[torch.randperm(len(rows), generator=draw)] for rows in ((y == label).nonzero().flatten() for label in labels)]
    session, client = torch.full((len(y),), -1), torch.full((len(y),), -1)
    number = 0
    while any(len(rows) for rows in unused) and number != rounds:
        number += 1
        for drawing in torch.randperm(clients, generator=draw).tolist():
            left = [place for place, rows in enumerate(unused) if len(rows)]
            for place in torch.randperm(len(left), generator=draw)[:way].tolist():
                rows, unused[left[place]] = unused[left[place]][:shots], unused[left[place]][shots:]
                session[rows], client[rows] = number, drawing
    served = client.unique()
    if idle := clients - len(served[served >= 0]):
        raise ValueError(
            f"{idle} of {clients} clients would have no images: those of the field classes are used up before. Take fewer clients, "
            "ways or shots"
        )
    return session, client


def dirichlet_shares(y: Tensor, clients: int, alpha: float, rounds: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the round, from 1, and the client of each of (samples,) field labels.

    Raises ValueError for a client that has fewer samples than there are rounds.
    """
    draw = torch.Generator().manual_seed(derive(seed, "shares"))
    session, client = torch.full((len(y),), -1), torch.full((len(y),), -1)
    for label in y.unique():
        rows = (y == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=draw)]
        shares = torch._standard_gamma(torch.full((clients,), float(alpha), dtype=torch.float64), generator=draw)
        ends = (shares.cumsum(0) / shares.sum() * len(rows)).round().long()
        client[rows] = torch.bucketize(torch.arange(len(rows)), ends, right=True).clamp(max=clients - 1)
    for owner in range(clients):
        own = (client == owner).nonzero().flatten()
        if len(own) < rounds:
            raise ValueError(
                f"client {owner} would have {len(own)} samples for {rounds} rounds at alpha={alpha:g}: take fewer clients or "
                "rounds, a greater alpha, or another seed"
            )
        session[own[torch.randperm(len(own), generator=draw)]] = torch.arange(len(own)) % rounds + 1
    return session, client
