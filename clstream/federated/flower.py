"""Flower's simulation engine: the same clients, as ClientApps in processes of its own, and a strategy of Flower's that merges.

Flower (Beutel et al. 2020, "Flower: A Friendly Federated Learning Framework") brings the messages, the nodes and the processes.
`run_on_flower` plays a run as `clstream.run` does, within Flower's ServerApp: events, evaluations, trackers and checkpoints are the
same. In each round `Merging`, a strategy of Flower's, sends what the server exports to the nodes whose client has a mission, and
merges what they send back. What clients learn is the same as in one process.
"""

from __future__ import annotations

import os
import time
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from clstream.bus import on
from clstream.events import RunStarted
from clstream.federated.client import Mission, Upload, learn_mission, missions_of
from clstream.federated.events import ClientTrained
from clstream.federated.payloads import compact, expand, payload_bytes
from clstream.params import check_integer, check_positive
from clstream.strategy import Strategy

if TYPE_CHECKING:
    from clstream.results import Result
    from clstream.stream import Stream

CPUS = 1
"""Cores that a client is given, if nothing else is said."""


class Server(Protocol):
    """What a strategy has that plays rounds: `clstream.strategies.Federated`."""

    base: Strategy
    blank: Strategy | None
    engine: Any
    round: int
    epochs: int
    batch_size: int
    seed: int

    def merge_uploads(self, uploads: list[Upload], down: dict[str, Tensor]) -> None:
        """Merge the uploads of a round."""

    def lose(self, client: int, reason: str, warn: bool = True) -> None:
        """Tell that what a client learned is not merged."""

    def emit(self, event: Any) -> None:
        """Tell all who listen."""


class _BlankMadeError(Exception):
    """A run has begun, and what clients start from is there."""


class _StopAtStart:
    """Ends a run as soon as it has begun."""

    @on(RunStarted)
    def stop(self, event: RunStarted) -> None:
        raise _BlankMadeError


def run_on_flower(
    strategy: Strategy,
    stream: Stream,
    *observers: object,
    seed: int = 0,
    timeout: float = 600.0,
    cpus: int = CPUS,
    init_args: dict[str, Any] | None = None,
    **options: Any,
) -> Result:
    """Play a stream of clients as `clstream.run` does, its clients run by Flower's simulation engine.

    Clients run on the CPU. What they send is checked as in one process; one that fails, or sends nothing within `timeout`, is lost
    for its round, and told.

    Args:
        strategy: a `clstream.strategies.Federated`.
        stream: of `clstream.streams.federated`.
        observers: as for `run`; `ClientTrained` has no learner here, since that is in another process.
        seed: as for `run`.
        timeout: seconds to wait for the clients of a round.
        cpus: cores of each client.
        init_args: for the start of Flower's backend, Ray.
        options: others of `run`.

    Raises:
        ImportError: if Flower is not installed.
        TypeError, ValueError: for a strategy that plays no rounds, a stream without clients, and as `run` does.

    """
    try:
        os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # a run tells nobody of itself
        from flwr.clientapp import ClientApp
        from flwr.serverapp import ServerApp
        from flwr.simulation import run_simulation
    except ImportError:
        raise ImportError("Flower is not installed: pip install 'clstream[federated]', from Python 3.11 on") from None

    from clstream.engine import run

    check_positive(timeout=timeout)
    check_integer(1, cpus=cpus)
    if not hasattr(strategy, "merge_uploads"):
        raise TypeError(f"run_on_flower plays the clients of a Federated(...), and {type(strategy).__name__} has none: wrap it")
    owners = [task.train[:].extra.get("client") for task in stream.tasks]
    clients = 1 + max((int(owner.max()) for owner in owners if owner is not None), default=-1)
    if not clients:
        raise ValueError(f"{stream.name} has no clients: take a stream of streams.federated")
    server: Any = strategy
    twin = deepcopy(server)
    try:
        run(twin, stream, _StopAtStart(), seed=seed, **{**options, "resume": None})
    except _BlankMadeError:
        pass
    field = Field(twin.blank, stream.reseeded(seed), server.epochs, server.batch_size, seed, cpus)

    client_app = ClientApp()

    @client_app.query()  # type: ignore[untyped-decorator]  # Flower's types are not looked at
    def tell_number(message: Any, context: Any) -> Any:
        return reply(message, {"client": int(context.node_config["partition-id"])})

    @client_app.train()  # type: ignore[untyped-decorator]
    def learn(message: Any, context: Any) -> Any:
        return field.learn(message, int(context.node_config["partition-id"]))

    server_app, ended = ServerApp(), dict[str, Any]()

    @server_app.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, _: Any) -> None:
        server.engine = _Rounds(grid, clients, timeout)
        try:
            ended["result"] = run(strategy, stream, *observers, seed=seed, **options)
        except BaseException as error:  # noqa: BLE001  # it is raised where the caller waits
            ended["error"] = error
        finally:
            server.engine = None

    config = {"client_resources": {"num_cpus": cpus, "num_gpus": 0.0}, "init_args": init_args or {}}
    run_simulation(server_app, client_app, num_supernodes=clients, backend_config=config)
    if "error" in ended:
        raise ended["error"]
    result: Result = ended["result"]
    return result


