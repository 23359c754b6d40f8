"""Snapshots of everything that a strategy may hold: it resumes exactly."""

from __future__ import annotations

import enum
import logging
import random
import re
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from clstream.strategies import Replay
from more_words import MoreWords
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import Batch, BatchLearned, RunStarted, Samples, SessionStarted, Strategy, TaskEnded, on, run
from clstream.checks import check_strategy, example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.memory import ClassBalanced, Reservoir, Ring
from clstream.seeds import isolated


class Phase(enum.Enum):
    WARM = 1
    COLD = "cold"


class Flags(enum.Flag):
    A = 1
    B = 2


Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Notes:
    losses: list[float] = field(default_factory=list)
    best: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Frozen:
    memory: Reservoir
    limit: int


class Plain:
    """A part without handlers of its own, with slots."""

    __slots__ = ("count", "generator")

    def __init__(self) -> None:
        self.generator, self.count = torch.Generator(), 0


class Everything(Strategy):
    """Holds one of each, and makes more on the way; all of it changes what is learned."""

    exempt = MappingProxyType({"grows": "what it adds to the outputs is NaN where they are -inf"})

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, partial(torch.optim.Adam, lr=3e-3))
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 7, gamma=0.9)
        self.experts: list[nn.Module] = []
        self.optimizers: dict[int, torch.optim.Optimizer] = {}
        self.memory, self.recent = Reservoir(20), Ring(12)
        self.recent.random = self.memory.random  # one generator for two
        self.balanced: dict[str, ClassBalanced] = {}
        self.frozen = Frozen(Reservoir(5), 3)
        self.notes = Notes()
        self.plain = Plain()
        self.numpy, self.old_numpy, self.python = np.random.default_rng(5), np.random.RandomState(6), random.Random(7)
        self.counts, self.ordered = Counter(), OrderedDict(a=1)
        self.window: deque[float] = deque(maxlen=4)
        self.by_class: defaultdict[int, list[float]] = defaultdict(list)
        self.phase, self.flags, self.pair = Phase.WARM, Flags.A, Pair(1, [2])
        self.importance: dict[nn.Parameter, Tensor] = {}
        self.odd = (1 + 2j, b"bytes", range(3), float("nan"), float("-inf"), 2**100, Path("a/b"), torch.Size([2]), torch.int8)
        self.activation = F.relu
        self.step = self.first_step
        self.table = np.zeros((3, 2), dtype=np.float32)
        self.gate = nn.Parameter(torch.zeros(1))
        self.gated = torch.optim.SGD([self.gate], lr=0.1, momentum=0.9)
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.gated, lambda step: 1 / (1 + 0.01 * step))
        self.hooked = 0
        self.register(model)

    def register(self, model: nn.Module) -> None:
        next(model.parameters()).register_hook(lambda gradient: gradient * (1 + 0.01 * self.hooked))

    @on(RunStarted)
    def meet(self, event: RunStarted) -> None:
        self.stream = event.stream

    @on(SessionStarted)
    def widen(self, event: SessionStarted) -> None:
        self.session = event.session
        expert = deepcopy(self.model)
        recurrent = nn.LSTM(6, 5, batch_first=True)
        layer = nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(6), act=nn.GELU(), out=nn.Linear(6, 6)))
        layer.out.bias.requires_grad_(False)
        new = nn.ModuleDict({"expert": expert, "recurrent": recurrent, "layer": layer})
        self.experts.append(new)
        self.optimizers[event.session.index] = torch.optim.AdamW([p for p in new.parameters() if p.requires_grad], lr=1e-3)
        self.balanced[f"memory {event.session.index}"] = ClassBalanced(9)
        if event.session.index == 1:
            self.optimizer.add_param_group({"params": [self.gate], "lr": 0.01})
            self.step = self.second_step
            self.activation = F.tanh
            self.late = partial(F.leaky_relu, negative_slope=0.2)

    def first_step(self, value: Tensor) -> Tensor:
        return value

    def second_step(self, value: Tensor) -> Tensor:
        return 0.5 * value

    def loss(self, samples: Samples) -> Tensor:
        x = samples.x
        whole = super().loss(samples)
        new = self.experts[-1]
        logits = new["expert"](x)
        if logits.shape[1] == 6:
            mixed = new["layer"](logits) if len(x) > 1 else logits
            hidden, _ = new["recurrent"](mixed[:, None])
            whole = whole + 0.1 * hidden.square().mean() + 0.1 * F.cross_entropy(self.activation(mixed), samples.y)
        if len(self.memory):
            whole = whole + super().loss(self.memory.sample(4)) + 0.1 * super().loss(self.recent.sample(2))
        if hasattr(self, "late"):
            whole = whole + self.late(self.gate).sum() * 0.1
        noise = self.numpy.random() + self.old_numpy.rand() + self.python.random() + random.random() + np.random.rand()
        return self.step(whole) * (1 + 0.01 * noise + 0.01 * float(torch.rand((), generator=self.plain.generator)))

    def learn(self, batch: Batch) -> Tensor:
        self.batch = batch  # it refers to the stream's data and task
        optimizer = self.optimizers[max(self.optimizers)]
        optimizer.zero_grad()
        loss = super().learn(batch)
        optimizer.step()
        self.gated.step()  # on gradients that the other optimizer leaves, after its zero_grad
        self.scheduler.step()
        self.rates.step()
        return loss

    @on(BatchLearned)
    def note(self, event: BatchLearned) -> None:
        samples = event.batch.samples
        for memory in (self.memory, self.recent, self.frozen.memory, self.balanced[max(self.balanced)]):
            memory.add(samples)
        value = round(float(event.loss), 3)
        self.notes.losses.append(value)
        self.window.append(value)
        self.hooked = len(self.window) + int(value * 10) % 3
        self.counts.update(samples.y.tolist())
        self.by_class[int(samples.y[0])].append(value)
        self.table[self.hooked % 3] += value
        self.plain.count += 1
        self.importance[self.gate] = self.gate.detach().square() + value

    @on(TaskEnded)
    def close(self, event: TaskEnded) -> None:
        self.task = event.task
        flat = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        self.flat, self.views = flat, list(flat.split(100))  # views of one storage
        self.notes.best = flat
        self.phase = Phase.COLD
        self.flags |= Flags.B
        self.pair = Pair(self.pair.left + 1, [*self.pair.right, event.task.id])
        for p in list(self.model.parameters())[:1]:
            p.requires_grad_(event.task.id % 2 == 0)
        if event.task.id == 1:
            del self.ordered


