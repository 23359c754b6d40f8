"""State: everything that a strategy holds, found by walking its attributes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

T = TypeVar("T")

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
    found = {name: getattr(value, name) for name in slots(type(value)) if hasattr(value, name)} | getattr(value, "__dict__", {})
    hidden = {name for cls in type(value).__mro__ for name in vars(cls).get("not_state", ())}
    return {name: item for name, item in found.items() if name not in hidden}


def slots(cls: type) -> list[str]:
    """Return the names of the attributes that instances keep in slots, those of base classes first."""
    found = []
    for each in reversed(cls.__mro__):
        named: str | Iterable[str] = vars(each).get("__slots__", ())
        for name in [named] if isinstance(named, str) else named:
            private = name.startswith("__") and not name.endswith("__")  # Python knows it by the name of the class too
            found.append(f"_{each.__name__.lstrip('_')}{name}" if private else name)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def held(root: object, kind: type[T]) -> list[tuple[str, T]]:
    """Return (path, value) for each value of type `kind` that `root` holds."""
    return [(path, value) for path, value in walk(root) if isinstance(value, kind)]
