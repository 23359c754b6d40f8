"""The options of `clstream run`, from the command line and from YAML files, parsed by jsonargparse.

Options, types, defaults and help come from the signatures and docstrings of the streams, strategies and models. A strategy's
`model` and a model's `input_shape` and `classes` are not asked for: they come from what was chosen before them.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import torch
import yaml
from jsonargparse import Namespace, set_dumper, set_loader, set_parsing_settings
from torch import nn
from torch.optim import Optimizer

from clstream.adapters import Adapter
from clstream.cli.errors import UsageError, nearest
from clstream.cli.lookup import (
    ALLOWED_MODULES,
    PLACES,
    import_object,
    import_path,
    is_user_module,
    known_names,
    measure_of,
    observer_class,
    required_parameters,
    resolve,
    returns_a_stream,
    top_modules,
)
from clstream.cli.option_parser import Parser, annotate, annotate_optimizer, options_of
from clstream.cli.settings import CHOICES, TRAIN, Setting, merge, parse_seeds, read, split_names, strings, trusted_in
from clstream.cli.training_options import add_training_options, check_training_option, training_of
from clstream.cli.yaml_files import dump_yaml, load_yaml
from clstream.strategy import Strategy
from clstream.stream import Stream

DEFAULTS = {"stream": "split_digits", "strategy": "Replay", "model": "Mlp"}


def run_parser() -> Parser:
    """Return the parser of `clstream run`."""
    importlib.import_module(PLACES["strategy"])  # so that jsonargparse finds them by name in a wrapper's options
    set_parsing_settings(subclasses_enabled=[Stream], instantiate_subclass_spec_in_any=False, validate_subclass_spec_in_any=True)
    set_loader("clstream", load_yaml, exceptions=(yaml.YAMLError,))
    set_dumper("clstream", dump_yaml)
    parser = Parser(
        prog="clstream run",
        description="Play a stream to a strategy, for each seed.",
        parser_mode="clstream",
        print_config=None,
        exit_on_error=False,
        allow_abbrev=False,
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
    parser.add_subclass_arguments(
        Adapter, "adapter", required=False,
        help="an adapter by name, or file.Class of your own: the model is frozen, but for it and the head",
    )  # fmt: skip
    add_training_options(parser)
    parser.add_argument("--weights", type=str, help="a file of `clstream pretrain` that the model starts from, all but its head")
    parser.add_argument(
        "--features", action="store_true",
        help="freeze the model: the stream becomes its features, computed once and cached, and the strategy has a head on them",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of all that is random in the run")
    parser.add_argument(
        "--seeds", type=int | list[int] | str, help="several seeds in place of one, as 0-4 or 0,1,7: one run for each"
    )
    parser.add_argument(
        "--workers", type=int, help="run several seeds at a time, each in a process of its own with --threads, or one"
    )
    parser.add_argument(
        "--together", action="store_true", default=None,
        help="run several seeds in one process, or with --workers a part of them in each, and take their steps as one",
    )  # fmt: skip
    parser.add_argument("--device", type=str, default="cpu", help="as torch names it: cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--precision", type=Literal["fp32", "bf16"],
        help="bf16: networks compute in bfloat16; weights, losses, memories and statistics stay float32, which is the default",
    )  # fmt: skip
    parser.add_argument(
        "--deterministic", action="store_true", default=None,
        help="run none but deterministic algorithms: on a GPU, the same bits in each run",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true", default=None,
        help="compile each step by torch.compile: it takes seconds at first, and pays where a run takes minutes",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="threads that torch uses; by default its own choice, with --workers one")
    parser.add_argument("--evaluate_every", type=int, help="also evaluate after every so many batches")
    parser.add_argument(
        "--evaluate_at", type=Literal["sessions", "tasks", "end"], default="sessions",
        help="when to evaluate: after every session, at the end of each task, or at the end of the run",
    )  # fmt: skip
    parser.add_argument(
        "--evaluate_on", type=Literal["all", "seen"], default="all", help="which tasks to ask about: all, or those taught so far"
    )
    parser.add_argument(
        "--probes", type=str | list[str], default=[],
        help="test sets beside the tasks' own, with commas between: unknown:fashion_mnist, corrupted:blur:3, held_out_classes",
    )  # fmt: skip
    parser.add_argument(
        "--measures", type=str | list[str], default=[],
        help="what to measure beside the main measure, with commas between: top5, cf1:0.8, task_top5, my_file.MyMeasure",
    )  # fmt: skip
    parser.add_argument(
        "--details", type=Literal["last", "all"],
        help="write predictions, rows by class and confusion matrices, of the last evaluation or of all, to the run folder",
    )  # fmt: skip
    parser.add_argument("--prequential", action="store_true", help="also have each batch labelled before it is learned")
    parser.add_argument(
        "--detection", action="store_true", help="also measure the shifts that a strategy detects against the stream's boundaries"
    )
    parser.add_argument(
        "--drift", action="store_true", default=None, help="also raise an alarm where the loss of new batches has risen"
    )
    parser.add_argument(
        "--observers",
        type=str | list[str],
        default=[],
        help="more observers, with commas: csv, tensorboard, wandb, your own by file.Class",
    )
    parser.add_argument("--trust", type=str, help="packages of yours that a config may name, beside the files of this folder")
    parser.add_argument("--max_sessions", type=int, help="stop after so many sessions")
    parser.add_argument("--continues", type=str, help="go on from the end of this run, as `clstream continue RUN` does")
    parser.add_argument(
        "--tune", action="store_true", help="test on the samples that the stream holds back with --stream.validation"
    )
    parser.add_argument(
        "--tuned", type=str, help="how the options of this config were chosen, as `clstream tune` writes it: kept with the run"
    )
    parser.add_argument("--data_root", type=str, help="folder with the data sets, in torchvision's layout")
    parser.add_argument("--tracking_uri", type=str, help="MLflow store or server; by default sqlite:///mlflow.db")
    parser.add_argument("--experiment", type=str, default="clstream", help="the MLflow experiment")
    parser.add_argument("--track", type=bool, default=True, help="false writes nothing to MLflow")
    parser.add_argument(
        "--log_model", type=Literal["false", "true", "sessions"] | bool, default=False,
        help="log the strategy as an MLflow model, registered as the next version of its name: at the end, or after each session",
    )  # fmt: skip
    parser.add_argument("--model_name", type=str, help="name of the registered model; by default the strategy and the stream")
    parser.add_argument("--runs", type=str, default="runs", help="folder of the run folders: checkpoints, event logs")
    parser.add_argument(
        "--resume", type=Literal["never", "auto"], default="never",
        help="auto: go on with the newest attempt at these very options, if there is one",
    )  # fmt: skip
    parser.add_argument(
        "--accept_changed_code", action="store_true",
        help="go on with a run though source code of your own has changed since; its log and its tags say so",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint_every", type=float, default=30.0,
        help="seconds from one checkpoint to the next; 0: no checkpoints, and no run folder",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint_share", type=float, default=0.02,
        help="the most of the time that checkpoints may take: where writing is slow, they come less often",
    )  # fmt: skip
    parser.add_argument("--log_batches", action="store_true", help="each batch has a line in the event log")
    parser.add_argument("--print_config", action="store_true", help="print all options as YAML, and run nothing")
    return parser


def parse_run(arguments: list[str], configs: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Parser, Namespace]:
    """Return the parser and the options of `clstream run`: those of config files and of the command line; later ones win.

    What a config's class was given is dropped where a later setting names another class; `parser.notes` says so.

    Args:
        arguments: as typed.
        configs: what is in config files that were read before, by the name that `--config` gives.

    Raises UsageError.
    """
    parser = run_parser()
    given = _options_in(parser)
    settings, parser.notes = merge(read(arguments, _whole(given), owner_of, configs))
    trusted = trusted_in(settings)
    settings = _with_paths([setting for setting in settings if setting.key != ("trust",)], trusted)
    for setting in settings:
        if setting.key in _NAMES:
            chosen = split_names(setting.value)
            for name in chosen:
                try:
                    _NAMES[setting.key](name, trusted)
                except UsageError as error:
                    raise UsageError(f"{setting.where}{error}") from error.__cause__
                if chosen.count(name) > 1:
                    raise UsageError(f"{setting.where}{setting.option} names {name} twice")
    settings = _with_defaults(settings, trusted)
    _check_options(settings)
    may = {top for setting in settings for text in strings(setting.value) for top in top_modules(text) if is_user_module(top)}
    _allow_imports({*ALLOWED_MODULES, *trusted, *may})
    for name in (str(setting.value) for setting in settings if setting.key[-1] == "optimizer"):
        if name.partition(".")[0] in (*trusted, *may):
            annotate_optimizer(name)
    try:
        options = parser.parse_args(list(_as_arguments(settings, given)), env=False)
    except UsageError as error:
        option = str(error).partition(" ")[0].rstrip(":")
        where = next((setting.where for setting in settings if setting.option == option), "")
        raise UsageError(f"{where}{error}") from None
    options.trust = trusted
    if options.seeds is not None:
        options.seeds = parse_seeds(options.seeds)
    _plain_optimizers(options)
    _check_values(options)
    _check_device(options.device)
    training_of(options)  # refuses what can't be
    if options.seed < 0:
        raise UsageError(f"--seed takes a whole number from 0 up, not {options.seed}")
    for name in ("evaluate_every", "max_sessions"):
        if options[name] is not None and options[name] < 1:
            raise UsageError(f"--{name} takes a whole number from 1 up, not {options[name]}")
    return parser, options


_NAMES: dict[tuple[str, ...], Callable[[str, list[str]], object]] = {("observers",): observer_class, ("measures",): measure_of}
"""The options that take several names, each looked up before anything is built."""


def owner_of(option: str) -> str:
    """Return what an option is of, as "stream" or "strategy.optimizer", if one that comes with clstream has it; else nothing."""
    paths = [(kind, f"{place}.{name}") for kind, place in PLACES.items() for name in known_names(kind)]
    paths.append(("strategy.optimizer", "torch.optim.SGD"))
    return next((kind for kind, path in paths if option in options_of(path)), "")


def _check_device(name: str) -> None:
    """Raise UsageError for a device that torch doesn't have by that name, or that holds no numbers."""
    if name.partition(":")[0] == "meta":
        raise UsageError("--device meta holds no numbers, so nothing can be learned there: choose cpu, cuda or mps")
    try:
        torch.device(name)
    except RuntimeError:
        hint = ": a GPU is called cuda" if "gpu" in name.lower() else ""
        raise UsageError(f"--device takes cpu, cuda, cuda:1 or mps, not {name!r}{hint}") from None


