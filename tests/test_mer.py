"""MER: its algorithms against loops by hand and Avalanche's, closed forms of Reptile, and what is offered when."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from clstream.strategies import MER, Finetune
from conftest import built
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from clstream import BatchLearned, BatchReady, Samples, on, run
from clstream.checks import example_model, example_stream, normed_model
from clstream.memory import Reservoir

Import = Callable[[str], ModuleType]


def small(**options: Any) -> MER:
    return built(partial(MER, **{"capacity": 30, "replay_batch": 3, "batches": 2, "beta": 0.3, "gamma": 0.6, **options}))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


class ByHand:
    """The paper's algorithm, beside a strategy, on a network, a memory and random numbers of its own."""

    def __init__(self, strategy: MER, together: bool = False) -> None:
        self.strategy, self.together = strategy, together
        self.network, self.memory = deepcopy(strategy.model), Reservoir(30)
        self.optimizer = SGD(self.network.parameters(), lr=0.1)
        self.steps = 0

    @on(BatchReady)
    def learn(self, event: BatchReady) -> None:
        if not len(self.memory):
            self.memory.random.set_state(self.strategy.memory.random.get_state())
        s = self.strategy
        for x, y in zip(event.batch.samples.x.split(1), event.batch.samples.y.split(1), strict=True):
            start = self.weights()
            for _ in range(s.batches):
                before = self.weights()
                group = [(x, y, s.current_factor)]
                if len(self.memory):
                    past = self.memory.sample(s.replay_batch, repeats=False)
                    old = [(a, b, 1.0) for a, b in zip(past.x.split(1), past.y.split(1), strict=True)]
                    group = group + old if s.place == "first" else old + group
                if s.place == "random":
                    group = [group[i] for i in torch.randperm(len(group), generator=self.memory.random)]
                if self.together:
                    group = [(torch.cat([a for a, _, _ in group]), torch.cat([b for _, b, _ in group]), 1.0)]
                for a, b, factor in group:
                    self.optimizer.zero_grad()
                    (factor * F.cross_entropy(self.network(a), b)).backward()
                    self.optimizer.step()
                    self.steps += 1
                self.set([w + s.beta * (new - w) for w, new in zip(before, self.weights(), strict=True)])
            self.set([w + s.gamma * (new - w) for w, new in zip(start, self.weights(), strict=True)])
            self.memory.add(Samples(x, y))

    def weights(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.network.parameters()]

    def set(self, values: list[Tensor]) -> None:
        for weight, value in zip(self.network.parameters(), values, strict=True):
            weight.data = value


