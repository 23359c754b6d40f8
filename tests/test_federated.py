"""Federated streams, and rounds of clients that learn apart: exact merges, missions, events, bytes, and clients that fail."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from clstream.strategies import AGEM, NCM, SLDA, Federated, Finetune, ICaRL, RanPAC, Replay
from clstream.streams import federated
from conftest import built
from torch import Tensor, nn
from torch.optim import SGD

from clstream import Event, RunStarted, Strategy, Stream, on, run, streams
from clstream.checkpoint.compare import difference
from clstream.checks.recorders import Checkpoints
from clstream.federated import (
    ClientDispatched,
    ClientLost,
    ClientTrained,
    FederatedAccuracy,
    Merged,
    Uploaded,
    compact,
    expand,
    learn_mission,
    missions_of,
    payload_bytes,
    shifted_as_published,
)
from clstream.models import Conv4, Mlp
from clstream.seeds import isolated
from clstream.serialization.compare import digest
from clstream.stream import Batch


@pytest.fixture(scope="module")
def stream() -> Stream:
    """Digits: 5 base classes, 5 field classes, 3 clients that draw 2 classes and 10 images each, 4 rounds."""
    return federated(clients=3, rounds=4)


def model(stream: Stream) -> nn.Module:
    with isolated(0, "model"):
        return Mlp(stream.input_shape, stream.classes, hidden=(32,))


def rounds_of(stream: Stream) -> list[tuple[int, int, list[int]]]:
    """(round, client, numbers of the samples) of each mission."""
    schedule = stream.schedule
    missions = []
    for number in range(1, len(schedule)):
        rows = schedule.draw(number)
        owner = schedule.client[rows]
        missions += [(number, client, rows[owner == client].tolist()) for client in owner.unique().tolist()]
    return missions


def test_missions_are_exclusive_and_have_so_many_ways_and_shots() -> None:
    whole = federated()
    missions, y = rounds_of(whole), torch.cat([task.train.y for task in whole.tasks])
    drawn = [row for _, _, rows in missions for row in rows]
    assert len(drawn) == len(set(drawn)) == len(whole.tasks[1].train)  # each image goes to one client, once
    for number, _, rows in missions:
        labels, counts = y[rows].unique(return_counts=True)
        assert len(labels) <= 2 and int(counts.max()) <= 10
        if number <= 4:
            assert len(labels) == 2 and counts.tolist() == [10, 10]
    for session in whole:
        owner = session.samples[:].extra["client"]
        assert (owner == -1).all() if session.index == 0 else (owner.unique() < 5).all()
        assert set(session.classes) <= set(whole.tasks[min(1, session.index)].classes)


def test_missions_are_a_function_of_the_seed() -> None:
    first, same, other = federated(rounds=3), federated(rounds=3), federated(rounds=3, seed=1)
    assert rounds_of(first) == rounds_of(same) != rounds_of(other)
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_dirichlet_shares_are_all_dealt_out_and_more_unlike_with_a_small_alpha() -> None:
    def spread(alpha: float) -> float:
        dealt = federated(alpha=alpha, rounds=2, clients=4)
        y = torch.cat([task.train.y for task in dealt.tasks])
        counts = torch.zeros(4, 5)
        for _, client, rows in rounds_of(dealt):
            counts[client] += (y[rows] - 5).bincount(minlength=5)
        assert int(counts.sum()) == len(dealt.tasks[1].train)
        return float((counts / counts.sum(0)).std(0).mean())

    assert spread(0.3) > 2 * spread(10.0) and spread(1000.0) < 0.03


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"way": 6}, "way=6 is more than the 5 field classes"),
        ({"shots": 500}, "shots=500 is more than the 1.. samples that a field class has"),
        ({"base": 10}, "base=10 classes leave no field classes: digits has 10, so take at most 9"),
        ({"alpha": 0.01, "clients": 30}, "would have 0 samples for 5 rounds at alpha=0.01"),
        ({"clients": 400}, "365 of 400 clients would have no images: those of the field classes are used up before"),
        ({"clients": 0}, "clients"),
        ({"alpha": 0}, "alpha"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_streams_that_cannot_be_are_refused(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        federated(**options)


FROZEN: dict[str, Callable[[nn.Module], Strategy]] = {
    "NCM": NCM,
    "SLDA": SLDA,
    "RanPAC": partial(RanPAC, projection=0, ridge=1.0),
}


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("clients", [1, 3])
def test_what_is_merged_is_what_one_learner_of_everything_has(name: str, clients: int) -> None:
    stream = federated(clients=clients, rounds=4)
    run(central := FROZEN[name](model(stream)), stream)
    run(apart := Federated(FROZEN[name](model(stream))), stream)
    ours = apart.base.export()
    for key, tensor in central.export().items():
        assert float((ours[key] - tensor).abs().max()) < 1e-10 * max(1.0, float(tensor.abs().max()))
    x = torch.cat([task.test.x for task in stream.tasks])
    assert torch.equal(apart.predict(x), central.predict(x))


def test_the_encoder_stays_as_it_is_and_base_prototypes_change_only_by_base_images(stream: Stream) -> None:
    class Watch:
        @on(RunStarted)
        def meet(self, event: RunStarted) -> None:
            self.strategy, self.prototypes = event.strategy, []

        @on(Merged)
        def look(self, event: Merged) -> None:
            self.prototypes.append(self.strategy.base.export()["sums"][:5])

    strategy = Federated(NCM(model(stream)))
    before = {name: tensor.clone() for name, tensor in strategy.model.state_dict().items()}
    run(strategy, stream, watch := Watch(), accuracy := FederatedAccuracy())
    assert all(torch.equal(tensor, before[name]) for name, tensor in strategy.model.state_dict().items())
    assert all(torch.equal(sums, watch.prototypes[0]) for sums in watch.prototypes)
    base = [row.base for row in accuracy.server()]
    assert base[0] == max(base) > min(base)  # more classes, with unchanged means of the base: never more right than without them


def test_prototypes_are_of_features_in_evaluation_mode(stream: Stream) -> None:
    """By batch statistics of a mission's few classes they would be others, and so would answers."""
    with isolated(0, "model"):
        network = Conv4(stream.input_shape, stream.classes, width=4, blocks=2).train()  # it has batch norm
    run(strategy := Federated(NCM(network)), stream)
    samples = [session.samples[:] for session in stream]
    x, y = torch.cat([part.x for part in samples]), torch.cat([part.y for part in samples])
    with torch.no_grad():
        network.eval()
        features, asked = network.features(x).double(), network.features(stream.tasks[1].test.x).double()
    means = torch.stack([features[y == label].mean(0) for label in range(stream.classes)])
    ours = strategy.base.export()
    assert float((ours["sums"] / ours["counts"][:, None] - means).abs().max()) < 1e-5
    assert torch.equal(strategy.predict(stream.tasks[1].test.x), torch.cdist(asked, means).argmin(1))


