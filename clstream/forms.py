"""Forms: how values that are no objects of their own are written in a snapshot, and what makes the state of those that are."""

from __future__ import annotations

import logging
import re
from ast import literal_eval
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clstream.origin import HOOKS, TABLES
from clstream.state import attributes


class CaptureError(TypeError):
    """An attribute that a snapshot can't hold; the message names it."""


CODE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, partial, type, np.ufunc, type(np.mean))
DICTS: dict[str, type[Any]] = {each.__name__: each for each in (dict, OrderedDict, defaultdict, Counter)}
NUMPY_BITS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")


def _torch_thing(kind: type[Any]) -> Callable[[str], Any]:
    """Return what finds a constant of torch by its name, and refuses what is none."""

    def find(name: str) -> Any:
        found = getattr(torch, name, None)
        if not isinstance(found, kind):
            raise ValueError(f"the checkpoint names torch.{name}, which is no {kind.__name__}")
        return found

    return find


SIMPLE: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "complex": (complex, lambda value: [value.real, value.imag], lambda pair: complex(*pair)),
    "range": (range, lambda value: [value.start, value.stop, value.step], lambda ends: range(*ends)),
    "size": (torch.Size, list, torch.Size),
    "dtype": (torch.dtype, lambda value: str(value).removeprefix("torch."), _torch_thing(torch.dtype)),
    "memory format": (torch.memory_format, lambda value: str(value).removeprefix("torch."), _torch_thing(torch.memory_format)),
    "device": (torch.device, str, torch.device),
    "path": (type(Path()), str, Path),
    "date": (date, date.isoformat, date.fromisoformat),
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "timedelta": (timedelta, lambda value: [value.days, value.seconds, value.microseconds], lambda parts: timedelta(*parts)),
    "decimal": (Decimal, str, Decimal),
    "pattern": (re.Pattern, lambda value: [value.pattern, value.flags], lambda pair: re.compile(*pair)),
    "logger": (logging.Logger, lambda value: value.name, logging.getLogger),
    "ellipsis": (type(...), repr, lambda text: ...),  # noqa: ARG005
}
TAGS = {kind: name for name, (kind, _, _) in SIMPLE.items()}


def plain(value: Any, what: str) -> Any:
    """Return a value as a file may hold it: what derives from a plain type is made one; CaptureError for what is none."""
    if value is None or isinstance(value, Tensor):
        return value if value is None else value.detach()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain(key, what): plain(item, f"{what}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(item, f"{what}[{number}]") for number, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise CaptureError(f"{what} is a {type(value).__name__}: a checkpoint holds None, numbers, strings, tensors, lists and dicts")


def set_ways(items: list[Any]) -> Iterator[set[Any]]:
    """Yield sets of the same items that grew in different ways, so that they may come in different orders."""
    yield set(items)
    n = len(items) or 1
    for size in sorted({1, 2, 3, 4, 5, 6, 8, 10, 16, 20, 32, 64, 128, 256, n}):
        joined: set[Any] = set()
        updated: set[Any] = set()
        for start in range(0, len(items), size):
            joined |= set(items[start : start + size])
            updated.update(items[start : start + size])
        for made in (joined, updated):
            yield made
            for again in sorted({1, 2, 3, 4, 6, 8, 16, 32, n}):  # what it has already makes room too
                made |= set(items[:again])
                yield made


def copied(value: object) -> dict[str, Any]:
    """Return the attributes of an object that make its state: without those in `not_state`, and torch's hooks."""
    held = attributes(value)
    cls = type(value)
    if isinstance(value, Optimizer):  # a scheduler puts a wrapper around `step`, which only counts
        return {name: item for name, item in held.items() if name != "step" and not name.endswith("_hooks")}
    if not isinstance(value, nn.Module):
        return held
    if cls.__module__.startswith("torch._dynamo"):  # torch.compile's: a module around the user's, and compiled code
        return {name: item for name, item in held.items() if name in TABLES}
    own = getattr(cls, "__getstate__", None)
    if own is not None and own.__module__.startswith("torch.nn.modules."):
        held = {name: item for name, item in held.items() if name in own(value)}  # a recurrent layer leaves out weak references
    return {name: item for name, item in held.items() if name not in HOOKS}


def array_type(text: str) -> np.dtype[Any]:
    """Return the dtype that a snapshot names."""
    return np.lib.format.descr_to_dtype(literal_eval(text))
