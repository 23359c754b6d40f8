"""Kinds of state composed at random, nested, shared and changed while a run goes on: a run that was cut ends as a whole one does.

The picture of the state that is compared is drawn here, without the snapshot's own eyes. What can't be held must be refused at the
first checkpoint, by name.
"""

from __future__ import annotations

import datetime
import enum
import io
import itertools
import os
import random
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from clstream import BatchLearned, Samples, Strategy, on, run
from clstream.checkpoint.compare import difference
from clstream.checks import example_model, example_stream
from clstream.checks.recorders import Checkpoints
from clstream.memory import ClassBalanced, Reservoir, Ring
from clstream.seeds import isolated
from clstream.serialization import CaptureError

pytestmark = pytest.mark.filterwarnings(  # torch's, about kinds of tensors and schedulers that are tried here
    "ignore:Detected call of:UserWarning", "ignore:torch.quantize:UserWarning", "ignore:Sparse CSR:UserWarning"
)


class Phase(enum.Enum):
    WARM = 1
    COLD = "cold"


class Flags(enum.IntFlag):
    A = 1
    B = 2


Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Notes:
    parts: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Frozen:
    parts: list[Any]


@dataclass(frozen=True)
class Key:
    """Something that is asked for its hash."""

    name: str
    tags: frozenset[str] = frozenset({"a", "b"})


class Box:
    limit = 3

    def __init__(self, *parts: Any) -> None:
        self.parts = list(parts)

    def add(self, part: Any) -> None:
        self.parts.append(part)

    @property
    def size(self) -> int:
        return len(self.parts)


class Slotted:
    __slots__ = ("__hidden", "parts")

    def __init__(self, *parts: Any) -> None:
        self.parts, self.__hidden = list(parts), 0.5


class Text(str):
    """A string with attributes, and so a class in C with more to it."""


class Labelled(list):
    pass


class Dice(random.Random):
    pass


class Marked(Tensor):
    pass


def attached(thing: Any, **attributes: object) -> Any:
    for name, value in attributes.items():
        setattr(thing, name, value)
    return thing


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.full_like(weight, 0.25)
    optimizer.step()
    return optimizer


def twins(seed: int) -> list[Any]:
    bits = np.random.PCG64(seed)
    return [np.random.Generator(bits), np.random.Generator(bits), bits.seed_seq]


def circle(*parts: Any) -> list[Any]:
    ring: list[Any] = [*parts]
    ring.append(ring)
    return ring


def backward() -> dict[Key, Any]:
    """An object that is asked for its hash, and leads back to the dict that asks."""
    table: dict[Any, Any] = {}
    box = Box(table)
    table[Key("k")] = box
    table[box] = 1
    return table