def test_clients_learn_the_same_in_any_order(stream: Stream) -> None:
    """What a client learns depends on no other client."""
    strategy = Federated(Finetune(model(stream)), epochs=2, batch_size=8)
    run(strategy, stream, max_sessions=1)
    missions = missions_of(stream.session(1).samples, 1, 2, 8, seed=0)
    down = strategy.base.export()
    forward = [learn_mission(strategy.blank, down, mission)[1] for mission in missions]
    backward = [learn_mission(strategy.blank, down, mission)[1] for mission in reversed(missions)][::-1]
    assert [upload.client for upload in forward] == [0, 1, 2]
    for upload, reverse in zip(forward, backward, strict=True):
        assert all(torch.equal(upload.payload[name], reverse.payload[name]) for name in upload.payload)
    moved = [upload.payload["model.head.weight"] for upload in forward]
    assert not torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], down["model.head.weight"])


def test_models_of_clients_are_averaged_by_their_numbers_of_samples(stream: Stream) -> None:
    strategy = Federated(Finetune(model(stream), partial(SGD, lr=0.1)), epochs=1, batch_size=8)
    run(strategy, stream, max_sessions=1)
    down = strategy.base.export()
    uploads = [learn_mission(strategy.blank, down, mission)[1] for mission in missions_of(stream.session(1).samples, 1, 1, 8, 0)]
    run(again := Federated(Finetune(model(stream), partial(SGD, lr=0.1)), epochs=1, batch_size=8), stream, max_sessions=2)
    total = sum(upload.samples for upload in uploads)
    for name, tensor in again.base.export().items():
        mean = sum(upload.payload[name].double() * upload.samples for upload in uploads) / total
        torch.testing.assert_close(tensor, mean.float())


