"""State: everything that a strategy holds, found by walking its attributes."""

from __future__ import annotations

import hashlib
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
            items = [(f"{path}.{name}", item) for name, item in _attributes(value).items()]
        for inner, item in items:
            yield from visit(inner, item)

    yield from visit(type(root).__name__, root)


def _attributes(value: object) -> dict[str, object]:
    """Return the attributes of an object, those in slots first."""
    slots = [name for cls in reversed(type(value).__mro__) for name in _names(vars(cls).get("__slots__", ()))]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
    hidden = {name for cls in type(value).__mro__ for name in vars(cls).get("not_state", ())}
    return {name: item for name, item in found.items() if name not in hidden}


def _names(slots: str | Iterable[str]) -> list[str]:
    return [name for name in ([slots] if isinstance(slots, str) else slots) if name not in ("__dict__", "__weakref__")]


def held(root: object, kind: type[T]) -> list[tuple[str, T]]:
    """Return (path, value) for each value of type `kind` that `root` holds."""
    return [(path, value) for path, value in walk(root) if isinstance(value, kind)]


def digest(root: object) -> str:
    """Return a hash of every tensor, generator, number and string that `root` holds: equal digests, equal states, bit for bit."""
    found = hashlib.sha256()

    def add(path: str, value: object) -> None:
        found.update(path.encode())
        if isinstance(value, Tensor):
            whole = value.detach().cpu().contiguous()
            found.update(f"{whole.dtype} {tuple(whole.shape)}".encode())
            found.update(whole.flatten().view(torch.uint8).numpy().tobytes() if whole.numel() else b"")
        elif isinstance(value, np.ndarray):
            found.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, torch.Generator):
            add(path, value.get_state())
        elif isinstance(value, (nn.Module, Optimizer)):
            for inner, item in walk(value.state_dict()):
                if not isinstance(item, (Mapping, list, tuple)):
                    add(f"{path}:{inner}", item)
        elif isinstance(value, (str, int, float, bool, type(None))):
            found.update(repr(value).encode())

    for path, value in walk(root):
        add(path, value)
    return found.hexdigest()
