"""State that is kept on classes and in their functions, not on an object: no checkpoint holds it, so a change is detected.

That is attributes of a class, also those that a descriptor keeps for its objects; attributes and default arguments of its
functions, and what a decorator closed over.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections import deque
from collections.abc import Collection, Container, Iterable, Mapping, Set
from enum import Enum
from functools import partial, partialmethod
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clstream.attributes import attributes, code_contents
from clstream.seeds import random_state
from clstream.serialization.encoding import CaptureError
from clstream.serialization.references import References

_NOT_SEARCHED = frozenset(sys.stdlib_module_names) | {"torch", "numpy"}

_DECORATED = (FunctionType, MethodType, staticmethod, classmethod, property, partial, partialmethod)

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def class_state(classes: Collection[type], functions: Iterable[FunctionType], held: Container[int]) -> dict[str, str]:
    """Return a hash of what classes and functions keep, by name; objects whose ids are `held` are only referred to."""
    hashes: dict[str, str] = {}
    for cls in classes:
        if cls.__module__.partition(".")[0] in _NOT_SEARCHED or issubclass(cls, Enum):
            continue
        hidden = _not_state(cls, classes)
        for name, value in vars(cls).items():
            dunder = name.startswith("__") and name.endswith("__")
            if name not in hidden and name != "_abc_impl" and (not dunder or isinstance(value, FunctionType)):
                hashes[f"{cls.__module__}.{cls.__qualname__}.{name}"] = state_hash(value, held)
    for function in functions:
        if function.__module__.partition(".")[0] not in _NOT_SEARCHED:
            hashes[f"{function.__module__}.{function.__qualname__}"] = state_hash(function, held)
    return hashes


def caches_of(classes: Collection[type]) -> list[str]:
    """Return the methods of classes whose answers functools.lru_cache keeps, where no checkpoint sees them."""
    return [
        f"{cls.__qualname__}.{name}"
        for cls in classes
        if cls.__module__.partition(".")[0] not in _NOT_SEARCHED
        for name, value in vars(cls).items()
        if hasattr(getattr(value, "__func__", value), "cache_clear") and name not in _not_state(cls, classes)
    ]


def _not_state(cls: type, classes: Collection[type]) -> set[str]:
    """Return what a class, one that it derives from, or one that derives from it names as no state."""
    family = [*cls.__mro__, *(other for other in classes if cls in other.__mro__)]
    return {name for relative in family for name in vars(relative).get("not_state", ())}


def check_class_state(
    references: References, classes: Collection[type], functions: Collection[FunctionType], held: Container[int]
) -> None:
    """Refuse what is kept on a class or function in place of the object, once it has changed."""
    for name in caches_of(classes):
        raise CaptureError(
            f"{name} is a functools.lru_cache, whose answers a checkpoint can't hold: keep them in a dict of the object, or "
            f"name {name.rpartition('.')[2]!r} in the `not_state` of the class if they never change"
        )
    before, now = references.class_state, class_state(classes, functions, held)
    owners = {name.rpartition(".")[0] for name in before}
    changed = [name for name in now if before.get(name, "" if name.rpartition(".")[0] in owners else now[name]) != now[name]]
    again = class_state(classes, functions, references.paths) if changed else {}  # what is held now, and was not then, is no change
    for name in changed:
        if before.get(name) != again[name]:
            raise CaptureError(
                f"{name} changed since the run began: it is kept on the class or function, where no checkpoint looks. Keep "
                f"it on the object, or name {name.rpartition('.')[2]!r} in the `not_state` of the class if nothing is learned "
                "by it"
            )
    references.class_state = {**now, **before}


def state_hash(value: object, held: Container[int]) -> str:
    """Return a hash that changes with the state of a value; of what is written in C, only its type counts."""
    if type(value) is FunctionType and _is_constant(value):  # as nearly all methods are
        return f"function {value.__defaults__!r}"
    met: dict[int, tuple[int, object]] = {}  # with the objects themselves, so that no id comes twice
    into = hashlib.blake2b(digest_size=16)

    def feed(part: Any) -> None:
        into.update(f"{type(part).__module__}.{type(part).__qualname__} ".encode())
        if isinstance(part, _PLAIN):
            into.update(repr(part).encode(errors="backslashreplace") + b";")
            return
        if (id(part) in held and not isinstance(part, FunctionType)) or id(part) in met or isinstance(part, (type, ModuleType)):
            into.update(f"{met.get(id(part), (None,))[0]};".encode())
            return
        met[id(part)] = len(met), part
        if isinstance(part, Tensor):
            into.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            if part.layout == torch.strided and not part.is_quantized:
                plain = part.detach().resolve_conj().resolve_neg().cpu().contiguous()
                into.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, np.ndarray):
            into.update(f"{part.dtype} {part.shape} ".encode() + (b"" if part.dtype.hasobject else part.tobytes()))
        elif isinstance(part, (np.random.Generator, np.random.RandomState, random.Random)):
            into.update(random_state(part).encode())
        elif isinstance(part, torch.Generator):
            feed(part.get_state())
        elif isinstance(part, Mapping):
            into.update(f"{len(part)} ".encode())
            for key, item in list(part.items()):
                feed(key)
                feed(item)
        elif isinstance(part, (list, tuple, deque)):
            into.update(f"{len(part)} ".encode())
            for item in part:
                feed(item)
        elif isinstance(part, Set):
            into.update(repr(sorted(state_hash(item, held) for item in part)).encode())
        else:
            for inner in _inside(part):
                feed(inner)

    try:
        feed(value)
    except RecursionError:
        pass
    return into.hexdigest()


def _is_constant(function: FunctionType) -> bool:
    """Return whether a function holds nothing but plain defaults."""
    if function.__closure__ or function.__kwdefaults__ or function.__dict__:
        return False
    return all(type(value) in _PLAIN for value in function.__defaults__ or ())


def _inside(value: Any) -> list[object]:
    """Return what state a function, a decorator of one, or an object of a class of the user's holds."""
    if isinstance(value, _DECORATED):
        if hasattr(value, "registry") and hasattr(value, "dispatch"):  # functools.singledispatch, which notes what it was asked
            return []
        return [item for _, item in code_contents(value)]
    if type(value).__module__.partition(".")[0] in _NOT_SEARCHED and not isinstance(value, torch.nn.Module):
        return []
    return [attributes(value)]