class Listen:
    """Takes down the events of rounds."""

    def __init__(self) -> None:
        self.heard: list[Event] = []

    @on(Event)
    def hear(self, event: Event) -> None:
        if isinstance(event, (ClientDispatched, ClientTrained, Uploaded, ClientLost, Merged)):
            self.heard.append(event)

    @property
    def word(self) -> str:
        letters = {ClientDispatched: "D", ClientTrained: "T", Uploaded: "U", ClientLost: "L", Merged: "M"}
        return "".join(letters[type(event)] for event in self.heard)


def test_events_tell_of_each_client_and_of_the_bytes_that_were_sent(stream: Stream) -> None:
    cost = run(strategy := Federated(NCM(model(stream), dtype="float32")), stream, listen := Listen()).cost
    assert re.fullmatch("(DDDTTTUUUM){4}", listen.word)
    merged = [event for event in listen.heard if isinstance(event, Merged)]
    assert [event.round for event in merged] == [1, 2, 3, 4] and merged[0].clients == (0, 1, 2)
    up = sum(event.bytes for event in listen.heard if isinstance(event, Uploaded))
    down = sum(event.bytes for event in listen.heard if isinstance(event, ClientDispatched))
    assert (up, down) == (merged[-1].bytes_up, merged[-1].bytes_down) == (strategy.bytes_up, strategy.bytes_down)
    # 2 classes of 32 floats each, their counts, and the number of each row and of all rows with both tensors
    assert {event.bytes for event in listen.heard if isinstance(event, Uploaded)} == {2 * 32 * 4 + 2 * 4 + 2 * 3 * 4}
    assert merged[-1].curves()["federated/bytes_up"] == up
    assert cost.bytes_up.cumsum(0).tolist() == [0, *(event.bytes_up for event in merged)]  # the base session sends nothing
    assert cost.bytes_down.cumsum(0).tolist() == [0, *(event.bytes_down for event in merged)]
    assert cost.total["bytes_up"] == up and {"bytes_up", "bytes_down"} < {*cost.to_frame().columns}


def test_rows_of_classes_that_did_not_come_are_not_sent() -> None:
    sums = torch.zeros(10, 64)
    sums[[2, 7, 8]] = torch.randn(3, 64)
    payload = {"sums": sums, "counts": (sums != 0).any(1).float(), "gram": torch.ones(3, 3), "one": torch.tensor(2)}
    sent = compact(payload)
    assert sent["sums"].shape == (3, 64) and sent["gram"] is payload["gram"]
    assert payload_bytes(payload) == 3 * 64 * 4 + 4 * 4 + 3 * 4 + 4 * 4 + 9 * 4 + 8
    back = expand(sent)
    assert back.keys() == payload.keys() and all(torch.equal(back[name], payload[name]) for name in payload)
    for rows in (torch.tensor([2, 7, 8]), torch.tensor([2, 7, 99, 10]), torch.tensor([1.0, 2.0, 3.0, 4.0])):
        with pytest.raises(ValueError, match="sums was sent with"):
            expand({**sent, "sums:rows": rows})


def of(mean: tuple[float, float], count: int) -> dict[str, Tensor]:
    return {
        "counts": torch.tensor([float(count)], dtype=torch.float64),
        "sums": count * torch.tensor([mean], dtype=torch.float64),
    }


def test_the_published_merge_gives_what_the_authors_code_gives() -> None:
    down = own = of((1, 2), 4)
    expected = ((1.2222222222, 1.5555555556), (1.0052910053, 2.2751322751))
    for upload, mean in zip((of((3, -2), 2), of((0, 6), 3)), expected, strict=True):
        shift = shifted_as_published(own, down, upload)
        own = {name: own[name] + shift[name] for name in own}
        torch.testing.assert_close((own["sums"] / own["counts"])[0], torch.tensor(mean, dtype=torch.float64))
    new = shifted_as_published({}, {}, of((3, -2), 2))
    assert torch.equal(new["sums"], of((3, -2), 2)["sums"])


