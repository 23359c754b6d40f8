"""What strategies export and merge: sums exactly, models by their average, and what is refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import permutations

import pytest
import torch
from clstream.strategies import (
    NCM,
    SLDA,
    TAME,
    ClassMeans,
    FeCAM,
    Finetune,
    ICaRL,
    RanPAC,
    Refresh,
    Replay,
)
from conftest import built
from torch import Tensor, nn

from clstream import Samples, Strategy, Stream, Task, run
from clstream.checks import example_model, example_stream
from clstream.serialization.compare import digest

FROZEN: dict[str, Callable[[nn.Module], Strategy]] = {
    "NCM": NCM,
    "SLDA": SLDA,
    "RanPAC": partial(RanPAC, projection=40, ridge=1.0),
    "RanPAC, no projection": partial(RanPAC, projection=0, ridge=1.0),
    "FeCAM": partial(FeCAM, tukey=None),
}


class Identity(nn.Module):
    """Features are the inputs."""

    def features(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return x


def gaussian(rows: slice | Tensor = slice(None)) -> Stream:
    """One task of 4 classes of 5 features; some of its 120 training samples."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(4, (150,), generator=draw)
    x = torch.randn(150, 5, generator=draw) + 2 * torch.randn(4, 5, generator=draw)[y]
    return Stream("gaussian", [Task(0, (0, 1, 2, 3), Samples(x[:120], y[:120])[rows], Samples(x[120:], y[120:]))])


def learned(make: Callable[[nn.Module], Strategy], rows: slice | Tensor = slice(None)) -> Strategy:
    run(strategy := make(Identity()), gaussian(rows), seed=3)
    return strategy


def started(make: Callable[[nn.Module], Strategy]) -> Strategy:
    """A learner that knows the stream and has learned nothing, as a server."""
    strategy = learned(make, slice(0, 1))
    strategy.statistics, strategy.solved = {}, None
    return strategy


@pytest.mark.parametrize("name", FROZEN)
def test_sums_merge_to_those_of_one_learner_of_everything_in_any_order_and_grouping(name: str) -> None:
    make = FROZEN[name]
    whole = learned(make).export()
    shares = [learned(make, rows).export() for rows in (slice(0, 31), slice(31, 40), slice(40, 120))]
    groups = [[list(order)] for order in permutations(shares)]
    groups += [[[first], [second, third]] for first, second, third in permutations(shares)]
    for grouping in groups:
        server = started(make)
        for payloads in grouping:
            server.merge(payloads)
        merged = server.export()
        assert merged.keys() == whole.keys()
        for key, tensor in whole.items():
            assert float((merged[key] - tensor).abs().max()) < 1e-12 * max(1.0, float(tensor.abs().max()))
    x = gaussian().tasks[0].test[:].x
    assert float((server.scores(x) - learned(make).scores(x)).abs().max()) < 1e-4  # scores are float32


@pytest.mark.parametrize("name", FROZEN)
def test_what_came_since_is_exported_by_itself(name: str) -> None:
    """A client goes on from its server's sums, and the server has its own already: only what is new comes back."""
    make = FROZEN[name]
    server = learned(make, slice(0, 60))
    before = server.export()
    client = started(make)
    client.take_over(before)
    new = gaussian(slice(60, 120)).tasks[0].train[:]
    client.receive(client.features(new.x), new.y)
    server.merge([client.export(since=before)])
    for key, tensor in learned(make).export().items():
        assert float((server.export()[key] - tensor).abs().max()) < 1e-10 * max(1.0, float(tensor.abs().max()))


def prototypes(server: NCM) -> Tensor:
    return server.solve(server.export())


def of_class_0(mean: list[float], count: int) -> dict[str, Tensor]:
    """What an NCM of 2 classes exports that saw so many samples of class 0 with this mean."""
    sums = torch.zeros(2, 2, dtype=torch.float64)
    sums[0] = count * torch.tensor(mean, dtype=torch.float64)
    return {"counts": torch.tensor([float(count), 0.0], dtype=torch.float64), "sums": sums}


