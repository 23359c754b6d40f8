"""Groups of weights with owners: a partition of every scalar, what starts from what, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from clstream.strategies import Lifelong, WithDetectedBoundaries
from clstream.strategies.lifelong.groups import FREE, GROUPS, NEW_TO_OLD, Groups, shares_needed
from clstream.streams import blobs
from torch import nn
from torch.optim import SGD

from clstream import TaskStarted, on, run
from clstream.bus import Event
from clstream.checks import example_model, example_stream
from clstream.checks.examples import NormedNet
from clstream.events import BatchLearned, SessionStarted
from clstream.models import Conv4, Linear, Mlp, SlimResNet18
from clstream.seeds import isolated
from clstream.stream import Stream, Task

INF = float("inf")


def deep(head: str = "fixed") -> nn.Module:
    with isolated(0, "model"):
        return Mlp((1, 8, 8), 6, hidden=(24, 18), head=head)


class Partition:
    """Counts, whenever it can, how many weights are in each group."""

    def __init__(self, strategy: Lifelong) -> None:
        self.strategy, self.counts = strategy, []

    @on(SessionStarted)
    def count(self, event: Event) -> None:
        groups = self.strategy.groups
        assert groups is not None
        weights = self.strategy.weights
        numbers = [groups.numbers(name, weight, groups.allocated - 1) for name, weight in weights.items()]
        assert all(own.shape == weight.shape for own, weight in zip(numbers, weights.values(), strict=True))
        self.counts.append(torch.bincount(torch.cat([own.flatten() for own in numbers]), minlength=len(GROUPS) + 1))


@pytest.mark.parametrize(
    "model",
    [
        deep,
        partial(deep, "growing"),
        partial(deep, "cosine"),
        partial(Conv4, (1, 8, 8), 6, width=8, blocks=2, norm="layer"),
        partial(Conv4, (1, 8, 8), 6, width=8, blocks=2, norm="batch"),
        partial(SlimResNet18, (1, 8, 8), 6),
        partial(Linear, (1, 8, 8), 6),
        NormedNet,
    ],
)
def test_every_weight_is_in_one_group(model: Callable[[], nn.Module]) -> None:
    strategy = Lifelong(model())
    run(strategy, example_stream(batch_size=60), partition := Partition(strategy))
    total = sum(weight.numel() for weight in strategy.weights.values())
    growing = "labels" in dict(strategy.model.named_buffers(prefix="")) or hasattr(strategy.model.head, "labels")
    for counts in partition.counts:
        assert len(counts) == len(GROUPS) + 1
        assert growing or int(counts.sum()) == total
    assert int(partition.counts[-1].sum()) == total
    assert int(partition.counts[-1][FREE]) == 0  # all units belong to a task in the end


def test_groups_of_a_small_network_are_those_counted_by_hand() -> None:
    """Inputs of 4, layers of 2 and 2 units, a head of 2 classes; two tasks."""
    model = Mlp(4, 2, hidden=(2, 2))
    groups, weights = Groups(model, 2), dict(model.named_parameters())
    groups.grow(model)
    groups.allocate(weights)
    groups.take_rows([0], weights)
    first = {name: groups.numbers(name, weight, 0).tolist() for name, weight in weights.items()}
    assert first["stages.layer1.weight"] == [[1] * 4, [FREE] * 4]
    assert first["stages.layer2.weight"] == [[1, FREE], [FREE, FREE]] and first["stages.layer2.bias"] == [1, FREE]
    assert first["head.weight"] == [[5, FREE], [FREE, FREE]]
    assert weights["stages.layer2.weight"][0, 1].item() == 0 == weights["head.weight"][0, 1].item()
    groups.allocate(weights)
    groups.take_rows([1], weights)
    second = {name: groups.numbers(name, weight, 1).tolist() for name, weight in weights.items()}
    assert second["stages.layer1.weight"] == [[0] * 4, [2] * 4]  # from inputs: they were there before
    assert second["stages.layer2.weight"] == [[0, NEW_TO_OLD], [2, 1]] and second["stages.layer2.bias"] == [0, 1]
    assert second["head.weight"] == [[4, NEW_TO_OLD], [5, 5]] and second["head.bias"] == [4, 5]
    assert groups.capacity() == 1


class Starts:
    """Keeps the weights as a task finds them, when its units are there."""

    def __init__(self, strategy: Lifelong) -> None:
        self.strategy, self.weights = strategy, {}

    @on(SessionStarted)
    def keep(self, event: SessionStarted) -> None:
        self.weights[event.session.task.id] = {name: weight.detach().clone() for name, weight in self.strategy.weights.items()}


def started(start: str) -> tuple[Lifelong, dict]:
    with isolated(0):
        strategy = Lifelong(deep(), partial(SGD, lr=0.05), start=start)
    run(strategy, example_stream(epochs=3), starts := Starts(strategy))
    return strategy, starts.weights


def test_units_start_with_the_weights_of_the_nearest_task() -> None:
    strategy, begun = started("nearest_task")
    owner, weights = strategy.groups.owner, begun[1]
    first, second = ((owner["stages.layer2"] == task).nonzero().flatten() for task in (0, 1))
    old = (owner["stages.layer1"] == 0).nonzero().flatten()
    assert torch.equal(weights["stages.layer2.weight"][second][:, old], weights["stages.layer2.weight"][first][:, old])
    assert torch.equal(weights["stages.layer1.weight"][8:16], weights["stages.layer1.weight"][:8])  # 24 units, 8 a task
    fresh = started("fresh")[1][1]
    assert not torch.equal(fresh["stages.layer1.weight"][8:16], fresh["stages.layer1.weight"][:8])


def test_rows_start_with_those_of_the_nearest_class() -> None:
    strategy, begun = started("nearest_class")
    owner, head = strategy.groups.owner["stages.layer2"], begun[1]["head.weight"]
    old = (owner == 0).nonzero().flatten()
    for row in (2, 3):
        assert any(torch.equal(head[row, old], head[other, old]) for other in (0, 1))
    assert not any(torch.equal(head[2], head[other]) for other in (0, 1))  # from new units it is as it was


def test_a_task_that_comes_again_with_new_classes_counts_again() -> None:
    assert shares_needed(example_stream()) == 3
    again = example_stream((0, 1, 0, 2))
    assert again.session(0).classes == [0] and again.session(2).classes == [1]
    assert shares_needed(again) == 4
    strategy = Lifelong(deep())
    run(strategy, again)
    assert torch.bincount(strategy.groups.owner["stages.layer1"]).tolist() == [6, 6, 6, 6]
    assert shares_needed(example_stream((0, 0, 1, 2))) == 3


def test_classes_that_come_in_a_later_session_of_a_task_learn_and_hold() -> None:
    tasks = example_stream().tasks
    train, test = tasks[0].train[:] + tasks[1].train[:], tasks[0].test[:] + tasks[1].test[:]
    places = torch.stack([torch.arange(60), torch.arange(60, 120)], 1).flatten()  # sessions are dealt out one by one
    both = [Task(0, (0, 1, 2, 3), train[places], test), replace(tasks[2], id=1)]
    stream = Stream("two tasks", both, schedule=(0, 0, 1), epochs=6, batch_size=8)
    came = [session.classes for session in stream]
    assert came[0] != came[1]
    strategy = Lifelong(deep())
    run(strategy, stream)
    for name, b in strategy.stiffness.items():
        assert torch.equal(strategy.weights[name][b.isinf()], strategy.reference[name][b.isinf()])
    assert bool((strategy.groups.owner["head"] == torch.tensor([0, 0, 0, 0, 1, 1])).all())


def test_detected_boundaries_give_no_units() -> None:
    with pytest.raises(ValueError, match="policy 'guarantee' gives tasks units of their own, and example hides its tasks"):
        run(WithDetectedBoundaries(Lifelong(example_model(), tasks=3)), example_stream(boundaries=False))
    run(WithDetectedBoundaries(Lifelong(example_model(), policy="fisher"), warmup=4, window=10), example_stream(boundaries=False))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": {}}, "a policy of groups must name at least one of old, new"),
        ({"policy": {"olde": 1.0}}, "a group of the policy must be one of old.*did you mean old"),
        ({"policy": {"old": -1.0}}, "the policy's stiffness of old must be a number of at least 0, or infinity"),
        ({"policy": {"old": float("nan")}}, "the policy's stiffness of old must be"),
        ({"policy": {"old": "inf"}}, "the policy's stiffness of old must be"),
        ({"policy": "guaranty"}, "policy must be one of zero, constant, fisher, guarantee.*did you mean guarantee"),
        ({"policy": "zero", "tasks": 3}, "tasks needs groups of weights"),
        ({"policy": "fisher", "start": "nearest_task"}, "start='nearest_task' needs groups of weights"),
        ({"policy": "constant", "relax": "pair"}, "relax='pair' needs groups of weights"),
        ({"decay": 0.5}, "decay and prune go by the stiffness of policy='fisher', not of 'guarantee'"),
        ({"policy": "constant", "prune": 0.1}, "decay and prune go by the stiffness of policy='fisher'"),
        ({"step": "gradient"}, "policy 'guarantee' has an infinite stiffness, whose gradient is none: take step='proximal'"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_a_sentence(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refusal:
        Lifelong(example_model(), **options)
    assert "\n" not in str(refusal.value)


class Unlike(nn.Module):
    """A model without stages."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1).float() / 255)


