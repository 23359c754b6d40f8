"""The command `clstream`: run, compare, verify, list, ui."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clstream import __version__
from clstream.anchors import Anchor, anchor_names, load_anchor
from clstream.config import (
    PLACES,
    UsageError,
    as_yaml,
    build_strategy,
    build_stream,
    names,
    nearest,
    option_help,
    parse_run,
    run_parser,
    seeds_of,
)
from clstream.engine import Result, check_fits, run
from clstream.figures import sparklines
from clstream.progress import ProgressBar
from clstream.strategy import needs

USAGE = """\
usage: clstream COMMAND [options]

  run       play a stream to a strategy:  clstream run --stream split_digits --strategy Replay --strategy.capacity 200
  compare   several runs in one table:    clstream compare finetune.yaml replay.yaml --seeds 0,1,2
  verify    rerun a known result:         clstream verify er-split-mnist
  list      the strategies, streams, models and anchors there are
  ui        open the MLflow UI on what was run

clstream COMMAND --help says more.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 for what failed, 2 for what was asked wrongly, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own strategy lies in the folder where the command is given
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": run_command, "compare": compare_command, "verify": verify_command, "list": list_command, "ui": ui_command,
    }  # fmt: skip
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0] == "--version":
        print(f"clstream {__version__}")
        return 0
    try:
        if given[0] not in commands:
            raise UsageError(f"there is no command {given[0]!r}{nearest(given[0], list(commands))}")
        return commands[given[0]](given[1:])
    except UsageError as error:
        _complain(error)
        return 2
    except Failure as error:
        _complain(error)
        return 1
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nclstream: stopped; what was measured so far is kept, in an MLflow run marked KILLED", file=sys.stderr)
        return 130


class Failure(Exception):  # noqa: N818  # it is not a fault of the program
    """What was asked can't be done here, or failed in a way that is the data's or the options': one sentence."""


def _complain(error: Exception) -> None:
    print(f"clstream: error: {error}", file=sys.stderr)


def run_command(arguments: list[str]) -> int:
    """`clstream run`."""
    played = play(arguments)
    if played is not None:
        report_runs([played])
    return 0


def compare_command(arguments: list[str]) -> int:
    """`clstream compare`: each config file is run with the same further options."""
    files = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    rest = arguments[len(files) :]
    if not files or {"-h", "--help"} & set(rest):
        print("usage: clstream compare CONFIG [CONFIG ...] [options of clstream run, for all of them]")
        return 0 if rest else 2
    for file in files:
        if not os.path.isfile(file):
            raise UsageError(f"there is no config file {file}")
    for file in files:
        parse_run(["--config", file, *rest])  # all are looked at before the first is run
    played = [play(["--config", file, *rest]) for file in files]
    report_runs([each for each in played if each is not None])
    return 0


class Played(NamedTuple):
    """The results of one run for each seed, and where they were tracked; "" for nowhere."""

    results: list[Result]
    tracked: str


def report_runs(played: list[Played]) -> None:
    """Print a table, the accuracies over the sessions, and how to see more."""
    if not played:
        return
    console = Console(highlight=False, soft_wrap=True)
    show_table(console, [(title(each.results), each.results) for each in played])
    for each in played:
        show_curves(console, each.results)
    command = sys.argv[0] if os.path.basename(sys.argv[0]) == "clstream" else "clstream"  # as it was called, so that it is found
    for where in sorted({each.tracked for each in played} - {""}):
        option = "" if where == "default" else f" --tracking_uri {where}"
        console.print(f"\nCurves, params and pictures are in MLflow. To see them: {command} ui{option}", markup=False)


