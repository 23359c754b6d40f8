"""Config: what to run, from the command line and YAML files, by jsonargparse; and building it.

Options, types, defaults and help come from the signatures and docstrings of the streams, strategies and models. A strategy's
`model` and a model's `input_shape` and `classes` are not asked for: they come from what was chosen before them.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader, set_parsing_settings
from torch import nn

from clstream.bus import heard
from clstream.pretraining import load_weights
from clstream.seeds import isolated
from clstream.strategy import Strategy
from clstream.stream import Stream

PLACES = {"stream": "clstream.streams", "strategy": "clstream.strategies", "model": "clstream.models"}
"""Where the names on the command line are looked up."""

DEFAULTS = {"stream": "split_digits", "strategy": "Replay", "model": "Mlp"}


class UsageError(ValueError):
    """What was asked for can't be: one sentence for the user."""


def names(kind: str) -> list[str]:
    """Return the names of the streams, strategies or models that come with clstream and can be had by name alone."""
    place = importlib.import_module(PLACES[kind])
    given = {"model", "base", "regularisers", "input_shape", "classes", "file"}  # by us, with a wrapper's or a recording's name
    return sorted(name for name in place.__all__ if not set(required(getattr(place, name))) - given)


def required(thing: Any) -> list[str]:
    """Return the parameters of a class or function that have no default."""
    parameters = inspect.signature(thing).parameters
    return [name for name, parameter in parameters.items() if parameter.default is parameter.empty]


def qualified(kind: str, name: str) -> str:
    """Return the import path of a name of ours, or of `file.Name` of the user's own.

    Raises UsageError for a name that isn't there; it names the nearest one.
    """
    if "." not in name:
        if name not in names(kind):
            near = nearest(name, names(kind)) or f": there are {', '.join(names(kind))}."
            raise UsageError(f"there is no {kind} {name!r}{near} One of your own is named by its file: my_file.{name}")
        return f"{PLACES[kind]}.{name}"
    module, _, attribute = name.rpartition(".")
    if not re.fullmatch(r"\w+(\.\w+)+", name):
        raise UsageError(f"{name!r} is no name of a {kind}: the one called Mine in the file my_file.py is my_file.Mine")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise UsageError(f"the {kind} {name!r} was not found: there is no file or package {error.name!r} here") from None
        raise UsageError(f"{module} can't be imported: {error}") from error
    except Exception as error:  # whatever the user's file raises
        raise UsageError(f"{module} can't be imported: {type(error).__name__}: {error}") from error
    place = getattr(found, "__file__", None) or module
    if not hasattr(found, attribute):
        known = [each for each in vars(found) if not each.startswith("_")]
        raise UsageError(f"the {kind} {name!r} was not found: {place} has no {attribute!r}{nearest(attribute, known)}")
    thing = getattr(found, attribute)
    wanted = {"strategy": Strategy, "model": nn.Module}.get(kind)
    if wanted is not None and not (isinstance(thing, type) and issubclass(thing, wanted)):
        raise UsageError(
            f"{name} is no {kind}: it must be a class derived from {wanted.__module__.partition('.')[0]}'s {wanted.__name__}"
        )
    if kind == "stream" and get_type_hints(thing).get("return") is not Stream:
        raise UsageError(f"{name} is no stream: it must be a function annotated to return one, def {attribute}(...) -> Stream")
    return name


def named(kind: str, name: str) -> tuple[str, dict[str, Any]]:
    """Return the import path of a name, and the options that come with it: `recorded:FILE` names a file too.

    `avalanche:NAME` is one of Avalanche's own streams or strategies, in the module of that name beside ours.
    """
    if kind == "stream" and name.startswith("recorded:"):
        return qualified(kind, "recorded"), {"file": name.removeprefix("recorded:")}
    if name.startswith("avalanche:") and kind in ("stream", "strategy"):
        return of_avalanche(kind, name.removeprefix("avalanche:")), {}
    return qualified(kind, name), {}


