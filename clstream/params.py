"""Params: what an object was built with, kept by name and described in plain values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn


class Recorded:
    """Remembers the arguments of its constructor, defaults included, as `params`: name -> value."""

    params: dict[str, Any]
    not_state: tuple[str, ...] = ("params",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have the class's own constructor record its arguments."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]  # the same one, and what it was given


def _recording(construct: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(construct)

    @wraps(construct)
    def __init__(self: Recorded, *args: Any, **kwargs: Any) -> None:  # noqa: N807  # it stands in for one
        if "params" not in vars(self):  # the most derived class comes first; those that it calls add nothing
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError:
                pass  # the call below says what is wrong
            else:
                bound.apply_defaults()
                object.__setattr__(self, "params", dict(list(bound.arguments.items())[1:]))
        construct(self, *args, **kwargs)

    return __init__


def check_whole(least: int, **values: object) -> None:
    """Raise ValueError for a value that is no whole number of at least `least`; None is let through."""
    for name, value in values.items():
        if value is not None and (not hasattr(value, "__index__") or value < least):  # type: ignore[operator]  # it is a number
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def describe(value: object) -> str | int | float | bool | None:
    """Return a value of a param as MLflow and tables show it: `SGD(lr=0.1)` for a partial, the class of an object."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (PurePath, torch.dtype, torch.device, np.generic)):
        return str(value)
    if isinstance(value, partial):
        made = next((each for each in value.args if isinstance(each, type)), value.func)  # jsonargparse's hold the class so
        shown = [str(describe(each)) for each in value.args] if made is value.func else []
        return f"{_name(made)}({', '.join([*shown, *_pairs(_beyond_defaults(made, value.keywords))])})"
    if isinstance(value, Recorded):
        return f"{type(value).__name__}({_arguments(getattr(value, 'params', {}))})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(str(describe(item)) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{_arguments(value)}}}"
    return _name(value) if callable(value) and hasattr(value, "__qualname__") else type(value).__name__


def flat(value: Recorded, prefix: str) -> dict[str, str | int | float | bool | None]:
    """Return the class of an object and its params by dotted name; a wrapped one is opened too, a module is left out."""
    found: dict[str, str | int | float | bool | None] = {prefix: type(value).__name__}
    for name, param in getattr(value, "params", {}).items():
        if isinstance(param, nn.Module):
            continue
        if isinstance(param, Recorded):
            found |= flat(param, f"{prefix}.{name}")
        else:
            found[f"{prefix}.{name}"] = describe(param)
    return found


def _beyond_defaults(made: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that differ from their defaults, and the learning rate."""
    try:
        parameters = inspect.signature(made).parameters
    except ValueError:  # written in C
        return dict(given)
    return {
        name: value for name, value in given.items() if name == "lr" or name not in parameters or parameters[name].default != value
    }


def _arguments(named: Mapping[str, Any]) -> str:
    return ", ".join(_pairs(named))


def _pairs(named: Mapping[str, Any]) -> list[str]:
    return [f"{name}={describe(value)}" for name, value in named.items()]


def _name(value: Callable[..., Any] | object) -> str:
    return getattr(value, "__qualname__", type(value).__name__).removesuffix(".<locals>.<lambda>")
