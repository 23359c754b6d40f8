"""Snapshots of everything that a strategy may hold; what is refused, and why; that a file can't choose what is run."""

from __future__ import annotations

import enum
import io
import logging
import math
import random
import re
import threading
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
from clstream.strategies import Joint, Replay
from more_words import MoreWords
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from clstream import Batch, BatchLearned, RunStarted, Samples, SessionStarted, Strategy, TaskEnded, on, run
from clstream.checks import check_strategy, example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.memory import ClassBalanced, Reservoir, Ring
from clstream.models import Timm
from clstream.seeds import isolated
from clstream.serialization import CaptureError, capture, restore
from clstream.serialization.capture import references_of
from clstream.serialization.compare import digest, first_difference, hashes


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


def test_compiled_and_recurrent_modules_are_captured() -> None:
    one, two = (Holder(net=torch.compile(nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 2)))) for _ in range(2))
    references, there = references_of([one]), references_of([two])
    restore([two], through_a_file(capture([one], references)[0]), there)
    for name, value in one.net.state_dict().items():
        assert torch.equal(value, two.net.state_dict()[name])


def through_a_file(snapshot: dict) -> dict:
    file = io.BytesIO()
    torch.save(snapshot, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Holder:
    def __init__(self, **attributes: object) -> None:
        vars(self).update(attributes)


def restored(before: Holder, fresh: Holder | None = None) -> Holder:
    """Return a holder with the state of another one, by way of a file."""
    fresh = fresh or Holder()
    snapshot, _ = capture([before], references_of([before]))
    restore([fresh], through_a_file(snapshot), references_of([fresh, *map(type, ())]))
    assert first_difference(capture([before])[0], capture([fresh])[0]) is None
    return fresh


def test_what_was_one_object_is_one_again() -> None:
    weight, generator, row = nn.Parameter(torch.ones(3)), torch.Generator(), [1]
    net = nn.Linear(3, 3)
    tied = nn.Linear(3, 3)
    tied.weight = net.weight
    before = Holder(a=weight, b=[weight], c={"w": weight.data}, d=generator, e=(generator, row), f=row, nets=[net, tied])
    before.g = before  # and in a circle
    after = restored(before, Holder(d=torch.Generator(), nets=[nn.Linear(3, 3), nn.Linear(3, 3)]))
    assert after.a is after.b[0] and after.d is after.e[0] and after.f is after.e[1] and after.g is after
    assert after.nets[0].weight is after.nets[1].weight
    with torch.no_grad():
        after.a.add_(1)
    assert after.c["w"].tolist() == [2, 2, 2]  # another tensor, the same storage
    assert weight.tolist() == [1, 1, 1]


def test_what_was_two_objects_is_not_one_again() -> None:
    shared = nn.Parameter(torch.zeros(2))
    one, two = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    same = torch.Generator()
    after = restored(
        Holder(a=nn.Parameter(torch.ones(2)), b=nn.Parameter(torch.ones(2) * 2), c=one, d=two),
        Holder(a=shared, b=shared, c=same, d=same),
    )
    assert after.a is not after.b and after.a.tolist() == [1, 1] and after.b.tolist() == [2, 2] and after.c is not after.d


def test_constants_that_others_hold_are_left_alone() -> None:
    """What a strategy no longer holds is not touched, whoever has it."""
    constant, samples = torch.zeros(3), Samples(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    array, default = np.zeros(2), [1.0, 1.0]
    one, two = (Holder(table=constant, samples=samples, array=array, scales=default, names={"a": 1}) for _ in range(2))
    one.names["b"] = 2  # changed in place, as the other one's is to be
    references, there = references_of([one]), references_of([two])
    one.table, one.array, one.scales = torch.ones(3), np.ones(2), [3.0, 2.0]
    one.samples = Samples(torch.ones(2, 1), torch.ones(2, dtype=torch.int64), {"logits": torch.ones(2, 3)})
    names = two.names
    restore([two], through_a_file(capture([one], references)[0]), there)
    assert two.table.tolist() == [1, 1, 1] and two.scales == [3, 2] and two.samples.extra["logits"].sum() == 6
    assert not constant.any() and not array.any() and default == [1, 1] and not samples.x.any() and not samples.extra
    assert names == {"a": 1, "b": 2} and two.names is names


def test_strides_and_types_stay() -> None:
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    numbers = [torch.ones(3, dtype=dtype) for dtype in (torch.uint8, torch.float16, torch.bfloat16, torch.complex64)]
    after = restored(Holder(image=image, numbers=numbers, scalar=np.float32(1.5)))
    assert after.image.stride() == image.stride() and torch.equal(after.image, image)
    assert [each.dtype for each in after.numbers] == [each.dtype for each in numbers]
    assert type(after.scalar) is np.float32


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_sparse_tensors_stay() -> None:
    assert torch.equal(restored(Holder(sparse=torch.eye(3).to_sparse())).sparse.to_dense(), torch.eye(3))


def test_gradients_and_what_is_frozen_stay() -> None:
    net = nn.Linear(2, 2)
    net(torch.ones(1, 2)).sum().backward()
    net.bias.requires_grad_(False)
    after = restored(Holder(net=net), Holder(net=nn.Linear(2, 2)))
    assert torch.equal(after.net.weight.grad, net.weight.grad) and after.net.weight.requires_grad
    assert not after.net.bias.requires_grad


def test_a_small_view_is_written_without_the_rest_of_its_storage() -> None:
    whole = torch.zeros(1_000_000)
    snapshot, _ = capture([Holder(row=whole[5:10])], references_of([Holder()]))
    file = io.BytesIO()
    torch.save(snapshot, file)
    assert len(file.getvalue()) < 5000


def test_the_streams_data_is_referred_to() -> None:
    stream = example_stream(schedule=(0, 0, 1, 2), batch_size=1000)
    kept = Checkpoints()
    strategy = Joint(example_model())
    strategy.own = Holder(task=stream.tasks[1], rows=stream.tasks[1].train.x[3:5], half=stream.session(0).samples[:])
    run(strategy, stream, kept, max_sessions=1)
    state = kept.load(-1)
    nodes = {node["path"]: node for node in state["strategy"]["nodes"]}
    assert nodes["Joint.sessions"]["items"] == [["session", 0]] and nodes["Joint.own"]["attributes"]["task"] == ["task", 1]
    assert nodes["Joint.own.rows"]["place"] == [1, "train", "x"] and "data" not in nodes["Joint.own.rows"]
    assert nodes["Joint.own.half.x"]["place"] == [0, "train", "x"]  # the first session's samples are views of the task's
    fresh = Joint(example_model(1))
    fresh.own = Holder()
    run(fresh, stream, max_sessions=1, resume=state)
    assert fresh.own.task is stream.tasks[1] and torch.equal(fresh.own.rows, stream.tasks[1].train.x[3:5])
    assert torch.equal(fresh.own.half.x, stream.session(0).samples.x)


def test_any_model_of_timm_is_captured() -> None:
    model = Timm((3, 32, 32), 4, "resnet10t")
    fresh = Timm((3, 32, 32), 4, "resnet10t")
    restored(Holder(model=model), Holder(model=fresh))
    x = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(model.eval()(x), fresh.eval()(x))


def test_parametrized_modules_are_captured() -> None:
    nets = [nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)) for _ in range(2)]
    restored(Holder(net=nets[0]), Holder(net=nets[1]))
    assert torch.equal(nets[0](torch.ones(1, 3)), nets[1](torch.ones(1, 3)))


