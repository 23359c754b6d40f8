"""Snapshots of everything that a strategy may hold: it resumes exactly."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clstream.strategies import Replay
from more_words import MoreWords
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import Batch, BatchLearned, Samples, SessionStarted, Strategy, TaskEnded, on, run
from clstream.checks import check_strategy, example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.memory import Reservoir
from clstream.seeds import isolated


class Wrapped(Strategy):
    """A wrapper with a detector that it replaces on the way: the one that hears events stays the one that it began with."""

    def __init__(self, model: nn.Module) -> None:
        self.base = Replay(model)
        super().__init__(model)
        self.detector = Detector()
        self.parts = (self.base, self.detector)

    def learn(self, batch: Batch) -> Tensor:
        if self.parts[1].heard == 9:
            self.detector = Detector()
            self.base.memory, self.spare = Reservoir(30), self.base.memory
        loss = self.base.learn(batch)
        self.detector.asked += 1
        return loss * (1 + 0.1 * self.parts[1].heard + 0.1 * self.detector.asked)


class Detector:
    heard = 0
    asked = 0

    @on(BatchLearned)
    def hear(self, event: BatchLearned) -> None:
        self.heard += 1


@pytest.mark.slow
def test_parts_that_are_replaced_resume_exactly() -> None:
    {check.name: check for check in check_strategy(Wrapped)}["resumes_exactly"]()


def resumed_everywhere(make: Callable[[nn.Module], Strategy]) -> None:
    """Resume a strategy from every second of its checkpoints, each of them twice, and compare weights and accuracies."""

    def play(state: object, *observers: object) -> tuple[Tensor, list[Tensor]]:
        with isolated(0, "strategy"):
            strategy = make(example_model())
        result = run(strategy, example_stream((0, 1, 0), batch_size=16), *observers, seed=2, resume=state)
        return result.accuracy, [weight.detach().clone() for weight in strategy.model.parameters()]

    kept = Checkpoints()
    accuracy, weights = play(None, kept)
    for number in range(0, len(kept.written), 2):
        state = kept.load(number)
        for again in ("once", "twice"):
            same, now = play(state)
            assert torch.equal(accuracy, same) and all(map(torch.equal, weights, now)), f"resumed {again} from checkpoint {number}"


class SAM(torch.optim.Optimizer):
    """An optimizer around another one, with attributes of its own."""

    def __init__(self, parameters: object) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base_optimizer = SGD(self.param_groups, lr=0.05, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups
        self.count = 0

    def step(self, closure: object = None) -> None:
        self.count += 1
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.data.add_(weight.grad, alpha=-0.001 * self.count)
        self.base_optimizer.step()


class OtherOptimizers(Strategy):
    """Takes another class of optimizer for each task."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, SAM)

    @on(TaskEnded)
    def change(self, event: TaskEnded) -> None:
        made = Adam if event.task.id == 0 else SAM
        self.optimizer = made(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.shift = event.task.id

    def rate(self, step: int) -> float:
        return 1 / (1 + step + getattr(self, "shift", 0))

    @on(BatchLearned)
    def slow(self, event: BatchLearned) -> None:
        if hasattr(self, "schedule"):
            self.schedule.step()


class Functions(Strategy):
    """Keeps state in what its functions are bound to, and close over."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        count = 0

        def counted() -> int:
            nonlocal count
            count += 1
            return count

        self.counted, self.memory = counted, Reservoir(20)
        self.add = self.memory.add
        self.append = (notes := []).append
        self.notes = notes
        self.weight = torch.ones(6)
        self.entropy = partial(F.cross_entropy, weight=self.weight)
        self.mean = np.mean

    def loss(self, samples: Samples) -> Tensor:
        loss = self.entropy(self.logits(samples), samples.y) * (1 + 0.01 * self.counted() + 0.01 * len(self.notes))
        return loss + 0.1 * super().loss(self.memory.sample(5)) if len(self.memory) else loss

    @on(BatchLearned)
    def keep(self, event: BatchLearned) -> None:
        self.add(event.batch.samples)
        self.weight *= 0.97
        if event.batch.index % 3 == 0:
            self.append(float(self.mean([event.batch.index])))

    @on(TaskEnded)
    def replace(self, event: TaskEnded) -> None:
        self.memory = Reservoir(20)  # and `add` still fills the old one
        if event.task.id:
            self.entropy = partial(F.cross_entropy, label_smoothing=0.1)
            self.counted = partial(float, event.task.id)


class Hooked(Strategy):
    """Has hooks on a plain tensor and on modules that change places."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.offset = torch.zeros(6, requires_grad=True)
        self.offset.register_hook(lambda gradient: 0.5 * gradient)
        self.pair = [nn.Linear(6, 6), nn.Linear(6, 6)]
        self.pair[0].register_forward_hook(lambda module, inputs, output: output * 2)

    def loss(self, samples: Samples) -> Tensor:
        return F.cross_entropy(self.pair[0](self.logits(samples)) + self.offset, samples.y)

    def learn(self, batch: Batch) -> Tensor:
        loss = super().learn(batch)
        with torch.no_grad():
            self.offset -= 0.1 * self.offset.grad
        self.offset.grad = None
        return loss

    @on(BatchLearned)
    def swap(self, event: BatchLearned) -> None:
        if event.batch.index == 1:
            self.pair.reverse()


class OwnStream(Strategy):
    """Holds a stream of its own, and a session that it changed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.other = example_stream(batch_size=4).reseeded(9)

    @on(SessionStarted)
    def meet(self, event: SessionStarted) -> None:
        self.half = replace(event.session, samples=event.session.samples[:][:8])
        self.whole = event.session

    def loss(self, samples: Samples) -> Tensor:
        more = next(iter(next(iter(self.other.session(1))))).samples
        return super().loss(samples + more + self.half.samples[:]) + 0 * len(self.whole.samples)


class Containers(Strategy):
    """An LRU, sets of numbers, arrays in odd orders, children of generators, private slots, and a default argument of its own."""

    def __init__(self, model: nn.Module, scales: list[float] = [1.0, 1.0]) -> None:  # noqa: B006  # that is what is tested
        super().__init__(model)
        self.scales, self.lru, self.seen = scales, OrderedDict[int, float](), set[int]()
        self.fortran = np.asfortranarray(np.random.RandomState(0).rand(7, 5).astype(np.float32))
        self.table = np.zeros(3, dtype=[("label", "i4"), ("weight", "f8")])
        self.matrix = torch.rand(50, 4)
        self.column = self.matrix[:, 1]
        self.draws, self.slotted = np.random.default_rng(3), Private()
        self.space = SimpleNamespace(
            when=datetime(2026, 1, 2), phase=MoreWords.B, log=logging.getLogger("x"), pattern=re.compile("a")
        )

    def loss(self, samples: Samples) -> Tensor:
        order = sum((number + 1) * label for number, label in enumerate(sorted(self.seen))) % 7
        (child,) = self.draws.spawn(1)
        factor = (
            self.scales[0] + 0.01 * order + 0.01 * float(self.fortran.sum()) + 0.01 * child.random() + 0.001 * self.slotted.next()
        )
        factor += 0.01 * next(iter(self.lru), 0) + 0.01 * float(self.table["weight"].sum()) + 0.001 * float(self.column.norm())
        return super().loss(samples) * factor

    @on(BatchLearned)
    def keep(self, event: BatchLearned) -> None:
        labels = event.batch.samples.y.tolist()
        self.seen |= {11 * label for label in labels}
        self.lru[labels[0]] = float(event.loss)
        self.lru.move_to_end(labels[0])
        self.table["weight"][labels[0] % 3] += 0.5
        self.column *= 0.99
        self.space.count = getattr(self.space, "count", 0) + 1

    @on(TaskEnded)
    def rescale(self, event: TaskEnded) -> None:
        self.scales = [self.scales[0] * 0.9, 2.0]
        self.column = self.matrix[:, 2].clone()[::2]


class Private:
    __slots__ = ("__x",)

    def __init__(self) -> None:
        self.__x = 0

    def next(self) -> int:
        self.__x += 1
        return self.__x


class NewParts(Strategy):
    """Replaces and adds parts on the way: those that the run began with go on hearing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.parts = (Detector(),)
        self.first = self.parts[0]

    def learn(self, batch: Batch) -> Tensor:
        if batch.index == 2:
            self.parts = (Detector(), *self.parts, Detector())
        return super().learn(batch) * 1

    def loss(self, samples: Samples) -> Tensor:
        return super().loss(samples) * (1 + 0.1 * self.first.heard + 0.1 * sum(part.heard for part in self.parts))


@pytest.mark.slow
@pytest.mark.parametrize("make", [OtherOptimizers, Functions, Hooked, OwnStream, Containers, NewParts])
def test_what_strategies_do_resumes_exactly(make: type[Strategy]) -> None:
    resumed_everywhere(make)
    assert Containers.__init__.__wrapped__.__defaults__ == ([1.0, 1.0],)  # what was restored is not the default argument itself