def test_other_models_are_refused_with_groups_and_taken_without() -> None:
    with pytest.raises(
        TypeError, match=r"groups need a model with `stages`.* not Unlike: the policies 'zero', 'constant' and 'fisher'"
    ):
        Lifelong(Unlike())
    run(Lifelong(Unlike(), policy="fisher"), example_stream(batch_size=60))


class Began:
    """Notes that something began."""

    began = False

    @on(TaskStarted)
    @on(BatchLearned)
    def note(self, event: Event) -> None:
        self.began = True


@pytest.mark.parametrize(
    ("strategy", "stream", "said"),
    [
        (partial(Lifelong, Mlp((1, 8, 8), 6, hidden=(2,))), example_stream, "layer stages.layer1 has 2 units, too few for 3 tasks"),
        (partial(Lifelong, Mlp((1, 8, 8), 6), tasks=2), example_stream, "tasks=2 is too few for example, which has 3"),
        (
            partial(Lifelong, Mlp(20, 10)),
            partial(blobs, tasks=3, scenario="domain", classes=10),
            "tasks of .* share classes, so the later ones couldn't be learned",
        ),
    ],
)
def test_streams_that_do_not_fit_are_refused_before_anything_is_learned(strategy: Callable, stream: Callable, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(strategy(), stream(), began := Began())
    assert not began.began