def play(arguments: list[str]) -> Played | None:
    """Run what the options say, once for each seed; None for --help and --print_config."""
    if "-h" in arguments or "--help" in arguments:
        print(run_parser().format_help())
        return None
    for option, name in zip(arguments, [*arguments[1:], ""], strict=True):
        if option.startswith("--") and option.endswith(".help") and option[2:-5] in PLACES:
            print(option_help(option[2:-5], name))
            return None
    parser, options = parse_run(arguments)
    if options.print_config:
        print(as_yaml(parser, options), end="")
        return None
    seeds = seeds_of(options)
    if options.threads is not None:
        if options.threads < 1:
            raise UsageError(f"--threads must be at least 1, not {options.threads}")
        torch.set_num_threads(options.threads)
    try:  # everything that can be wrong with the options shows here, before anything is learned
        stream = build_stream(parser, options)
        strategy = build_strategy(parser, options, stream, seeds[0])
        check_fits(strategy, stream, options.device, options.evaluate_every, options.max_sessions)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise Failure(str(error)) from error
    name = f"{type(strategy).__name__} on {stream.name}"
    Console(stderr=True, highlight=False, soft_wrap=True).print(str(stream), markup=False)

    def once(seed: int, *trackers: object) -> Result:
        built = strategy if seed == seeds[0] else build_strategy(parser, options, stream, seed)
        bar = ProgressBar(f"{name}, seed {seed}")
        try:
            return run(
                built, stream, *trackers, bar,
                seed=seed, device=options.device, evaluate_every=options.evaluate_every, max_sessions=options.max_sessions,
            )  # fmt: skip
        except FloatingPointError as error:
            raise Failure(str(error)) from error

    if not options.track:
        return Played([once(seed) for seed in seeds], "")
    from clstream.tracking import MlflowTracker, connect, parent_run  # importing mlflow takes seconds: only where it is used

    def tracker(seed: int, parent: str | None = None) -> MlflowTracker:
        own = options.clone()
        own.seed, own.seeds = seed, None
        return MlflowTracker(options.experiment, options.tracking_uri, parent=parent, config=as_yaml(parser, own))

    try:
        connect(options.tracking_uri, options.experiment)
    except OSError as error:
        raise Failure(str(error)) from error
    where = options.tracking_uri or "default"
    if len(seeds) == 1:
        return Played([once(seeds[0], tracker(seeds[0]))], where)
    with parent_run(f"{name}, {len(seeds)} seeds", options.experiment, options.tracking_uri) as parent:
        results = [once(seed, tracker(seed, parent.run_id)) for seed in seeds]
        shared = {key: value for key, value in results[0].params.items() if key != "seed"} | {"seeds": ",".join(map(str, seeds))}
        parent.summarise(shared, {key: [measure(result) for result in results] for key, measure in MEASURES.items()})
    return Played(results, where)


MEASURES: dict[str, Callable[[Result], float]] = {
    "accuracy": lambda result: result.average_accuracy,
    "forgetting": lambda result: result.forgetting,
    "seconds": lambda result: result.seconds,
}
"""What the table shows of a run."""


def title(results: list[Result]) -> str:
    """Return the name of what was run."""
    params = results[0].params
    return f"{params['strategy']} on {params['stream']}"


def spread(values: list[float], digits: int) -> str:
    """Return the mean of some values and, for several, their sample standard deviation."""
    each = torch.tensor(values, dtype=torch.float64)
    return f"{float(each.mean()):.{digits}f}" + (f" ± {float(each.std()):.{digits}f}" if len(values) > 1 else "")


