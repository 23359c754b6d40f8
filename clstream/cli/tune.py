"""`clstream tune`: a search for options on held-out samples, and its winner on test samples, once for each seed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clstream.cli.command_parser import CommandParser
from clstream.cli.errors import Failure, UsageError, as_failure, printable
from clstream.cli.tables import report_runs, wide_console

if TYPE_CHECKING:
    from argparse import Namespace

    from optuna.trial import FrozenTrial

    from clstream.cli.searched import Searched
    from clstream.tuning import Outcome, Search

WINNER = "tuned.yaml"
"""The winner's config, in the folder of a search."""

TRIALS = 12
"""The budget, where none is given."""


def tune_command(arguments: list[str]) -> int:
    """`clstream tune`: search for options on held-out samples, and freeze the winner into a config."""
    own, rest = split_tune(arguments)
    own.trials = TRIALS if own.trials is None and own.seconds is None else own.trials
    from clstream.cli.searched import searched
    from clstream.cli.settings import parse_seeds
    from clstream.sweep.workers import ENGINES

    for option, value in (("trials", own.trials), ("workers", own.workers)):
        if value is not None and value < 1:
            raise UsageError(f"--{option} must be at least 1, not {value}")
    if own.seconds is not None and not own.seconds > 0:
        raise UsageError(f"--seconds must be above 0, not {own.seconds:g}")
    if own.engine not in ENGINES:
        raise UsageError(f"--engine must be one of {', '.join(ENGINES)}, not {own.engine!r}")
    seeds = None if own.seeds is None else parse_seeds(own.seeds)
    if own.out is not None and (Path(own.out).is_dir() or not Path(own.out).absolute().parent.is_dir()):
        raise Failure(f"{own.out} is a folder: name a file" if Path(own.out).is_dir() else f"there is no folder for {own.out}")
    with as_failure(ValueError, TypeError, OSError, ImportError, FloatingPointError):
        task = searched(rest, own.space, own.tasks, own.held_out)
        folder = Path(own.folder or Path("tunings") / task.name)
        winner = _search(own, task, folder)
    if winner is None:
        return 130
    if own.out is not None:
        with as_failure(OSError):
            Path(own.out).write_text(winner.read_text(encoding="utf-8"), encoding="utf-8")
        winner = Path(own.out)
    if seeds is None:
        print(f"\nOn test samples: clstream run --config {winner} --seeds 0-4")
        return 0
    from clstream.cli.experiment import run_experiment

    trusted = [f"--trust={','.join(task.setting.trust)}"] if task.setting.trust else []
    report_runs([run_experiment(["--config", str(winner), f"--seeds={','.join(map(str, seeds))}", "--resume=auto", *trusted])])
    return 0


