"""`clstream sweep`: every combination of a grid, on one machine or a cluster; what is finished is not run again."""

from __future__ import annotations

import signal
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clstream.cli.command_parser import CommandParser
from clstream.cli.errors import Failure, UsageError, as_failure, printable

if TYPE_CHECKING:
    from argparse import Namespace

    from clstream.cli.seed_jobs import SeedJob
    from clstream.cli.sweep_plan import Plan, Planned
    from clstream.comparison import Record
    from clstream.results import Result
    from clstream.sweep.workers import JobError
    from clstream.tracking.uploader import Uploader

GRID = "grid.yaml"
"""The copy of the grid in the folder of a sweep."""


def sweep_command(arguments: list[str]) -> int:
    """`clstream sweep`: run what a grid stands for; return 1 if a run failed."""
    own, rest = sweep_parser().parse_known_args(arguments)
    for name in ("workers", "threads"):
        if getattr(own, name) is not None and getattr(own, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(own, name)}")
    from clstream.cli.sweep_plan import plan_of
    from clstream.cli.tables import wide_console
    from clstream.files import FolderError, locked
    from clstream.sweep.workers import ENGINES, TerminatedError

    if own.engine not in ENGINES:
        raise UsageError(f"--engine takes {', '.join(ENGINES)}, not {own.engine}")
    if own.address and own.engine == "loky":
        raise UsageError("--address is that of a cluster: choose --engine ray or --engine dask with it")
    plan = plan_of(own.grid, rest)
    console, folder = wide_console(), Path(own.sweeps) / Path(own.grid).stem
    sweep = Sweep(own, plan, folder, console)
    if own.dry_run:
        sweep.show_plan()
        return 0
    with as_failure(FolderError, OSError, ImportError, ValueError):
        sweep.check_store()
        try:
            with locked(folder):
                sweep.prepare()
                return sweep.run()
        except KeyboardInterrupt as stop:
            number = getattr(stop, "signal", signal.SIGTERM if isinstance(stop, TerminatedError) else signal.SIGINT)
            print(f"\nclstream: stopped with {_count(sweep.left)} left; the same command goes on with them", file=sys.stderr)
            return 128 + int(number)


def sweep_parser() -> CommandParser:
    """Return the parser of the command's own options."""
    parser = CommandParser(
        "sweep",
        usage="clstream sweep GRID.yaml [options] [options of clstream run, for all runs]",
        description="Run every combination of a grid: a config with a section `sweep`. The same command again goes on with what is "
        "left: finished runs are known by their config, code and data, others go on from their checkpoints.",
    )
    parser.add_argument("grid", help="a YAML file: options of clstream run, and `sweep: {strategy: [Replay, EWC], seed: 0-4}`")
    parser.add_argument("--workers", type=int, help="how many runs go on at a time; by default as many as there are cores for")
    parser.add_argument("--threads", type=int, help="that each of them computes in; by default one")
    parser.add_argument("--engine", default="loky", help="loky (processes of this machine, by default), ray or dask")
    parser.add_argument("--address", help="HOST:PORT of a Ray or Dask cluster, whose machines share this folder")
    parser.add_argument("--records", help="a file of records to read and to add to: what is finished there is not run again")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print the plan, with an estimate, and run nothing")
    parser.add_argument("--sweeps", default="sweeps", help="folder of the folders of sweeps; by default sweeps")
    parser.add_argument(
        "--accept_changed_code", "--accept-changed-code", action="store_true",
        help="count what other code has finished, of the same config and data, as finished",
    )  # fmt: skip
    return parser