def test_the_published_merge_is_another_one_only_where_the_server_knew_the_class(stream: Stream) -> None:
    run(exact := Federated(NCM(model(stream))), stream)
    run(published := Federated(NCM(model(stream)), merging="published"), stream)
    ours, theirs = exact.base.export(), published.base.export()
    assert torch.equal(ours["counts"], theirs["counts"])
    torch.testing.assert_close(ours["sums"][:5], theirs["sums"][:5])
    assert not torch.allclose(ours["sums"][5:], theirs["sums"][5:])
    for base in (Finetune, SLDA):
        sentence = f"merging='published' is of prototypes, as NCM has them, and {base.__name__} has others"
        with pytest.raises(ValueError, match=sentence):
            Federated(base(model(stream)), merging="published")


class Faulty(NCM):
    """One whose upload is bad where its mission has class 5 and not 6."""

    how = "nan"

    def export(self, since: object = None) -> dict[str, Tensor]:
        payload = super().export(since)
        if since and payload["counts"][5] and not payload["counts"][6]:
            bad = payload["sums"] * float("nan") if self.how == "nan" else payload["sums"][:, :7]
            return {**payload, "sums": bad}
        return payload


@pytest.mark.parametrize(
    ("how", "sentence"), [("nan", "sums has numbers that are not finite"), ("shape", "statistics of the shapes")]
)
def test_bad_uploads_are_left_out_and_told(monkeypatch: pytest.MonkeyPatch, stream: Stream, how: str, sentence: str) -> None:
    monkeypatch.setattr(Faulty, "how", how)
    with pytest.warns(RuntimeWarning, match=f"goes on without client .: its upload can't be merged: .*{sentence}"):
        run(strategy := Federated(Faulty(model(stream))), stream, listen := Listen())
    lost = [(event.round, event.client) for event in listen.heard if isinstance(event, ClientLost)]
    assert lost
    central, y = NCM(model(stream)), torch.cat([task.train.y for task in stream.tasks])
    left = [row for number, client, rows in rounds_of(stream) for row in rows if (number, client) not in lost]
    run(central, stream, max_sessions=1)
    x = torch.cat([task.train.x for task in stream.tasks])
    central.receive(central.features(x[left]), y[left])
    for name, tensor in central.export().items():
        torch.testing.assert_close(strategy.base.export()[name], tensor)
    merged = [event for event in listen.heard if isinstance(event, Merged)]
    assert len(merged) == 4 and sum(len(event.clients) for event in merged) == 12 - len(lost)


class Diverging(Finetune):
    """One whose loss is not finite on a batch with class 5 and not 6."""

    def learn(self, batch: Batch) -> Tensor:
        labels = set(batch.samples.y.tolist())
        return super().learn(batch) * (float("nan") if 5 in labels and 6 not in labels else 1.0)


def test_a_client_whose_loss_is_not_finite_is_lost_and_the_round_goes_on(stream: Stream) -> None:
    with pytest.warns(RuntimeWarning, match="goes on without client .: its loss is not finite in epoch 0"):
        run(Federated(Diverging(model(stream))), stream, listen := Listen())
    lost = [event for event in listen.heard if isinstance(event, ClientLost)]
    assert lost and listen.word.count("T") == 12 - len(lost)


