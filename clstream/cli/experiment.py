"""Experiments: what options say is built, and each seed run, tracked, logged and checkpointed in its folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jsonargparse import Namespace
from rich.console import Console

from clstream.bus import ObserverError
from clstream.checkpoint import Stopped
from clstream.cli import run_folders
from clstream.cli.build import build_strategy, build_stream, measures_of, numerics_of, observers_of, seeds_of
from clstream.cli.continuing import run_before
from clstream.cli.errors import UsageError, as_failure, printable
from clstream.cli.lookup import TRACKERS, trust_needed
from clstream.cli.option_parser import Parser
from clstream.cli.parser import as_yaml, parse_run
from clstream.cli.seed_runs import FINISHED, Experiment
from clstream.cli.seeds_together import run_together
from clstream.cli.settings import split_names
from clstream.cli.together_checks import check_together, why_apart
from clstream.cli.training_options import training_of
from clstream.cli.worker_runs import run_in_workers
from clstream.engine import OtherRunError, check_fits
from clstream.engine.numerics import NotDeterministicError, Numerics
from clstream.files import FolderError, check_plain_files, locked
from clstream.results import Result
from clstream.serialization import CaptureError
from clstream.sweep.workers import at_once

if TYPE_CHECKING:
    from clstream.tracking import ParentRun


class Outcome(NamedTuple):
    """The results of one run for each seed, and where they were tracked: the store ("" for nowhere) and the experiment.

    The fingerprint of the stream's data is there if it was asked for; `tuned` says how the options were chosen.
    """

    results: list[Result]
    tracked: str
    experiment: str
    fingerprint: str = ""
    tuned: str = ""


def run_experiment(
    arguments: list[str],
    folder: Path | None = None,
    fingerprint: bool = False,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Outcome:
    """Run what the options of `clstream run` say, once for each seed.

    Args:
        arguments: the options.
        folder: of an earlier attempt, to resume it.
        fingerprint: whether that of the stream's data is asked for, which reads all of it.
        configs: what is in config files that were read before, by the name that `--config` gives.

    Raises:
        UsageError: for options that can't be.
        Failure: for what can't be run, and a loss that is not finite.
        Stopped, KeyboardInterrupt: when a signal came.

    """
    parser, options = parse_run(arguments, configs)
    print_notes(parser)
    seeds, _ = seeds_of(options), observers_of(options)
    if options.threads is not None:
        if options.threads < 1:
            raise UsageError(f"--threads must be at least 1, not {options.threads}")
        torch.set_num_threads(options.threads)
    if not 0 < options.checkpoint_share <= 1:
        raise UsageError(f"--checkpoint_share must be above 0 and at most 1, not {options.checkpoint_share:g}")
    if options.checkpoint_every < 0:
        raise UsageError(f"--checkpoint_every must be seconds, or 0 for no checkpoints, not {options.checkpoint_every:g}")
    if options.workers is not None and options.workers < 1:
        raise UsageError(f"--workers must be at least 1, not {options.workers}")
    check_together(options, seeds)
    needing = {
        "--resume auto": options.resume == "auto", "--log_batches": options.log_batches, "--details": options.details,
        "--workers": (options.workers or 1) > 1,
        **{f"--observers {name}": name in split_names(options.observers) for name in TRACKERS if options.observers},
    }  # fmt: skip
    if not options.track and (options.log_model in (True, "true", "sessions") or options.model_name):
        raise UsageError("--log_model logs to MLflow, and --track false writes nothing there: leave out one of both")
    if not options.checkpoint_every and any(needing.values()):
        option = next(name for name, given in needing.items() if given)
        raise UsageError(f"{option} needs a run folder, and --checkpoint_every 0 makes none: leave out one of both")
    with as_failure(ValueError, TypeError, OSError, ImportError):  # all that can be wrong shows here, before anything is learned
        stream = build_stream(parser, options)
        attempt = _attempt(parser, options) if folder is None and options.continues and options.resume == "auto" else folder
        before = run_before(options, stream, attempt)
        outputs = None if before is None else before.outputs
        if before is not None:
            parser, options = parse_run(arguments, configs)  # the parser that was made last says what may be imported
            stream = before.stream
        strategy = build_strategy(parser, options, stream, seeds[0], outputs)
        check_fits(
            strategy, stream, options.device, options.evaluate_every, options.max_sessions,
            evaluate_at=options.evaluate_at, evaluate_on=options.evaluate_on, measures=measures_of(options),
            train=training_of(options), outputs=outputs,
        )  # fmt: skip
        Numerics(**numerics_of(options)).check(options.device)
        title = f"{type(strategy).__name__} on {stream.name}"
        say = Console(stderr=True, highlight=False, soft_wrap=True)
        say.print(printable(str(stream)), markup=False)
        resumed = folder is not None
        if folder is None and options.checkpoint_every:
            folder, resumed = _run_folder(parser, options, type(strategy).__name__, stream.name)
            if before is not None and not resumed:
                before.keep(folder, seeds)
        elif folder is None:
            _check_store(options)
    with (
        ExitStack() as stack,
        as_failure(FolderError, CaptureError, ObserverError, OtherRunError, FloatingPointError, NotDeterministicError),
    ):
        if folder is not None:
            check_plain_files(folder)
            stack.enter_context(locked(folder))
            finished = resumed and all((folder / f"seed_{seed}" / FINISHED).exists() for seed in seeds)
            say.print(
                f"the run in {folder} is finished: nothing is run now, and what follows was measured then"
                if finished
                else f"{'going on' if resumed else 'checkpoints'} in {folder}",
                markup=False,
            )
        experiment = Experiment(parser, options, stream, title, folder, resumed, before)
        experiment.built[seeds[0]] = strategy
        if options.together and (reason := why_apart(strategy, stream, training_of(options))):
            experiment.together, experiment.workers = False, options.workers or at_once(options.threads or 1)
            processes = "" if folder is None or experiment.workers == 1 else f", in {experiment.workers} processes"
            say.print(printable(f"the seeds are run each by itself{processes}, for {reason}"), markup=False)
        try:
            outcome = run_all(experiment, seeds)
            return outcome._replace(fingerprint=stream.fingerprint if fingerprint else "", tuned=options.tuned or "")
        except Stopped as stop:
            stop.trust = trust_needed(as_yaml(parser, options), options.trust)
            raise


def print_notes(parser: Parser) -> None:
    """Print to stderr which options of configs later ones dropped."""
    for note in parser.notes:
        print(f"clstream: {note}", file=sys.stderr)


def _run_folder(parser: Parser, options: Namespace, strategy: str, stream: str) -> tuple[Path, bool]:
    """Return the folder for a run, and whether it is that of an earlier attempt."""
    config, runs = as_yaml(parser, options), Path(options.runs)
    name = run_folders.folder_name(strategy, stream, _same(parser, options))
    attempts = run_folders.find_attempts(runs, name)
    if options.resume == "auto" and attempts:
        return attempts[-1], True
    _check_store(options)  # before the folder is made: what can't be tracked leaves none
    return run_folders.create(runs, name, config), False


def _same(parser: Parser, options: Namespace) -> str:
    """Return the options that make attempts at the same run, as YAML."""
    same = options.clone()
    same.runs, same.resume, same.checkpoint_every, same.checkpoint_share = "runs", "never", 30.0, 0.02
    same.log_batches, same.threads = False, None  # and accept_changed_code, which is in no YAML
    return as_yaml(parser, same)


def _attempt(parser: Parser, options: Namespace) -> Path | None:
    """Return the newest attempt at these very options, whatever its strategy and stream are called; None if there is none."""
    ending = run_folders.folder_name("", "", _same(parser, options)).rpartition("-")[2]
    found = [path for path in Path(options.runs).glob(f"*-{ending}*") if (path / run_folders.CONFIG).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _check_store(options: Namespace) -> None:
    """Open the tracking store, if the run is tracked. Raises OSError if that fails."""
    if options.track:
        from clstream.tracking.mlflow_store import connect  # importing mlflow takes seconds: only where it is used

        connect(options.tracking_uri, options.experiment)


def run_all(experiment: Experiment, seeds: list[int]) -> Outcome:
    """Run each seed; several ones are tracked under one run that sums them up."""
    options = experiment.options
    if not options.track:
        return Outcome(_run_each(experiment, seeds, None), "", "")
    from clstream.tracking import parent_run

    where, uri = options.tracking_uri or "default", options.tracking_uri
    if len(seeds) == 1:
        return Outcome([experiment.run_seed(seeds[0], None)], where, options.experiment)
    name = f"{experiment.title}, {len(seeds)} seeds"
    with ExitStack() as stack:
        with as_failure(OSError):
            parent = stack.enter_context(
                parent_run(name, seeds, options.experiment, uri, folder=experiment.folder, resumed=experiment.resumed)
            )
        return Outcome(_run_each(experiment, seeds, parent), where, options.experiment)


def _run_each(experiment: Experiment, seeds: list[int], parent: ParentRun | None) -> list[Result]:
    """Run the seeds one after the other, several at a time if there are to be workers, or together, in one process or more."""
    workers, folder = min(experiment.workers, len(seeds)), experiment.folder
    if workers == 1 or folder is None:
        if not experiment.together:
            return [experiment.run_seed(seed, parent) for seed in seeds]
        ended = run_together(experiment, seeds, parent)
        experiment.check_ended({seed: str(error) for seed, error in ended.items() if isinstance(error, Exception)})
        return [result for seed in seeds if isinstance(result := ended[seed], Result)]
    experiment.built.clear()
    return run_in_workers(experiment, seeds, workers, parent)
