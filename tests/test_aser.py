"""ASER: Shapley values by their definition, what is retrieved and what is exchanged."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import pytest
import torch
from clstream.strategies import ASER
from clstream.strategies.aser import ExchangingMemory, knn_shapley
from conftest import built
from torch import Tensor, nn
from torch.nn import functional as F

from clstream import Samples, run
from clstream.checks import example_model, example_stream
from clstream.seeds import isolated


def small(**options: object) -> ASER:
    return built(partial(ASER, **{"capacity": 40, "k": 3, **options}))


def by_permutations(sample: Tensor, y: int, candidates: Tensor, labels: list[int], k: int) -> list[float]:
    """The definition: what a candidate adds to the worth of those before it, the mean over all orders."""
    distances = (candidates - sample).norm(dim=1).tolist()

    def worth(chosen: tuple[int, ...]) -> float:
        nearest = sorted(chosen, key=distances.__getitem__)[:k]
        return sum(labels[place] == y for place in nearest) / k

    values, orders = [0.0] * len(labels), list(permutations(range(len(labels))))
    for order in orders:
        for place in range(len(order)):
            values[order[place]] += worth(order[: place + 1]) - worth(order[:place])
    return [value / len(orders) for value in values]


@pytest.mark.parametrize(("k", "count"), [(1, 5), (2, 5), (3, 6), (5, 4)])
def test_shapley_values_are_those_of_the_definition(k: int, count: int) -> None:
    draw = torch.Generator().manual_seed(k)
    features, candidates = torch.randn(3, 2, generator=draw), torch.randn(count, 2, generator=draw)
    y, labels = torch.randint(2, (3,), generator=draw), torch.randint(2, (count,), generator=draw)
    ours = knn_shapley(features, y, candidates, labels, k)
    expected = [by_permutations(one, int(label), candidates, labels.tolist(), k) for one, label in zip(features, y, strict=True)]
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_the_recursion_by_hand() -> None:
    """Candidates at 1, 2, 3 and 4 from the sample, right, wrong, right, right, with k = 2: the sum is 1/2, what all are worth."""
    values = knn_shapley(torch.zeros(1, 1), torch.tensor([7]), torch.tensor([[3.0], [1], [4], [2]]), torch.tensor([7, 7, 7, 0]), 2)
    torch.testing.assert_close(values, torch.tensor([[1 / 4, 1 / 4, 1 / 4, -1 / 4]]))


@pytest.mark.parametrize("retrieval", ["asv_mu", "asv", "neg_sv"])
def test_what_is_replayed_has_the_greatest_adversarial_values(retrieval: str) -> None:
    stream = example_stream()
    strategy = small(retrieval=retrieval, replay_batch=3)
    run(strategy, stream, max_sessions=2)
    batch, memory = stream.tasks[2].train[:8], strategy.memory
    state = memory.random.get_state()
    (drawn,) = strategy.draw(batch)
    memory.random.set_state(state)
    none = torch.zeros(40, dtype=torch.bool)
    rows = memory.balanced(2, none)
    none[rows] = True
    others = memory.balanced(2, none)
    assert not {*rows.tolist()} & {*others.tolist()}
    kept = memory.all()
    h = {name: strategy.model.features(x) for name, x in (("all", kept.x), ("batch", batch.x))}
    against = knn_shapley(h["batch"], batch.y, h["all"][rows], kept.y[rows], 3)
    along = knn_shapley(h["all"][others], kept.y[others], h["all"][rows], kept.y[rows], 3)
    values = {
        "asv_mu": along.mean(0) - against.mean(0),
        "asv": along.max(0).values - against.min(0).values,
        "neg_sv": -against.sum(0),
    }[retrieval]
    best = rows[values.argsort(descending=True, stable=True)[:3]]
    assert torch.equal(drawn.x, kept.x[best]) and torch.equal(drawn.y, kept.y[best])


def test_a_step_minimises_the_mean_of_both_together() -> None:
    strategy, stream = small(replay_batch=5), example_stream()
    run(strategy, stream, max_sessions=1)
    batch = stream.tasks[1].train[:8]
    (drawn,) = strategy.draw(batch)
    loss = strategy.objective_with(batch, (drawn,))
    torch.testing.assert_close(loss, F.cross_entropy(strategy.model(torch.cat([batch.x, drawn.x])), torch.cat([batch.y, drawn.y])))


def test_a_balanced_draw_has_as_many_of_each_class() -> None:
    memory = ExchangingMemory(20)
    y = torch.tensor([0] * 12 + [3] * 5 + [5])
    memory.put(Samples(torch.arange(18.0)[:, None], y), torch.arange(18))
    without = torch.zeros(18, dtype=torch.bool)
    without[12:16] = True
    seen = set()
    for _ in range(60):
        rows = memory.balanced(3, without)
        assert y[rows].tolist() == [0, 0, 0, 3, 5] and len({*rows.tolist()}) == 5 and not without[rows].any()
        seen |= {*rows.tolist()}
    assert seen == {*range(12), 16, 17}


class Itself(nn.Module):
    """A network whose features are its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 3)

    def features(self, x: Tensor) -> Tensor:
        """Return them."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(x)


def test_samples_amid_another_class_make_room() -> None:
    """Nine kept samples of class 0 lie at 0, one at 10 amid those of class 1; a new one of class 1 at 10 takes its place."""
    with isolated(0):
        strategy = ASER(Itself(), capacity=20, k=3, per_class=4)
    x = torch.cat([torch.linspace(0, 1, 9), torch.tensor([10.05]), torch.linspace(10, 10.1, 10)])[:, None]
    y = torch.tensor([0] * 10 + [1] * 10)
    left = torch.zeros(20, dtype=torch.int64)
    for _ in range(40):
        strategy.memory.put(Samples(x, y), torch.arange(20))
        strategy.exchange(Samples(torch.tensor([[10.06]]), torch.tensor([1])))
        kept = strategy.memory.all()
        changed = (kept.x != x).flatten() | (kept.y != y)
        assert changed.sum() <= 1
        left += changed
    left, others = int(left[9]), torch.cat([left[:9], left[10:]])
    assert 8 <= left <= 28  # whenever it is a candidate, and not among those that are classified: 16 of 40
    assert others.max() <= left // 2


def test_a_new_class_comes_in() -> None:
    """After tasks of other classes, though no kept sample of it would be classified by its samples."""
    strategy = small(capacity=24)
    run(strategy, example_stream())
    assert (strategy.memory.all().y.bincount(minlength=6) > 0).all()
    assert len(strategy.memory) == 24 and strategy.memory.seen == 180
    stored = strategy.memory.all()
    everything = torch.cat([task.train[:].x for task in example_stream().tasks])
    labels = torch.cat([task.train[:].y for task in example_stream().tasks])
    for image, label in zip(stored.x, stored.y, strict=True):
        assert int(label) in labels[(everything == image).flatten(1).all(1)].tolist()


def test_where_all_that_is_kept_are_candidates_the_batch_alone_decides() -> None:
    stream, strategy = example_stream(), small(capacity=4, per_class=4, replay_batch=2)
    run(strategy, stream, max_sessions=1)
    batch, kept = stream.tasks[1].train[:8], strategy.memory.all()
    against = strategy.shapley(batch, kept).mean(0)
    (drawn,) = strategy.draw(batch)
    values = strategy.adversarial_values(kept, kept[:0], batch)
    torch.testing.assert_close(values, -against)
    assert {int(image.sum()) for image in drawn.x} <= {int(image.sum()) for image in kept.x} and len(drawn) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 0}, "k must be a whole number of at least 1"),
        ({"per_class": 0}, "per_class must be a whole number of at least 1"),
        ({"retrieval": "sv"}, "retrieval must be one of asv_mu, asv, neg_sv"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ASER(example_model(), **options)


def test_models_must_have_features() -> None:
    with pytest.raises(TypeError, match="ASER needs a model with a method `features`, as those of clstream, which Linear hasn't"):
        ASER(nn.Linear(4, 3))
