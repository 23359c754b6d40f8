"""Experiments: what options say is built, and each seed run, tracked, logged and checkpointed in its folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jsonargparse import Namespace
from rich.console import Console

from clstream.bus import ObserverError, on
from clstream.checkpoint import Checkpointer, Stopped, newest
from clstream.cli import run_folders
from clstream.cli.build import build_strategy, build_stream, measures_of, numerics_of, observers_of, seeds_of
from clstream.cli.errors import Failure, UsageError, as_failure, printable
from clstream.cli.lookup import TRACKERS, trust_needed
from clstream.cli.option_parser import Parser
from clstream.cli.parser import as_yaml, parse_run
from clstream.cli.seeds_together import check_together, run_together, why_apart
from clstream.cli.settings import split_names
from clstream.engine import ChangedCodeError, OtherRunError, check_fits, run
from clstream.engine.loop import check_same_run
from clstream.engine.numerics import NotDeterministicError, Numerics
from clstream.events import RunStarted
from clstream.files import FolderError, check_plain_files, locked
from clstream.online_metrics import Detection, Prequential
from clstream.progress import ProgressBar
from clstream.results import Result, result_of
from clstream.serialization import CaptureError
from clstream.strategy import Strategy
from clstream.stream import Stream
from clstream.sweep.workers import at_once
from clstream.tracking import Details, EventLog
from clstream.tracking.point_tracker import PointTracker
from clstream.tracking.run_metrics import tasks_by_row

if TYPE_CHECKING:
    from clstream.tracking import ParentRun


FINISHED = "finished"


class Outcome(NamedTuple):
    """The results of one run for each seed, and where they were tracked: the store ("" for nowhere) and the experiment.

    The fingerprint of the stream's data is there if it was asked for; `tuned` says how the options were chosen.
    """

    results: list[Result]
    tracked: str
    experiment: str
    fingerprint: str = ""
    tuned: str = ""


def run_experiment(arguments: list[str], folder: Path | None = None, fingerprint: bool = False) -> Outcome:
    """Run what the options of `clstream run` say, once for each seed.

    Args:
        arguments: the options.
        folder: of an earlier attempt, to resume it.
        fingerprint: whether that of the stream's data is asked for, which reads all of it.

    Raises:
        UsageError: for options that can't be.
        Failure: for what can't be run, and a loss that is not finite.
        Stopped, KeyboardInterrupt: when a signal came.

    """
    parser, options = parse_run(arguments)
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
    if not options.checkpoint_every and any(needing.values()):
        option = next(name for name, given in needing.items() if given)
        raise UsageError(f"{option} needs a run folder, and --checkpoint_every 0 makes none: leave out one of both")
    with as_failure(ValueError, TypeError, OSError, ImportError):  # all that can be wrong shows here, before anything is learned
        stream = build_stream(parser, options)
        strategy = build_strategy(parser, options, stream, seeds[0])
        check_fits(
            strategy, stream, options.device, options.evaluate_every, options.max_sessions,
            evaluate_at=options.evaluate_at, evaluate_on=options.evaluate_on, measures=measures_of(options),
        )  # fmt: skip
        Numerics(**numerics_of(options)).check(options.device)
        title = f"{type(strategy).__name__} on {stream.name}"
        say = Console(stderr=True, highlight=False, soft_wrap=True)
        say.print(printable(str(stream)), markup=False)
        resumed = folder is not None
        if folder is None and options.checkpoint_every:
            folder, resumed = _run_folder(parser, options, type(strategy).__name__, stream.name)
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
        experiment = Experiment(parser, options, stream, title, folder, resumed)
        experiment.built[seeds[0]] = strategy
        if options.together and (reason := why_apart(strategy, stream)):
            experiment.together, experiment.workers = False, options.workers or at_once(options.threads or 1)
            processes = "" if folder is None or experiment.workers == 1 else f", in {experiment.workers} processes"
            say.print(printable(f"the seeds are run each by itself{processes}, for {reason}"), markup=False)
        try:
            outcome = experiment.run_all(seeds)
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
    config, same, runs = as_yaml(parser, options), options.clone(), Path(options.runs)
    same.runs, same.resume, same.checkpoint_every, same.checkpoint_share = "runs", "never", 30.0, 0.02
    same.log_batches, same.threads = False, None  # and accept_changed_code, which is in no YAML
    name = run_folders.folder_name(strategy, stream, as_yaml(parser, same))
    attempts = run_folders.find_attempts(runs, name)
    if options.resume == "auto" and attempts:
        return attempts[-1], True
    _check_store(options)  # before the folder is made: what can't be tracked leaves none
    return run_folders.create(runs, name, config), False


def _check_store(options: Namespace) -> None:
    """Open the tracking store, if the run is tracked. Raises OSError if that fails."""
    if options.track:
        from clstream.tracking.mlflow_store import connect  # importing mlflow takes seconds: only where it is used

        connect(options.tracking_uri, options.experiment)


class Start:
    """Hears the start of a run, after the strategy."""

    heard = False

    @on(RunStarted)
    def hear(self, event: RunStarted) -> None:
        """Note it."""
        self.heard = True


class Experiment:
    """One attempt at what the options say: a run for each seed."""

    def __init__(self, parser: Parser, options: Namespace, stream: Stream, title: str, folder: Path | None, resumed: bool) -> None:
        self.parser, self.options, self.stream, self.title = parser, options, stream, title
        self.folder, self.resumed = folder, resumed
        self.first = True
        self.built: dict[int, Strategy] = {}  # by seed, what was built already
        self.together, self.workers = bool(options.together), options.workers or 1
        module, _, name = options.stream.class_path.rpartition(".")
        self.code = [getattr(importlib.import_module(module), name, None)]  # what built the stream

    def run_all(self, seeds: list[int]) -> Outcome:
        """Run each seed; several ones are tracked under one run that sums them up."""
        options = self.options
        if not options.track:
            return Outcome(self._run_each(seeds, None), "", "")
        from clstream.tracking import parent_run

        where, uri = options.tracking_uri or "default", options.tracking_uri
        if len(seeds) == 1:
            return Outcome([self.run_seed(seeds[0], None)], where, options.experiment)
        name = f"{self.title}, {len(seeds)} seeds"
        with ExitStack() as stack:
            with as_failure(OSError):
                parent = stack.enter_context(
                    parent_run(name, seeds, options.experiment, uri, folder=self.folder, resumed=self.resumed)
                )
            return Outcome(self._run_each(seeds, parent), where, options.experiment)

    def _run_each(self, seeds: list[int], parent: ParentRun | None) -> list[Result]:
        """Run the seeds one after the other, several at a time if there are to be workers, or together, in one process or more."""
        workers, folder = min(self.workers, len(seeds)), self.folder
        if workers == 1 or folder is None:
            if not self.together:
                return [self.run_seed(seed, parent) for seed in seeds]
            ended = run_together(self, seeds, parent)
            self.check_ended({seed: str(error) for seed, error in ended.items() if isinstance(error, Exception)})
            return [result for seed in seeds if isinstance(result := ended[seed], Result)]
        from clstream.cli.worker_runs import run_in_workers

        self.built.clear()
        return run_in_workers(self, seeds, workers, parent)

    def check_ended(self, errors: Mapping[int, str]) -> None:
        """Raise Failure if seeds failed, when the others have ended."""
        if not errors:
            return
        also = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
        seed, error = next(iter(errors.items()))
        folder = self.folder
        if folder is None:
            raise Failure(f"seed {seed} failed{also}: {error}")
        raise Failure(
            f"seed {seed} failed{also}: {error}; what they printed is in {folder}/seed_*/output.txt, and the other seeds are "
            f"finished: clstream resume {folder} runs those that failed again"
        )

    def state_of(self, seed: int, parent: ParentRun | str | None) -> tuple[Mapping[str, Any] | None, bool]:
        """Return the newest checkpoint of a seed, if there is one and the run is resumed, and whether it is finished.

        Raises Failure if it is finished, and its checkpoint is gone.
        """
        folder = None if self.folder is None else self.folder / f"seed_{seed}"
        state = None
        if folder is not None and self.resumed:
            with as_failure(ValueError):
                state = newest(folder)
            if parent is not None and not isinstance(parent, str):
                parent.read_journal(seed, folder)
        finished = folder is not None and (folder / FINISHED).exists()
        if folder is not None and finished and state is None:
            raise Failure(
                f"{folder} is marked as finished, but its last checkpoint, which has the results, is gone: run it anew in "
                f"another folder, or remove {folder / FINISHED} to run it anew in this one"
            )
        return state, finished and state is not None and state["position"][0] == state["sessions"]

    def finish(self, seed: int) -> None:
        """Mark a seed as finished. Raises OSError."""
        assert self.folder is not None
        (self.folder / f"seed_{seed}" / FINISHED).touch()

    def start(self) -> Start:
        """Return what hears the start of a run."""
        return Start()

    def run_seed(self, seed: int, parent: ParentRun | str | None) -> Result:
        """Run one seed, from its newest checkpoint if it has one; of one that was finished, return the result.

        The parent is the run that sums up the seeds in this process, or the id of any MLflow run.
        """
        options = self.options
        folder = None if self.folder is None else self.folder / f"seed_{seed}"
        state, finished = self.state_of(seed, parent)
        strategy = self.built.pop(seed, None) or build_strategy(self.parser, options, self.stream, seed)
        same: dict[str, Any] = {
            "seed": seed, "device": options.device, "evaluate_every": options.evaluate_every, "code": self.code,
            "evaluate_at": options.evaluate_at, "evaluate_on": options.evaluate_on, "measures": measures_of(options),
            **numerics_of(options),
            "max_sessions": options.max_sessions, "accept_changed_code": options.accept_changed_code, "resume": state,
        }  # fmt: skip
        if finished and state is not None:
            self._check_finished(seed, lambda: check_same_run(strategy, self.stream, *self.more_observers(folder), **same))
            result = result_of(state)
            if parent is not None and not isinstance(parent, str):
                parent.update(seed, result, tasks_by_row(self.stream.reseeded(seed), result.sessions))
            return result
        observers, start = self.observers(seed, folder, parent), Start()
        self.first = False
        try:
            result = run(strategy, self.stream, start, *observers, **same)
        except (ValueError, TypeError) as error:
            if start.heard:
                raise
            raise Failure(str(error)) from error  # the strategy refuses the stream: nothing was learned
        if folder is not None:
            with suppress(OSError):  # without it, a resumption finds a run with nothing left to do
                self.finish(seed)
        return result

    def _check_finished(self, seed: int, check: Callable[[], list[str]]) -> None:
        """Say that a run is finished, and with what code if that has changed; refuse that if it is not accepted."""
        try:
            changed = check()
        except ChangedCodeError as error:
            raise Failure(
                f"seed {seed} is finished, and the code of the run has changed since: {error.shown}. To run the changed code: "
                f"clstream run --config {self.folder}/{run_folders.CONFIG} --resume never; to see the results of the old code all "
                "the same, give --accept-changed-code"
            ) from None
        if changed:
            Console(stderr=True, highlight=False, soft_wrap=True).print(
                f"seed {seed} was run by other code than there is now: {'; '.join(changed)}; its results are of the old code",
                markup=False,
            )

    def more_observers(self, folder: Path | None) -> list[object]:
        """Return the observers that were asked for by name."""
        chosen: list[object] = []
        for cls in observers_of(self.options):
            if isinstance(cls, type) and issubclass(cls, PointTracker):
                assert folder is not None  # it was asked for
                with as_failure(OSError, ImportError):
                    chosen.append(cls.of_run(folder, self.options.experiment))
            else:
                chosen.append(cls())
        return chosen

    def observers(
        self, seed: int, folder: Path | None, parent: ParentRun | str | None, bar: bool = True, signals: bool = True
    ) -> list[object]:
        """Return the observers of the run of a seed. The checkpointer is last: when it ends, the others have closed.

        `bar`: whether a progress bar is among them; `signals`: whether the checkpointer acts on signals.
        """
        options = self.options
        measures = [*([Prequential()] if options.prequential else []), *([Detection()] if options.detection else [])]
        measures += self.more_observers(folder)
        bars = [ProgressBar(f"{self.title}, seed {seed}")] if bar else []
        log = [] if folder is None else [EventLog(folder, options.log_batches)]
        details = [] if folder is None or not options.details else [Details(folder / "details", options.details)]
        checkpointer = (
            []
            if folder is None
            else [Checkpointer(folder, every_seconds=options.checkpoint_every, share=options.checkpoint_share, signals=signals)]
        )
        if not options.track:
            return [*log, *details, *measures, *bars, *checkpointer]
        from clstream.tracking import MlflowTracker

        own = options.clone()
        own.seed, own.seeds, own.together = seed, None, None
        with as_failure(OSError):
            tracker = MlflowTracker(
                options.experiment,
                options.tracking_uri,
                parent=parent,
                config=as_yaml(self.parser, own),
                tags={"tuned": options.tuned} if options.tuned else {},
                folder=folder,
                files=[*(event_log.file for event_log in log), *(observer.folder for observer in details)],
                allow_offline=self.resumed or not self.first,  # a server that went away is no reason to lose what is left to do
            )
        return [*log, *details, *measures, tracker, *bars, *checkpointer]
