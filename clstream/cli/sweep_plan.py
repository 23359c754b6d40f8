"""The plan of a sweep: each run's config and identity, with all that can be wrong seen before anything is run."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from clstream.cli.build import build_strategy, build_stream, measures_of, numerics_of, observers_of, seeds_of
from clstream.cli.errors import UsageError, as_failure
from clstream.cli.lookup import PLACES, resolve
from clstream.cli.option_parser import Parser, options_of
from clstream.cli.parser import DEFAULTS, as_yaml, parse_run, run_parser, trusted_by
from clstream.cli.settings import CHOICES, TRAIN, as_config, parse_seeds
from clstream.cli.training_options import training_of
from clstream.cli.yaml_files import dump_yaml, load_yaml, read_yaml
from clstream.engine import check_fits
from clstream.engine.numerics import Numerics
from clstream.strategy import Strategy
from clstream.stream import Stream
from clstream.sweep.grid import Combination, GridError, Known, combinations, read_grid
from clstream.sweep.identity import Identity, code_hash, text_hash

CHANGES_NOTHING = (
    "track", "tracking_uri", "experiment", "runs", "resume", "checkpoint_every", "checkpoint_share", "log_batches", "threads",
    "details", "log_model", "model_name", "data_root", "observers", "tuned", "seed", "seeds",
)  # fmt: skip
"""Options that have no part in what a run measures; the seed has one of its own."""


@dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Args:
        label: what tables call its method, see `Combination`.
        place: what they call its stream.
        strategy, stream, scenario: the names of its class and of its stream, and how test questions are asked.
        seed: of the run.
        config: all options as YAML, as `clstream run --config` takes them.
        identity: what it is known by.
        trust: packages that the config may name.
        tuned: how its options were chosen; "" if nothing is known of that.

    """

    label: str
    place: str
    strategy: str
    stream: str
    scenario: str
    seed: int
    config: str
    identity: Identity
    trust: tuple[str, ...]
    tuned: str = ""

    @property
    def group(self) -> str:
        """What it is but for its seed."""
        return f"{self.label} on {self.place}"

    @property
    def title(self) -> str:
        """What it is, in words."""
        return f"{self.group}, seed {self.seed}"

    @property
    def folder_name(self) -> str:
        """The name of its run folder: it says what is run, and ends in a hash of the identity."""
        plain = re.sub(r"[^\w.-]+", "_", f"{self.strategy}-{self.stream}")
        return f"{plain}-s{self.seed}-{text_hash(str(self.identity))[:8]}"


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep, in order, and the options that they share: experiment, tracking_uri, track, threads."""

    runs: list[Planned]
    options: Namespace


def plan_of(file: str, arguments: list[str]) -> Plan:
    """Return the plan of a grid's file; the streams and strategies of it are built once, to see that they can be.

    Args:
        file: the grid.
        arguments: further options of `clstream run`, for all runs.

    Raises:
        UsageError: for a grid or options that can't be, and two runs that are the same.
        Failure: for what can't be run.

    """
    loaded, place = read_yaml(file, "grid"), Path(file).parent
    options_of = partial(_options_of, trusted_by(arguments))
    known = Known(run_options(), options_of, cache(lambda name: _config(place, name)), parse_seeds)
    try:
        combined = combinations(read_grid(loaded, known), known, DEFAULTS)
    except (GridError, UsageError) as error:
        raise UsageError(f"{file}: {error}") from None
    base = {key: value for key, value in loaded.items() if key not in ("sweep", "seed", "seeds")}
    planned, streams = list[Planned](), dict[str, Stream]()
    for combination in combined:
        configs, words = {file: base}, ["--config", file]
        if "config" in combination.settings:
            name = f"{file}, {combination.settings['config']}"
            configs[name] = dict(known.config(str(combination.settings["config"])))
            words += ["--config", name]
        name = f"{file}, {combination.label}"
        configs[name] = as_config({key: value for key, value in combination.settings.items() if key != "config"})
        parser, options = parse_run([*words, *["--config", name] * bool(configs[name]), *arguments], configs)
        typed = any(re.match(r"--seeds?(=|$)", word) for word in arguments)
        seeds = seeds_of(options) if typed else list(combination.seeds)
        options.seeds, options.seed = None, seeds[0]
        planned += _planned(combination, parser, options, seeds, streams, name)
    _check_distinct(planned, file)
    return Plan(planned, options)


def run_options() -> list[str]:
    """Return the options of `clstream run` that a config may have, without those of strategies, streams and models."""
    names = [option[2:] for action in run_parser()._actions for option in action.option_strings if option.startswith("--")]
    kept_out = {"config", "print_config", "trust", "help", "workers", *CHOICES}
    plain = [name for name in names if name.startswith(f"{TRAIN}.") or ("." not in name and "+" not in name)]
    return [*(name for name in plain if name not in kept_out), "config"]


@cache
def _options_of(trusted: tuple[str, ...], kind: str, name: str) -> tuple[str, ...]:
    return options_of(resolve(kind, name, trusted)[0])


def _config(place: Path, name: str) -> dict[str, Any]:
    """Return what a config file that a grid names holds, but for its seeds; the path goes from the grid's folder on."""
    loaded = read_yaml(place / name, "config file")
    return {key: value for key, value in loaded.items() if key not in ("seed", "seeds")}


