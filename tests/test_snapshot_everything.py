"""A strategy that holds one of each kind of thing, and makes more on the way, resumes exactly."""

from __future__ import annotations

import enum
import random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clstream import Batch, BatchLearned, RunStarted, Samples, SessionStarted, Strategy, TaskEnded, on
from clstream.checks import check_strategy
from clstream.memory import ClassBalanced, Reservoir, Ring


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


@pytest.mark.slow
def test_everything_resumes_exactly() -> None:
    checks = {check.name: check for check in check_strategy(Everything)}
    checks["resumes_exactly"]()
    checks["is_deterministic"]()
