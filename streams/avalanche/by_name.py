"""Avalanche's classic benchmarks by name, for the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from clstream.streams.avalanche.streams import from_avalanche, suggestion
from clstream.streams.data import data_root

from clstream.avalanche.imports import import_avalanche
from clstream.seeds import isolated
from clstream.stream import Stream

IN_ROOT = ("SplitMNIST", "PermutedMNIST", "RotatedMNIST", "SplitFMNIST", "SplitCIFAR10", "SplitCIFAR100")
"""Those whose data lies in torchvision's layout, right in the folder for data; others get a folder of their own there."""

OWN = ("epochs", "batch_size", "boundaries", "shuffle", "lazy", "drop_last")
"""Options of `from_avalanche` that can be given beside a benchmark's."""


@cache
def known_names() -> list[str]:
    """Return the names of Avalanche's classic benchmarks that can be had by options alone."""
    classic = import_avalanche("benchmarks.classic")
    return sorted(
        name
        for name, function in vars(classic).items()
        if name[0].isupper() and callable(function) and "dataset_root" in inspect.signature(function).parameters
    )


def __getattr__(name: str) -> Any:
    """Return the function that makes the stream of one of Avalanche's classic benchmarks."""
    if not name[:1].isupper():  # whoever looks this module over is not to have Avalanche imported
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return stream_function(name)


@cache
def stream_function(name: str) -> Callable[..., Stream]:
    """Return a function of a benchmark's plain options and `from_avalanche`'s that returns the stream.

    Raises AttributeError for a name that isn't one of Avalanche's classic benchmarks.
    """
    if name not in known_names():
        raise AttributeError(f"Avalanche has no benchmark {name!r} that can be had by name{suggestion(name, known_names())}")
    build = getattr(import_avalanche("benchmarks.classic"), name)
    theirs = [option for option in map(_plain_option, _options_of(build)) if option is not None]
    taken = {option.name for option in theirs}
    ours = [
        option.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[option.name])
        for hints in [get_type_hints(from_avalanche)]
        for option in inspect.signature(from_avalanche).parameters.values()
        if option.name in OWN and option.name not in taken
    ]
    root = inspect.Parameter("root", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None)

    def stream(**options: Any) -> Stream:
        given = {key: value for key, value in options.items() if key in taken}
        folder = data_root(options.get("root"))
        folder = folder if name in IN_ROOT else folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with isolated(0, "avalanche"):  # its class orders come from the global generators, and its seeds set them
                benchmark = build(dataset_root=folder, **given)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"the data of {name} is not in {folder}, and could not be downloaded to it ({' '.join(str(error).split())[:200]}). "
                "Put it there, or name the folder that has it with --data-root, root=... or the environment variable CLSTREAM_DATA"
            ) from None
        return from_avalanche(benchmark, name, **{key: value for key, value in options.items() if key in OWN and key not in taken})

    stream.__name__, stream.__qualname__, stream.__module__ = name, name, __name__
    stream.__doc__ = f"Avalanche's {name}, read into a stream.\n\nOptions: Avalanche's own, and those of `from_avalanche`."
    stream.__signature__ = inspect.Signature([*theirs, *ours, root], return_annotation=Stream)  # type: ignore[attr-defined]
    stream.__annotations__ = {option.name: option.annotation for option in [*theirs, *ours, root]} | {"return": Stream}
    return stream


UNTYPED = {"fixed_class_order": list[int] | None, "seed": int | None, "n_experiences": int}
"""Parameters that some of Avalanche's functions have without a type, or a default that tells it."""


def _options_of(build: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of one of Avalanche's functions, with their types as objects."""
    hints = get_type_hints(build)
    options = []
    for parameter in inspect.signature(build).parameters.values():
        if not parameter.name.startswith("dataset_root"):
            untyped = UNTYPED.get(parameter.name, Any if parameter.default in (None, parameter.empty) else type(parameter.default))
            options.append(parameter.replace(annotation=hints.get(parameter.name, untyped)))
    return options


def _plain_option(parameter: inspect.Parameter) -> inspect.Parameter | None:
    """Return a parameter that a command line can give, keyword only; None for one that needs an object, such as a transform."""
    wanted = [kind for kind in get_args(parameter.annotation) or [parameter.annotation] if kind is not type(None)]
    if any(kind is Any or (isinstance(kind, type) and kind not in (int, float, bool, str, list, Path)) for kind in wanted):
        return None
    if any(get_origin(kind) in (list, Sequence) for kind in [parameter.annotation, *wanted]):
        optional = parameter.default is None
        return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=list[int] | None if optional else list[int])
    return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