def _planned(
    combination: Combination, parser: Parser, options: Namespace, seeds: Sequence[int], streams: dict[str, Stream], where: str
) -> list[Planned]:
    """Return the runs of a combination, once its stream and its strategy were built."""
    try:
        with as_failure(OSError, ImportError, TypeError):
            stream = _stream(parser, options, streams)
            strategy = build_strategy(parser, options, stream, seeds[0])
            observers_of(options)
            check_fits(
                strategy, stream, options.device, options.evaluate_every, options.max_sessions,
                evaluate_at=options.evaluate_at, evaluate_on=options.evaluate_on, measures=measures_of(options),
                train=training_of(options),
            )  # fmt: skip
            Numerics(**numerics_of(options)).check(options.device)
    except ValueError as error:
        raise UsageError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
    config = as_yaml(parser, options)
    kept = f"{_identifying(parser, options)}epochs: {stream.epochs}\nbatch_size: {stream.batch_size}\n"
    code = _code(strategy, stream, options)
    place = ", ".join(part for part in (stream.name, combination.stream) if part)
    return [
        Planned(
            combination.method, place, type(strategy).__name__, stream.name, stream.scenario, seed,
            re.sub(r"^seed: .*$", f"seed: {seed}", config, flags=re.MULTILINE),
            Identity(text_hash(f"{kept}seed: {seed}"), code, stream.fingerprint), tuple(options.trust),
            str(options.get("tuned") or ""),
        )
        for seed in seeds
    ]  # fmt: skip


def _stream(parser: Parser, options: Namespace, streams: dict[str, Stream]) -> Stream:
    """Return the stream of some options; those of the last four combinations are kept."""
    asked = [options.stream, options.probes, options.tune, options.data_root, options.seed if options.features else None]
    key = repr([*asked, *([options.model, options.weights] if options.features else [])])
    if key not in streams:
        while len(streams) >= 4:
            del streams[next(iter(streams))]
        streams[key] = build_stream(parser, options)
    return streams[key]


def _identifying(parser: Parser, options: Namespace) -> str:
    """Return those options that a run's measurements depend on, as YAML, where they differ from the defaults."""
    text = parser.dump(options, skip_none=True, skip_validation=True, skip_default=True)
    kept = {key: value for key, value in (load_yaml(str(text)) or {}).items() if key not in CHANGES_NOTHING}
    for kind in CHOICES:
        if options[kind] is not None:
            kept[kind] = kept.get(kind) or {"class_path": options[kind].class_path}
    for key in ("config", "print_config", "trust", "accept_changed_code", "workers"):
        kept.pop(key, None)
    kept["stream"].get("init_args", {}).pop("root", None)
    return dump_yaml({key: kept[key] for key in sorted(kept)})


def _code(strategy: Strategy, stream: Stream, options: Namespace) -> str:
    module, _, name = options.stream.class_path.rpartition(".")
    makes_stream = getattr(importlib.import_module(module), name, None)
    measures = [measure for measure in measures_of(options) if not isinstance(measure, str)]
    return code_hash(strategy, stream, (PLACES["strategy"], PLACES["model"], PLACES["adapter"]), [makes_stream, *measures])


def _check_distinct(planned: Sequence[Planned], file: str) -> None:
    """Raise UsageError for two runs of one identity."""
    seen: dict[Identity, Planned] = {}
    for run in planned:
        if run.identity in seen:
            other = seen[run.identity]
            between = f"two runs are called {run.title}" if run.title == other.title else f"{other.title} and {run.title}"
            raise UsageError(
                f"{file}: {between}: they are the same run, down to every option that changes what is measured: leave one out"
            )
        seen[run.identity] = run