HELD: dict[str, Callable[..., Any]] = {
    "list": lambda *parts: [*parts],
    "tuple": lambda *parts: (*parts, 1.5),
    "dict": lambda *parts: {"one": parts, 2: "two", None: -0.0},
    "dict of objects": lambda *parts: {Key("a"): parts, (Key("b"), 1): None, Box: 3} | {Box(): part for part in parts},
    "set": lambda *parts: {1, 2.5, "text", (3, "x"), None},
    "set of objects": lambda *parts: {Key("a"), Key("b"), frozenset({Key("c")})},
    "frozenset": lambda *parts: [frozenset({np.int64(7), 2**70, "é"}), *parts],
    "deque": lambda *parts: deque(parts, maxlen=4),
    "ordered": lambda *parts: OrderedDict(b=parts, a=1),
    "default": lambda *parts: defaultdict(list, x=[*parts]),
    "counter": lambda *parts: Counter("abracadabra"),
    "named tuple": lambda *parts: Pair([*parts], 2),
    "dataclass": lambda *parts: Notes([*parts]),
    "frozen": lambda *parts: Frozen([*parts]),
    "box": lambda *parts: Box(*parts),
    "slotted": lambda *parts: Slotted(*parts),
    "namespace": lambda *parts: SimpleNamespace(parts=[*parts]),
    "circle": circle,
    "backward": lambda *parts: backward(),
    "numbers": lambda *parts: [float("nan"), -0.0, 1 + 2j, 2**100, True, np.float32(0.1), np.datetime64("2020-01-01"), *parts],
    "plain": lambda *parts: [
        Decimal("1.50"),
        Fraction(1, 3),
        datetime.timedelta(1),
        b"\0\xff",
        range(3),
        Phase.COLD,
        Flags.A | Flags.B,
    ],
    "tensor": lambda *parts: torch.linspace(0, 1, 12).reshape(3, 4),
    "views": lambda *parts: list(torch.arange(24.0).reshape(4, 6).unbind(1)),
    "bytes of numbers": lambda *parts: [whole := torch.arange(6.0), whole.view(torch.int32), whole[2:], torch.empty(0)],
    "expanded": lambda *parts: torch.arange(10.0)[3].expand(2, 5),
    "channels last": lambda *parts: torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "types": lambda *parts: [torch.ones(3, dtype=dtype) for dtype in (torch.bfloat16, torch.complex64, torch.bool, torch.int8)],
    "sparse": lambda *parts: torch.eye(3).to_sparse(),
    "parameter": lambda *parts: attached(nn.Parameter(torch.ones(3)), grad=torch.ones(3), note=[*parts]),
    "frozen weight": lambda *parts: nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False),
    "layers": lambda *parts: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.GELU()),
    "recurrent": lambda *parts: nn.LSTM(2, 2),
    "tied": lambda *parts: [layer := nn.Linear(2, 2), attached(nn.Linear(2, 2), weight=layer.weight)],
    "optimizer": lambda *parts: stepped(torch.optim.AdamW(nn.Linear(2, 2).parameters())),
    "schedule": lambda *parts: torch.optim.lr_scheduler.StepLR(
        stepped(torch.optim.SGD(nn.Linear(2, 2).parameters(), momentum=0.9)), 2
    ),
    "generator": lambda *parts: torch.Generator().manual_seed(3),
    "numpy": lambda *parts: np.random.default_rng(4),
    "twins": lambda *parts: twins(5),
    "old numpy": lambda *parts: [np.random.RandomState(6), np.random.Generator(np.random.Philox(3))],
    "python": lambda *parts: random.Random(7),
    "global": lambda *parts: [random._inst, np.random.mtrand._rand],
    "array": lambda *parts: np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "structured": lambda *parts: np.zeros(3, dtype=[("label", "i4"), ("where", "f8", (2,))]),
    "read only": lambda *parts: np.frombuffer(bytes(bytearray(8)), dtype=np.int16),
    "method": lambda *parts: [box := Box(*parts), box.add, box.parts.append],
    "partial": lambda *parts: partial(F.leaky_relu, negative_slope=0.1),
    "memory": lambda *parts: [reservoir := Reservoir(5), attached(Ring(4), random=reservoir.random), ClassBalanced(4)],
}
REFUSED: dict[str, Callable[..., Any]] = {
    "lock": lambda *parts: threading.Lock(),
    "buffer": lambda *parts: io.BytesIO(b"content"),
    "file": lambda *parts: open(os.devnull, encoding="utf-8"),  # noqa: SIM115
    "items to come": lambda *parts: (part for part in parts),
    "iterator": lambda *parts: iter([*parts]),
    "count": lambda *parts: itertools.count(3),
    "text with attributes": lambda *parts: attached(Text("x"), note=parts),
    "list with attributes": lambda *parts: attached(Labelled(parts), note=1),
    "ordered with attributes": lambda *parts: attached(OrderedDict(), note=parts),
    "partial with attributes": lambda *parts: attached(partial(F.relu), note=parts),
    "conjugate": lambda *parts: torch.ones(2, dtype=torch.complex64).conj(),
    "negative": lambda *parts: torch.ones(2, dtype=torch.complex64).conj().imag,
    "quantised": lambda *parts: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "without data": lambda *parts: torch.ones(2, device="meta"),
    "rows": lambda *parts: torch.eye(2).to_sparse_csr(),
    "with a graph": lambda *parts: nn.Parameter(torch.ones(2)) * 2,
    "subclass": lambda *parts: torch.ones(2).as_subclass(Marked),
    "lazy": lambda *parts: [nn.LazyLinear(3).weight],
    "masked": lambda *parts: np.ma.masked_array([1, 2], [True, False]),
    "objects": lambda *parts: np.array([*parts, None, 1], dtype=object),
    "gaps": lambda *parts: np.zeros((4, 4))[:, ::2],
    "two arrays": lambda *parts: [whole := np.zeros(4), whole[:2]],
    "array and tensor": lambda *parts: [whole := np.zeros(4), torch.from_numpy(whole)],
    "record": lambda *parts: np.zeros(2, dtype=[("a", "i4")])[0],
    "memory view": lambda *parts: memoryview(bytearray(3)),
    "bytearray": lambda *parts: bytearray(3),
    "time zone": lambda *parts: datetime.datetime(2026, 1, 1, tzinfo=ZONE),
    "weak": lambda *parts: weakref.WeakKeyDictionary({SHARED: 1}),
    "odd random": lambda *parts: Dice(3),
}  # fmt: skip
LATE: dict[str, Callable[..., Any]] = {  # held from the start, and refused when they come later
    "function": lambda *parts: lambda: parts,
}
ZONE = datetime.timezone(datetime.timedelta(hours=1), "named")
SHARED = Box()


