"""GDumb: its sampler against the algorithm, its schedule against torch's, its training against Avalanche's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from clstream.strategies import GDumb
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from clstream import Samples, run
from clstream.checks import example_model, example_stream
from clstream.memory import GreedyBalanced


def offered(labels: list[int], capacity: int, batch: int) -> GreedyBalanced:
    torch.manual_seed(0)
    memory = GreedyBalanced(capacity)
    for start in range(0, len(labels), batch):
        rows = torch.arange(start, min(start + batch, len(labels)))
        memory.add(Samples(rows[:, None].float(), torch.tensor(labels)[rows]))
    return memory


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_the_sampler_keeps_the_first_ones_in_shares(batch: int) -> None:
    """Of 9 places: 9 samples of the first class, then one of them goes for each that comes, until shares are even."""
    memory = offered([0] * 20, 9, batch)
    assert memory.all().x.flatten().tolist() == [*map(float, range(9))]
    memory = offered([0] * 20 + [1] * 20, 9, batch)  # 4.5 of a class
    kept = memory.all()
    assert Counter(kept.y.tolist()) == {0: 5, 1: 4}
    assert sorted(kept.x.flatten()[kept.y == 1].tolist()) == [20.0, 21.0, 22.0, 23.0]
    assert set(kept.x.flatten()[kept.y == 0].tolist()) < {*map(float, range(9))}
    memory = offered([0] * 20 + [1] * 20 + [2] * 20 + [0] * 20, 9, batch)
    kept = memory.all()
    assert Counter(kept.y.tolist()) == {0: 3, 1: 3, 2: 3} and len(memory) == 9 and memory.seen == 80
    assert kept.x.flatten()[kept.y == 2].tolist() and max(kept.x.flatten().tolist()) < 60  # nothing that came when all was even


def test_the_sampler_doesn_t_depend_on_the_batches_and_keeps_pairs() -> None:
    labels = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(3)).tolist()
    one, other = offered(labels, 37, 1), offered(labels, 37, 50)
    assert torch.equal(one.all().x, other.all().x) and torch.equal(one.all().y, other.all().y)
    assert Counter(one.all().y.tolist()) == dict.fromkeys(range(5), 7)
    assert [labels[int(row)] for row in one.all().x.flatten()] == one.all().y.tolist()
    memory = GreedyBalanced(4)
    for task in (0, 1):
        memory.add(Samples(torch.arange(6.0)[:, None], torch.zeros(6, dtype=torch.int64), {"task": torch.full((6,), task)}))
    assert sorted(memory.all().extra["task"].tolist()) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="takes labels, not value targets"):
        GreedyBalanced(3).add(Samples(torch.zeros(1, 1), torch.zeros(1, 1), target="value"))


def test_the_rates_are_those_of_torch_s_restarts_after_a_warm_start() -> None:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.05)
    scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=1, T_mult=2, eta_min=0.0005)
    expected = [0.005, 0.05]
    for _ in range(62):
        scheduler.step()
        expected.append(optimizer.param_groups[0]["lr"])
    strategy = GDumb(example_model())
    assert [0.05 * strategy.rate_factor(epoch) for epoch in range(64)] == pytest.approx(expected)
    assert expected[-1] < 0.001


def test_against_avalanche_s(avalanche: Callable[[str], ModuleType]) -> None:
    """With room for everything and one batch of it all, nothing is random: the weights are the same."""
    from clstream.strategies.avalanche import strategy_class

    stream = example_stream(batch_size=1000, epochs=6)
    options = {"schedule": "constant", "clip": None}
    ours = GDumb(example_model(), partial(SGD, lr=0.1), capacity=180, epochs=6, batch_size=1000, **options)
    theirs = strategy_class("GDumb")(example_model(), partial(SGD, lr=0.1), mem_size=180)
    results = [run(strategy, stream) for strategy in (ours, theirs)]
    for one, two in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert torch.equal(results[0].accuracy, results[1].accuracy)


def test_with_less_room_than_classes_each_new_class_comes_in_once() -> None:
    assert sorted(offered([0, 1, 2, 0, 1, 2, 0], 2, 3).all().x.flatten().tolist()) == [1.0, 2.0]


def test_each_session_starts_from_the_initial_weights() -> None:
    """So that learning a task last is learning all at once, if the memory is the same."""
    stream = example_stream(batch_size=180)
    whole = GDumb(example_model(), partial(SGD, lr=0.1), capacity=180, epochs=3, batch_size=180, schedule="constant")
    run(whole, stream)
    model, optimizer = example_model(), None
    optimizer = SGD(model.parameters(), lr=0.1)
    samples = stream.tasks[0].train[:] + stream.tasks[1].train[:] + stream.tasks[2].train[:]
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(samples.x), samples.y).backward()
        optimizer.step()
    for one, two in zip(whole.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_mixed_images_are_learned_by_the_shares_of_their_pixels() -> None:
    """Each image is of one gray that tells it, so that pixels say which share of it is left."""
    strategy, seen = GDumb(example_model(), cutmix=1.0), []
    strategy.model.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    samples = Samples(
        torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 8, 8).contiguous(), torch.tensor([0, 1, 2, 5])
    )
    torch.manual_seed(4)
    loss = strategy.mixed_loss(samples)
    own = (seen[0][1] == 1).float().mean()
    assert set(seen[0][1].unique().tolist()) == {0, 1} and 0 < own < 1
    outputs = strategy.model(seen[0])
    expected = own * F.cross_entropy(outputs, samples.y) + (1 - own) * F.cross_entropy(outputs, torch.tensor([5, 0, 1, 2]))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"schedule": "cosine"}, "schedule must be one of warm_restarts, constant"),
        ({"cutmix": 1.5}, "cutmix must be a finite number from 0 to 1 or None"),
        ({"clip": 0.0}, "clip must be a finite number above 0 or None"),
        ({"capacity": 0}, "capacity must be a whole number of at least 1"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GDumb(example_model(), **options)