def test_clients_drop_out_and_uploads_come_late_by_the_seed(stream: Stream) -> None:
    run(strategy := Federated(NCM(model(stream)), dropout=0.3, late=0.3), stream, listen := Listen())
    reasons = [event.reason for event in listen.heard if isinstance(event, ClientLost)]
    assert {*reasons} == {"it dropped out", "its upload comes a round late"}
    run(same := Federated(NCM(model(stream)), dropout=0.3, late=0.3), stream)
    assert digest(strategy) == digest(same)
    merged = sum(len(event.clients) for event in listen.heard if isinstance(event, Merged))
    assert merged == 12 - reasons.count("it dropped out") - len(strategy.delayed)
    images = strategy.base.export()["counts"][5:].sum()
    assert int(images) == 20 * merged  # a late upload counts once, in the round in which it came


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda model: Federated(NCM(model), late=0.4),
        lambda model: Federated(ICaRL(model, capacity=60, merge_epochs=1), epochs=2, batch_size=8),
        lambda model: Federated(Replay(model), epochs=2, weigh="equally"),
    ],
    ids=["NCM", "ICaRL", "Replay"],
)
def test_a_federated_run_resumes_exactly(make: Callable[[nn.Module], Strategy]) -> None:
    stream = federated(clients=2, rounds=3, batch_size=200)
    whole = Checkpoints()
    expected = run(make(model(stream)), stream, whole, accuracy := FederatedAccuracy())
    for number in range(1, len(whole.written) - 1, 3):
        rest, measured = Checkpoints(every=0), FederatedAccuracy()
        result = run(make(model(stream)), stream, rest, measured, resume=whole.load(number))
        assert difference(whole.load(-1), rest.load(-1)) is None
        assert torch.equal(result.accuracy, expected.accuracy)
        for column in ("bytes_up", "bytes_down"):
            assert torch.equal(getattr(result.cost, column), getattr(expected.cost, column)) and getattr(result.cost, column).any()
        assert [(row.round, row.client) for row in measured.rows] == [(row.round, row.client) for row in accuracy.rows]


def test_accuracies_of_clients_and_server_by_hand(stream: Stream) -> None:
    run(strategy := Federated(NCM(model(stream))), stream, accuracy := FederatedAccuracy())
    rows = accuracy.rows
    assert [(row.round, row.client) for row in rows[:5]] == [(0, -1), (1, 0), (1, 1), (1, 2), (1, -1)] and len(rows) == 1 + 4 * 4
    test, last = stream.tasks[1].test[:], accuracy.server()[-1]
    assert last.field == pytest.approx(float((strategy.predict(test.x) == test.y).double().mean()))
    assert rows[0].field != rows[0].field and rows[1].mission > 0.5  # there is no field class before the first merge: NaN
    assert rows[1].mean == pytest.approx((rows[1].base + rows[1].mission) / 2)
    assert accuracy.server()[0].base > last.base - 1e-12


def test_the_bounds_learn_the_same_stream(stream: Stream) -> None:
    """Sequential steps forget the base; the prototypes of clients don't; sessions of a round have the images of all clients."""
    lower = run(Finetune(model(stream)), replace(stream, epochs=5))
    federated_result = run(Federated(NCM(model(stream))), stream)
    assert float(lower.accuracy[-1, 0]) < 0.3 < float(federated_result.accuracy[-1, 0])
    assert sum(len(session.samples) for session in stream) == len(stream.tasks[0].train) + 4 * 3 * 20


def test_what_has_no_clients_or_cannot_be_merged_is_refused(stream: Stream) -> None:
    with pytest.raises(ValueError, match="clients have sessions and no tasks, and AGEM needs boundaries"):
        Federated(built(AGEM))
    with pytest.raises(ValueError, match="a growing head another after each mission: take head='fixed'"):
        run(Federated(Finetune(Mlp(stream.input_shape, stream.classes, hidden=(8,), head="growing"))), stream)
    for option in ({"dropout": 1.0}, {"late": -0.1}, {"merging": "mean"}, {"weigh": "none"}, {"epochs": 0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            Federated(NCM(model(stream)), **option)
    with pytest.raises(ValueError, match=r"has no field classes: FederatedAccuracy needs a stream of streams\.federated"):
        run(Federated(NCM(Mlp(20, 10))), streams.blobs(tasks=1), FederatedAccuracy())


def test_observers_need_not_be_there_and_outside_of_a_run_nothing_is_sent(stream: Stream) -> None:
    run(alone := Federated(NCM(model(stream))), stream)
    run(watched := Federated(NCM(model(stream))), stream, FederatedAccuracy(), Listen())
    assert digest(alone) == digest(watched)
