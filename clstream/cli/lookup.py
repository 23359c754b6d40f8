"""Lookup: streams, strategies and models by name, ours and the user's own."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from torch import nn

from clstream.adapters import Adapter
from clstream.bus import handlers_of
from clstream.cli.errors import UsageError, nearest
from clstream.measures import Measure, measure_named
from clstream.strategy import Strategy
from clstream.stream import Stream

PLACES = {
    "stream": "clstream.streams",
    "strategy": "clstream.strategies",
    "model": "clstream.models",
    "adapter": "clstream.adapters",
}
"""Where the names on the command line are looked up."""

TRACKERS = {
    "csv": ("clstream.tracking.csv_tracker.CsvTracker", ""),
    "tensorboard": ("clstream.tracking.tensorboard_tracker.TensorBoardTracker", "tensorboard"),
    "wandb": ("clstream.tracking.wandb_tracker.WandbTracker", "wandb"),
}
"""Trackers beside MLflow's, by the names that `--observers` takes, and the packages that they need."""

ALLOWED_MODULES = (*PLACES.values(), "clstream.strategy", "clstream.drift_detection", "torch.nn", "torch.optim", "torch._C._nn")
"""What any config may name, with all below it, beside our own modules; torch.nn.functional has some from torch._C._nn."""


def known_names(kind: str) -> list[str]:
    """Return the names of the streams, strategies, models or adapters that come with clstream and can be had by name alone."""
    place = importlib.import_module(PLACES[kind])
    given = {
        "model",
        "base",
        "regularisers",
        "input_shape",
        "classes",
        "file",
        "root",
        "source",
    }  # by us, or with the name of files
    return sorted(name for name in place.__all__ if not set(required_parameters(getattr(place, name))) - given)


def required_parameters(thing: Any) -> list[str]:
    """Return the parameters of a class or function that have no default."""
    parameters = inspect.signature(thing).parameters.values()
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.default is parameter.empty and parameter.kind not in various]


def is_user_module(module: str) -> bool:
    """Return whether a top-level module of that name is a file or folder of the working folder; nothing is imported."""
    if module in sys.stdlib_module_names:
        return False
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):  # ValueError: it has no spec, as __main__
        return False
    return spec is not None and bool(places := _places(spec)) and all(_lies_here(Path(place)) for place in places)


def _places(spec: ModuleSpec) -> list[str]:
    if spec.submodule_search_locations is not None:  # a package, or a folder that serves as one
        return list(spec.submodule_search_locations)
    return [spec.origin] if spec.has_location and spec.origin is not None else []


def _lies_here(place: Path) -> bool:
    path = place.absolute()
    return Path.cwd() in path.parents and not {"site-packages", "dist-packages"} & set(path.parts)


def top_modules(text: str) -> list[str]:
    """Return the first words of the dotted names in a text: the modules that they may lie in."""
    return [name for name in re.findall(r"(?<![\w.])([^\W\d]\w*)(?:\.[^\W\d]\w*)+", text) if name not in _NEVER_NAMED]


_NEVER_NAMED = {*sys.stdlib_module_names, "jsonargparse"}


def check_may_name(name: str, trusted: Iterable[str] = ()) -> None:
    """Raise UsageError for a dotted name that lies in none of the modules that configs may name."""
    top = name.partition(".")[0]
    if _below(name, (*ALLOWED_MODULES, *trusted)) or _is_ours(name) or is_user_module(top):
        return
    if (file := Path(f"{top}.py")).is_file():
        raise UsageError(f"{name} is not what is in {file} here: another module is called {top} too, and goes first: rename {file}")
    if top not in sys.builtin_module_names and top not in sys.modules and find_spec(top) is None:
        raise UsageError(f"{name!r} was not found: there is no file or package {top!r} here")
    raise UsageError(import_refusal(name))


def trust_needed(config: str, trusted: Iterable[str]) -> list[str]:
    """Return those of some trusted packages that a config names, and may name only with `--trust`."""
    return [
        package
        for package in trusted
        if re.search(rf"(?<![\w.]){re.escape(package)}\.", config) and not is_user_module(package) and find_spec(package)
    ]


def import_refusal(name: str) -> str:
    """Return the sentence on a name that is not to be imported."""
    top = name.partition(".")[0]
    yours = "" if top in {*sys.stdlib_module_names, "clstream", "torch"} else f"; if {top} is yours, give --trust {top}"
    return (
        f"{name} can't be named by a config, which takes only what is in clstream, torch.nn, torch.optim and the files of the "
        f"working folder{yours}"
    )


def _is_ours(name: str) -> bool:
    """Return whether a dotted name lies in a module of this package, not in what lies beside it in a source tree."""
    top, module, *_ = name.split(".")
    place = Path(__file__).parent.parent / module
    return top == "clstream" and (name.count(".") == 1 or place.with_suffix(".py").is_file() or (place / "__init__.py").is_file())


