"""Core sets: each choice against points that can be looked at, and a memory of them that Replay uses."""

from __future__ import annotations

import pytest
import torch
from clstream.strategies import CoreSets, DERpp, Finetune, Replay
from clstream.strategies.core_sets import SPACES
from torch import Tensor

from clstream import SessionStarted, on, run
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Losses
from clstream.models import Mlp
from clstream.seeds import isolated
from clstream.strategy.core_sets import CORE_SETS, CoreSet, choose, herding, k_center
from clstream.stream import Samples

POINTS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [4.0, 4.0], [2.0, 1.0]])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_herding_and_k_center() -> None:
    assert herding(POINTS, 3).tolist() == [4, 2, 1]
    assert k_center(POINTS, 2, POINTS[:1]).tolist() == [3, 4]
    assert choose("k_center", POINTS, 3, generator()).tolist() == [4, 3, 0]  # from the one nearest to the mean
    assert choose("herding", POINTS, 9, generator()).tolist()[:3] == [4, 2, 1]


def test_k_means_finds_clusters() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (centres[:, None] + 0.1 * torch.randn(3, 30, 2, generator=generator())).flatten(0, 1)
    for seed in range(5):
        chosen = choose("k_means", points, 30, torch.Generator().manual_seed(seed))
        assert (chosen // 30).bincount(minlength=3).min() >= 5
        assert len(chosen.unique()) == 30


def test_random_is_uniform_and_has_no_repeats() -> None:
    chosen = choose("random", POINTS, 4, generator())
    assert len(chosen.unique()) == 4 and torch.equal(chosen, torch.randperm(5, generator=generator())[:4])


def test_the_extreme_value_set_covers_the_class_and_leaves_outliers_out() -> None:
    inside = torch.tensor([5.0, 0.0, 0.0]) + torch.randn(200, 3, generator=generator())
    outside = torch.tensor([-5.0, 1.0, 0.0]) + 0.1 * torch.randn(40, 3, generator=generator())
    features = torch.cat([inside, outside])
    trusted = torch.arange(240) < 200
    chosen = choose("evt", features, 20, generator(), trusted)
    assert len(chosen.unique()) == 20 and bool((chosen < 200).all())
    cosines = torch.nn.functional.cosine_similarity(features[chosen], inside.mean(0)[None])
    assert bool((cosines.diff() < 1e-6).all())  # quantile after quantile, farther and farther
    everything = choose("evt", features, 240, generator(), trusted)
    assert 150 < len(everything) <= 200
    with pytest.raises(ValueError, match="a tail of at least 3 finite distances, not 2"):
        choose("evt", features, 20, generator(), torch.arange(240) < 2)


@pytest.mark.parametrize("method", CORE_SETS)
def test_every_set_has_as_many_as_are_asked_for(method: str) -> None:
    features = torch.randn(50, 6, generator=generator()) + 3
    for many in (0, 1, 7):
        chosen = choose(method, features, many, generator())
        assert len(chosen) == len(chosen.unique()) == many and chosen.dtype == torch.int64
        assert torch.equal(chosen, choose(method, features, many, generator()))
    with pytest.raises(ValueError, match="method must be one of random, k_center, k_means, herding, evt"):
        choose("best", features, 3, generator())


def test_the_memory_holds_what_it_is_told_to() -> None:
    memory = CoreSet(3)
    memory.add(Samples(torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)))
    assert (memory.seen, len(memory)) == (5, 0)
    memory.hold(Samples(torch.ones(3, 2), torch.arange(3)))
    memory.hold(Samples(torch.zeros(2, 2), torch.arange(2)))
    assert len(memory) == 2 and memory.all().y.tolist() == [0, 1] and not memory.all().x.any()
    with pytest.raises(ValueError, match="at most 3 samples can't hold 4"):
        memory.hold(Samples(torch.ones(4, 2), torch.arange(4)))
    with pytest.raises(TypeError, match=r"without logits: wrap a strategy that replays inputs and labels alone, as Replay"):
        memory.add(Samples(torch.ones(4, 2), torch.arange(4), {"logits": torch.ones(4, 2)}))


class Kept:
    """Notes the labels that are kept when sessions begin."""

    def __init__(self, strategy: CoreSets) -> None:
        self.strategy, self.counts = strategy, list[list[int]]()

    @on(SessionStarted)
    def note(self, event: SessionStarted) -> None:
        memory = self.strategy.memory
        self.counts.append(memory.all().y.bincount(minlength=6).tolist() if len(memory) else [0] * 6)


@pytest.mark.parametrize("method", CORE_SETS)
@pytest.mark.parametrize("space", SPACES)
def test_classes_have_equal_shares(method: str, space: str) -> None:
    with isolated(0, "strategy"):
        strategy = CoreSets(Replay(example_model(), capacity=22), method, space)
    run(strategy, example_stream(epochs=5), kept := Kept(strategy))
    own = strategy.memory.all()
    if method == "evt":
        assert all(sum(counts) <= 22 for counts in kept.counts) and max(kept.counts[1]) == 11
    else:
        assert kept.counts == [[0] * 6, [11, 11, 0, 0, 0, 0], [6, 6, 5, 5, 0, 0]]
        assert own.y.bincount().tolist() == [4, 4, 4, 4, 3, 3]
    whole = torch.cat([task.train.x for task in example_stream().tasks]).flatten(1)
    assert bool((own.x.flatten(1)[:, None] == whole).all(2).any(1).all())  # images of the stream, with their labels


def test_a_class_that_has_no_model_is_chosen_by_herding_and_it_is_told() -> None:
    class Wrong(Replay):
        def predict(self, x: Tensor, task: object = None, threshold: float = 0.5) -> Tensor:
            return torch.zeros(len(x), dtype=torch.int64)

    strategy = CoreSets(Wrong(example_model(), capacity=10), "evt")
    with pytest.warns(UserWarning, match="CoreSets chooses by herding in class 1: an extreme-value model needs a tail"):
        run(strategy, example_stream(), max_sessions=1)
    assert strategy.memory.all().y.bincount().tolist() == [5, 5]


def test_a_strategy_without_such_a_memory_is_refused() -> None:
    for base in (Finetune(example_model()), Replay(example_model(), memory="class_balanced", per_class=3)):
        with pytest.raises(ValueError, match=f"CoreSets fills a strategy's memory, .*: {type(base).__name__} has none"):
            CoreSets(base)
    with pytest.raises(TypeError, match="wrap a strategy that replays inputs and labels alone"):
        run(CoreSets(DERpp(example_model())), example_stream())
    CoreSets(Replay(torch.nn.Linear(3, 2)), space="input")
    with pytest.raises(TypeError, match="CoreSets needs a model with a method `features`, which Linear hasn't"):
        CoreSets(Replay(torch.nn.Linear(3, 2)))


def test_the_first_session_is_replay_s_without_a_memory() -> None:
    """Until a session is over there is nothing to replay: the steps are those of fine-tuning, bit for bit."""
    losses = []
    for make in (lambda model: CoreSets(Replay(model)), Finetune):
        with isolated(0, "strategy"):
            strategy = make(Mlp((1, 8, 8), 6, hidden=(32,)))
        run(strategy, example_stream(), heard := Losses(), max_sessions=1)
        losses.append(torch.stack(heard.all))
    assert torch.equal(*losses)