# What can't be captured ---------------------------------------------------------------------------------------------------


def refusal(**attributes: object) -> str:
    before = Holder(inner=Holder(**attributes))
    with pytest.raises(CaptureError) as refused:
        capture([before], references_of([Holder()]))
    return str(refused.value)


def test_what_cannot_be_captured_is_named() -> None:
    assert "Holder.inner.lock is a _thread.lock, which a checkpoint can't hold" in refusal(lock=threading.Lock())
    assert "name 'lock' in the `not_state` of the class of Holder.inner" in refusal(lock=threading.Lock())
    assert "Holder.inner.rows is a builtins.generator" in refusal(rows=(row for row in range(3)))
    assert "Holder.inner.choose is a function nowhere.<lambda> that it didn't hold when the run began" in refusal(
        choose=eval("lambda: 3", {"__name__": "nowhere"})
    )
    assert "Holder.inner.gaps is a view with gaps" in refusal(gaps=np.zeros((4, 4))[:, ::2])
    assert "Holder.inner.point is a test_snapshot.P, which" in refusal(point=namedtuple("P", "x", module=__name__)(1))
    assert "Holder.inner.objects is a numpy.ndarray" in refusal(objects=np.array([{}, 1], dtype=object))
    assert "a tensor with the graph that it was computed by" in refusal(loss=nn.Linear(2, 1)(torch.ones(2)))
    assert "Holder.inner.act is a builtins.builtin_function_or_method" in refusal(act=math.tanh)  # none of ours, nor a layer's
    table = np.zeros((4, 2))
    assert "Holder.inner.row shares its memory with Holder.inner.table" in refusal(table=table, row=table[1])
    tensor = torch.zeros(3)
    assert "Holder.inner.array shares its memory with Holder.inner.tensor" in refusal(tensor=tensor, array=tensor.numpy())

    class Local:
        pass

    assert "<locals>.Local, which a checkpoint can't hold" in refusal(local=Local())
    chain: list[object] = []
    for _ in range(1000):
        chain = [chain]
    assert "is nested too deeply for a checkpoint" in refusal(chain=chain)


