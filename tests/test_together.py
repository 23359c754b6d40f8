"""Seeds together: each one learns what its own run learns, and sees what its own run sees."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from clstream.strategies import AGEM, EWC, L2, DERpp, Finetune, L2Penalty, LwF, Regularised, Replay
from clstream.streams import from_tensors, split_digits
from torch import Tensor, nn
from torch.optim import SGD, Adam

from clstream import BatchLearned, Event, Result, Strategy, Stream, on, run, run_seeds
from clstream.checkpoint import Checkpointer, newest
from clstream.engine import SeedsError
from clstream.engine.stacked_step import Stack
from clstream.models import ConvNet, Mlp
from clstream.online_metrics import Prequential, PrequentialMeasured
from clstream.seeds import isolated

Make = Callable[[int], Strategy]
SEEDS = (0, 3, 1)


def digits(**options: object) -> Stream:
    """Two sessions of 8 x 8 images, with some 30 batches each; the last one is not full."""
    whole = split_digits(tasks=[2, 2, 6], epochs=1)
    parts = [(task.train[:], task.test[:]) for task in whole.tasks[:2]]
    x, y = (torch.cat([getattr(train, name)[:265] for train, _ in parts]) for name in "xy")
    x_test, y_test = (torch.cat([getattr(test, name) for _, test in parts]) for name in "xy")
    return from_tensors(x, y, x_test, y_test, tasks=2, batch_size=10, **options)  # type: ignore[arg-type]


def mlp(head: str = "fixed") -> Mlp:
    return Mlp((1, 8, 8), 4, hidden=(16, 16), head=head)


STACKED: dict[str, Make] = {
    "Finetune": lambda seed: Finetune(mlp()),
    "Finetune, momentum": lambda seed: Finetune(mlp(), partial(SGD, lr=0.03, momentum=0.9, weight_decay=1e-3)),
    "Finetune, Adam, growing head": lambda seed: Finetune(mlp("growing"), partial(Adam, lr=1e-3), active_classes="seen"),
    "Replay": lambda seed: Replay(mlp(), capacity=60),
    "Replay, class-balanced": lambda seed: Replay(mlp(), capacity=60, memory="class_balanced", active_classes="task"),
    "DERpp": lambda seed: DERpp(mlp(), capacity=60),
    "L2": lambda seed: L2(mlp(), strength=0.01),
    "EWC": lambda seed: EWC(mlp(), strength=10.0),
    "LwF": lambda seed: LwF(mlp()),
    "Replay with a penalty": lambda seed: Regularised(Replay(mlp(), capacity=60), [L2Penalty(0.01)]),
    "batch norm": lambda seed: Finetune(ConvNet((1, 8, 8), 4, channels=(4, 4, 4), hidden=8, norm="batch"), partial(SGD, lr=0.01)),
}


class Kept:
    """Builds strategies, and keeps them."""

    def __init__(self, make: Make) -> None:
        self.make, self.strategies = make, dict[int, Strategy]()

    def __call__(self, seed: int) -> Strategy:
        self.strategies[seed] = self.make(seed)
        return self.strategies[seed]


def alone(make: Make, stream: Stream, seed: int, *observers: object, **options: object) -> tuple[Result, Strategy]:
    with isolated(seed, "model"):
        strategy = make(seed)
    return run(strategy, stream, *observers, seed=seed, **options), strategy  # type: ignore[arg-type]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many seeds each stacked step was of."""
    counted: list[int] = []
    step = Stack.step

    def counting(stack: Stack, *arguments: object) -> tuple[Tensor, ...]:
        counted.append(len(stack.learners))
        return step(stack, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Stack, "step", counting)
    return counted