def test_everything_resumes_exactly() -> None:
    checks = {check.name: check for check in check_strategy(Everything)}
    checks["resumes_exactly"]()
    checks["is_deterministic"]()


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


def test_parts_that_are_replaced_resume_exactly() -> None:
    {check.name: check for check in check_strategy(Wrapped)}["resumes_exactly"]()


def resumed_everywhere(make: Callable[[nn.Module], Strategy]) -> None:
    """Resume a strategy from each of its checkpoints, each of them twice, and compare weights and accuracies."""

    def play(state: object, *observers: object) -> tuple[Tensor, list[Tensor]]:
        with isolated(0, "strategy"):
            strategy = make(example_model())
        result = run(strategy, example_stream((0, 1, 0), batch_size=16), *observers, seed=2, resume=state)
        return result.accuracy, [weight.detach().clone() for weight in strategy.model.parameters()]

    kept = Checkpoints()
    accuracy, weights = play(None, kept)
    for number in range(len(kept.written)):
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


@pytest.mark.parametrize("make", [OtherOptimizers, Functions, Hooked, OwnStream, Containers, NewParts])
def test_what_strategies_do_resumes_exactly(make: type[Strategy]) -> None:
    resumed_everywhere(make)


def test_default_arguments_are_left_alone() -> None:
    resumed_everywhere(Containers)
    assert Containers.__init__.__wrapped__.__defaults__ == ([1.0, 1.0],)