ALGORITHMS = {
    "1": {},
    "6": {"batches": 1, "place": "last", "gamma": 1.0},
    "7": {"batches": 1, "place": "random", "gamma": 1.0, "current_factor": 5.0},
    "Mammoth's": {"steps": "batch"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_is_the_algorithm_by_hand(name: str) -> None:
    strategy = small(**ALGORITHMS[name])
    twin = ByHand(strategy, together=name == "Mammoth's")
    run(strategy, example_stream(), twin, max_sessions=1)
    torch.testing.assert_close(flat(strategy.model), flat(twin.network), rtol=1e-4, atol=1e-6)
    assert twin.steps == (120 if name == "Mammoth's" else strategy.batches * (1 + 2 + 3 + 57 * 4))
    assert torch.equal(strategy.memory.all().x, twin.memory.all().x)


def test_reptile_in_closed_form() -> None:
    """With the loss (w - x)^2 / 2 and rate r, n steps toward x leave (1 - r)^n of the way; Reptile follows a part."""

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.w.expand(len(x), 1)

    class Halved(MER):
        def loss(self, samples: Samples) -> Tensor:
            return (self.outputs(samples) - samples.x).square().mean() / 2

    for examples, n in (("single", 1), ("batch", 4)):
        strategy = Halved(Weight(), partial(SGD, lr=0.25), batches=3, beta=0.4, gamma=0.5, examples=examples)
        samples = Samples(torch.full((4, 1), 8.0), torch.zeros(4, dtype=torch.int64))
        batch = next(iter(next(iter(example_stream().session(0)))))
        strategy.learn(type(batch)(samples[:n], batch.task_if_shown, 0, 0))
        stays = 1 - 0.4 * (1 - 0.75**n)  # what a batch leaves of the way, with the memory empty
        assert strategy.model.w.item() == pytest.approx(8 * 0.5 * (1 - stays**3), rel=1e-5)


class Kept:
    """What Avalanche's strategy is given for its memory: samples that stay."""

    def __init__(self, samples: Samples) -> None:
        self.buffer = [(samples.x[i], int(samples.y[i]), 0) for i in range(len(samples))]

    def update(self, strategy: object) -> None:
        pass


class FromTorch(MER):
    """MER on samples that stay, drawn from torch's global generator as Avalanche's are."""

    def draw(self, samples: Samples) -> tuple[Samples, ...]:
        kept = self.memory.all()
        return (kept[torch.randperm(len(kept))[: self.replay_batch]],)

    def offer_example(self, example: Samples, epoch: int) -> None:
        pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No loggers")
def test_it_is_avalanche_s_with_the_same_draws(avalanche: Import) -> None:
    from clstream.strategies.avalanche import AvalancheStrategy

    stream, kept = example_stream(), example_stream().tasks[2].train[:20]
    options = {"replay_batch": 5, "batches": 3, "beta": 0.3, "gamma": 0.6}
    ours = built(partial(FromTorch, optimizer=partial(SGD, lr=0.1), capacity=20, examples="batch", **options))
    ours.memory.add(kept)
    begun, net = flat(ours.model), deepcopy(ours.model)
    names = {"batch_size_mem": 5, "n_inner_steps": 3, "beta": 0.3, "gamma": 0.6}
    mer = avalanche("training.supervised").mer.MER
    meta = mer(model=net, optimizer=SGD(net.parameters(), lr=0.1), mem_size=20, train_mb_size=8, evaluator=None, **names)
    meta.buffer.storage_policy = Kept(kept)

    class Seeded:
        @on(BatchReady)
        def seed(self, event: BatchReady) -> None:
            torch.manual_seed(event.batch.index)

    run(ours, stream, Seeded(), max_sessions=2)
    run(AvalancheStrategy(meta), stream, Seeded(), max_sessions=2)
    torch.testing.assert_close(flat(ours.model), flat(net), rtol=1e-4, atol=1e-6)
    assert (flat(ours.model) - begun).norm() > 0.1


def test_followed_all_the_way_without_a_past_it_is_fine_tuning_sample_by_sample() -> None:
    class Without(MER):
        def draw(self, samples: Samples) -> tuple[Samples, ...]:
            return ()

    optimizer = partial(SGD, lr=0.05, momentum=0.9)
    ours = built(partial(Without, optimizer=optimizer, batches=1, beta=1.0))
    plain = built(partial(Finetune, optimizer=optimizer))

    class BySample:
        @on(BatchReady)
        def learn(self, event: BatchReady) -> None:
            for row in range(len(event.batch.samples)):
                plain.minimise(plain.loss(event.batch.samples[row : row + 1]))

    run(ours, example_stream(), BySample())
    assert torch.equal(flat(ours.model), flat(plain.model))


def test_only_the_first_pass_is_offered_unless_each_is() -> None:
    for offer, seen in (("first_epoch", 60), ("every_epoch", 120)):
        strategy = small(offer=offer, batches=1, replay_batch=1)
        run(strategy, example_stream(epochs=2), max_sessions=1)
        assert strategy.memory.seen == seen and len(strategy.memory) == 30


def test_an_example_is_not_among_the_past_that_it_meets() -> None:
    strategy, seen = small(batches=1), []
    draw = strategy.draw

    def watched(samples: Samples) -> tuple[Samples, ...]:
        drawn = draw(samples)
        seen.append((samples.x.numpy().tobytes(), {x.numpy().tobytes() for past in drawn for x in past.x.split(1)}))
        return drawn

    strategy.draw = watched
    run(strategy, example_stream(), max_sessions=1)
    assert [len(past) for _, past in seen[:5]] == [0, 1, 2, 3, 3] and len(seen) == 60
    assert not any(own in past for own, past in seen)
    earlier = set()
    for own, past in seen:
        assert past <= earlier
        earlier.add(own)


def test_the_loss_is_the_example_s_and_frozen_weights_stay() -> None:
    strategy = small(batches=1, current_factor=3.0, optimizer=partial(SGD, lr=0.0))
    first = next(strategy.model.parameters()).requires_grad_(False)
    before, losses = first.clone(), []

    class Told:
        @on(BatchLearned)
        def note(self, event: BatchLearned) -> None:
            losses.append((event.loss, F.cross_entropy(strategy.model(event.batch.samples.x), event.batch.samples.y).detach()))

    run(strategy, example_stream(), Told(), max_sessions=1)
    for told, expected in losses:
        torch.testing.assert_close(told, expected)
    assert torch.equal(first, before)


def test_batch_norm_learns_images_one_by_one() -> None:
    strategy = MER(normed_model(), capacity=10, replay_batch=2, batches=1)
    run(strategy, example_stream(), max_sessions=1)
    assert flat(strategy.model).isfinite().all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beta": -0.1}, "beta must be a finite number of at least 0"),
        ({"place": "middle"}, "place must be one of first, last, random"),
        ({"steps": "batch", "current_factor": 2.0}, "current_factor=2.0 is of a step on the example alone: take steps='single'"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MER(example_model(), **options)