def test_the_vectors_of_merged_prototypes() -> None:
    server = NCM(Identity())
    server.classes = 2
    server.merge(of_class_0([1, 2], 4))
    server.merge([of_class_0([3, -2], 2)])
    torch.testing.assert_close(prototypes(server)[0], torch.tensor([1.6666666667, 0.6666666667], dtype=torch.float64))
    server.merge([of_class_0([0, 6], 3)])
    torch.testing.assert_close(prototypes(server)[0], torch.tensor([1.1111111111, 2.4444444444], dtype=torch.float64))
    new = NCM(Identity())
    new.classes = 2
    new.merge([of_class_0([3, -2], 2), of_class_0([0, 6], 3)])
    torch.testing.assert_close(prototypes(new)[0], torch.tensor([1.2, 2.8], dtype=torch.float64))


def test_distances_to_prototypes_and_the_loss_of_their_softmax() -> None:
    server = NCM(Identity())
    server.classes = 3
    sums = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    server.merge({"counts": torch.ones(3, dtype=torch.float64), "sums": sums})
    scores = server.scores(torch.tensor([[1.2, 1.0]], dtype=torch.float64)).double()
    torch.testing.assert_close(scores, -torch.tensor([[2.44, 1.64, 5.44]], dtype=torch.float64), atol=1e-6, rtol=0)
    p = scores.softmax(1)[0]
    torch.testing.assert_close(p, torch.tensor([0.3053129338, 0.6794864303, 0.0152006359], dtype=torch.float64), atol=1e-6, rtol=0)
    assert float(-p[1].log()) == pytest.approx(0.3864180158, abs=1e-6)


def test_models_merge_by_their_weighted_mean_with_buffers() -> None:
    models = [example_model(seed) for seed in range(3)]
    learners = [Finetune(model) for model in models]
    server = Finetune(example_model(9))
    server.merge([learner.export() for learner in learners], weights=[1, 2, 5])
    for name, tensor in server.model.state_dict().items():
        parts = torch.stack([model.state_dict()[name] for model in models]).double()
        expected = (parts * torch.tensor([1, 2, 5]).view(3, *[1] * (parts.dim() - 1))).sum(0) / 8
        torch.testing.assert_close(tensor, expected.to(tensor.dtype))
    other = Finetune(example_model(4))
    other.take_over(server.export())
    assert digest(other.model) == digest(server.model)


class Counting(nn.Linear):
    """A model with a buffer of whole numbers, as batch norm's number of batches."""

    def __init__(self, batches: int) -> None:
        super().__init__(2, 2)
        self.register_buffer("batches", torch.tensor(batches))


def test_whole_numbers_stay_whole() -> None:
    server = Finetune(Counting(0))
    server.merge([Finetune(Counting(3)).export(), Finetune(Counting(4)).export(), Finetune(Counting(4)).export()])
    assert server.model.batches.dtype == torch.int64 and int(server.model.batches) == 4


def test_classes_that_came_to_one_came_to_all() -> None:
    learners = []
    for task in (0, 2):
        run(learner := built(partial(Finetune, active_classes="seen")), replace(example_stream(), schedule=(task,)))
        learners.append(learner)
    first, second = learners
    first.merge([first.export(), second.export()])
    assert first.seen_classes.tolist() == [0, 1, 4, 5]


def test_wrappers_merge_what_they_wrap() -> None:
    run(server := built(lambda model: Refresh(Replay(model))), example_stream(), max_sessions=1)
    run(client := built(lambda model: Refresh(Replay(model))), example_stream(), max_sessions=2)
    server.merge([client.export()])
    assert digest(server.model) == digest(client.model)


def icarl(capacity: int = 30, merge_epochs: int = 0) -> ICaRL:
    return built(partial(ICaRL, capacity=capacity, merge_epochs=merge_epochs))


def test_icarl_averages_an_output_over_those_that_know_its_class_and_joins_exemplars() -> None:
    stream = example_stream(epochs=3)
    learners = []
    for task in (0, 2):
        run(learner := icarl(), replace(stream, schedule=(task,)))
        learners.append(learner)
    server = icarl()
    run(server, replace(stream, schedule=(1,)))
    before = server.exemplars_by_class()
    server.merge([learner.export() for learner in learners])
    weight = {index: learner.model.head.weight for index, learner in zip((0, 2), learners, strict=True)}
    torch.testing.assert_close(server.model.head.weight[[0, 1]], weight[0][[0, 1]])
    torch.testing.assert_close(server.model.head.weight[[4, 5]], weight[2][[4, 5]])
    hidden = next(server.model.parameters())
    torch.testing.assert_close(hidden, (next(learners[0].model.parameters()) + next(learners[1].model.parameters())) / 2)
    assert server.counts == dict.fromkeys(range(6), 5)
    assert torch.equal(server.exemplars_by_class()[2].x, before[2].x[:5])
    x = torch.cat([task.test.x for task in stream.tasks])
    assert set(server.predict(x).tolist()) <= set(range(6))


