"""Seeds, the caller's generators, what an object holds, and how it describes the arguments that it was built with."""

import copy
import random
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from clstream.strategies import Replay
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from clstream.attributes import find_all, walk
from clstream.models import Mlp
from clstream.params import HasParams, describe, flat
from clstream.seeds import derive, isolated

# Seeds -------------------------------------------------------------------------------------------------------------------


def test_derived_seeds_stay_what_they_are():
    assert derive(0, "run") == 5671538188559471622
    assert derive(1, "pixels", 2) == 2471514909451704427


PARTS = st.lists(st.integers() | st.text(max_size=5) | st.booleans() | st.none(), max_size=4).map(tuple)


@given(PARTS, PARTS)
def test_derived_seeds_differ_where_their_parts_do(one, other):
    assert 0 <= derive(*one) < 2**63
    assert (derive(*one) == derive(*other)) == (repr(one) == repr(other))


def test_neighbouring_seeds_have_nothing_in_common():
    seeds = {derive(seed, session, epoch) for seed in range(20) for session in range(20) for epoch in range(20)}
    assert len(seeds) == 8000
    assert 0.48 < np.mean([seed >> 62 for seed in seeds]) < 0.52


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(())), float(torch.empty(1).normal_())


def global_state():
    numpy_state = [np.asarray(part).tolist() for part in np.random.get_state()]
    return random.getstate(), numpy_state, torch.get_rng_state().tolist()


def test_isolated_draws_depend_on_its_parts_alone():
    def drawn(*parts):
        draw()  # wherever the global generators are
        with isolated(*parts):
            return draw()

    assert drawn(0, "run") == drawn(0, "run")
    others = [drawn(*parts) for parts in ((0, "run"), (1, "run"), (0, "model"))]
    for numbers in zip(*others, strict=True):
        assert len(set(numbers)) == 3


def test_isolated_leaves_the_global_generators_as_they_were():
    before = global_state()
    with isolated(3):
        draw()
        with isolated(4):
            draw()
    assert global_state() == before


def test_isolated_leaves_them_as_they_were_after_an_exception_too():
    @isolated(3)
    def interrupted():
        draw()
        raise KeyboardInterrupt

    before = global_state()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert global_state() == before


def test_nested_isolation_gives_the_outer_draws_back():
    with isolated(3):
        expected = draw(), draw()
    with isolated(3):
        first = draw()
        with isolated(4):
            draw()
        assert (first, draw()) == expected


# State -------------------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    generator: torch.Generator
    inner: dict = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Slotted:
    generator: torch.Generator


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)


def paths(root, kind=torch.Generator):
    return [path for path, _ in find_all(root, kind)]


def test_what_is_nested_is_found_by_its_path():
    made = [torch.Generator() for _ in range(7)]
    root = Holder(
        own=made[0],
        items=[1, (made[1],)],
        table={"a": made[2], 3: [made[3]]},
        record=Record(made[4], {"deep": Slotted(made[5])}),
        parts=(Holder(random=made[6]),),
    )
    found = find_all(root, torch.Generator)
    assert [path for path, _ in found] == [
        "Holder.own",
        "Holder.items[1][0]",
        "Holder.table['a']",
        "Holder.table[3][0]",
        "Holder.record.generator",
        "Holder.record.inner['deep'].generator",
        "Holder.parts[0].random",
    ]
    assert all(value is expected for (_, value), expected in zip(found, made, strict=True))


def test_what_is_shared_is_found_once():
    shared, model = torch.Generator(), nn.Linear(1, 1)
    root = Holder(one=shared, again=[shared, model], parts=(Holder(model=model),))
    assert paths(root) == ["Holder.one"]
    assert paths(root, nn.Module) == ["Holder.again[1]"]


def test_equal_numbers_and_texts_are_found_each_time():
    values = dict(walk(Holder(a=1, b=1, c=["x", "x"], d=None, e=None)))
    assert [values[f"Holder.{name}"] for name in ("a", "b", "c[0]", "c[1]", "d", "e")] == [1, 1, "x", "x", None, None]
    assert "Holder.e" in values


def test_what_torch_keeps_together_is_one_value():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    root = Holder(model=model, optimizer=SGD(model.parameters(), lr=0.1))
    assert [path for path, _ in walk(root)] == ["Holder", "Holder.model", "Holder.optimizer"]


def test_what_holds_itself_is_walked_once():
    root = Holder(generator=torch.Generator())
    root.itself, root.part = root, Holder(owner=root)
    assert paths(root) == ["Holder.generator"]