def _below(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def import_object(name: str, what: str) -> Any:
    """Return what a dotted name stands for. Raises UsageError if its module can't be imported or has nothing of that name."""
    module, _, attribute = name.rpartition(".")
    try:
        place = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise UsageError(f"the {what} {name!r} was not found: there is no file or package {error.name!r} here") from None
        raise UsageError(f"{module} can't be imported: {error}") from error
    except Exception as error:  # whatever the user's file raises
        raise UsageError(f"{module} can't be imported: {type(error).__name__}: {error}") from error
    if not hasattr(place, attribute):
        names = [name for name in vars(place) if not name.startswith("_")]
        file = getattr(place, "__file__", None) or module
        raise UsageError(f"the {what} {name!r} was not found: {file} has no {attribute!r}{nearest(attribute, names)}")
    return getattr(place, attribute)


def import_path(kind: str, name: str, trusted: Iterable[str] = ()) -> str:
    """Return the import path of a name of ours, or of `file.Name` of the user's own.

    Raises UsageError for a name that isn't there, and names the nearest one; and for one that may not be named.
    """
    file = Path(name if name.endswith(".py") else f"{name}.py")
    if re.fullmatch(r"\w+(\.py)?", name) and name not in known_names(kind) and file.is_file():
        what = "function" if kind == "stream" else "class"
        raise UsageError(f"--{kind} takes the name of a {what}, and {file} is a file: the {what} Mine in it is {file.stem}.Mine")
    if "." not in name:
        if name not in known_names(kind):
            near = nearest(name, known_names(kind)) or f": there are {', '.join(known_names(kind))}."
            raise UsageError(f"there is no {kind} {name!r}{near} One of your own is named by its file: my_file.{name}")
        return f"{PLACES[kind]}.{name}"
    if not re.fullmatch(r"\w+(\.\w+)+", name):
        raise UsageError(f"{name!r} is no name of a {kind}: the one called Mine in the file my_file.py is my_file.Mine")
    check_may_name(name, trusted)
    thing = import_object(name, kind)
    wanted = {"strategy": Strategy, "model": nn.Module, "adapter": Adapter}.get(kind)
    if wanted is not None and not (isinstance(thing, type) and issubclass(thing, wanted)):
        raise UsageError(
            f"{name} is no {kind}: it must be a class derived from {wanted.__module__.partition('.')[0]}'s {wanted.__name__}"
        )
    if kind == "stream" and not returns_a_stream(thing):
        attribute = name.rpartition(".")[2]
        raise UsageError(f"{name} is no stream: it must be a function annotated to return one, def {attribute}(...) -> Stream")
    return name


def returns_a_stream(thing: Any) -> bool:
    """Return whether a function is annotated to return a stream."""
    try:
        return bool(get_type_hints(thing).get("return") is Stream)
    except (TypeError, NameError, AttributeError):  # what has no annotations, or some that can't be resolved
        return False


def resolve(kind: str, name: str, trusted: Iterable[str] = ()) -> tuple[str, dict[str, Any]]:
    """Return the import path of a name, and the options that come with it: `recorded:FILE` names a file too.

    `avalanche:NAME` is one of Avalanche's own streams or strategies, in the module of that name beside ours.
    """
    if kind == "stream" and name.startswith("recorded:"):
        return import_path(kind, "recorded"), {"file": name.removeprefix("recorded:")}
    if name.startswith("avalanche:") and kind in ("stream", "strategy"):
        return avalanche_path(kind, name.removeprefix("avalanche:")), {}
    return import_path(kind, name, trusted), {}


def avalanche_path(kind: str, name: str) -> str:
    """Return the import path of one of Avalanche's streams or strategies. Raises UsageError if it, or Avalanche, isn't there."""
    path = f"{PLACES[kind]}.avalanche"
    try:
        names = importlib.import_module(path).known_names()
    except ImportError as error:
        raise UsageError(str(error)) from None
    if name not in names:
        near = nearest(name, names) or f": there are {', '.join(names)}"
        raise UsageError(f"there is no {kind} {name!r} of Avalanche's that can be had by name{near}")
    return f"{path}.{name}"


def measure_of(name: str, trusted: Iterable[str] = ()) -> str | type[Measure]:
    """Return a name of a measure of ours, or the class of one of the user's own by its dotted name.

    Raises UsageError for what is neither, and for a class that needs arguments.
    """
    if not re.fullmatch(r"[^\W\d]\w*(\.\w+)+", name):
        try:
            measure_named(name)
        except ValueError as error:
            raise UsageError(f"--measures: {error}; one of your own is named by its file: my_file.MyMeasure") from None
        return name
    check_may_name(name, trusted)
    thing = import_object(name, "measure")
    if not isinstance(thing, type) or not issubclass(thing, Measure) or inspect.isabstract(thing):
        raise UsageError(f"{name} is no measure: it must be a class derived from clstream.measures.Measure")
    if missing := required_parameters(thing):
        raise UsageError(f"{name} can't be made from the command line: its {missing[0]} has no default")
    return thing


def observer_class(name: str, trusted: Iterable[str] = ()) -> Callable[[], object]:
    """Return the class of an observer: of a tracker by its name in TRACKERS, of one of the user's own by its dotted name.

    Raises UsageError for what is none, needs arguments, or a package that is not installed.
    """
    if name in TRACKERS:
        path, package = TRACKERS[name]
        if package and find_spec(package) is None:
            raise UsageError(f"--observers {name} needs the package {package}: pip install 'clstream[{name}]'")
        return import_object(path, "observer")  # type: ignore[no-any-return]  # it is a class of ours
    if not re.fullmatch(r"\w+(\.\w+)+", name):
        near = nearest(name, TRACKERS) or f"; it also takes {', '.join(TRACKERS)}"
        raise UsageError(f"--observers takes observers by their files, as my_file.Watch, not {name[:60]!r}{near}")
    check_may_name(name, trusted)
    thing = import_object(name, "observer")
    if not isinstance(thing, type) or not any(handlers_of(thing)):
        raise UsageError(f"{name} is no observer: it must be a class with methods marked @on(...)")
    if missing := required_parameters(thing):
        raise UsageError(f"{name} can't be made from the command line: its {missing[0]} has no default")
    return thing