class Sweep:
    """What is left to do of a plan, and doing it.

    Args:
        own: the command's own options.
        plan: of all runs.
        folder: of the sweep.
        console: where to say what happens.

    """

    def __init__(self, own: Namespace, plan: Plan, folder: Path, console: Any) -> None:
        from clstream.comparison.records import FILE, read_file

        self.own, self.plan, self.folder, self.console = own, plan, folder, console
        self.file = folder / FILE
        self.further = None if own.records is None else Path(own.records)
        if self.further is not None and not self.further.absolute().parent.is_dir():
            raise UsageError(f"--records: there is no folder {self.further.parent}")
        for file in (self.file, self.further):
            if file is not None and file.exists() and not file.is_file():
                raise UsageError(f"{file} is no regular file, and so no file of records")
        with as_failure(OSError, ValueError):
            self.own_records = read_file(self.file) if self.file.exists() else []
            others = read_file(self.further) if self.further is not None and self.further.exists() else []
        records = [record for record in (*others, *self.own_records) if record.identity and not record.error]
        self.finished: dict[str, Record] = {}
        """By identity, the records of runs of the plan."""
        self.of_other_code: list[Planned] = []
        by_identity = {record.identity: record for record in records}
        by_config = {_without_code(record.identity): record for record in records}
        for run in plan.runs:
            identity = str(run.identity)
            if identity in by_identity:
                self.finished[identity] = by_identity[identity]
            elif (record := by_config.get(_without_code(identity))) is not None:
                if own.accept_changed_code:
                    self.finished[identity] = record
                else:
                    self.of_other_code.append(run)
        self.in_further = {record.identity for record in others}
        self.waiting = [run for run in plan.runs if str(run.identity) not in self.finished]
        self.left = len(self.waiting)

    def check_store(self) -> None:
        """Open the tracking store of a sweep that begins: OSError if that fails. One that goes on can wait for its server."""
        if self.waiting and self.plan.options.track and not self._has_journal():
            from clstream.tracking.mlflow_store import connect

            connect(self.plan.options.tracking_uri, self.plan.options.experiment)

    def _has_journal(self) -> bool:
        from clstream.tracking.outbox import FILE

        return (self.folder / FILE).exists()

    def prepare(self) -> None:
        """Write the grid and the records of what is finished to the folder; what failed is run again, so it is left out."""
        from clstream.comparison.records import to_json
        from clstream.files import write_atomically

        planned = {str(run.identity) for run in self.plan.runs}
        kept = [record for record in self.own_records if not (record.error and record.identity in planned)]
        present = {record.identity for record in kept}
        runs = {str(run.identity): run for run in self.plan.runs}
        kept += [
            replace(record, label=runs[identity].label, stream=runs[identity].place)
            for identity, record in self.finished.items()
            if record.identity not in present
        ]
        lines = "".join(f"{to_json(record)}\n" for record in kept)
        text = Path(self.own.grid).read_bytes()
        write_atomically(self.folder / GRID, lambda out: out.write(text))
        write_atomically(self.file, lambda out: out.write(lines.encode()))

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(printable(text), markup=False)

    def show_plan(self) -> None:
        """Print what would be run, and about how long it takes."""
        from clstream.cli.sweep_estimate import estimates, total
        from clstream.sweep.progress import duration
        from clstream.sweep.workers import at_once

        groups: dict[str, list[Planned]] = {}
        for run in self.plan.runs:
            groups.setdefault(run.group, []).append(run)
        self.say(f"{_count(len(self.plan.runs))} in {self.folder}, {len(self.finished)} of them finished")
        waiting = {str(run.identity) for run in self.waiting}
        left = {group: [run for run in runs if str(run.identity) in waiting] for group, runs in groups.items()}
        unknown = {group: runs for group, runs in left.items() if runs}
        known = estimates(unknown, self._earlier(), self._threads())
        for group, runs in groups.items():
            seeds = ", ".join(str(run.seed) for run in runs)
            done = len(runs) - len(left[group])
            takes = f", {duration(known[group].seconds)} each, {known[group].source}" if left[group] else ""
            finished = f": {done} of {len(runs)} finished" if done else ""
            self.say(f"  {group}, seed{'s' * (len(runs) > 1)} {seeds}{finished}{takes}")
        seconds = [known[group].seconds for group, runs in left.items() for _ in runs]
        if seconds:
            workers = self.own.workers or min(at_once(self._threads()), len(seconds))
            self.say(f"about {duration(total(seconds, workers))} with {workers} at a time on machines like this one")

    def _earlier(self) -> dict[str, list[float]]:
        """Return how long finished runs took, by group."""
        earlier: dict[str, list[float]] = {}
        for run in self.plan.runs:
            if (record := self.finished.get(str(run.identity))) is not None:
                earlier.setdefault(run.group, []).append(record.seconds)
        return earlier

    def _threads(self) -> int:
        return int(self.own.threads or self.plan.options.threads or 1)

    def run(self) -> int:
        """Run what is left, and return the exit status."""
        from clstream.sweep.workers import at_once

        if not self.waiting:
            self.say(f"all {len(self.plan.runs)} runs are finished; see them: clstream compare {self.folder}")
            return 0
        workers = self.own.workers or (min(at_once(self._threads()), len(self.waiting)) if self.own.engine == "loky" else None)
        done = len(self.finished)
        self.say(
            f"{_count(len(self.waiting))}{f' of {len(self.plan.runs)}, {done} are finished' if done else ''}, "
            f"{workers or 'as many as the cluster has cores'} at a time, in {self.folder}"
        )
        if self.of_other_code:
            self.say(
                f"{len(self.of_other_code)} of them were finished by other code, and run again with the code of now: "
                "--accept-changed-code keeps the results of the old code"
            )
        options = self.plan.options
        if not options.track:
            return self._run_all(workers, None)
        from clstream.tracking.parent_runs import group_run

        name = f"sweep {self.folder.name}"
        tags = {"sweep": self.folder.name}
        with group_run(name, options.experiment, options.tracking_uri, tags, self.folder, self._has_journal()) as uploader:
            try:
                return self._run_all(workers, uploader)
            finally:
                uploader.outbox.put("artifact", name=GRID, text=(self.folder / GRID).read_text(encoding="utf-8", errors="replace"))
                uploader.outbox.put("artifact", name=self.file.name, text=self.file.read_text(encoding="utf-8"))

    def _run_all(self, workers: int | None, uploader: Uploader | None) -> int:
        from clstream.cli.worker_runs import run_seed_job
        from clstream.sweep.progress import Progress
        from clstream.sweep.workers import run_jobs

        parent = None if uploader is None else uploader.outbox.run_id
        jobs = {self._job(run, parent): run for run in self.waiting}
        progress = Progress([run.group for run in self.waiting], workers, self._earlier())
        failed: list[Record] = []
        ended = run_jobs(
            run_seed_job, [*jobs], workers=workers, engine=self.own.engine, address=self.own.address,
            threads=self._threads(),
        )  # fmt: skip
        with closing(ended):
            for job, value in ended:
                run = jobs[job]
                record = self._record(run, value, job.folder)
                self._append(record)
                self.left -= 1
                number = progress.ended(run.group, record.seconds)
                failed += [record] if record.error else []
                self.say(f"{number} {run.title}{_outcome(record)}{progress.left}")
        for record in failed if len(failed) < len(self.waiting) or len(failed) > 1 else ():
            self.say(f"  {record.label} on {record.stream}, seed {record.seed}: {record.error}; see {record.source}")
        if failed:
            raise Failure(f"{len(failed)} of {_count(len(self.waiting))} failed, as listed above; the same command runs them again")
        self.say(f"all runs are finished; see them: clstream compare {self.folder}")
        return 0

    def _job(self, run: Planned, parent: str | None) -> SeedJob:
        """Return the job of a run, whose folder gets its config."""
        from clstream.cli.run_folders import CONFIG
        from clstream.cli.seed_jobs import SeedJob
        from clstream.files import write_atomically

        folder = (self.folder / "runs" / run.folder_name).absolute()
        for place in (folder, folder / f"seed_{run.seed}"):
            if place.is_symlink():
                raise Failure(f"{place} is a link, and what it leads to may be anybody's: remove it")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, lambda out: out.write(run.config.encode()))
        return SeedJob(run.config, run.seed, folder, Path.cwd(), parent, run.trust, self.own.accept_changed_code)

    def _record(self, run: Planned, value: Result | JobError, folder: Path) -> Record:
        from clstream.comparison.records import Record, record_of
        from clstream.sweep.identity import code_version
        from clstream.sweep.progress import sentence_of
        from clstream.sweep.workers import JobError

        known: dict[str, Any] = {
            "label": run.label, "stream": run.place, "identity": str(run.identity), "fingerprint": run.identity.data,
            "code": code_version(), "tuned": run.tuned, "source": str(self.folder / "runs" / folder.name / f"seed_{run.seed}"),
        }  # fmt: skip
        if isinstance(value, JobError):
            return Record(run.strategy, scenario=run.scenario, seed=run.seed, **known, error=sentence_of(value))
        return record_of(value, **known)

    def _append(self, record: Record) -> None:
        """Keep a record, of a finished run in the further file too."""
        from clstream.comparison.records import append_record

        append_record(self.file, record)
        if self.further is not None and not record.error and record.identity not in self.in_further:
            append_record(self.further, record)


def _without_code(identity: str) -> tuple[str, str]:
    """Return the config and the data of an identity."""
    return identity.partition("-")[0], identity.rpartition("-")[2]


def _outcome(record: Record) -> str:
    """Return how a run ended, as a line about it goes on."""
    if record.error:
        return f" failed: {record.error}"
    measures = [
        f"{name.replace('_', ' ').removeprefix('average ')} {record.metrics[name]:.3f}"
        for name in (f"average_{record.main.replace('/', '_')}", "forgetting")
        if name in record.metrics
    ]
    return f": {', '.join([*measures, f'{record.seconds:.1f} s'])}"


def _count(runs: int) -> str:
    return f"{runs} run{'s' * (runs != 1)}"