def of_avalanche(kind: str, name: str) -> str:
    """Return the import path of one of Avalanche's streams or strategies. Raises UsageError if it, or Avalanche, isn't there."""
    path = f"{PLACES[kind]}.avalanche"
    try:
        known = importlib.import_module(path).known()
    except ImportError as error:
        raise UsageError(str(error)) from None
    if name not in known:
        near = nearest(name, known) or f": there are {', '.join(known)}"
        raise UsageError(f"there is no {kind} {name!r} of Avalanche's that can be had by name{near}")
    return f"{path}.{name}"


def nearest(word: str, known: list[str]) -> str:
    """Return ': did you mean ...?' for the known word nearest to one, or nothing."""
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else ""


class Parser(ArgumentParser):
    """A parser whose errors are one sentence, with the option that was probably meant."""

    outermost = False  # jsonargparse makes inner ones for what is within an option, and words their errors itself

    def error(self, message: str, ex: Exception | None = None) -> Any:  # as the base has it
        """Raise UsageError in place of jsonargparse's nested report."""
        if not self.outermost:
            super().error(message, ex)
        raise UsageError(self._sentence(message))

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """Return the help without the hundreds of modules that torch knows."""
        return re.sub(r",\s+known\s+subclasses:.*?\)", ")", super().format_help(formatter), flags=re.DOTALL)

    def _sentence(self, message: str) -> str:
        if loose := re.search(r"unrecognized arguments: ([^-].*)", message, re.IGNORECASE):
            return f"{loose[1]!r} belongs to no option; several values are written with commas and no spaces, as 0,1,2 or [0,1,2]"
        if unknown := re.search(r"unrecognized arguments: (--[\w.-]+)", message, re.IGNORECASE):
            options = [option for action in self._actions for option in action.option_strings]
            return f"unknown option {unknown[1]}{nearest(unknown[1], options)}"
        if refused := re.search(r"Option '(\w+)' is not accepted", message):
            paths = re.findall(r"Problem with given class_path '([\w.]+)'", message)
            if not paths:
                return f"there is no option {refused[1]!r}{nearest(refused[1], [action.dest for action in self._actions])}"
            known = options_of(paths[-1])
            near = nearest(refused[1], known) or f": it has {', '.join(known)}"
            return f"{paths[-1].rpartition('.')[2]} has no option {refused[1]!r}{near}"
        if absent := re.search(r"Expected a dot import path string: (\w+)", message):
            ours = {name: found for name, found in vars(importlib.import_module(PLACES["strategy"])).items() if name[0] != "_"}
            known = [name for name, found in {**ours, **vars(torch.optim)}.items() if isinstance(found, type)]
            key = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
            return f"--{key}: there is no {absent[1]!r}{nearest(absent[1], known)}"
        keys = re.findall(r'Parser key "([\w.]+)"', message)
        if missing := re.search(r"the following arguments are required: ([\w, ]+)", message):
            return (
                f"--{'.'.join(keys)} needs {missing[1]}: give {', '.join(f'--{keys[0]}.{name}' for name in missing[1].split(', '))}"
            )
        wrong = re.search(r"(Expected [^\n]*?)\.? Got value: ([^\n]*)", message) or re.search(r"(Expected [^\n]*)()", message)
        if keys and wrong:
            value = wrong[2] or next(iter(re.findall(r"Given value: (?!NestedArg)([^\n]*)", message)), "")
            kind = re.sub(r"Expected an? |<class '([\w.]+)'>", r"\1", wrong[1])
            return f"--{'.'.join(keys)} takes {kind}" + (f", not {value}" if value else "")
        return re.sub(r"\s+", " ", message).strip()[:300]