def show_table(console: Console, rows: list[tuple[str, list[Result]]]) -> None:
    """Print accuracy, forgetting and seconds of each row: the mean over its seeds, and their standard deviation."""
    seeds = len(rows[0][1])
    table = Table(caption=f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else None, caption_justify="left")
    for column in ("run", "accuracy", "forgetting", "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for name, results in rows:
        values = {key: [measure(result) for result in results] for key, measure in MEASURES.items()}
        table.add_row(name, spread(values["accuracy"], 3), spread(values["forgetting"], 3), spread(values["seconds"], 1))
    console.print(table)


def show_curves(console: Console, results: list[Result]) -> None:
    """Print how the accuracy on each task went over the sessions, for the first seed."""
    result = results[0]
    console.print(f"\n{title(results)}, seed {result.params['seed']}: accuracy on each task, session by session", markup=False)
    for line in sparklines(result.main, result.taught):
        console.print("  " + line, markup=False)


def verify_command(arguments: list[str]) -> int:
    """`clstream verify`: rerun an anchor, and say whether it is inside what was expected."""
    parser = argparse.ArgumentParser(
        prog="clstream verify", description="Rerun an anchor, and say whether it is inside what is expected."
    )
    parser.add_argument("anchor", nargs="?", help="its name, or a YAML file; without it, the anchors are listed")
    parser.add_argument("--seeds", help="in place of the anchor's own, as 0,1,2")
    parser.add_argument("--data_root", "--data-root", help="folder with the data sets, in torchvision's layout")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch uses")
    parser.add_argument("--track", action="store_true", help="also write the runs to MLflow")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    if options.anchor is None:
        for name in anchor_names():
            anchor = load_anchor(name)
            console.print(f"{name:32} {anchor.expectation()}; about {anchor.minutes:g} min", markup=False)
        return 0
    anchor = load_anchor(options.anchor)
    given = ["--config", str(anchor.config_file()), "--seeds", options.seeds or ",".join(map(str, anchor.seeds))]
    given += ["--threads", str(options.threads), "--track", str(options.track).lower()]
    played = play(given + (["--data_root", options.data_root] if options.data_root else []))
    assert played is not None
    return report(console, anchor, played.results)


def report(console: Console, anchor: Anchor, results: list[Result]) -> int:
    """Print what an anchor measured; return 0 if it is inside, else 1."""
    values = [anchor.measure(result) for result in results]
    console.print(
        f"{anchor.name}: {anchor.metric} {spread(values, 4)} over seeds {', '.join(str(each.params['seed']) for each in results)}"
    )
    console.print(f"  each      {', '.join(f'{value:.4f}' for value in values)}")
    console.print(f"  expected  {anchor.expectation()}", markup=False)
    console.print(f"  source    {anchor.kind}: {anchor.source}", markup=False)
    low, high = anchor.interval(len(values))
    inside = low <= sum(values) / len(values) <= high
    console.print(
        f"  {'INSIDE' if inside else 'OUTSIDE'} the interval {low:.4f} to {high:.4f} for a mean of {len(values)}; "
        f"{sum(result.seconds for result in results):.0f} s"
    )
    return 0 if inside else 1


def list_command(arguments: list[str]) -> int:
    """`clstream list`."""
    parser = argparse.ArgumentParser(prog="clstream list", description="The strategies, streams, models and anchors there are.")
    parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    for kind, place in PLACES.items():
        table = Table("name", "what it is", title=f"{kind} (--{kind} NAME)", title_justify="left", box=None, pad_edge=False)
        if kind == "strategy":
            table.add_column("needs")
        for name in names(kind):
            found = getattr(importlib.import_module(place), name)
            table.add_row(name, escape(first_line(found)), *([", ".join(needs(found)) or "nothing"] if kind == "strategy" else []))
        console.print(table)
        console.print()
    console.print(f"anchors (clstream verify NAME): {', '.join(anchor_names())}", markup=False)
    return 0


def first_line(thing: Any) -> str:
    """Return the first sentence of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def ui_command(arguments: list[str]) -> int:
    """`clstream ui`: start MLflow's own UI on the store of this folder."""
    parser = argparse.ArgumentParser(prog="clstream ui", description="Start the MLflow UI on what was run here.")
    parser.add_argument(
        "--tracking_uri", "--tracking-uri", help="the store; by default MLFLOW_TRACKING_URI, else sqlite:///mlflow.db"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    options = parser.parse_args(arguments)
    from clstream.tracking import tracking_uri

    where = tracking_uri(options.tracking_uri)
    if where.startswith("http"):
        print(f"the runs are on the tracking server: open {where}")
        return 0
    if where.startswith("sqlite:///") and not os.path.exists(where.removeprefix("sqlite:///")):
        raise Failure(f"there is nothing at {where} yet: `clstream run` makes it")
    print(f"the MLflow UI on {where}: open http://{options.host}:{options.port} (Ctrl-C ends it)", flush=True)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        where,
        "--host",
        options.host,
        "--port",
        str(options.port),
    ]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