class Fuzzed(Strategy):
    """Holds what a recipe says: kinds of state, each with parts among those before it; some come while it learns."""

    recipe: tuple[tuple[str, tuple[int, ...]], ...] = ()
    changes: tuple[tuple[int, int], ...] = ()

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.things: list[Any] = []
        self.count = 0
        for kind, parts in self.recipe:
            self.things.append(self.built(kind, parts))

    def built(self, kind: str, parts: tuple[int, ...]) -> Any:
        known = [self.things[part % len(self.things)] for part in parts] if self.things else []
        return (HELD | REFUSED | LATE)[kind](*known)

    @on(BatchLearned)
    def change(self, event: BatchLearned) -> None:
        self.count += 1
        for which, way in self.changes:
            if not self.things or (self.count + way) % 3 == 0:
                continue
            index = which % len(self.things)
            changed(self.things[index], self.things[way % len(self.things)], event.batch.samples, self.count)
            if way % 5 == 0:
                self.things[index] = self.built(*self.recipe[index])
            if way % 7 == 0:
                setattr(self, f"more{way % 4}", self.things[index])


def changed(thing: Any, other: Any, samples: Samples, count: int) -> None:
    """Change a thing in place, by its kind."""
    number = count / 8
    if isinstance(thing, nn.Module):
        for weight in thing.parameters():
            weight.data.mul_(0.9)
        thing.training = count % 2 == 0
    elif isinstance(thing, Tensor):
        if thing.layout == torch.strided and 0 not in thing.stride() and not thing.requires_grad and thing.dtype != torch.bool:
            thing += 1
        elif thing.requires_grad:
            thing.data = thing.data * 1.5 if count % 2 else torch.cat([thing.data, thing.data[:1]])
            thing.grad = None
    elif isinstance(thing, np.ndarray):
        if thing.flags.writeable and thing.dtype.kind == "f":
            thing += number
    elif isinstance(thing, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)):
        thing.step()
    elif isinstance(thing, torch.Generator):
        torch.rand((), generator=thing)
    elif isinstance(thing, np.random.Generator):
        thing.spawn(1)[0].random() + thing.random()
    elif isinstance(thing, np.random.RandomState):
        thing.normal()
    elif isinstance(thing, random.Random):
        thing.gauss(0, 1)
    elif isinstance(thing, (Reservoir, Ring)):
        thing.add(samples)
    elif isinstance(thing, (list, deque)):
        if count % 3:
            thing.append(other)
        for inner in list(thing)[:3]:
            if inner is not thing and not isinstance(inner, (list, deque)):
                changed(inner, other, samples, count)
    elif isinstance(thing, Counter):
        thing["a"] += count
    elif isinstance(thing, dict):
        thing[f"at {count}"] = other
        thing.pop(2, None)
    elif isinstance(thing, set):
        thing.add(count)
        thing.discard(1)
    elif hasattr(thing, "parts"):
        thing.parts.append(other)


def by_content(part: Any) -> str:
    """Return a text of what is in a set, whatever the order of sets within it."""
    if isinstance(part, Key):
        return f"Key {part.name} {by_content(part.tags)}"
    return repr(sorted(map(by_content, part))) if isinstance(part, frozenset) else repr(part)