def test_hooks_that_came_during_the_run_are_refused() -> None:
    before = Holder(net=nn.Linear(2, 2))
    before.net.register_forward_hook(print)
    references = references_of([before])
    capture([before], references)
    before.net.weight.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(CaptureError, match=r"Holder.net.weight got or lost hooks since the run began"):
        capture([before], references)


def test_what_is_no_state_may_be_anything() -> None:
    class Locked(Strategy):
        not_state = ("lock",)

        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.lock = threading.Lock()

    {check.name: check for check in check_strategy(Locked)}["resumes_exactly"]()


def test_a_run_without_checkpoints_may_hold_anything() -> None:
    strategy = Strategy(example_model())
    strategy.lock = threading.Lock()
    run(strategy, example_stream())
    with pytest.warns(UserWarning, match="was run before"), pytest.raises(CaptureError, match=r"Strategy.lock"):
        run(strategy, example_stream(), Checkpoints())


# What doesn't fit -------------------------------------------------------------------------------------------------------


def test_functions_from_the_start_must_be_there_again() -> None:
    before = Holder(act=eval("lambda x: x", {"__name__": "nowhere"}))
    snapshot, _ = capture([before], references_of([before]))
    with pytest.raises(ValueError, match=r"expects nowhere:<lambda> at Holder.act when the run begins, but there is .*relu"):
        restore([Holder(act=F.relu)], snapshot, references_of([Holder(act=F.relu)]))


def test_another_class_is_refused() -> None:
    snapshot, _ = capture([Holder()], references_of([Holder()]))
    with pytest.raises(ValueError, match=r"it is of .*Holder, not of .*Notes"):
        restore([Notes()], snapshot, references_of([Notes()]))


# Digests ------------------------------------------------------------------------------------------------------------------


def test_hashes_name_what_differs() -> None:
    def made(**changes: object) -> Strategy:
        torch.manual_seed(0)
        strategy = Replay(example_model())
        run(strategy, example_stream(), seed=1)
        vars(strategy).update(changes)
        return strategy

    same = capture([made()])[0]
    assert first_difference(same, capture([made()])[0]) is None and digest(made()) == digest(made())
    assert first_difference(same, capture([made(replay_batch=3)])[0]) == "Replay.replay_batch"
    other = made()
    other.memory.kept.x[3] += 1
    assert first_difference(same, capture([other])[0]) == "Replay.memory.kept.x"
    other = made()
    other.memory.random.manual_seed(1)
    assert first_difference(same, capture([other])[0]) == "Replay.memory.random"
    other = made()
    with torch.no_grad():
        other.model.head.weight[0, 0] += 1e-7
    assert first_difference(same, capture([other])[0]) == "Replay.model.head.weight"
    other = made()
    other.model.head.weight.grad[0] += 1
    assert first_difference(same, capture([other])[0]) == "Replay.model.head.weight.grad" and digest(other) == digest(made())
    assert "Replay.optimizer.param_groups[0]" in hashes(same)
