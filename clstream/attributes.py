"""Attributes: everything that a strategy holds, found by walking them."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

T = TypeVar("T")


_POINTER = struct.calcsize("P")


_LEAVES = (
    Tensor, np.ndarray, nn.Module, Optimizer, torch.Generator, torch.device, torch.dtype, type,
    str, bytes, int, float, complex, bool, type(None), FunctionType, BuiltinFunctionType, MethodType, ModuleType,
)  # fmt: skip


def walk(root: object) -> Iterator[tuple[str, object]]:
    """Yield (path, value) for each value that `root` holds, at any depth, each object once.

    Attributes, fields of dataclasses and items of containers are followed; what torch keeps together (a module, an
    optimizer, a generator) is one value. What a class names in `not_state` is left out: the constructor's `params`, since
    they are not what it became, and the run's bus.
    """
    met: set[int] = set()

    def visit(path: str, value: object) -> Iterator[tuple[str, object]]:
        if id(value) in met:
            return
        if not isinstance(value, (str, int, float, bool, type(None), tuple, frozenset)):  # those may be one object for many
            met.add(id(value))
        yield path, value
        if isinstance(value, _LEAVES):
            return
        if isinstance(value, Mapping):
            items = [(f"{path}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            items = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
        else:
            items = [(f"{path}.{name}", item) for name, item in attributes(value).items()]
        for inner, item in items:
            yield from visit(inner, item)

    yield from visit(type(root).__name__, root)


def attributes(value: object) -> dict[str, object]:
    """Return the attributes of an object, those in slots first."""
    in_slots = {}
    for name, slot in slots(type(value)).items():
        with suppress(AttributeError):  # it is empty
            in_slots[name] = slot.__get__(value)
    hidden = {name for cls in type(value).__mro__ for name in vars(cls).get("not_state", ())}
    return {name: item for name, item in {**in_slots, **getattr(value, "__dict__", {})}.items() if name not in hidden}


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