def split_tune(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """Return the command's own options, and those of `clstream run`; a config that is given first needs no `--config`."""
    given = ["--config", *arguments] if arguments and not arguments[0].startswith("-") else arguments
    own, rest = tune_parser().parse_known_args(given)
    return own, rest


def tune_parser() -> CommandParser:
    """Return the parser of the command's own options."""
    parser = CommandParser(
        "tune",
        usage="clstream tune [CONFIG] --strategy NAME --stream NAME [options]",
        description="Search for options on samples that are held back from training; no trial can reach a test sample. The winner "
        "becomes a config, and with --seeds it is run on test samples, once for each seed.",
        epilog="What is searched is the section `tune` of a config, as tune: {optimizer.lr: [0.001, 0.3, log]}, or a file of that "
        "(--space), or what experiments/spaces.yaml has for the strategy. The options of clstream run say all else. The same "
        "command again goes on with a search that was stopped.",
    )
    parser.add_argument("--space", help="a YAML file: for each option its range or values")
    parser.add_argument("--trials", type=int, help=f"how many there are in all; by default {TRIALS}")
    parser.add_argument("--seconds", type=float, help="after which none begins any more, over all calls")
    parser.add_argument("--tasks", type=int, help="tune on so many of the first tasks alone; by default on all")
    parser.add_argument(
        "--held_out", "--held-out", type=float, default=0.1,
        help="the share of the training samples that trials are tested on, unless the stream's validation says it; by default 0.1",
    )  # fmt: skip
    parser.add_argument("--seeds", help="run the winner on test samples with these seeds, as 0-4; by default it is not run")
    parser.add_argument("--workers", type=int, default=1, help="trials at a time; by default 1, which can be repeated exactly")
    parser.add_argument("--engine", default="loky", help="loky (processes of this machine, by default), ray or dask")
    parser.add_argument("--address", help="of a Ray or Dask cluster")
    parser.add_argument("--folder", help="of the search; by default one below tunings/ that what is searched gives its name")
    parser.add_argument("--out", help="a file for the winner's config, beside the one in the folder")
    return parser


def _search(own: Namespace, task: Searched, folder: Path) -> Path | None:
    """Run the trials that are left, and return the winner's config; None if the search was interrupted."""
    from clstream.cli.searched import CONFIG, play
    from clstream.files import locked, write_atomically
    from clstream.tuning import Search

    console = wide_console()
    with locked(folder):
        search = Search(folder, task.space, task.options.seed, task.start, task.about)
        write_atomically(folder / CONFIG, lambda out: out.write(task.setting.config.encode()))
        options = f"{len(task.space)} option{'s' * (len(task.space) > 1)}: {', '.join(task.space)}"
        console.print(f"{task.title}, {options}; the search is in {folder}", markup=False)
        before, tracker = len(search.over), None
        if before:
            console.print(f"going on after {before} trials", markup=False)
        if task.options.track:
            from clstream.tuning.tracked import SearchTracker

            tracker = SearchTracker(search, folder, f"tuning {task.title}", task.options.experiment, task.options.tracking_uri)
        began = time.monotonic()

        def watch(trial: FrozenTrial, outcome: Outcome) -> None:
            spent = time.monotonic() - began
            count = len(search.over) - before
            left = "" if own.trials is None else f"; {spent / count * (own.trials - len(search.over)):.0f} s left"
            console.print(printable(f"  {_line(search, trial, outcome)}{left}"), markup=False)
            if tracker is not None:
                tracker.write(trial, outcome)

        status = "FAILED"
        try:
            search.run(
                partial(play, task.setting), own.trials, own.seconds, watch,
                workers=own.workers, engine=own.engine, address=own.address, threads=task.options.threads or _threads(own.workers),
            )  # fmt: skip
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            console.print(f"\nstopped after {len(search.over)} trials: the same command goes on", markup=False)
            return None
        finally:
            if tracker is not None:
                tracker.end(status)
        if search.best is None:
            last = search.over[-1].user_attrs["outcome"]["note"] or "it was pruned" if search.over else "none was run"
            raise Failure(f"no trial of {len(search.over)} came to a good end; the last one: {last}")
        text = task.frozen(search)
        write_atomically(folder / WINNER, lambda out: out.write(text.encode()))
        best = ", ".join(f"{option} {value}" for option, value in search.values(search.best).items())
        console.print(f"best: trial {search.best.number}, {search.best.value:.4f} on held-out samples: {best}", markup=False)
        console.print(f"its config: {folder / WINNER}", markup=False)
    return folder / WINNER


def _threads(workers: int) -> int | None:
    """Return the threads of a worker: one beside others, else torch's own choice."""
    return 1 if workers > 1 else None


def _line(search: Search, trial: FrozenTrial, outcome: Outcome) -> str:
    """Return the line on a trial that is over."""
    values: Mapping[str, Any] = search.values(trial)
    shown = ", ".join(f"{option} {value}" for option, value in values.items())
    result = f"{outcome.value:.4f}" if outcome.state == "complete" and math.isfinite(outcome.value) else outcome.state
    result += f" ({outcome.note})" if outcome.note else ""
    return f"trial {trial.number}: {result}, {outcome.seconds:.1f} s: {shown}"
