"""Attributes: everything that a strategy holds, found by walking them."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial, partialmethod
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

T = TypeVar("T")

_POINTER = struct.calcsize("P")

_LEAVES = (  # those first that are told soonest
    str, bytes, int, float, complex, bool, type(None), FunctionType, BuiltinFunctionType, MethodType, ModuleType,
    Tensor, np.ndarray, nn.Module, Optimizer, torch.Generator, torch.device, torch.dtype, type,
)  # fmt: skip
_SHARED = (str, int, float, bool, type(None), tuple, frozenset)
"""What may be one object for many values."""

CONTAINERS = (list, tuple, set, frozenset, deque)


def walk(root: object, leaves: tuple[type, ...] = ()) -> Iterator[tuple[str, object]]:
    """Yield (path, value) for each value that `root` holds, at any depth, each object once.

    Attributes, fields of dataclasses and items of containers are followed; what torch keeps together (a module, an
    optimizer, a generator) is one value. What a class names in `not_state` is left out: the constructor's `params`, since
    they are not what it became, and the run's bus. Objects of the types in `leaves` are yielded, and not followed.
    """
    kinds: tuple[type, ...] = (*_LEAVES, *leaves)
    met: set[int] = set()
    stack: list[tuple[str, object]] = [(type(root).__name__, root)]
    while stack:
        path, value = stack.pop()
        if id(value) in met:
            continue
        if not isinstance(value, _SHARED):
            met.add(id(value))
        yield path, value
        if not isinstance(value, kinds):
            stack += [(path + name, item) for name, item in reversed([*contents(value)])]


def contents(value: object, hidden: bool = False) -> Iterator[tuple[str, object]]:
    """Yield (end of its path, value) for each value that an object holds: items of a container, else attributes.

    With `hidden`, also attributes that its class names in `not_state`.
    """
    if isinstance(value, Mapping):
        for number, (key, item) in enumerate(value.items()):
            yield f"[key {number}]" if isinstance(key, Tensor) else f"[{key!r}]", item
    elif isinstance(value, CONTAINERS):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    else:
        yield from ((f".{name}", item) for name, item in attributes(value, hidden).items())


def code_contents(value: object) -> Iterator[tuple[str, object]]:
    """Yield (end of its path, value) for each value that a function holds: defaults, closure, attributes, what it is bound to."""
    if isinstance(value, (partial, partialmethod)):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, MethodType):
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
    elif isinstance(value, (staticmethod, classmethod)):
        yield ".__func__", value.__func__
    elif isinstance(value, property):
        yield from ((".fget", value.fget), (".fset", value.fset), (".fdel", value.fdel))
    elif isinstance(value, FunctionType):
        yield from ((".__defaults__", value.__defaults__), (".__kwdefaults__", value.__kwdefaults__))
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with suppress(ValueError):  # nothing was bound to it yet
                yield f" {name}", cell.cell_contents
        yield from ((f".{name}", item) for name, item in vars(value).items())


def attributes(value: object, hidden: bool = False) -> dict[str, object]:
    """Return the attributes of an object, those in slots first; with `hidden`, also those in `not_state` of its class."""
    in_slots = {}
    for name, slot in slots(type(value)).items():
        with suppress(AttributeError):  # it is empty
            in_slots[name] = slot.__get__(value)
    held = {**in_slots, **getattr(value, "__dict__", {})}
    left_out = set() if hidden else {name for cls in type(value).__mro__ for name in cls.__dict__.get("not_state", ())}
    return {name: item for name, item in held.items() if name not in left_out}


def slots(cls: type) -> dict[str, MemberDescriptorType]:
    """Return the attributes that instances keep in slots, by name, those of base classes first."""
    descriptors: dict[str, MemberDescriptorType] = {}
    for base in reversed(cls.__mro__):
        named: str | Iterable[str] = vars(base).get("__slots__", ())
        for name in [named] if isinstance(named, str) else named:
            private = name.startswith("__") and not name.endswith("__")  # Python knows it by the name of the class too
            name = f"_{base.__name__.lstrip('_')}{name}" if private else name
            if isinstance(slot := vars(base).get(name), MemberDescriptorType):
                descriptors[name] = slot
    return descriptors


def builds_plainly(cls: type) -> bool:
    """Return whether objects of a class are nothing but their attributes: no C code keeps more in them, as in a lock or a file."""
    extra = (cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0) + len(slots(cls))
    return cls.__itemsize__ == 0 and cls.__basicsize__ <= object.__basicsize__ + extra * _POINTER


def replaces_method(cls: type, name: str) -> bool:
    """Return whether an attribute of an object would stand in for a method of its class, or for what Python itself asks for."""
    if name.startswith("__") and name.endswith("__"):
        return True
    inherited = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
    bound = hasattr(type(inherited), "__get__") and not hasattr(type(inherited), "__set__")  # a descriptor that sets comes first
    return bound and not isinstance(inherited, cached_property)


def find_all(root: object, kind: type[T]) -> list[tuple[str, T]]:
    """Return (path, value) for each value of type `kind` that `root` holds."""
    return [(path, value) for path, value in walk(root) if isinstance(value, kind)]
