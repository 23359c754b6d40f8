"""What commands print of runs: the table of results, and forgetting curves as text."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from clstream.cli.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from clstream.cli.experiment import Outcome
    from clstream.results import Result


MEASURES: dict[str, Callable[[Result], float]] = {
    "accuracy": lambda result: result.average_accuracy,
    "forgetting": lambda result: result.forgetting,
    "seconds": lambda result: result.seconds,
}
"""What tables show of a run."""


def track_comparisons(outcomes: list[Outcome], files: list[str], began: float) -> None:
    """Draw the runs that are tracked in one place, and are of one stream, against each other."""
    together: dict[tuple[object, ...], list[tuple[str, list[Result]]]] = {}
    for outcome, name in zip(outcomes, titles(outcomes, files), strict=True):
        params = outcome.results[0].params
        if outcome.tracked:
            same = [params[key] for key in ("stream", "stream.tasks", "stream.scenario")]
            label = name.replace(f" on {params['stream']}", "", 1)
            together.setdefault((outcome.tracked, outcome.experiment, *same), []).append((label, outcome.results))
    for (tracked, experiment, *_), runs in together.items():
        if len(runs) > 1:
            from clstream.tracking.parent_runs import track_comparison

            track_comparison(dict(runs), str(experiment), None if tracked == "default" else str(tracked), began)


def report_runs(outcomes: list[Outcome], files: Sequence[str] = ()) -> None:
    """Print a table, the accuracies over the sessions, and how to see more."""
    console = wide_console()
    show_table(console, list(zip(titles(outcomes, files), (outcome.results for outcome in outcomes), strict=True)))
    for outcome in outcomes:
        show_curves(console, outcome.results)
    command = sys.argv[0] if os.path.basename(sys.argv[0]) == "clstream" else "clstream"  # as it was called, so that it is found
    for where in sorted({outcome.tracked for outcome in outcomes} - {""}):
        option = "" if where == "default" else f" --tracking_uri {where}"
        console.print(f"\nCurves, params and pictures are in MLflow. To see them: {command} ui{option}", markup=False)


def wide_console() -> Console:
    """Return a console whose lines are as long as they need to be, if they go to a file: only a terminal has an edge."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 1000)


def titles(outcomes: list[Outcome], files: Sequence[str]) -> list[str]:
    """Return the name of each run, with its config file where two have the same."""
    names = [title(outcome.results) for outcome in outcomes]
    return [
        f"{name} ({file.removesuffix('.yaml')})" if names.count(name) > 1 else name
        for name, file in zip(names, files or names, strict=True)
    ]


def title(results: list[Result]) -> str:
    """Return the name of what was run."""
    params = results[0].params
    return f"{params['strategy']} on {params['stream']}"


def mean_and_std(values: list[float], digits: int) -> str:
    """Return the mean of some values and, for several that are numbers, their sample standard deviation."""
    mean = fmean(values)
    return f"{mean:.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 and math.isfinite(mean) else "")


def show_table(console: Console, rows: list[tuple[str, list[Result]]]) -> None:
    """Print accuracy, forgetting and seconds of each row: the mean over its seeds, and their standard deviation."""
    from rich.table import Table

    counts = [len(results) for _, results in rows]
    over = f"{counts[0]} seeds" if len(set(counts)) == 1 else "the seeds of each"
    table = Table(caption=f"mean ± standard deviation over {over}" if max(counts) > 1 else None, caption_justify="left")
    for column in ("run", "accuracy", "forgetting", "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=column != "run", overflow="fold")
    for name, results in rows:
        name += f", {len(results)} seed{'s' * (len(results) > 1)}" if len(set(counts)) > 1 else ""
        values = {key: [measure(result) for result in results] for key, measure in MEASURES.items()}
        cells = (mean_and_std(values[key], digits) for key, digits in (("accuracy", 3), ("forgetting", 3), ("seconds", 1)))
        table.add_row(name, *cells)
    console.print(table)


def show_curves(console: Console, results: list[Result]) -> None:
    """Print how the accuracy on each task went over the sessions, for the first seed."""
    from clstream.figures import sparklines

    result = results[0]
    console.print(f"\n{title(results)}, seed {result.params['seed']}: accuracy on each task, session by session", markup=False)
    for line in sparklines(result.main, result.taught):
        console.print(printable("  " + line), markup=False)
