"""What commands print of runs: the table of results, and forgetting curves as text."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from clstream.cli.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from clstream.cli.experiment import Outcome
    from clstream.results import Result


def track_comparisons(outcomes: list[Outcome], files: list[str], began: float) -> None:
    """Draw the runs that are tracked in one place, and are of one stream and one main measure, against each other."""
    together: dict[tuple[object, ...], list[tuple[str, list[Result]]]] = {}
    for outcome, name in zip(outcomes, titles(outcomes, files), strict=True):
        params = outcome.results[0].params
        if outcome.tracked:
            same = [*(params[key] for key in ("stream", "stream.tasks", "stream.scenario")), outcome.results[0].main_name]
            label = name.replace(f" on {params['stream']}", "", 1)
            together.setdefault((outcome.tracked, outcome.experiment, *same), []).append((label, outcome.results))
    for (tracked, experiment, *_), runs in together.items():
        if len(runs) > 1:
            from clstream.tracking.parent_runs import track_comparison

            track_comparison(dict(runs), str(experiment), None if tracked == "default" else str(tracked), began)


def report_runs(outcomes: list[Outcome], files: Sequence[str] = ()) -> None:
    """Print tables, the main measure on each task over the sessions, and how to see more."""
    console = wide_console()
    rows = list(zip(titles(outcomes, files), (outcome.results for outcome in outcomes), strict=True))
    by_measure: dict[str, list[tuple[str, list[Result]]]] = {}
    for name, results in rows:
        by_measure.setdefault(results[0].main_name, []).append((name, results))
    for group in by_measure.values():
        show_table(console, group)
    if len(by_measure) > 1:
        console.print(
            f"The main measures, {' and '.join(by_measure)}, can't be compared: each has a table of its own.", markup=False
        )
    for name, results in rows:
        show_measured(console, name, results)
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
    """Return the mean of some values and, for several, their sample standard deviation; a dash if they are no numbers."""
    mean = fmean(values)
    if math.isnan(mean):  # a run of one task has no forgetting
        return "-"
    return f"{mean:.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 and math.isfinite(mean) else "")


def show_table(console: Console, rows: list[tuple[str, list[Result]]]) -> None:
    """Print the main measure, forgetting and seconds of each row: the mean over its seeds, and their standard deviation."""
    from rich.table import Table

    counts = [len(results) for _, results in rows]
    over = f"{counts[0]} seeds" if len(set(counts)) == 1 else "the seeds of each"
    table = Table(caption=f"mean ± standard deviation over {over}" if max(counts) > 1 else None, caption_justify="left")
    for column in ("run", rows[0][1][0].main_name, "forgetting", "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=column != "run", overflow="fold")
    for name, results in rows:
        name += f", {len(results)} seed{'s' * (len(results) > 1)}" if len(set(counts)) > 1 else ""
        average, forgetting, seconds = zip(*((run.average, run.forgetting, run.seconds) for run in results), strict=True)
        table.add_row(name, mean_and_std([*average], 3), mean_and_std([*forgetting], 3), mean_and_std([*seconds], 1))
    console.print(table)


def show_measured(console: Console, name: str, results: list[Result]) -> None:
    """Print what else was measured after the last session, if there is anything: a row for each measure, a column for test sets."""
    from rich.table import Table

    first = results[0]
    tasks, plain = len(first.targets), {"accuracy", "task_accuracy", *first.main_names}
    if not len(first.main) or (set(first.measured) <= plain and tasks + 1 == len(first.test_sets)):
        return
    columns = {"mean of tasks": range(tasks), "all seen": [len(first.test_sets) - 1]}
    for place, test_set in enumerate(first.test_sets[tasks:-1], tasks):  # copies of the tasks' test sets share a column
        group, _, own = test_set.rpartition("/")
        title = f"{group}, mean" if own in first.test_sets[:tasks] else test_set
        columns[title] = [*columns.get(title, []), place]
    table = Table("measure", title=f"{name}: after the last session", title_justify="left")
    for title in columns:
        table.add_column(title, justify="right")
    for measure in first.measured:
        cells = []
        for places in columns.values():
            values = [_mean_of_seen(result, measure, places) for result in results]
            cells.append(mean_and_std(values, 3) if all(map(math.isfinite, values)) else "-")
        if set(cells) != {"-"}:
            table.add_row(measure + " (lower is better)" * (measure in first.lower_is_better), *cells)
    console.print(table)


def _mean_of_seen(result: Result, measure: str, places: Sequence[int]) -> float:
    """Return the mean of the last values of a measure of some test sets, without those of tasks that were not taught."""
    last, tasks = result.measured[measure][-1].tolist(), len(result.targets)
    seen = dict(zip(result.test_sets[:tasks], result.taught.any(0).tolist(), strict=True))
    asked = [last[place] for place in places if seen.get(result.test_sets[place].rpartition("/")[2], True)]
    known = [value for value in asked if not math.isnan(value)]
    return fmean(known) if known else math.nan


def show_curves(console: Console, results: list[Result]) -> None:
    """Print how the main measure of each task went over the sessions, for the first seed."""
    from clstream.figures import sparklines

    result = results[0]
    what = f"{title(results)}, seed {result.params['seed']}: {result.main_name} on each task, session by session"
    console.print(f"\n{what}", markup=False)
    for line in sparklines(result.main, result.taught):
        console.print(printable("  " + line), markup=False)
