"""What `clstream tune` searches: options and their space, and a trial, built from a config in any process."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from clstream.cli.build import build_strategy, build_stream, numerics_of, seeds_of, steps_of
from clstream.cli.errors import UsageError, nearest
from clstream.cli.experiment import print_notes
from clstream.cli.option_parser import Parser
from clstream.cli.parser import as_yaml, parse_run
from clstream.cli.settings import as_config
from clstream.cli.training_options import training_of
from clstream.cli.yaml_files import dump_yaml, parse_yaml, read_yaml
from clstream.engine import check_fits
from clstream.engine.numerics import Numerics
from clstream.stream import Stream
from clstream.tuning import Choice, Job, Outcome, Range, Search, check_installed, parse_space, run_trial, trial_stream

CONFIG = "config.yaml"
"""What is searched, in the folder of a search."""

VALUES = "the search space"
"""What the values of a trial are called, as a config."""

SECTION = "tune"
"""The key of a config that has the search space."""

SPACES = ("clstream.experiments", "spaces.yaml")
"""The package and file with the spaces of our strategies."""

CHANGES_NOTHING = (
    "track", "tracking_uri", "experiment", "runs", "resume", "checkpoint_every", "checkpoint_share", "log_batches", "threads",
    "details", "log_model", "model_name", "data_root", "observers", "measures", "tuned",
)  # fmt: skip
"""Options that have no part in what a trial finds."""

EVERY_STRATEGY = "every strategy"
"""The key of that file with what all strategies have."""


@dataclass(frozen=True)
class Setting:
    """What a trial is built from, in any process.

    Args:
        config: all options, as YAML.
        options: for each option that is searched its full name, as strategy.optimizer.lr.
        tasks: of the stream's first tasks. None: all.
        held_out: the share of training samples that is held back, where the stream's own options say nothing.
        trust: packages that the config may name.
        place: the working folder, where the user's own files lie.

    """

    config: str
    options: tuple[tuple[str, str], ...]
    tasks: int | None
    held_out: float
    trust: tuple[str, ...]
    place: Path


@dataclass(frozen=True)
class Searched:
    """What is searched.

    Args:
        setting: of its trials.
        options: as they are without a search.
        space: for each option what it may be.
        start: for each option what it is without a search.
        title: the strategy and the stream, in words.
        name: of the search's folder; it ends in a hash of all that it depends on.
        about: what it depends on, in plain values.
        on: what trials are tested on, in words.

    """

    setting: Setting
    options: Namespace
    space: dict[str, Range | Choice]
    start: dict[str, Any]
    title: str
    name: str
    about: dict[str, Any]
    on: str

    def frozen(self, search: Search) -> str:
        """Return the config of the best trial, with a note on how it was chosen."""
        assert search.best is not None
        parser, options = parse_with(self.setting, search.values(search.best))
        pruned = sum(trial.state.name == "PRUNED" for trial in search.over)
        options.tuned = f"{len(search.over)} trials{f' ({pruned} pruned)' * bool(pruned)} on {self.on}"
        for key in ("config", "print_config", "trust"):
            options.pop(key, None)
        text: str = parser.dump(options, skip_none=True, skip_validation=True, skip_default=True)
        space = dump_yaml({option: repr(values) for option, values in self.space.items()}, flow=True).strip()
        lines = (
            f"{self.title}: trial {search.best.number}, {search.best.value:.4f} on {self.on}",
            f"searched: {space}; Optuna's TPE sampler, seed {search.seed}; {search.seconds:.0f} s",
        )
        return "".join(f"# {line}\n" for line in lines) + text


def searched(arguments: list[str], space_file: str | None, tasks: int | None, held_out: float) -> Searched:
    """Return what is searched, once all of it was looked at: no trial is refused for what can be seen before.

    Args:
        arguments: options of `clstream run`.
        space_file: with the space; None: it is in a config, or in our table of spaces.
        tasks, held_out: see `Setting`.

    Raises:
        UsageError: for options that can't be, and a space that has none, or values that one can't have.

    """
    if not 0 < held_out < 1:
        raise UsageError(f"--held_out must be a share between 0 and 1, not {held_out:g}")
    check_installed()
    parser, options, sections = parse_search(arguments)
    print_notes(parser)
    options.seed, options.seeds, options.probes, options.tune = seeds_of(options)[0], None, [], False
    space_given = _given_space(sections, space_file, options)
    names = {option: _full_name(option, options) for option in space_given}
    start = {option: _value(options, name) for option, name in names.items()}
    try:
        space = parse_space(space_given, start)
    except ValueError as error:
        raise UsageError(str(error)) from None
    config = as_yaml(parser, options)
    setting = Setting(config, tuple(names.items()), tasks, held_out, tuple(options.trust), Path.cwd())
    for end in ("low", "high"):  # so that a range that an option can't have is no trial's error
        parse_with(setting, {option: getattr(values, end) for option, values in space.items() if isinstance(values, Range)})
    for option, values in space.items():
        for value in values.values if isinstance(values, Choice) else ():
            parse_with(setting, {option: value})
    stream = stream_of(setting)
    strategy = build_strategy(parser, options, stream, options.seed)
    check_fits(
        strategy, stream, options.device, options.evaluate_every, options.max_sessions, options.seed, train=training_of(options)
    )
    Numerics(**numerics_of(options)).check(options.device)
    whole = stream.name.removesuffix(" (validation)")
    name = type(strategy).__name__
    of = "" if tasks is None else f" of the first {tasks} task{'s' * (tasks > 1)}"
    about = {"config": _identity(config), "tasks": tasks, "held_out": held_out, "data": stream.fingerprint}
    digest = hashlib.sha256(repr((about, space, options.seed)).encode()).hexdigest()[:8]
    folder = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', f'{name}-{whole}')}-{digest}"
    held = sum(len(task.test) for task in stream.tasks)
    on = f"{held:,} held-out training samples{of} of {whole}"
    return Searched(setting, options, space, start, f"{name} on {whole}", folder, about, on)


def parse_search(arguments: list[str]) -> tuple[Parser, Namespace, list[Any]]:
    """Return the parser and the options of `clstream run`, and the sections of config files that are search spaces."""
    configs = _configs(arguments)
    sections = [loaded.pop(SECTION) for loaded in configs.values() if not isinstance(loaded.get(SECTION, True), bool)]
    return *parse_run(arguments, configs), sections


def play(setting: Setting, job: Job | None) -> Outcome | None:
    """Run a trial, in any process; of no job return nothing."""
    if job is None:
        return None
    if Path.cwd() != setting.place:  # a worker on another machine begins elsewhere
        os.chdir(setting.place)
    if str(setting.place) not in sys.path:
        sys.path.append(str(setting.place))
    parser, options = parse_with(setting, job.values)
    stream = stream_of(setting)
    strategy = build_strategy(parser, options, stream, options.seed)
    return run_trial(
        strategy, stream, job.earlier, seed=options.seed, device=options.device, evaluate_every=options.evaluate_every,
        max_sessions=options.max_sessions, **steps_of(options),
    )  # fmt: skip


@lru_cache(maxsize=1)  # in each process once, not for each trial
def stream_of(setting: Setting) -> Stream:
    """Return the stream of the trials. The whole one is forgotten here, and with it the test samples."""
    parser, options = parse_with(setting, {})
    chosen = options.stream.init_args
    if chosen.get("validation") == 0.0:
        chosen.validation = setting.held_out
    return build_stream(parser, options, lambda stream: trial_stream(stream, setting.tasks))


def parse_with(setting: Setting, values: Mapping[str, Any]) -> tuple[Parser, Namespace]:
    """Return the parser and the options of a config, with some values in the place of its own."""
    names = dict(setting.options)
    trusted = [f"--trust={','.join(setting.trust)}"] if setting.trust else []
    configs = {CONFIG: parse_yaml(setting.config.encode(), "the config")}
    if values:  # a config too, not options: what a file's space names is not what the command line names
        configs[VALUES] = as_config({names[option]: value for option, value in values.items()})
    return parse_run([*(word for name in configs for word in ("--config", name)), *trusted], configs)


def _identity(config: str) -> str:
    """Return a config without what changes nothing of what is run."""
    return "\n".join(line for line in config.splitlines() if line.partition(":")[0] not in CHANGES_NOTHING)


def _configs(arguments: list[str]) -> dict[str, dict[str, Any]]:
    """Return what the config files of a command hold, by name."""
    words = [word for argument in arguments for word in argument.split("=", int(argument.startswith("--config=")))]
    return {file: read_yaml(file, "config file") for option, file in pairwise(words) if option == "--config"}


def _given_space(sections: list[Any], space_file: str | None, options: Namespace) -> dict[str, Any]:
    """Return the space of the last config that has one, of a file, or of our table, as plain values."""
    if sections and space_file is not None:
        raise UsageError(f"a config has a section {SECTION}, and --space names a file: keep one of both")
    section = read_yaml(space_file, "space") if space_file is not None else sections[-1] if sections else _known_space(options)
    if isinstance(section, list):  # names alone
        section = {str(option): "auto" for option in section}
    if not isinstance(section, dict) or not section:
        raise UsageError("the search space is empty: name options with their ranges, as tune: {optimizer.lr: [0.001, 0.3, log]}")
    return section


def _known_space(options: Namespace) -> dict[str, Any]:
    """Return what our table has for a strategy: its own options, and those that every strategy has."""
    content = resources.files(SPACES[0]).joinpath(SPACES[1]).read_bytes()
    table = parse_yaml(content, SPACES[1])
    name = options.strategy.class_path.rpartition(".")[2]
    space = {**table[EVERY_STRATEGY], **(table.get(name) or {})}
    space = {option: values for option, values in space.items() if values is not None and _has(option, options)}
    if not space:
        raise UsageError(f"{name} has nothing that is searched by default: name its options in a section {SECTION} of a config")
    return space


def _has(option: str, options: Namespace) -> bool:
    try:
        _full_name(option, options)
    except UsageError:
        return False
    return True


def _full_name(option: str, options: Namespace) -> str:
    """Return the full name of an option of the space: optimizer.lr is that of the strategy, or of the one within it."""
    root, _, rest = option.partition(".")
    if root == "stream":
        raise UsageError(f"{option} can't be searched: the stream is what is tuned on, and trials of two streams can't be compared")
    name = option
    if root == "optimizer":
        name, chosen = "strategy", options.strategy
        while "optimizer" not in chosen.init_args and isinstance(chosen.init_args.get("base"), Namespace):
            name, chosen = f"{name}.base", chosen.init_args.base
        name = f"{name}.{option}"
    if root not in ("strategy", "model", "optimizer") or not rest:
        raise UsageError(
            f"{option} can't be searched: options of the strategy, the optimizer and the model can, as strategy.{option}"
        )
    _value(options, name)
    return name


def _value(options: Namespace, name: str) -> Any:
    """Return what an option is. Raises UsageError if there is none of that name."""
    kind, *parts = name.split(".")
    chosen = options[kind]
    for part in parts:
        has = vars(chosen.init_args) if isinstance(chosen, Namespace) and "init_args" in chosen else {}
        if part not in has:
            owner = chosen.class_path.rpartition(".")[2] if isinstance(chosen, Namespace) and "class_path" in chosen else chosen
            near = nearest(part, has) or (f": it has {', '.join(has)}" if has else "")
            raise UsageError(f"the search space names {name}, and {owner} has no option {part!r}{near}")
        chosen = has[part]
    return chosen