def _allow_imports(modules: set[str]) -> None:
    """Let jsonargparse import what lies in these modules, and nothing else; it has one setting for all of its parsers."""
    set_parsing_settings(import_path_denylist=["*", *sorted(_ALLOWED - modules)], import_path_allowlist=sorted(modules))
    _ALLOWED.update(modules)


_ALLOWED: set[str] = set()
"""All that was ever allowed in this process: what was for one command is not for the next."""


def _options_in(parser: Parser) -> dict[str, bool]:
    """Return all options, and whether each takes a value."""
    return {option[2:]: action.nargs != 0 for action in parser._actions for option in action.option_strings if option[:2] == "--"}


def _whole(options: Mapping[str, bool]) -> dict[str, bool]:
    """Return options without those of what others name, as strategy.capacity."""
    return {name: takes for name, takes in options.items() if "." not in name and "+" not in name} | {TRAIN: True}


def trusted_by(arguments: list[str]) -> tuple[str, ...]:
    """Return the packages that may be named because the options of a command name them, by --trust or in a value."""
    return tuple(trusted_in([setting for part in read(arguments, _whole(_options_in(run_parser())), owner_of) for setting in part]))


def _with_paths(settings: list[Setting], trusted: list[str]) -> list[Setting]:
    """Return settings in which streams, strategies, models and adapters are named by import path, the default ones included."""
    chosen: list[Setting] = []
    extra: list[Setting] = []
    for kind in CHOICES:
        setting = next((setting for setting in settings if setting.key == (kind,)), Setting((kind,), DEFAULTS.get(kind)))
        if setting.value is None:
            if loose := next((setting for setting in settings if setting.key[0] == kind), None):
                raise UsageError(f"{loose.where}{loose.option} is an option of an {kind}: name it too, --{kind} NAME")
            continue
        try:
            path, with_it = resolve(kind, setting.value, trusted)
        except UsageError as error:
            raise UsageError(f"{setting.where}{error}") from None
        annotate(import_object(path, kind))
        chosen.append(setting._replace(value=path))
        extra += [Setting((kind, name), value, setting.file) for name, value in with_it.items()]
    return [*chosen, *extra, *(setting for setting in settings if setting.key not in {(kind,) for kind in CHOICES})]