def assert_same(strategy: Strategy, other: Strategy, atol: float = 1e-4) -> None:
    for name, weight in strategy.model.state_dict().items():
        assert torch.allclose(weight.to(torch.float64), other.model.state_dict()[name].to(torch.float64), atol=atol), name
        assert other.model.state_dict()[name].is_contiguous()


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKED)
@pytest.mark.filterwarnings("error")
def test_each_seed_ends_as_its_own_run(name: str, steps: list[int]) -> None:
    stream, make = digits(), Kept(STACKED[name])
    results = run_seeds(make, stream, SEEDS)
    assert set(steps) == {3} and len(steps) > 30
    for seed, result in zip(SEEDS, results, strict=True):
        single, strategy = alone(make.make, stream, seed)
        assert torch.allclose(result.accuracy, single.accuracy, atol=0.02)  # of some 90 samples in a task: one of them
        assert torch.equal(result.cost.flops, single.cost.flops)
        assert_same(strategy, make.strategies[seed])
        held = getattr(strategy, "memory", None)
        if held is not None and held.kept is not None:
            kept = make.strategies[seed].memory.kept  # type: ignore[attr-defined]
            assert torch.equal(kept.x, held.kept.x) and torch.equal(kept.y, held.kept.y)


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_heads_of_tasks_and_shared_classes(scenario: str, steps: list[int]) -> None:
    stream, make = digits(scenario=scenario), Kept(lambda seed: DERpp(mlp(), capacity=60))
    results = run_seeds(make, stream, (0, 1))
    assert set(steps) == {2}
    for seed, result in enumerate(results):
        single, strategy = alone(make.make, stream, seed)
        assert torch.allclose(result.task_accuracy, single.task_accuracy, atol=0.02)
        assert_same(strategy, make.strategies[seed])


class Trace:
    """Keeps the kinds of events, and the labels of batches."""

    def __init__(self) -> None:
        self.events: list[object] = []

    @on(Event)
    def hear(self, event: Event) -> None:
        told = event.batch.samples.y.tolist() if isinstance(event, BatchLearned) else type(event).__name__
        if isinstance(event, PrequentialMeasured):
            told = round(event.mean, 2)
        self.events.append(told)


@pytest.mark.slow
def test_observers_hear_each_seed_as_in_its_own_run() -> None:
    stream, make = digits(epochs=2), STACKED["Replay"]
    traces = {seed: (Prequential(), Trace()) for seed in SEEDS}
    results = run_seeds(make, stream, SEEDS, observers=traces.__getitem__, evaluate_every=11, max_sessions=1)
    for seed, result in zip(SEEDS, results, strict=True):
        own = Prequential(), Trace()
        single, _ = alone(make, stream, seed, *own, evaluate_every=11, max_sessions=1)
        assert traces[seed][1].events == own[1].events
        assert torch.allclose(result.accuracy, single.accuracy, atol=0.02)


def noisy(x: Tensor) -> Tensor:
    return x.float() + torch.rand(len(x), 1, 1, 1)


ALONE: dict[str, tuple[Make, str]] = {
    "AGEM": (lambda seed: AGEM(mlp()), "AGEM takes its steps by a `learn` of its own"),
    "optimizer": (lambda seed: Finetune(mlp(), partial(Fussy, lr=0.1)), "a step of Fussy is not one of each number"),
    "dropout": (
        lambda seed: Finetune(nn.Sequential(nn.Flatten(), Floats(), nn.Dropout(0.5), nn.Linear(64, 4))),
        "a step draws from the global random generators",
    ),
    "one of another size": (
        lambda seed: Finetune(Mlp((1, 8, 8), 4, hidden=(16 + seed,))),
        "a tensor of one seed's strategy has another shape",
    ),
}


class Fussy(SGD):
    """An optimizer of one's own."""