@dataclass(frozen=True)
class Field:
    """What clients have in their own processes.

    Args:
        blank: what they start from.
        stream: whose rounds have their samples.
        epochs, batch_size: of their learning.
        seed: of the run.
        cpus: cores of each.

    """

    blank: Strategy
    stream: Stream
    epochs: int
    batch_size: int
    seed: int
    cpus: int

    def learn(self, message: Any, client: int) -> Any:
        """Return the answer of a client to what the server sent: its upload, or why there is none."""
        torch.set_num_threads(self.cpus)
        facts = message.content["facts"]
        samples = self.stream.session(int(facts["session"])).samples
        missions = missions_of(samples, int(facts["round"]), self.epochs, self.batch_size, self.seed)
        mission = next(own for own in missions if own.client == client)
        try:
            _, upload = learn_mission(self.blank, expand(tensors(message.content["down"])), mission)
        except FloatingPointError as error:
            return reply(message, {"client": client, "lost": str(error)})
        told = {"client": client, "classes": list(upload.classes), "samples": upload.samples}
        return reply(message, told, compact(upload.payload))


def record(payload: dict[str, Tensor]) -> Any:
    """Return an ArrayRecord of tensors."""
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(tensor.cpu().numpy()) for name, tensor in payload.items()})


def tensors(arrays: Any) -> dict[str, Tensor]:
    """Return the tensors of an ArrayRecord."""
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in arrays.items()}


def reply(message: Any, facts: dict[str, Any], payload: dict[str, Tensor] | None = None) -> Any:
    """Return an answer to a message, with facts and tensors."""
    from flwr.app import ConfigRecord, Message, RecordDict

    content = {"facts": ConfigRecord(facts)}
    return Message(RecordDict(content if payload is None else {**content, "upload": record(payload)}), reply_to=message)


class _Rounds:
    """Plays the rounds of a run on Flower's nodes.

    Args:
        grid: Flower's, which messages go by.
        clients: how many there are.
        timeout: seconds to wait for them to be there, and for those of a round.

    """

    def __init__(self, grid: Any, clients: int, timeout: float) -> None:
        from flwr.app import ConfigRecord, Message, RecordDict

        self.grid, self.timeout = grid, timeout
        waited = time.monotonic() + timeout
        while len(list(grid.get_node_ids())) < clients and time.monotonic() < waited:
            time.sleep(0.1)
        asked = [Message(RecordDict({"facts": ConfigRecord({})}), node, "query") for node in grid.get_node_ids()]
        answers = [answer for answer in grid.send_and_receive(asked, timeout=timeout) if answer.has_content()]
        self.nodes = {int(answer.content["facts"]["client"]): answer.metadata.src_node_id for answer in answers}

    def play(self, server: Server, missions: list[Mission], down: dict[str, Tensor], session: int) -> None:
        """Send what is to be learned, wait for the uploads, and merge them."""
        strategy = merging(server, missions, down, self.nodes, session)
        messages = strategy.configure_train(server.round, record(compact(down)), None, self.grid)
        strategy.aggregate_train(server.round, self.grid.send_and_receive(messages, timeout=self.timeout))


def merging(server: Server, missions: list[Mission], down: dict[str, Tensor], nodes: dict[int, int], session: int) -> Any:
    """Return the strategy of Flower's that merges a round.

    Args:
        server: what merges.
        missions: of the clients of the round.
        down: what the server exported.
        nodes: of Flower's, by the number of the client.
        session: the number of the round's session.

    """
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.serverapp.strategy import Strategy as FlowerStrategy

    class Merging(FlowerStrategy):  # type: ignore[misc]  # Flower has no types that are looked at here
        """Sends missions, and merges what clients upload as the server's strategy does."""

        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> list[Any]:
            facts = ConfigRecord({"round": server_round, "session": session})
            reached = [nodes[mission.client] for mission in missions if mission.client in nodes]
            return [Message(RecordDict({"down": arrays, "facts": facts}), node, "train") for node in reached]

        def aggregate_train(self, server_round: int, replies: Any) -> tuple[Any, None]:
            uploads, heard = [], set[int]()
            for answer in replies:
                if not answer.has_content():
                    continue
                facts = answer.content["facts"]
                heard.add(client := int(facts["client"]))
                if "lost" in facts:
                    server.lose(client, str(facts["lost"]))
                    continue
                try:
                    payload = expand(tensors(answer.content["upload"]))
                except ValueError as error:
                    server.lose(client, f"its upload can't be merged: {error}")
                    continue
                classes = tuple(int(label) for label in facts["classes"])
                server.emit(ClientTrained(server_round, client, None, classes))
                uploads.append(Upload(client, classes, int(facts["samples"]), payload, payload_bytes(payload)))
            for mission in missions:
                if mission.client not in heard:
                    server.lose(mission.client, "nothing came from it")
            server.merge_uploads(uploads, down)
            return record(compact(server.base.export())), None

        def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Any) -> list[Any]:
            return []

        def aggregate_evaluate(self, server_round: int, replies: Any) -> None:
            return None

        def summary(self) -> None:
            return None

    return Merging()