def _with_defaults(settings: list[Setting], trusted: list[str]) -> list[Setting]:
    """Return settings that name a default such as partial(SGD, lr=0.1) before an option of it, as --strategy.optimizer.lr."""
    values = {setting.key: setting.value for setting in settings}
    whole: list[Setting] = []
    for setting in settings:
        key = setting.key[:-1]
        if len(key) > 1 and key not in values:
            default, file = _default(values.get(key[:-1]), key[-1], trusted), setting.file
            values[key] = None
            if isinstance(default, partial) and isinstance(default.func, type):
                whole.append(Setting(key, f"{default.func.__module__}.{default.func.__qualname__}", file))
                for name, value in default.keywords.items():
                    if (*key, name) not in values:
                        whole.append(Setting((*key, name), value if file else str(value), file))
        whole.append(setting)
    return whole


def _default(owner: Any, parameter: str, trusted: list[str]) -> Any:
    """Return the default of a parameter of a strategy by its name or import path; None if there is no such thing."""
    with suppress(UsageError, ValueError, TypeError):
        thing = import_object(import_path("strategy", owner, trusted), "strategy")
        for cls in inspect.getmro(thing):  # a class may pass **kwargs on to its base
            parameters = inspect.signature(cls).parameters
            if parameter in parameters:
                return parameters[parameter].default
    return None