class Floats(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 255


@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_be_stacked_is_said_and_learned_one_by_one(name: str, steps: list[int]) -> None:
    stream = digits()
    make, reason = ALONE[name]
    kept = Kept(make)
    with pytest.warns(RuntimeWarning, match=f"take their steps one after the other: {reason}"):
        results = run_seeds(kept, stream, SEEDS, max_sessions=1)
    assert not steps
    for seed, result in zip(SEEDS, results, strict=True):
        single, strategy = alone(make, stream, seed, max_sessions=1)
        assert torch.equal(result.accuracy, single.accuracy)
        assert_same(strategy, kept.strategies[seed], atol=0.0)


def test_an_augmentation_is_drawn_for_each_seed_as_in_its_own_run(steps: list[int]) -> None:
    stream, kept = replace(digits(), augment=noisy), Kept(lambda seed: Finetune(mlp()))
    with pytest.warns(RuntimeWarning, match="global random generators, as dropout and augmentations do"):
        run_seeds(kept, stream, (0, 1), max_sessions=1)
    assert not steps
    for seed in (0, 1):
        assert_same(alone(kept.make, stream, seed, max_sessions=1)[1], kept.strategies[seed], atol=0.0)


class Reads(Strategy):
    """Its loss reads a tensor that can't be found."""

    def __init__(self, model: nn.Module, shift: float) -> None:
        super().__init__(model)
        self.hidden = (torch.tensor(shift),)

    def loss(self, samples: object) -> Tensor:
        return super().loss(samples) * self.hidden[0]  # type: ignore[arg-type]


def test_a_loss_that_differs_when_it_is_stacked_is_not_learned_so(steps: list[int]) -> None:
    kept = Kept(lambda seed: Reads(mlp(), 1.0 + seed))
    with pytest.warns(RuntimeWarning, match="a stacked step has other losses"):
        run_seeds(kept, digits(), (0, 1), max_sessions=1)
    assert not steps
    for seed in (0, 1):
        assert_same(alone(kept.make, digits(), seed, max_sessions=1)[1], kept.strategies[seed], atol=0.0)


def test_a_seed_that_fails_is_named_and_the_others_end(steps: list[int]) -> None:
    stream = digits()

    def make(seed: int) -> Strategy:
        strategy = Replay(mlp(), capacity=60)
        if seed == 3:
            with torch.no_grad():
                next(strategy.model.parameters()).mul_(1e15)
        return strategy

    with pytest.raises(SeedsError, match="seed 3 failed: the loss is nan in task 0, session 0, epoch 0, batch") as caught:
        run_seeds(make, stream, SEEDS)
    assert {*caught.value.results} == {0, 1} and isinstance(caught.value.errors[3], FloatingPointError)
    assert steps[-1] == 2
    for seed in (0, 1):
        assert torch.allclose(caught.value.results[seed].accuracy, alone(make, stream, seed)[0].accuracy, atol=0.02)


class Interrupt:
    """Interrupts at a batch."""

    def __init__(self, batch: int) -> None:
        self.left = batch

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["Replay", "EWC", "Finetune, momentum"])
def test_seeds_that_were_interrupted_go_on_from_where_each_was(name: str, tmp_path: Path) -> None:
    stream, make = digits(), STACKED[name]

    def checkpointer(seed: int) -> Checkpointer:
        return Checkpointer(tmp_path / str(seed), every_batches=13 + 4 * seed, signals=False)

    with pytest.raises(KeyboardInterrupt):
        run_seeds(make, stream, (0, 1), observers=lambda seed: [checkpointer(seed), Interrupt(41 + 99 * seed)])
    states = {seed: newest(tmp_path / str(seed)) for seed in (0, 1)}
    assert states[0] is not None and states[1] is not None and states[0]["step"] != states[1]["step"] > 0
    kept = Kept(make)
    results = run_seeds(kept, stream, (0, 1), observers=lambda seed: [checkpointer(seed)], resume=states)
    for seed, result in enumerate(results):
        single, strategy = alone(make, stream, seed)
        assert torch.allclose(result.accuracy, single.accuracy, atol=0.02)
        assert_same(strategy, kept.strategies[seed])


def test_a_checkpoint_of_a_seed_is_one_of_its_own_run(tmp_path: Path) -> None:
    stream, make = digits(), STACKED["Finetune, momentum"]

    def observers(seed: int) -> list[object]:
        return [Checkpointer(tmp_path / str(seed), every_batches=17, signals=False), Interrupt(40 + seed)]

    with pytest.raises(KeyboardInterrupt):
        run_seeds(make, stream, (0, 1), observers=observers)
    _, ended = alone(make, stream, 1)
    with isolated(1, "model"):
        strategy = make(1)
    run(strategy, stream, seed=1, resume=newest(tmp_path / "1"))
    assert_same(ended, strategy)


def test_the_global_generators_of_the_caller_stay() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    run_seeds(STACKED["Replay"], digits(), (0, 1), max_sessions=1)
    assert torch.equal(before[0], torch.get_rng_state()) and random.getstate() == before[2]
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,)])
def test_seeds_are_checked_first(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="seeds"):
        run_seeds(STACKED["Replay"], digits(), seeds)


def test_what_a_run_refuses_is_refused_before_anything_is_learned() -> None:
    x, y = torch.rand(8, 3), torch.rand(8, 2)
    values = from_tensors(x, y, x, y, tasks=1, target="value")
    with pytest.raises(ValueError, match="value"):
        run_seeds(lambda seed: LwF(Mlp(3, 2, hidden=(4,))), values, (0, 1))