def test_icarl_learns_merged_exemplars_and_exports_those_of_new_classes() -> None:
    stream = example_stream(epochs=5)
    run(server := icarl(60, merge_epochs=40), replace(stream, schedule=(0,)))
    down = server.export()
    uploads = []
    for task in (1, 2):
        client = deepcopy(icarl(60))
        run(client, replace(stream, schedule=(task,)), max_sessions=1)
        uploads.append(client.export(since=down))
        assert set(uploads[-1]["exemplars.y"].tolist()) == set(stream.tasks[task].classes)
    server.merge(uploads)
    x, y = (torch.cat([getattr(task.test[:], name) for task in stream.tasks]) for name in ("x", "y"))
    assert float((server.predict(x) == y).float().mean()) > 0.9
    fresh = icarl(60)
    run(fresh, replace(stream, schedule=(0,)))
    fresh.take_over(server.export())
    assert torch.equal(fresh.predict(x), server.predict(x))
    assert len(server.exemplars.x.flatten(1).unique(dim=0)) == len(server.exemplars)


@pytest.mark.parametrize("make", [*FROZEN.values()], ids=[*FROZEN])
def test_bad_statistics_are_refused_before_anything_changes(make: Callable[[nn.Module], Strategy]) -> None:
    server, good = learned(make, slice(0, 60)), learned(make, slice(60, 120)).export()
    before = digest(server)
    key = "counts"
    for bad, sentence in (
        ({**good, key: good[key] * float("nan")}, "counts has numbers that are not finite"),
        ({**good, key: good[key][:3]}, "has statistics of the shapes"),
        ({name: tensor for name, tensor in good.items() if name != key}, "has statistics of the shapes"),
        ([1, 2], "is a mapping of names to tensors"),
        ([], "there is nothing to merge"),
    ):
        with pytest.raises(ValueError, match=sentence):
            server.merge([good, bad] if bad else [])
        assert digest(server) == before
    with pytest.raises(ValueError, match="merge takes what one learner exported, or several in a list, not 3"):
        server.merge(3)  # type: ignore[arg-type]


def test_bad_models_are_refused_before_anything_changes() -> None:
    server, good = Finetune(example_model(0)), Finetune(example_model(1)).export()
    before, name = digest(server), "model.head.weight"
    for bad, sentence in (
        ({**good, name: good[name] * float("inf")}, "model.head.weight has numbers that are not finite"),
        ({**good, name: good[name][:3]}, r"Finetune has model.head.weight of the shape \(6, 32\), and this is of \(3, 32\)"),
        ({**good, "more": good[name]}, "what Finetune merges has other tensors: this has more too"),
        ({name: good[name]}, "what Finetune merges has other tensors: this lacks model"),
    ):
        with pytest.raises(ValueError, match=sentence):
            server.merge([good, bad])
        assert digest(server) == before
    for weights, sentence in (([1], "a weight for each of the 2"), ([0, 0], "not all 0"), ([1, -1], "0 or more")):
        with pytest.raises(ValueError, match=sentence):
            server.merge([good, good], weights=weights)


def test_bad_exemplars_are_refused_before_anything_changes() -> None:
    run(server := icarl(), example_stream(), max_sessions=1)
    run(client := icarl(), example_stream(), max_sessions=2)
    good, before = client.export(), digest(server)
    for name, bad, sentence in (
        ("exemplars.x", good["exemplars.x"][:, :, :7], "inputs are"),
        ("exemplars.y", good["exemplars.y"] + 9, "not among the classes"),
        ("classes", good["classes"] * 100, "not among the classes|outside of the stream's"),
        ("model.head.bias", good["model.head.bias"] * float("nan"), "not finite"),
    ):
        with pytest.raises(ValueError, match=sentence):
            server.merge([good, {**good, name: bad}])
        assert digest(server) == before


def test_what_answers_with_more_than_a_model_is_not_averaged() -> None:
    tame = built(partial(TAME, window=10))
    run(tame, example_stream(boundaries=False), max_sessions=1)
    with pytest.raises(TypeError, match="TAME answers with more than its model, so an average of models is no TAME"):
        tame.export()
    means = ClassMeans(Replay(example_model()))
    with pytest.raises(TypeError, match="ClassMeans answers otherwise than the Replay that it wraps"):
        means.merge([means.base.export()])