def test_neither_the_arguments_nor_the_bus_of_a_strategy_are_followed():
    strategy = Replay(nn.Linear(2, 2), optimizer=partial(SGD, lr=0.1))
    strategy.bus = Holder(generator=torch.Generator())
    assert paths(strategy, nn.Module) == ["Replay.model"]
    assert paths(strategy) == ["Replay.memory.random"]
    assert not [path for path, _ in walk(strategy) if "params" in path]


def test_params_of_an_object_that_does_not_record_its_arguments_are_its_own():
    assert paths(Holder(teacher=Holder(params=[torch.Generator()]))) == ["Holder.teacher.params[0]"]


class Grown(Record):
    """A class derived from a dataclass, with an attribute that is no field."""

    def __init__(self):
        super().__init__(torch.Generator())
        self.second = torch.Generator()


class PlainSlots:
    __slots__ = ("generator",)

    def __init__(self):
        self.generator = torch.Generator()


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        (Holder(queue=deque([torch.Generator()])), ["Holder.queue[0]"]),
        (Grown(), ["Grown.generator", "Grown.second"]),
        (PlainSlots(), ["PlainSlots.generator"]),
    ],
    ids=["deque", "attribute beside fields", "slots"],
)
def test_nothing_that_is_held_is_missed(root, expected):
    assert paths(root) == expected


# Params ------------------------------------------------------------------------------------------------------------------


class Base(HasParams):
    def __init__(self, first, second=2, *, third: float = 0.5):
        self.value = first


class Wrapper(HasParams):
    def __init__(self, base, sizes=(1, 2), **options):
        base.value = 0  # params are the arguments, whatever the constructor does


def function():
    pass


def test_params_are_the_arguments_by_name_with_defaults():
    assert Base(1).params == {"first": 1, "second": 2, "third": 0.5}
    assert Base(1, 3, third=4).params == {"first": 1, "second": 3, "third": 4}
    assert Base(second=5, first=0).params == {"first": 0, "second": 5, "third": 0.5}
    rest = {"head": "fixed", "mean": 0.0, "std": 1.0, "init": "torch", "activation": "relu"}
    assert Mlp(3, 2, hidden=(4,)).params == {"input_shape": 3, "classes": 2, "hidden": (4,), **rest}


def test_a_derived_class_records_its_own_arguments():
    class Derived(Base):
        def __init__(self, width):
            super().__init__(first=width * 2)

    assert Derived(3).params == {"width": 3}
    assert Derived(3).value == 6


def test_bad_arguments_are_refused_by_the_constructor_itself():
    with pytest.raises(TypeError, match=r"__init__\(\) got an unexpected keyword argument 'fourth'"):
        Base(1, fourth=4)


def test_a_copy_keeps_its_params():
    one = Base(7, third=1.5)
    for other in (copy.copy(one), copy.deepcopy(one)):
        assert other.params == one.params
        assert other.value == 7


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3),
        (0.5, 0.5),
        (True, True),
        (None, None),
        ("text", "text"),
        (partial(SGD, lr=0.1, momentum=0.9), "SGD(lr=0.1, momentum=0.9)"),
        (partial(SGD), "SGD()"),
        ([1, (2, "x")], "[1, [2, x]]"),
        ({"a": 1, "b": partial(SGD, lr=1)}, "{a=1, b=SGD(lr=1)}"),
        (Base(1, second=(1, 2)), "Base(first=1, second=[1, 2], third=0.5)"),
        (SGD, "SGD"),
        (function, "function"),
        (nn.ReLU(), "ReLU"),
    ],
)
def test_describe(value, expected):
    assert describe(value) == expected
    assert type(describe(value)) is type(expected)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (partial(pow, 2), partial(pow, 3)),
        (Path("here"), Path("there")),
        (torch.float32, torch.float64),
        (np.float32(0.5), np.float32(0.25)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_different_values_are_described_differently(one, other):
    assert describe(one) != describe(other)


def test_flat_opens_what_is_wrapped_and_leaves_modules_out():
    wrapped = Wrapper(Wrapper(Base(1, second=partial(SGD, lr=0.1))), sizes=[3], alpha=0.5)
    assert flat(wrapped, "strategy") == {
        "strategy": "Wrapper",
        "strategy.base": "Wrapper",
        "strategy.base.base": "Base",
        "strategy.base.base.first": 1,
        "strategy.base.base.second": "SGD(lr=0.1)",
        "strategy.base.base.third": 0.5,
        "strategy.base.sizes": "[1, 2]",
        "strategy.base.options": "{}",
        "strategy.sizes": "[3]",
        "strategy.options": "{alpha=0.5}",
    }
    replay = flat(Replay(Mlp(2, 2), capacity=7), "s")
    assert {"s": "Replay", "s.optimizer": "SGD(lr=0.1)", "s.capacity": 7, "s.replay_batch": None}.items() <= replay.items()
    assert not any(name.startswith("s.model") for name in replay)
