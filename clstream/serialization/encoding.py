"""Encoding: how scalars, dtypes and views are written in a snapshot, and which attributes make the state of an object."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from functools import partial
from operator import index
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clstream.attributes import attributes
from clstream.serialization.references import HOOKS, TABLES


class CaptureError(TypeError):
    """An attribute that a snapshot can't hold; the message names it."""


def refusal(value: object, path: str) -> CaptureError:
    """Return the error for an attribute that a snapshot can't hold: it names it and what to do."""
    owner, _, name = path.rpartition(".")
    what = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, FunctionType):
        what = f"function {value.__module__}.{value.__qualname__} that it didn't hold when the run began"
    return CaptureError(
        f"{path} is a {what}, which a checkpoint can't hold: keep it out of "
        f"the strategy, or name {name!r} in the `not_state` of the class of {owner} if nothing is learned by it, or run "
        "without checkpoints (--checkpoint_every 0)"
    )


CODE = (FunctionType, BuiltinFunctionType, MethodType, ModuleType, partial, type, np.ufunc, type(np.mean))

DICTS: dict[str, type[Any]] = {cls.__name__: cls for cls in (dict, OrderedDict, defaultdict, Counter)}

NUMPY_BITS: dict[str, Any] = {name: getattr(np.random, name) for name in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")}

MOST_OVERLAPPING = 2**30
"""Bytes that a tensor whose items lie upon each other may seem to have."""


def _torch_thing(kind: type[Any]) -> Callable[[str], Any]:
    """Return what finds a constant of torch by its name, and refuses what is none."""

    def find(name: str) -> Any:
        constant = getattr(torch, name, None)
        if not isinstance(constant, kind):
            raise ValueError(f"the checkpoint names torch.{name}, which is no {kind.__name__}")
        return constant

    return find


SCALARS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
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
    "fraction": (Fraction, lambda value: [value.numerator, value.denominator], lambda pair: Fraction(*map(index, pair))),
    "pattern": (re.Pattern, lambda value: [str.__str__(value.pattern), value.flags], lambda pair: re.compile(*pair)),
    "logger": (logging.Logger, lambda value: value.name, logging.getLogger),
    "ellipsis": (type(...), repr, lambda text: ...),  # noqa: ARG005
}

SCALAR_TAGS = {kind: name for name, (kind, _, _) in SCALARS.items()}


def to_plain(value: Any, what: str) -> Any:
    """Return a value as a file may hold it: what derives from a plain type is made one; CaptureError for what is none."""
    if value is None or isinstance(value, Tensor):
        return value if value is None else value.detach()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {to_plain(key, what): to_plain(item, f"{what}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [to_plain(item, f"{what}[{number}]") for number, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise CaptureError(f"{what} is a {type(value).__name__}: a checkpoint holds None, numbers, strings, tensors, lists and dicts")


def check_plain(value: object) -> None:
    """Refuse, with ValueError, what no checkpoint consists of, and what would grow when it is read: a list that comes twice."""
    met: set[int] = set()
    waiting: list[tuple[object, int]] = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, (list, dict, tuple)):
            if depth > 200 or (id(part) in met and part != ()):
                raise ValueError("the checkpoint is no good: it refers to itself, or is nested too deeply")
            met.add(id(part))
            inner = [*part.keys(), *part.values()] if isinstance(part, dict) else part
            waiting += [(item, depth + 1) for item in inner]
        elif type(part) is Tensor:
            if part.layout != torch.strided or part.is_quantized or part.requires_grad or part.is_conj() or part.is_meta:
                raise ValueError("the checkpoint is no good: it has a tensor that is not plain")
        elif part is not None and type(part) not in (bool, int, float, str):
            raise ValueError(f"the checkpoint is no good: it has a {type(part).__name__}")


def state_of(value: object) -> dict[str, Any]:
    """Return the attributes of an object that make its state: without those in `not_state`, and those that torch adds."""
    held = attributes(value)
    return {name: held[name] for name in held if not is_no_state(type(value), name)}


def is_no_state(cls: type, name: str) -> bool:
    """Return whether an attribute is no state of an object, since it is made anew: torch's hooks, what typing adds."""
    if issubclass(cls, Optimizer):  # a scheduler puts a wrapper around `step`, which only counts
        return name == "step" or name.endswith("_hooks")
    if issubclass(cls, nn.Module):
        compiled = cls.__module__.startswith("torch._dynamo") and name not in TABLES  # a module around the user's
        return compiled or name in HOOKS or name == "_flat_weight_refs"  # a recurrent layer's weak references to its weights
    if issubclass(cls, Tensor):
        return name.startswith("_dynamo_")  # what its compiler notes
    return name == "__orig_class__"


def dtype_from_plain(written: Any) -> np.dtype[Any]:
    """Return the dtype that a snapshot names: text, or for a structured one a list of fields. Raises ValueError for objects."""

    def described(part: Any) -> Any:
        if not isinstance(part, list):
            return part
        return [
            (tuple(name) if isinstance(name, list) else name, described(kind), *map(tuple, shape)) for name, kind, *shape in part
        ]

    dtype = np.lib.format.descr_to_dtype(described(written))
    if dtype.hasobject:
        raise ValueError("it has an array of objects")
    return dtype


def dtype_to_plain(dtype: np.dtype[Any]) -> Any:
    """Return what stands for a dtype in a snapshot. Raises ValueError for one that it can't stand for."""

    def lists(part: Any) -> Any:
        return [lists(inner) for inner in part] if isinstance(part, (list, tuple)) else part

    written = lists(np.lib.format.dtype_to_descr(dtype))
    again = dtype_from_plain(written)
    if dtype.metadata or dtype.subdtype or again != dtype or again.isalignedstruct != dtype.isalignedstruct:
        raise ValueError("it can't be written")
    return written


def extent(node: Mapping[str, Any]) -> int:
    """Return the position behind the last number of a strided tensor in its storage, in numbers."""
    if 0 in node["size"]:
        return 0
    last: int = node["offset"] + sum((size - 1) * stride for size, stride in zip(node["size"], node["stride"], strict=True))
    return last + 1


def overlapping(node: Mapping[str, Any]) -> int:
    """Return how many numbers a tensor seems to have, if more than lie in its storage; else 0."""
    seeming = math.prod(node["size"])
    return seeming if seeming > extent(node) - node["offset"] else 0


def view_of(node: Mapping[str, Any], storage: Tensor) -> Tensor:
    """Return the strided tensor that a node describes, of a storage as a tensor of bytes. Raises ValueError if it isn't within."""
    dtype = SCALARS["dtype"][2](node["dtype"])
    numbers = [node["offset"], *node["size"], *node["stride"]]
    if any(type(number) is not int or not 0 <= number < 2**62 for number in numbers) or len(node["size"]) != len(node["stride"]):
        raise ValueError(f"{node['path']} has the shape {node['size']} at {node['stride']}, which none has")
    if extent(node) * dtype.itemsize > storage.numel() or overlapping(node) * dtype.itemsize > MOST_OVERLAPPING:
        raise ValueError(f"{node['path']} is larger than what the checkpoint has of it")
    if 0 in node["size"]:
        return torch.empty_strided(node["size"], node["stride"], dtype=dtype, device=storage.device)
    view = torch.empty(0, dtype=dtype, device=storage.device)
    return view.set_(storage.untyped_storage(), node["offset"], node["size"], node["stride"])
