"""Callables: the functions and bound methods that a snapshot may name."""

from __future__ import annotations

import random
from collections import deque
from types import FunctionType, MethodType
from typing import Any

import numpy as np
from torch.nn import functional

from clstream.serialization.encoding import DICTS
from clstream.serialization.references import References, lookup_loaded, qualified_name

LAYERS = ("timm", "torchvision", "open_clip", "peft")
"""Packages beside torch whose layers a saved strategy may have."""

_ANSWERS_ONLY = ("torch", *LAYERS, "transformers", "huggingface_hub")
"""Packages of layers and of what layers derive from: they also have methods that write files, or send some."""

_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)

BUILTIN_METHODS: dict[type, frozenset[str]] = {
    cls: frozenset(name for name in dir(cls) if not name.startswith("_") and name not in ("set_state", "setstate"))
    for cls in (list, set, deque, *DICTS.values(), *_GENERATORS)
}
"""Those that a snapshot may name: they change their own object, and nothing else."""


def method_of(owner: object, name: str, references: References) -> Any:
    """Return a bound method that a snapshot may name; else ValueError.

    Of the user's classes and ours those that are written there; of torch's and of packages of layers only what answers and steps,
    or what the run held when it began; of Python's containers and of generators all that change only themselves.
    """
    cls = type(owner)
    if name.startswith("__") or name in BUILTIN_METHODS.get(cls, ()):
        method = getattr(owner, name, None) if name in BUILTIN_METHODS.get(cls, ()) else None
    else:
        home = next((base for base in cls.__mro__ if name in vars(base)), object)
        function = vars(home).get(name)
        method = None
        package = home.__module__.partition(".")[0]
        writes = name == "save" and package == "clstream"  # a file may not have files written
        if (
            isinstance(function, FunctionType)
            and not writes
            and (
                id(function) in references.paths
                or (package in _ANSWERS_ONLY and name in ("forward", "step", "zero_grad"))
                or (
                    package not in (*_ANSWERS_ONLY, "numpy")
                    and (qualified_name(home) in references.classes or home.__module__ in references.modules)
                )
            )
        ):
            method = MethodType(function, owner)
    if method is None:
        raise ValueError(f"it names the method {name!r} of a {cls.__name__}, which no checkpoint may call")
    return method


def names_of(value: Any) -> list[str]:
    """Return the names under which a function or class may be found."""
    if isinstance(value, type):
        return [qualified_name(value)]
    return [f"{functional.__name__}:{getattr(value, '__name__', '')}"]


def is_global(function: FunctionType) -> bool:
    """Return whether a function is one of a module, which others use too."""
    return lookup_loaded(qualified_name(function)) is function