def options_of(path: str) -> list[str]:
    """Return the options of a class or function by its import path."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    signature = inspect.signature(found)
    return [option for option in signature.parameters if option not in ("model", "input_shape", "classes")]


def option_help(kind: str, name: str) -> str:
    """Return the help on the options of one stream, strategy or model."""
    module, _, attribute = named(kind, name)[0].rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    parser = ArgumentParser(prog=f"clstream run --{kind} {name}", add_help=False)
    if isinstance(found, type):
        parser.add_class_arguments(found, kind, skip={"model", "base", "input_shape", "classes"} & set(required(found)))
    else:
        parser.add_function_arguments(found, kind)
    return str(parser.format_help())


def run_parser() -> Parser:
    """Return the parser of `clstream run`."""
    importlib.import_module(PLACES["strategy"])  # so that jsonargparse finds them by name in a wrapper's options
    set_parsing_settings(subclasses_enabled=[Stream])
    set_loader("clstream", _load_yaml, exceptions=(yaml.YAMLError,))
    parser = Parser(
        prog="clstream run",
        description="Play a stream to a strategy, for each seed.",
        parser_mode="clstream",
        print_config=None,
        exit_on_error=False,
    )
    parser.outermost = True
    parser.add_argument("--config", action="config", help="a YAML file with any of these options; later ones win")
    parser.add_argument(
        "--stream", type=Stream, help="a stream by name, or file.function of your own; its options: --stream.OPTION"
    )
    skip = {"base.init_args." * depth + "model" for depth in range(4)}
    parser.add_subclass_arguments(Strategy, "strategy", skip=skip, help="a strategy by name, or file.Class of your own")
    parser.add_subclass_arguments(
        nn.Module, "model", skip={"input_shape", "classes"}, help="a model by name, or file.Class of your own"
    )
    parser.add_argument("--weights", type=str, help="a file of `clstream pretrain` that the model starts from, all but its head")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random in the run")
    parser.add_argument("--seeds", type=int | list[int] | str, help="several seeds in place of one, as 0,1,2: one run for each")
    parser.add_argument("--device", type=str, default="cpu", help="as torch names it: cpu, cuda, cuda:1, mps")
    parser.add_argument("--threads", type=int, help="threads that torch uses; by default its own choice")
    parser.add_argument("--evaluate_every", "--evaluate-every", type=int, help="also evaluate after every so many batches")
    parser.add_argument("--prequential", action="store_true", help="also have each batch labelled before it is learned")
    parser.add_argument(
        "--detection", action="store_true", help="also measure the shifts that a strategy detects against the stream's boundaries"
    )
    parser.add_argument(
        "--observers", type=str | list[str], default=[], help="more observers, each by file.Class, with commas between them"
    )
    parser.add_argument("--max_sessions", "--max-sessions", type=int, help="stop after so many sessions")
    parser.add_argument(
        "--tune", action="store_true", help="test on the samples that the stream holds back with --stream.validation"
    )
    parser.add_argument("--data_root", "--data-root", type=str, help="folder with the data sets, in torchvision's layout")
    parser.add_argument("--tracking_uri", "--tracking-uri", type=str, help="MLflow store or server; by default sqlite:///mlflow.db")
    parser.add_argument("--experiment", type=str, default="clstream", help="the MLflow experiment")
    parser.add_argument("--track", type=bool, default=True, help="false writes nothing to MLflow")
    parser.add_argument("--runs", type=str, default="runs", help="folder of the run folders: checkpoints, event logs")
    parser.add_argument(
        "--resume", type=Literal["never", "auto"], default="never",
        help="auto: go on with the newest try of these very options, if there is one",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint_every", "--checkpoint-every", type=float, default=30.0,
        help="seconds from one checkpoint to the next; 0: no checkpoints, and no run folder",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint_share", "--checkpoint-share", type=float, default=0.02,
        help="the most of the time that checkpoints may take: where writing is slow, they come less often",
    )  # fmt: skip
    parser.add_argument("--log_batches", "--log-batches", action="store_true", help="each batch has a line in the event log")
    parser.add_argument("--print_config", "--print-config", action="store_true", help="print all options as YAML, and run nothing")
    return parser


def _load_yaml(text: str) -> Any:
    """Load YAML as jsonargparse does, and let streams, strategies and models be named as on the command line."""
    loaded = yaml.safe_load(text)
    if isinstance(loaded, dict):
        for kind in PLACES:
            chosen = loaded.get(kind)
            if isinstance(chosen, str):
                chosen = loaded[kind] = {"class_path": chosen}
            if isinstance(chosen, dict) and isinstance(chosen.get("class_path"), str):
                chosen["class_path"], with_it = named(kind, chosen["class_path"])
                if with_it:
                    chosen["init_args"] = {**(chosen.get("init_args") or {}), **with_it}
    return loaded


def parse_run(arguments: list[str]) -> tuple[Parser, Namespace]:
    """Return the parser and the options of `clstream run`. Raises UsageError."""
    parser = run_parser()
    given = [f"--{kind}={qualified(kind, DEFAULTS[kind])}" for kind in PLACES if not _chosen(kind, arguments)]
    after: str | None = None
    for argument in arguments:
        option, equals, value = argument.partition("=")
        name = argument
        if after is None and option.startswith("--") and option[2:] in PLACES:
            after, name = option[2:], value
            if not equals:
                continue
        if after is None:
            given.append(argument)
            continue
        path, with_it = named(after, name)
        given += [f"--{after}={path}", *(f"--{after}.{key}={each}" for key, each in with_it.items())]
        after = None
    given += [f"--{after}"] if after is not None else []  # the parser says what is missing
    # a class before its options, in whatever order they were typed
    chosen = [
        number for number, argument in enumerate(given) if argument.partition("=")[0] in ("--strategy", "--stream", "--model")
    ]
    first = [number for start in chosen for number in ((start,) if "=" in given[start] else (start, start + 1))]
    given = [given[number] for number in first if number < len(given)] + [
        each for number, each in enumerate(given) if number not in first
    ]
    options = parser.parse_args(_with_partials(given))
    _plain_optimizers(options)
    return parser, options


def _chosen(kind: str, arguments: list[str]) -> bool:
    """Return whether the options name a stream, strategy or model; only if not, the default comes in, with its options."""
    return any(argument.partition("=")[0] == f"--{kind}" for argument in arguments) or any(
        kind in loaded for loaded in _configs(arguments)
    )


def _with_partials(given: list[str]) -> list[str]:
    """Let `--strategy.optimizer.lr 0.05` change an option of a default such as partial(SGD, lr=0.1): name the default before it."""
    split = [part for argument in given for part in (argument.split("=", 1) if argument.startswith("--") else [argument])]
    done: set[str] = set()
    whole: list[str] = []
    for argument in given:
        match = re.match(r"--((strategy(?:\.\w+)*)\.(\w+))\.\w+", argument)
        if match and match[1] not in done and f"--{match[1]}" not in split:
            done.add(match[1])
            owner = split[split.index(f"--{match[2]}") + 1] if f"--{match[2]}" in split else _in_config(match[2], given)
            default = _default(owner, match[3])
            if isinstance(default, partial) and isinstance(default.func, type):
                whole.append(f"--{match[1]}={default.func.__module__}.{default.func.__qualname__}")
                whole += [f"--{match[1]}.{name}={value}" for name, value in default.keywords.items()]
        whole.append(argument)
    return whole


def _default(owner: str, parameter: str) -> Any:
    """Return the default of a parameter of a strategy by name; None if there is no such thing."""
    try:
        module, _, name = qualified("strategy", owner).rpartition(".")
    except UsageError:
        return None
    found = inspect.signature(getattr(importlib.import_module(module), name)).parameters.get(parameter)
    return found.default if found else None


def _in_config(key: str, given: list[str]) -> str:
    """Return the class that a config file names for a dotted key, unless it names an optimizer for it too; else nothing."""
    for loaded in _configs(given):
        value: Any = loaded
        for depth, part in enumerate(key.split(".")):
            value = value.get("init_args", {}) if depth and isinstance(value, dict) else value
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str):
            return value
        if isinstance(value, dict) and "optimizer" not in value.get("init_args", {}):
            return str(value.get("class_path", ""))
    return ""


def _configs(arguments: list[str]) -> list[dict[str, Any]]:
    """Return what the config files among the options hold; the parser says what is wrong with the others."""
    found = []
    for index, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option == "--config":
            try:
                loaded = yaml.safe_load(Path(value or arguments[index + 1]).read_text())
            except (OSError, IndexError, yaml.YAMLError):
                continue
            found += [loaded] if isinstance(loaded, dict) else []
    return found


def _plain_optimizers(options: Namespace) -> None:
    """Turn defaults such as partial(SGD, lr=0.1) into the form that YAML can hold."""
    for key, value in list(options.items()):
        if isinstance(value, partial) and isinstance(value.func, type):
            path = f"{value.func.__module__}.{value.func.__qualname__}"
            options[key] = Namespace(class_path=path, init_args=Namespace(**value.keywords))


def as_yaml(parser: Parser, options: Namespace) -> str:
    """Return the options as the YAML that `--config` takes."""
    kept = options.clone()
    for key in ("config", "print_config"):
        kept.pop(key, None)
    text: str = parser.dump(kept, skip_none=True, skip_validation=True)
    whole = parser.parse_string(text)  # with the defaults of what stood for an optimizer
    for key in ("config", "print_config"):
        whole.pop(key, None)
    return str(parser.dump(whole, skip_none=True, skip_validation=True))


def seeds_of(options: Namespace) -> list[int]:
    """Return the seeds to run. Raises UsageError for what are not distinct whole numbers."""
    if options.seeds is None:
        return [options.seed]
    given = options.seeds if isinstance(options.seeds, list) else str(options.seeds).strip("[]() ").split(",")
    try:
        seeds = [int(seed) for seed in given]
    except ValueError:
        raise UsageError(f"--seeds takes whole numbers with commas, as 0,1,2, not {options.seeds!r}") from None
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds names one seed twice: {options.seeds}")
    return seeds


def observers_of(options: Namespace) -> list[type]:
    """Return the classes of the observers that were asked for by name. Raises UsageError for what is none."""
    given = options.observers
    found = []
    for name in given if isinstance(given, list) else [each.strip() for each in given.strip("[]").split(",")]:
        if "." not in name:
            raise UsageError(f"--observers takes observers by their files, as my_file.Watch, not {name!r}")
        module, _, attribute = qualified("observer", name).rpartition(".")
        thing = getattr(importlib.import_module(module), attribute)
        if not isinstance(thing, type) or not any(heard(thing)):
            raise UsageError(f"{name} is no observer: it must be a class with methods marked @on(...)")
        if missing := required(thing):
            raise UsageError(f"{name} can't be made from the command line: its {missing[0]} has no default")
        found.append(thing)
    return found


def build_stream(parser: Parser, options: Namespace) -> Stream:
    """Return the stream that was asked for."""
    chosen = options.stream
    if options.data_root and "root" in chosen.init_args and chosen.init_args.root is None:
        chosen.init_args.root = options.data_root
    stream: Stream = _instantiate(parser, "stream", chosen)
    return stream.for_tuning() if options.tune else stream


def build_strategy(parser: Parser, options: Namespace, stream: Stream, seed: int) -> Strategy:
    """Return the strategy that was asked for, with a model for the stream whose initial weights come from the seed."""

    def make_model(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        taken = inspect.signature(cls).parameters
        offered = {"input_shape": stream.input_shape, "classes": stream.classes}
        return cls(*args, **{name: value for name, value in offered.items() if name in taken}, **kwargs)

    def make_strategy(cls: type[Strategy], *args: Any, **kwargs: Any) -> Strategy:
        if "model" in inspect.signature(cls).parameters:
            kwargs["model"] = model
        return cls(*args, **kwargs)

    with isolated(seed, "model"):
        model = _instantiate(parser, "model", options.model, (make_model, nn.Module, True))
        if options.weights is not None:
            load_weights(model, options.weights)
        strategy: Strategy = _instantiate(parser, "strategy", options.strategy, (make_strategy, Strategy, True))
    return strategy


def _instantiate(parser: Parser, kind: str, chosen: Namespace, *instantiators: tuple[Any, type, bool]) -> Any:
    """Build one thing; an error in its constructor is raised as it is, without jsonargparse's report around it."""
    try:
        return parser.instantiate(Namespace(**{kind: chosen}), instantiators=list(instantiators))[kind]
    except Exception as error:  # noqa: BLE001  # jsonargparse wraps whatever it was
        cause: BaseException = error
        while cause.__cause__ is not None or (cause.__context__ is not None and not cause.__suppress_context__):
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]  # one of them is there
        raise cause from None
