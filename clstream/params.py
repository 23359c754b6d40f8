"""Params: what an object was built with, kept by name and described in plain values."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial, wraps
from numbers import Real
from operator import index
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn


class HasParams:
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
    def __init__(self: HasParams, *args: Any, **kwargs: Any) -> None:  # noqa: N807  # it stands in for one
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


def check_integer(least: int, most: int | None = None, /, *, none: bool = False, **options: object) -> None:
    """Raise ValueError for an option that is not a whole number from `least` to `most`; `none` says whether None is taken too.

    A bool is refused, and a float such as 2.0; an integer of numpy is taken.
    """
    upto = f"of at least {least}" if most is None else f"from {least} to {most}"
    for name, value in options.items():
        try:
            number = least - 1 if isinstance(value, (bool, np.bool_)) else index(value)  # type: ignore[arg-type]  # that is asked
        except (TypeError, RuntimeError):  # torch's own, for a tensor of several numbers
            number = least - 1
        if not (none and value is None) and (number < least or (most is not None and number > most)):
            raise ValueError(f"{name} must be a whole number {upto}{' or None' * none}, not {_shown(value)}")


def check_integers(least: int, /, **options: object) -> None:
    """Raise ValueError for an option that is not a list or tuple of whole numbers of at least `least`."""
    for name, value in options.items():
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} must be a list of whole numbers of at least {least}, not {_shown(value)}")
        for position, number in enumerate(value):
            try:
                check_integer(least, number=number)
            except ValueError as error:
                raise ValueError(f"{name}[{position}]{str(error).removeprefix('number')}") from None


def check_number(low: float = -math.inf, high: float = math.inf, /, *, none: bool = False, **options: object) -> None:
    """Raise ValueError for an option that is not a finite number from `low` to `high`; `none`: whether None is taken too."""
    bounds = (
        ""
        if (low, high) == (-math.inf, math.inf)
        else f" of at least {low:g}"
        if high == math.inf
        else f" from {low:g} to {high:g}"
    )
    for name, value in options.items():
        if not (none and value is None) and not (_is_finite(value) and low <= value <= high):  # type: ignore[operator]  # a number
            raise ValueError(f"{name} must be a finite number{bounds}{' or None' * none}, not {_shown(value)}")


def check_positive(*, none: bool = False, **options: object) -> None:
    """Raise ValueError for an option that is not a finite number above 0; `none`: whether None is taken too."""
    for name, value in options.items():
        if not (none and value is None) and not (_is_finite(value) and value > 0):  # type: ignore[operator]  # it is a number
            raise ValueError(f"{name} must be a finite number above 0{' or None' * none}, not {_shown(value)}")


def check_share(**options: object) -> None:
    """Raise ValueError for an option that is not a number from 0 to below 1: a part of a whole that leaves some."""
    for name, value in options.items():
        if not (_is_finite(value) and 0 <= value < 1):  # type: ignore[operator]  # it is a number
            raise ValueError(f"{name} must be a share, from 0 to below 1, not {_shown(value)}")


def check_choice(choices: Iterable[str], /, *, none: bool = False, **options: object) -> None:
    """Raise ValueError for an option that is not one of the choices, naming the nearest; `none`: whether None is taken too."""
    allowed = list(choices)
    for name, value in options.items():
        if not (none and value is None) and not (isinstance(value, str) and value in allowed):
            near = get_close_matches(value, allowed, n=1) if isinstance(value, str) else []
            meant = f": did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name} must be one of {', '.join(allowed)}{' or None' * none}, not {_shown(value)}{meant}")


def check_choices(choices: Iterable[str], /, **options: object) -> None:
    """Raise ValueError for an option that is not a list or tuple of some of the choices."""
    allowed = list(choices)
    for name, value in options.items():
        if not isinstance(value, (list, tuple)) or not value or any(item not in allowed for item in value):
            raise ValueError(f"{name} must be a tuple of some of {', '.join(allowed)}, not {_shown(value)}")


def check_bool(*, none: bool = False, **options: object) -> None:
    """Raise ValueError for an option that is not True or False; `none`: whether None is taken too."""
    for name, value in options.items():
        if not (none and value is None) and not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name} must be True or False{' or None' * none}, not {_shown(value)}")


def _is_finite(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, (Real, np.floating)) and math.isfinite(value)


def _shown(value: object) -> str:
    """Return a value as errors show it, in one line of bounded length."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has none.

    Of a long line, which may say at its end what it is, the start and the end.
    """
    first = (str(error).splitlines() or [""])[0] or type(error).__name__
    return first if len(first) <= 200 else f"{first[:90]} ... {first[-105:]}"


def describe(value: object) -> str | int | float | bool | None:
    """Return a value of a param as MLflow and tables show it: `SGD(lr=0.1)` for a partial, the class of an object."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (PurePath, torch.dtype, torch.device, np.generic)):
        return str(value)
    if isinstance(value, partial):
        classes = (argument for argument in value.args if isinstance(argument, type))  # jsonargparse's hold the class so
        cls = next(classes, value.func)
        shown = [str(describe(argument)) for argument in value.args] if cls is value.func else []
        return f"{_name(cls)}({', '.join([*shown, *_pairs(_beyond_defaults(cls, value.keywords))])})"
    if isinstance(value, HasParams):
        return f"{type(value).__name__}({_arguments(getattr(value, 'params', {}))})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(str(describe(item)) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{_arguments(value)}}}"
    return _name(value) if callable(value) and hasattr(value, "__qualname__") else type(value).__name__


def flat(value: HasParams, prefix: str) -> dict[str, str | int | float | bool | None]:
    """Return the class of an object and its params by dotted name; a wrapped one is opened too, a module is left out."""
    params: dict[str, str | int | float | bool | None] = {prefix: type(value).__name__}
    for name, param in getattr(value, "params", {}).items():
        if isinstance(param, nn.Module):
            continue
        if isinstance(param, HasParams):
            params |= flat(param, f"{prefix}.{name}")
        else:
            params[f"{prefix}.{name}"] = describe(param)
    return params


def _beyond_defaults(cls: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that differ from their defaults, and the learning rate."""
    try:
        parameters = inspect.signature(cls).parameters
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