def _check_options(settings: list[Setting]) -> None:
    """Raise UsageError for an option that the stream, strategy, model or adapter does not have."""
    paths = {setting.key[0]: setting.value for setting in settings if len(setting.key) == 1}
    for setting in settings:
        if setting.key[0] == TRAIN:
            check_training_option(setting)
        elif len(setting.key) > 1 and setting.key[1] not in (options := options_of(paths[setting.key[0]])):
            near = nearest(setting.key[1], options) or f": it has {', '.join(options)}"
            name = paths[setting.key[0]].rpartition(".")[2]
            raise UsageError(f"{setting.where}{name} has no option {setting.key[1]!r}{near}")


def _as_arguments(settings: list[Setting], takes: dict[str, bool]) -> Iterator[str]:
    """Yield the arguments for jsonargparse: the classes, all that is from configs as one of them, then the options."""
    tree: dict[str, Any] = {}
    for setting in sorted(
        (setting for setting in settings if setting.file or setting.key in _KINDS), key=lambda setting: len(setting.key)
    ):
        place = tree
        if setting.key[0] == TRAIN:
            tree.setdefault(TRAIN, {})[setting.key[1]] = setting.value
            continue
        for part in setting.key[:-1]:
            if not (isinstance(place.get(part), dict) and "init_args" in place[part]):
                place[part] = ({"class_path": place[part]} if isinstance(place.get(part), str) else {}) | {"init_args": {}}
            place = place[part]["init_args"]
        place[setting.key[-1]] = setting.value
    for kind in CHOICES:
        if isinstance(tree.get(kind), str):
            yield f"--{kind}={tree.pop(kind)}"
    if tree:
        yield f"--config={dump_yaml(tree, flow=True)}"
    for setting in settings:
        if not setting.file and setting.key not in _KINDS:
            option = setting.option + "+" * setting.appends
            yield f"{option}={setting.value}" if takes.get(setting.key[0], True) else option


_KINDS = {(kind,) for kind in CHOICES}


def _check_values(options: Namespace) -> None:
    """Raise UsageError for a number that is none, and for a class_path that names something else than a class."""
    for key, value in _leaves(options):
        option = "--" + re.sub(r"\.(init_args|class_path)\b", "", key)
        if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and key.endswith(".lr"))):
            raise UsageError(f"{option} must be a finite number, not {value}")
        if key.endswith(".class_path") and key != "stream.class_path":
            thing = import_object(value, "class")
            if not isinstance(thing, type) and not returns_a_stream(thing):
                raise UsageError(f"{option}: {value} is no class")
            if isinstance(thing, type) and issubclass(thing, Optimizer) and "closure" in required_parameters(thing.step):
                raise UsageError(
                    f"{option}: {thing.__name__} evaluates the loss several times a step, and batches are learned once"
                )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is in the options with its dotted key, also in lists, but not in mappings that are values themselves."""
    if isinstance(value, Namespace):
        for name, item in vars(value).items():
            yield from _leaves(item, f"{key}.{name}" if key else name)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item, key)
    else:
        yield key, value


def _plain_optimizers(options: Namespace) -> None:
    """Turn defaults such as partial(SGD, lr=0.1) into the form that YAML can hold."""
    for key, value in list(options.items()):
        if isinstance(value, partial) and isinstance(value.func, type):
            path = f"{value.func.__module__}.{value.func.__qualname__}"
            options[key] = Namespace(class_path=path, init_args=Namespace(**value.keywords))


def as_yaml(parser: Parser, options: Namespace) -> str:
    """Return the options as the YAML that `--config` takes."""
    kept = options.clone()
    if kept.seeds is not None:
        kept.pop("seed")
    left_out = _NOT_KEPT if training_of(options) is not None else (*_NOT_KEPT, TRAIN)
    for key in left_out:
        kept.pop(key, None)
    text: str = parser.dump(kept, skip_none=True, skip_validation=True)
    whole = parser.parse_string(text, env=False)  # with the defaults of what stood for an optimizer
    for key in (*left_out, *(["seed"] if kept.seeds is not None else [])):
        whole.pop(key, None)
    return str(parser.dump(whole, skip_none=True, skip_validation=True))


_NOT_KEPT = ("config", "print_config", "trust", "accept_changed_code", "workers")
