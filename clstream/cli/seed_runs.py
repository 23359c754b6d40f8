"""The runs of an experiment: each seed built, tracked, logged and checkpointed in its folder."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from rich.console import Console

from clstream.bus import on
from clstream.checkpoint import Checkpointer, newest
from clstream.cli import run_folders
from clstream.cli.arrival_lines import ArrivalLines
from clstream.cli.build import build_strategy, measures_of, observers_of, steps_of
from clstream.cli.continuing import Before
from clstream.cli.errors import Failure, as_failure
from clstream.cli.option_parser import Parser
from clstream.cli.parser import as_yaml
from clstream.drift_detection import DriftAlarm
from clstream.engine import ChangedCodeError, run
from clstream.engine.loop import check_same_run
from clstream.events import RunStarted
from clstream.online_metrics import Delayed, Detection, Prequential
from clstream.progress import ProgressBar
from clstream.results import Result, result_of
from clstream.strategy import Strategy
from clstream.stream import Stream
from clstream.tracking import Details, EventLog
from clstream.tracking.point_tracker import PointTracker
from clstream.tracking.run_metrics import tasks_by_row

if TYPE_CHECKING:
    from clstream.tracking import ParentRun


FINISHED = "finished"


class Start:
    """Hears the start of a run, after the strategy."""

    heard = False

    @on(RunStarted)
    def hear(self, event: RunStarted) -> None:
        """Note it."""
        self.heard = True


class Experiment:
    """One attempt at what the options say: a run for each seed."""

    def __init__(
        self,
        parser: Parser,
        options: Namespace,
        stream: Stream,
        title: str,
        folder: Path | None,
        resumed: bool,
        before: Before | None = None,
    ) -> None:
        self.parser, self.options, self.stream, self.title = parser, options, stream, title
        self.folder, self.resumed, self.before = folder, resumed, before
        self.first = True
        self.built: dict[int, Strategy] = {}  # by seed, what was built already
        self.together, self.workers = bool(options.together), options.workers or 1
        module, _, name = options.stream.class_path.rpartition(".")
        self.code = [getattr(importlib.import_module(module), name, None)]  # what built the stream

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
        before = self.before
        outputs = None if before is None else before.outputs
        strategy = self.built.pop(seed, None) or build_strategy(self.parser, options, self.stream, seed, outputs)
        same: dict[str, Any] = {
            "seed": seed, "device": options.device, "evaluate_every": options.evaluate_every, "code": self.code,
            "evaluate_at": options.evaluate_at, "evaluate_on": options.evaluate_on, "measures": measures_of(options),
            **steps_of(options),
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
            continues = before.of_seed(seed) if before is not None and state is None else None
            result = run(strategy, self.stream, start, *observers, continues=continues, **same)
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
        measures: list[object] = [*([Prequential()] if options.prequential else []), *([Detection()] if options.detection else [])]
        measures += [DriftAlarm()] if options.drift else []
        measures += self.more_observers(folder)
        if self.stream.arrives:
            measures += [Delayed()] if self.stream.target == "label" else []
        bars: list[object] = [ArrivalLines() if self.stream.arrives else ProgressBar(f"{self.title}, seed {seed}")] if bar else []
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
                log_model={True: "end", "true": "end", "sessions": "sessions"}.get(options.log_model, ""),
                model_name=options.model_name,
                allow_offline=self.resumed or not self.first,  # a server that went away is no reason to lose what is left to do
            )
        return [*log, *details, *measures, tracker, *bars, *checkpointer]