def picture(root: object) -> list[Any]:
    """Return what there is, object by object in the order of a walk, drawn without the snapshot's means."""
    numbers: dict[int, int] = {}
    kept: list[object] = []
    storages: dict[int, int] = {}

    def draw(value: Any) -> Any:
        if value is None or isinstance(
            value, (bool, int, float, complex, str, bytes, range, Decimal, Fraction, enum.Enum, np.generic)
        ):
            return type(value).__name__, repr(value)
        if isinstance(value, (type, FunctionType, datetime.timedelta, np.random.SeedSequence)):
            return repr(getattr(value, "__qualname__", value))
        if isinstance(value, (tuple, partial)):
            return type(value).__name__, [
                draw(part) for part in (value if isinstance(value, tuple) else (value.func, *value.keywords.items()))
            ]
        if isinstance(value, (MethodType, BuiltinMethodType)):
            return "method", value.__name__, draw(value.__self__)
        if isinstance(value, (set, frozenset)):
            return type(value).__name__, sorted(map(by_content, value))
        if id(value) in numbers:
            return f"#{numbers[id(value)]}"
        numbers[id(value)] = len(numbers)
        kept.append(value)
        return type(value).__name__, content(value)

    def content(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.layout != torch.strided:
                return value.to_dense().tolist()
            place = storages.setdefault(value.untyped_storage()._cdata, len(storages)) if value.numel() else None
            flags = value.requires_grad, str(value.dtype), value.stride(), place, draw(value.grad), draw(vars(value))
            return repr(value.detach().tolist()), *flags
        if isinstance(value, np.ndarray):
            return repr(value.tolist()), str(value.dtype), value.flags.writeable, value.flags.f_contiguous
        if isinstance(value, torch.Generator):
            return value.get_state().tolist()
        if isinstance(value, (np.random.Generator, np.random.RandomState)):
            bits = value.bit_generator if isinstance(value, np.random.Generator) else value._bit_generator
            return repr(value.__getstate__() if isinstance(value, np.random.RandomState) else bits.state), draw(id(bits) in numbers)
        if isinstance(value, random.Random):
            return value.getstate()
        if isinstance(value, (list, deque)):
            return [draw(part) for part in value]
        if isinstance(value, dict):
            return [(draw(key), draw(part)) for key, part in value.items()]
        slots = {
            name: getattr(value, name)
            for cls in type(value).__mro__
            for name in vars(cls).get("__slots__", ())
            if hasattr(value, name)
        }
        skipped = ("params", "bus", "step", "_flat_weight_refs", *getattr(value, "not_state", ()))
        both = {**slots, **getattr(value, "__dict__", {})}
        return [(name, draw(part)) for name, part in sorted(both.items()) if name not in skipped and "hooks" not in name]

    return draw(root)


def played(recipe: Any, changes: Any, observer: Checkpoints, state: Any = None) -> Fuzzed:
    cls = type("Fuzzed", (Fuzzed,), {"recipe": recipe, "changes": changes, "__module__": __name__, "__qualname__": "Fuzzed"})
    with isolated(0, "strategy"):
        strategy = cls(example_model())
    run(strategy, example_stream((0, 1), batch_size=20), observer, resume=state)
    return strategy


PARTS = st.lists(st.integers(0, 9), max_size=3).map(tuple)
CHANGES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), max_size=5).map(tuple)
QUICK = settings(
    max_examples=int(os.environ.get("CLSTREAM_FUZZ", "40")), deadline=None, derandomize="CLSTREAM_FUZZ" not in os.environ,
    database=None, suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


@pytest.mark.slow
@QUICK
@given(st.lists(st.tuples(st.sampled_from(sorted(HELD)), PARTS), min_size=1, max_size=8).map(tuple), CHANGES, st.integers(0, 10**6))
def test_whatever_it_holds_a_cut_run_ends_as_a_whole_one(recipe: Any, changes: Any, cut: int) -> None:
    whole, rest = Checkpoints(), Checkpoints(every=0)
    one = played(recipe, changes, whole)
    two = played(recipe, changes, rest, whole.load(cut % len(whole.written)))
    assert difference(whole.load(-1), rest.load(-1)) is None
    assert picture(one) == picture(two)


@pytest.mark.parametrize("kind", sorted(HELD))
def test_each_kind_alone(kind: str) -> None:
    recipe, changes = ((kind, ()), (kind, (0,))), ((0, 7), (1, 15), (0, 1))
    whole = Checkpoints()
    one = picture(played(recipe, changes, whole))
    assert picture(played(recipe, changes, Checkpoints(every=0), whole.load(len(whole.written) // 2))) == one


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_cannot_be_held_is_refused_at_the_first_checkpoint(kind: str) -> None:
    seen = Checkpoints()
    with pytest.raises(CaptureError, match=r"^Fuzzed\.things\[1\]") as refused:
        played((("list", ()), (kind, (0,))), (), seen)
    assert not seen.written and "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", sorted(LATE))
def test_what_comes_later_and_cannot_be_found_again_is_refused_then(kind: str) -> None:
    recipe = (("list", ()), (kind, (0,)))
    whole = Checkpoints()
    one = picture(played(recipe, ((0, 1),), whole))  # there from the start, it is held
    assert picture(played(recipe, ((0, 1),), Checkpoints(every=0), whole.load(3))) == one
    with pytest.raises(CaptureError, match=r"^Fuzzed\.things\[1\]"):
        played(recipe, ((1, 5),), Checkpoints())
