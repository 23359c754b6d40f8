"""The command `clstream`: run, resume, compare, verify, prove-resume, parity, pretrain, show, record, log, sync, list, ui."""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NoReturn

from clstream import __version__
from clstream.errors import Failure, UsageError, nearest, printable
from clstream.settings import parse_seeds

if TYPE_CHECKING:
    from rich.console import Console

    from clstream.anchors import Anchor
    from clstream.engine import Result
    from clstream.playing import Played
    from clstream.stream import Stream

# What takes seconds to import, torch above all, is imported by the commands that need it: help and a wrong command answer at once.

USAGE = """\
usage: clstream COMMAND [options]

  run           play a stream to a strategy:  clstream run --stream split_digits --strategy Replay --strategy.capacity 200
  resume        go on with a run:             clstream resume runs/NAME
  compare       several runs in one table:    clstream compare finetune.yaml replay.yaml --seeds 0,1,2
  verify        rerun a known result:         clstream verify er-split-mnist
  prove-resume  kill a run again and again:   clstream prove-resume --strategy my_file.MyStrategy --kills 20
  parity        hold our methods against Avalanche's:  clstream parity --methods EWC,Replay --seeds 0,1,2,3,4
  pretrain      train a model to start from:  clstream pretrain --stream split_mnist --model VitTiny --out vit.pt
  show          draw a stream before running:  clstream show fuzzy_tasks --stream.width 0.8
  record        write what a stream is:       clstream record --stream split_digits --out digits.clstream
  log           read what happened in a run:  clstream log runs/NAME
  sync          send what a tracking server did not take while it was away
  list          the strategies, streams, models and anchors there are, or one kind:  clstream list strategies
  ui            open the MLflow UI on what was run

clstream COMMAND --help says more.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 for what failed, 2 for what was asked wrongly, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own strategy lies in the folder where the command is given
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": run_command, "resume": resume_command, "prove-resume": prove_command, "compare": compare_command,
        "verify": verify_command, "parity": parity_command, "pretrain": pretrain_command, "show": show_command,
        "record": record_command, "log": log_command, "sync": sync_command, "list": list_command, "ui": ui_command,
    }  # fmt: skip
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0] == "--version":
        print(f"clstream {__version__}")
        return 0
    try:
        if given[0] not in commands:
            raise UsageError(
                f"there is no command {given[0]!r}{nearest(given[0], list(commands)) or ': clstream --help lists them'}"
            )
        return commands[given[0]](given[1:])
    except UsageError as error:
        _complain(error)
        return 2
    except Failure as error:
        _complain(error)
        return 1
    except SystemExit as end:  # after a help text
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        from clstream.checkpoint import Stopped

        if isinstance(stop, Stopped):
            with suppress(OSError):  # whoever read it may be gone by the same signal
                trust = f" --trust {','.join(stop.trust)}" if stop.trust else ""
                print(f"\nclstream: {stop}\nclstream: to go on: clstream resume {stop.folder.parent}{trust}", file=sys.stderr)
            return 128 + stop.signal
        print(
            "\nclstream: stopped, with no checkpoint to go on with; what was tracked is kept in MLflow, marked KILLED",
            file=sys.stderr,
        )
        return 130


class CommandParser(argparse.ArgumentParser):
    """The parser of a command's own options: each in full and once, and an error is one sentence."""

    def __init__(self, command: str, description: str, usage: str | None = None, epilog: str | None = None) -> None:
        super().__init__(prog=f"clstream {command}", description=description, usage=usage, epilog=epilog, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the options that it has. Raises UsageError for one that is given twice."""
        own = [option for action in self._actions for option in action.option_strings]
        given = [name.replace("-", "_") for word in args or () if (name := word.partition("=")[0]) in own]
        if twice := next((name for name in given if given.count(name) > 1), None):
            self.error(f"--{twice.lstrip('_')} is given twice: keep the right one")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with what argparse says, and the option that was probably meant."""
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            options = [option for action in self._actions for option in action.option_strings]
            message = f"unknown option {unknown[1]}{nearest(unknown[1], options)}"
            if not unknown[1].startswith("-"):
                message = f"{unknown[1]!r} belongs to no option"
        raise UsageError(f"{message}; {self.prog} --help says what it takes")


def _complain(error: Exception | str) -> None:
    print(printable(f"clstream: error: {error}"), file=sys.stderr)


def run_command(arguments: list[str]) -> int:
    """`clstream run`."""
    from clstream.playing import play

    if shown := shown_help(arguments):
        print(shown, end="")
        return 0
    report_runs([play(arguments)])
    return 0


def shown_help(arguments: list[str]) -> str:
    """Return what is only to be shown: help, or the options as YAML; nothing if there is a run to be made."""
    from clstream.config import PLACES, as_yaml, option_help, parse_run, run_parser
    from clstream.playing import tell_notes

    if "-h" in arguments or "--help" in arguments:
        return str(run_parser().format_help()) + "\n"
    for option, name in zip(arguments, [*arguments[1:], ""], strict=True):
        if option.startswith("--") and option.endswith(".help") and option[2:-5] in PLACES:
            return option_help(option[2:-5], name) + "\n"
    parser, options = parse_run(arguments)
    if options.print_config:
        tell_notes(parser)
    return as_yaml(parser, options) if options.print_config else ""


def resume_command(arguments: list[str]) -> int:
    """`clstream resume`: go on with a run from its newest checkpoint."""
    parser = CommandParser(
        "resume",
        description="Go on with a run from its newest checkpoint; it ends as it would have without the break.",
    )
    parser.add_argument("run", help="its folder, as runs/NAME, or the id of its MLflow run")
    parser.add_argument("--runs", default="runs", help="folder of the run folders")
    parser.add_argument("--data_root", "--data-root", help="folder with the data sets, if it lies elsewhere now")
    parser.add_argument("--tracking_uri", "--tracking-uri", help="the tracking server, if it has another address now")
    parser.add_argument("--trust", help="packages of yours that its config may name, beside the files of this folder")
    parser.add_argument(
        "--accept_changed_code", "--accept-changed-code", action="store_true",
        help="go on though source code of your own has changed since; the log and the tags of the run say so",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    from clstream.playing import play
    from clstream.tries import CONFIG, earlier

    folder = earlier(options.run, Path(options.runs))
    moved = [f"--{name}={value}" for name in ("data_root", "tracking_uri", "trust") if (value := getattr(options, name))]
    moved += ["--accept_changed_code"] if options.accept_changed_code else []
    report_runs([play(["--config", str(folder / CONFIG), *moved], folder)])
    return 0


def compare_command(arguments: list[str]) -> int:
    """`clstream compare`: each config file is run with the same further options."""
    files = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    rest = arguments[len(files) :]
    if not files or {"-h", "--help"} & set(rest):
        print("usage: clstream compare CONFIG [CONFIG ...] [options of clstream run, for all of them]")
        return 0 if rest else 2
    from clstream.playing import play

    if shown := "".join([shown_help(["--config", file, *rest]) for file in files]):  # all are looked at before the first is run
        print(shown, end="")
        return 0
    began = time.time()
    played = [play(["--config", file, *rest]) for file in files]
    report_runs(played, files)
    track_comparisons(played, files, began)
    return 0


def track_comparisons(played: list[Played], files: list[str], began: float) -> None:
    """Draw the runs that are tracked in one place, and are of one stream, against each other."""
    together: dict[tuple[object, ...], list[tuple[str, list[Result]]]] = {}
    for each, name in zip(played, titles(played, files), strict=True):
        params = each.results[0].params
        if each.tracked:
            same = [params[key] for key in ("stream", "stream.tasks", "stream.scenario")]
            label = name.replace(f" on {params['stream']}", "", 1)
            together.setdefault((each.tracked, each.experiment, *same), []).append((label, each.results))
    for (tracked, experiment, *_), runs in together.items():
        if len(runs) > 1:
            from clstream.tracking import track_comparison

            track_comparison(dict(runs), str(experiment), None if tracked == "default" else str(tracked), began)


def report_runs(played: list[Played], files: Sequence[str] = ()) -> None:
    """Print a table, the accuracies over the sessions, and how to see more."""
    console = wide_console()
    show_table(console, list(zip(titles(played, files), (each.results for each in played), strict=True)))
    for each in played:
        show_curves(console, each.results)
    command = sys.argv[0] if os.path.basename(sys.argv[0]) == "clstream" else "clstream"  # as it was called, so that it is found
    for where in sorted({each.tracked for each in played} - {""}):
        option = "" if where == "default" else f" --tracking_uri {where}"
        console.print(f"\nCurves, params and pictures are in MLflow. To see them: {command} ui{option}", markup=False)


def wide_console() -> Console:
    """Return a console whose lines are as long as they need to be, if they go to a file: only a terminal has an edge."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 1000)


def titles(played: list[Played], files: Sequence[str]) -> list[str]:
    """Return the name of each run, with its config file where two have the same."""
    names = [title(each.results) for each in played]
    return [
        f"{name} ({file.removesuffix('.yaml')})" if names.count(name) > 1 else name
        for name, file in zip(names, files or names, strict=True)
    ]


def title(results: list[Result]) -> str:
    """Return the name of what was run."""
    params = results[0].params
    return f"{params['strategy']} on {params['stream']}"


def spread(values: list[float], digits: int) -> str:
    """Return the mean of some values and, for several that are numbers, their sample standard deviation."""
    mean = fmean(values)
    return f"{mean:.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 and math.isfinite(mean) else "")


def show_table(console: Console, rows: list[tuple[str, list[Result]]]) -> None:
    """Print accuracy, forgetting and seconds of each row: the mean over its seeds, and their standard deviation."""
    from rich.table import Table

    from clstream.playing import MEASURES

    counts = [len(results) for _, results in rows]
    over = f"{counts[0]} seeds" if len(set(counts)) == 1 else "the seeds of each"
    table = Table(caption=f"mean ± standard deviation over {over}" if max(counts) > 1 else None, caption_justify="left")
    for column in ("run", "accuracy", "forgetting", "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=column != "run", overflow="fold")
    for name, results in rows:
        name += f", {len(results)} seed{'s' * (len(results) > 1)}" if len(set(counts)) > 1 else ""
        values = {key: [measure(result) for result in results] for key, measure in MEASURES.items()}
        table.add_row(name, spread(values["accuracy"], 3), spread(values["forgetting"], 3), spread(values["seconds"], 1))
    console.print(table)


def show_curves(console: Console, results: list[Result]) -> None:
    """Print how the accuracy on each task went over the sessions, for the first seed."""
    from clstream.figures import sparklines

    result = results[0]
    console.print(f"\n{title(results)}, seed {result.params['seed']}: accuracy on each task, session by session", markup=False)
    for line in sparklines(result.main, result.taught):
        console.print(printable("  " + line), markup=False)


def verify_command(arguments: list[str]) -> int:
    """`clstream verify`: rerun an anchor, and say whether it is inside what was expected."""
    parser = CommandParser("verify", description="Rerun an anchor, and say whether it is inside what is expected.")
    parser.add_argument("anchor", nargs="?", help="its name, or a YAML file; without it, the anchors are listed")
    parser.add_argument("--seeds", help="in place of the anchor's own, as 0-2 or 0,1,2")
    parser.add_argument("--data_root", "--data-root", help="folder with the data sets, in torchvision's layout")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch uses")
    parser.add_argument("--track", action="store_true", help="also write the runs to MLflow")
    options = parser.parse_args(arguments)
    from clstream.anchors import anchor_names, load_anchor
    from clstream.config import parse_run, seeds_of
    from clstream.playing import play

    console = wide_console()
    if options.anchor is None:
        for name in anchor_names():
            anchor = load_anchor(name)
            console.print(f"{name:32} {anchor.expectation()}; about {anchor.minutes:g} min", markup=False)
        return 0
    anchor = load_anchor(options.anchor)
    seeds = options.seeds or ",".join(map(str, anchor.seeds))
    given = ["--config", str(anchor.config_file()), "--threads", str(options.threads)]
    given += ["--track", str(options.track).lower(), "--checkpoint_every", "0"]
    given += ["--data_root", options.data_root] if options.data_root else []
    if not anchor.seeded:
        return report(console, anchor, play([*given, "--seeds", seeds]).results)
    results: list[Result] = []
    for seed in seeds_of(parse_run([*given, "--seeds", seeds])[1]):  # what is drawn anew for each run is an option of that run
        drawn = [word for option in anchor.seeded for word in (f"--{option}", str(seed))]
        results += play([*given, "--seeds", str(seed), *drawn]).results
    return report(console, anchor, results)


def report(console: Console, anchor: Anchor, results: list[Result]) -> int:
    """Print what an anchor measured, by each of its metrics; return 0 if all are inside, else 1."""
    outside = 0
    for figure in anchor:
        values = [figure.measure(result) for result in results]
        seeds = ", ".join(str(each.params["seed"]) for each in results)
        console.print(f"{anchor.name}: {figure.metric} {spread(values, 4)} over seeds {seeds}")
        console.print(f"  each      {', '.join(f'{value:.4f}' for value in values)}")
        console.print(f"  expected  {figure.expectation()}", markup=False)
        console.print(f"  source    {anchor.kind}: {anchor.source}", markup=False)
        good, verdict = figure.verdict(sum(values) / len(values), len(values))
        outside += not good
        console.print(f"  {verdict}; {sum(result.seconds for result in results):.0f} s", markup=False)
    return int(outside > 0)


def prove_command(arguments: list[str]) -> int:
    """`clstream prove-resume`: kill a run again and again, and show that it ends as if it had not been."""
    parser = CommandParser(
        "prove-resume",
        usage="clstream prove-resume [--kills N] [--out FOLDER] [options of clstream run]",
        description="Run once through, and once killed and resumed again and again; compare all weights, memories, generators and "
        "metrics bit for bit, the event logs, and what MLflow has.",
    )
    parser.add_argument("--kills", type=int, default=20, help="how often the run is killed")
    parser.add_argument("--kill_seed", "--kill-seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", help="an empty folder for both runs; by default one that is removed at the end")
    own, rest = parser.parse_known_args(arguments)
    if own.kills < 1:
        raise UsageError(f"--kills must be at least 1, not {own.kills}")

    from clstream.config import parse_run, seeds_of
    from clstream.proof import OWN, prove

    given = [word.partition("=")[0].removeprefix("--").replace("-", "_") for word in rest]
    if taken := next((name for name in given if name in OWN), None):
        raise UsageError(f"clstream prove-resume sets --{taken} itself: leave it out")
    if len(seeds_of(parse_run(rest)[1])) > 1:
        raise UsageError("clstream prove-resume runs one seed: give --seed")
    if own.out is not None and Path(own.out).exists() and any(Path(own.out).iterdir()):
        raise Failure(f"{own.out} is not empty: name another folder")
    console = wide_console()
    with tempfile.TemporaryDirectory(prefix="clstream-") as temporary:
        proof = prove(
            rest, own.kills, Path(own.out or temporary).absolute(), own.kill_seed, lambda line: console.print(line, markup=False)
        )
        torn = sum(kill.torn for kill in proof.kills)
        console.print(f"{len(proof.kills)} kills, {torn} of them with a checkpoint half written")
        console.print(
            f"compared: {proof.parts} attributes, tensors and generators; {proof.metrics} points in MLflow; {proof.lines} log lines"
        )
        console.print("0 bits differ" if proof.difference is None else f"DIFFERENT: {proof.difference}", markup=False)
        few = len(proof.kills) < own.kills
        if few:
            console.print(f"NOT PROVED: it was to be killed {own.kills} times; give a longer run, or fewer kills")
    return 0 if proof.difference is None and not few else 1


def parity_command(arguments: list[str]) -> int:
    """`clstream parity`: run our strategies and Avalanche's on the same stream; return 1 if they differ where they should not."""
    parser = CommandParser(
        "parity",
        description="Run strategies of ours and of Avalanche 0.6.0 on the same stream, from the same weights, and print whether "
        "accuracy and forgetting agree within the noise of seeds (Welch's test at 0.01), and the time of both.",
    )
    parser.add_argument("--methods", help="those whose names begin so, with commas; by default all")
    parser.add_argument("--seeds", default="0-4", help="at least two")
    parser.add_argument("--data", default="mnist", choices=("mnist", "digits"), help="five tasks of two classes of it")
    parser.add_argument("--per_task", "--per-task", type=int, default=2000, help="training samples of each task; 0 for all")
    parser.add_argument("--out", help="a CSV file for each run's numbers")
    parser.add_argument("--data_root", "--data-root", help="folder with the data sets, in torchvision's layout")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch uses")
    options = parser.parse_args(arguments)
    seeds = parse_seeds(options.seeds)
    if len(seeds) < 2:
        raise UsageError("clstream parity compares samples of runs: give at least two --seeds")
    if options.per_task < 0 or options.threads < 1:
        raise UsageError("--per_task takes a whole number from 0 up, --threads one from 1 up")
    if options.out is not None and not Path(options.out).absolute().parent.is_dir():
        raise UsageError(f"there is no folder for {options.out}")
    import torch

    from clstream.optional import avalanche
    from clstream.playing import said

    if options.data_root:
        os.environ["CLSTREAM_DATA"] = options.data_root
    parity = importlib.import_module("clstream.experiments.parity.measuring")
    try:
        methods = parity.chosen(options.methods)
    except ValueError as error:
        raise UsageError(f"--methods: {error}") from None
    torch.set_num_threads(options.threads)
    with said(ValueError, TypeError, OSError, ImportError):
        avalanche("benchmarks")
        stream = parity.stream_of(options.data, options.per_task or None)
        print(f"{stream}\n", flush=True)
        out = None if options.out is None else Path(options.out)
        lines: list[str] = []

        def say(line: str) -> None:
            lines.append(line)
            print(line, flush=True)

        parity.compare(methods, seeds, stream, out, say)
    return int(any(line.endswith("DIFFER |") for line in lines))


def pretrain_command(arguments: list[str]) -> int:
    """`clstream pretrain`: train a model on a stream's classes together, and write its weights to a file."""
    parser = CommandParser(
        "pretrain",
        usage="clstream pretrain --stream NAME --model NAME [options] --out FILE",
        description="Train a model on all classes of a stream together, and write its weights: `clstream run --weights FILE` "
        "starts from them.",
        epilog="--stream NAME, --model NAME, --optimizer NAME and their options, --seed, --device, --threads and --data_root "
        "FOLDER are as in clstream run; it learns as the strategy Finetune.",
    )
    parser.add_argument("--out", required=True, help="the file to write, as vit.pt")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument("--classes", help="the labels to train on, as 0,1,2; by default all")
    parser.add_argument("--epochs", type=int, help="passes over the samples; by default those of the stream")
    own, rest = parser.parse_known_args(arguments)
    known = ("--stream", "--model", "--optimizer", "--seed", "--device", "--threads", "--data_root", "--data-root")
    for option in (argument.partition("=")[0] for argument in rest if argument.startswith("--")):
        if option.partition(".")[0] not in known:
            raise UsageError(
                f"clstream pretrain has no option {option}{nearest(option, ['--out', '--classes', '--epochs', *known])}"
            )
    try:
        classes = None if own.classes is None else [int(label) for label in own.classes.split(",")]
    except ValueError:
        raise UsageError(f"--classes takes whole numbers with commas, as 0,1,2, not {own.classes!r}") from None
    import torch

    from clstream.config import build_strategy, build_stream, parse_run
    from clstream.engine import check_fits, run
    from clstream.playing import said, tell_notes
    from clstream.pretraining import joined, save_weights
    from clstream.progress import ProgressBar

    out = Path(own.out)
    if not out.parent.is_dir() or (out.exists() and not (own.force and out.is_file())):
        raise Failure(f"{out} is there already: --force replaces it" if out.exists() else f"there is no folder {out.parent}")
    given = [re.sub("^--optimizer", "--strategy.optimizer", argument) for argument in rest]
    run_options, options = parse_run(["--strategy", "Finetune", *given])
    tell_notes(run_options)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    with said(ValueError, TypeError, OSError, ImportError):
        whole = build_stream(run_options, options)
        stream = joined(whole, classes, own.epochs)
        strategy = build_strategy(run_options, options, whole, options.seed)
        check_fits(strategy, stream, options.device)
    with said(FloatingPointError):
        result = run(strategy, stream, ProgressBar(f"training on {stream.name}"), seed=options.seed, device=options.device)
    about: dict[str, Any] = {"labels": list(stream.tasks[0].classes), "data": whole.fingerprint}
    about |= {"accuracy": result.average_accuracy}
    about |= {name: result.params[name] for name in ("stream", "stream.epochs", "stream.batch_size", "strategy.optimizer", "seed")}
    with said(OSError):
        save_weights(strategy.model, out, about)
    print(f"{type(strategy.model).__name__} on {stream.name}: accuracy {result.average_accuracy:.3f}, {result.seconds:.0f} s")
    print(f"weights in {out}: clstream run --weights {out} starts from them")
    return 0


def show_command(arguments: list[str]) -> int:
    """`clstream show`: print a stream's card and what it delivers over time, and draw that; nothing is run."""
    parser = CommandParser(
        "show",
        usage="clstream show STREAM [--stream.OPTION VALUE ...] [--by {class,task}] [--out FILE.png]",
        description="Draw what a stream delivers over time, without running anything.",
        epilog="STREAM and its options, --config FILE, --data_root FOLDER and --tune are as in clstream run.",
    )
    parser.add_argument("--by", choices=("class", "task"), help="what is counted; by default tasks where they share their classes")
    parser.add_argument("--out", help="a picture to write, as stream.png, .svg or .pdf")
    own, rest = parser.parse_known_args(arguments)

    from clstream.figures import composition_figure, composition_lines
    from clstream.showing import composition

    rest = ["--stream", *rest] if rest and not rest[0].startswith("-") else rest
    stream = _stream_of("show", rest, "--by and --out")
    found = composition(stream, own.by)
    console = wide_console()
    console.print(printable(str(stream)), markup=False)
    whole = len(found.sessions) == len(stream)
    console.print(f"\nsamples of each {found.by}, session by session{'' if whole else f', {len(found.sessions)} of {len(stream)}'}")
    for line in composition_lines(found.counts, found.names, found.by, max(10, min(120, console.width - 24))):
        console.print("  " + line, markup=False)
    if own.out is not None:
        try:
            composition_figure(found.counts, found.sessions, found.names, found.by, stream.name).savefig(own.out, dpi=110)
        except (OSError, ValueError) as error:
            raise Failure(f"{own.out} can't be written: {error}") from error
        print(f"\ndrawn in {own.out}")
    return 0


def _stream_of(command: str, rest: list[str], others: str) -> Stream:
    """Return the stream that the options of a command name, which takes no more of those of `clstream run`."""
    known = ("--stream", "--config", "--data_root", "--data-root", "--tune", "--trust")
    for option in (argument.partition("=")[0] for argument in rest if argument.startswith("-")):
        if option not in known and not option.startswith("--stream."):
            raise UsageError(f"clstream {command} has no option {option}: it takes {', '.join(known[:3])}, --tune, {others}")
    if not any(argument.partition("=")[0] in ("--stream", "--config") for argument in rest):
        raise UsageError(f"clstream {command} needs the stream: --stream NAME, or a --config that names it")
    from clstream.config import build_stream, parse_run
    from clstream.playing import tell_notes

    try:
        parser, options = parse_run(rest)
        tell_notes(parser)
        return build_stream(parser, options)
    except UsageError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise Failure(str(error)) from error


def record_command(arguments: list[str]) -> int:
    """`clstream record`: write what a stream is to a file; nothing is run."""
    parser = CommandParser(
        "record",
        usage="clstream record --stream NAME [--stream.OPTION VALUE ...] --out FILE",
        description="Write what a stream is, without its samples; `--stream recorded:FILE` replays it over the same data.",
        epilog="--stream NAME and its options, --config FILE, --data_root FOLDER and --tune are as in clstream run.",
    )
    parser.add_argument("--out", required=True, help="the file to write, as digits.clstream")
    parser.add_argument("--force", action="store_true", help="overwrite a file that holds something else")
    own, rest = parser.parse_known_args(arguments)
    from clstream.recording import record

    stream = _stream_of("record", rest, "--out and --force")
    try:
        file = record(stream, own.out, own.force)
    except (ValueError, TypeError, OSError) as error:
        raise Failure(str(error)) from error
    print(stream)
    print(f"\nrecorded in {file}: {file.stat().st_size:,} bytes, fingerprint {stream.fingerprint}")
    return 0


def log_command(arguments: list[str]) -> int:
    """`clstream log`: print the event logs of a run in reading form."""
    parser = CommandParser("log", description="Print what happened in a run, an event a line.")
    parser.add_argument("run", metavar="RUN", help="a run's folder or its name below runs/, an MLflow run id, or a log")
    parser.add_argument(
        "--batches", action=argparse.BooleanOptionalAction, default=False, help="show the batches too, where they were logged"
    )
    options = parser.parse_args(arguments)

    from clstream import eventlog
    from clstream.journal import are_damaged

    place = run_folder(options.run)
    files = [place] if place.is_file() else sorted(each for each in place.rglob(eventlog.FILE) if each.is_file())
    if not files:
        raise Failure(f"there is no event log in {place}")
    console = wide_console()
    failed = False
    for file in files:
        if len(files) > 1:
            console.print(f"{file}:", style="bold", markup=False)
        damaged: list[int] = []
        try:
            for line in eventlog.reading(eventlog.read(file, damaged), options.batches):
                console.print(line, markup=False)
        except OSError as error:
            _complain(f"the event log {file} can't be read: {error.strerror or error}")
        except ValueError as error:
            _complain(error)
        else:
            if not damaged:
                continue
            _complain(f"{file}: {are_damaged(damaged)}, and left out")
        failed = True
    return int(failed)


def sync_command(arguments: list[str]) -> int:
    """`clstream sync`: send what runs wrote while their tracking server was away; return 0 if nothing is left."""
    parser = CommandParser("sync", description="Send what runs wrote while their tracking server was away. Nothing is sent twice.")
    parser.add_argument("run", metavar="RUN", nargs="?", help="its folder or name below runs/, or its MLflow run id; else all")
    parser.add_argument("--tracking_uri", "--tracking-uri", help="where the runs are now, if not where they were")
    options = parser.parse_args(arguments)
    from clstream import outbox
    from clstream.folders import claimed
    from clstream.journal import are_damaged

    place = Path("runs") if options.run is None else run_folder(options.run)
    files = [place] if place.is_file() else outbox.journals(place)
    if options.run is not None and not files:
        raise Failure(f"there is no journal of a tracker in {place}: nothing was tracked there")
    waiting: dict[Path, int] = {}
    faults: list[str] = []
    for file in files:
        try:
            journal = outbox.peek(file)
        except OSError as error:
            faults.append(f"the journal {file} can't be read: {error.strerror}")
        except ValueError as error:
            faults.append(str(error))
        else:
            waiting[file] = len(journal.pending)
            faults += [f"{file}: {are_damaged(journal.damaged)}, and what it said can't be sent"] if journal.damaged else []
    left = len(faults)
    for fault in faults:
        _complain(fault)
    if not any(waiting.values()):
        if not faults:
            print(f"there is nothing to send in {place}")
        return int(left > 0)
    from clstream.store import deliver  # importing mlflow takes seconds: only where it is used

    for file in [file for file, count in waiting.items() if count]:
        try:
            with claimed(file.parent):
                done = deliver(file, options.tracking_uri)
        except (OSError, ValueError) as error:
            left += waiting[file]
            print(f"{file}: {waiting[file]} writes could not be sent: {error}")
            continue
        left += done.left
        print(f"{file}: {done.sent} writes sent to the MLflow run {done.run_id or 'that could not be created'}")
        if done.left:
            print(f"{file}: {done.left} writes could not be sent: {done.error}")
        elif not done.ended:
            print(f"{file}: the run itself has not ended; it may be resumed")
    return 1 if left else 0


def run_folder(name: str) -> Path:
    """Return where a run is: a folder or file, one below runs/, or the folder of the MLflow run with that id."""
    from clstream import outbox

    runs = Path("runs")
    found = next((path for path in (Path(name), runs / name) if path.exists()), None) or outbox.find(name, runs)
    if found is None:
        raise Failure(f"there is no run {name!r}: no folder of that name here or in {runs}/, and no MLflow run with that id there")
    return found


def list_command(arguments: list[str]) -> int:
    """`clstream list`."""
    parser = CommandParser("list", description="The strategies, streams, models and anchors there are.")
    kinds = ("streams", "strategies", "models", "anchors")
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"only one of {', '.join(kinds)}; by default all")
    options = parser.parse_args(arguments)
    if options.kind not in (None, *kinds):
        raise UsageError(f"clstream list has no {options.kind!r}{nearest(options.kind, kinds) or ': it has ' + ', '.join(kinds)}")
    from rich.markup import escape
    from rich.table import Table

    from clstream.anchors import anchor_names, load_anchor
    from clstream.lookup import PLACES, names
    from clstream.strategy import needs

    console = wide_console()
    for (kind, place), plural in zip(PLACES.items(), kinds, strict=False):
        if options.kind not in (None, plural):
            continue
        table = Table("name", "what it is", title=f"{kind} (--{kind} NAME)", title_justify="left", box=None, pad_edge=False)
        if kind == "strategy":
            table.add_column("needs")
        for name in names(kind):
            thing = getattr(importlib.import_module(place), name)
            table.add_row(name, escape(first_line(thing)), *([", ".join(needs(thing)) or "nothing"] if kind == "strategy" else []))
        console.print(table)
        if options.kind is None:
            console.print()
    if options.kind is None:
        console.print(f"anchors (clstream verify NAME): {', '.join(anchor_names())}", markup=False)
    elif options.kind == "anchors":
        table = Table(
            "name", "what it shows", title="anchors (clstream verify NAME)", title_justify="left", box=None, pad_edge=False
        )
        for name in anchor_names():
            table.add_row(name, escape(load_anchor(name).about))
        console.print(table)
    return 0


def first_line(thing: Any) -> str:
    """Return the first sentence of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def ui_command(arguments: list[str]) -> int:
    """`clstream ui`: start MLflow's own UI on the store of this folder, until Ctrl-C."""
    parser = CommandParser("ui", description="Start the MLflow UI on what was run here.")
    parser.add_argument(
        "--tracking_uri", "--tracking-uri", help="the store; by default MLFLOW_TRACKING_URI, else sqlite:///mlflow.db"
    )
    parser.add_argument("--experiment", help="the one to open; by default that of the newest run")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    options = parser.parse_args(arguments)
    if not 0 < options.port < 65536:
        raise UsageError(f"--port must be from 1 to 65535, not {options.port}")
    from clstream.playing import said
    from clstream.store import charts_page, tracking_uri, without_password
    from clstream.tracking import PICTURE

    where = tracking_uri(options.tracking_uri)
    if where.startswith("sqlite:///") and not os.path.exists(where.removeprefix("sqlite:///")):
        raise Failure(f"there is nothing at {where} yet: `clstream run` makes it")
    with said(OSError, LookupError):
        page = charts_page(where, PICTURE, options.experiment)
    if where.startswith("http"):
        print(f"the runs are on the tracking server: open {without_password(where).rstrip('/')}/{page}")
        return 0
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind((options.host, options.port))
        except OSError as error:
            raise Failure(
                f"the UI can't use port {options.port} of {options.host} ({error.strerror}): choose another with --port"
            ) from error
    return serve(where, options.host, options.port, page)


def serve(store: str, host: str, port: int, page: str) -> int:
    """Run MLflow's server until it ends or Ctrl-C comes; say what to open when it answers. Of its log only errors are shown."""
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store, "--host", host, "--port", str(port)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server ends too
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    assert server.stdout is not None
    threading.Thread(target=relay_errors, args=(server.stdout,), daemon=True).start()
    url = f"http://{host}:{port}"
    print(f"starting the MLflow UI on {store}", file=sys.stderr, flush=True)
    try:
        while server.poll() is None and not _answers(f"{url}/health"):
            time.sleep(0.3)
        if server.poll() is None:
            print(f"it is ready, until Ctrl-C: open\n{url}/{page}", flush=True)
        status = server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # with all of its workers
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, number)
                server.wait(5)
    raise Failure(f"the MLflow UI ended by itself, with status {status}")


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


def relay_errors(log: Iterable[str]) -> None:
    """Print the errors of a server's log, with the lines that belong to them, to the standard error."""
    shown = False
    for line in log:
        if re.search(r"\b(ERROR|CRITICAL)\b|^(Traceback|Error\b|\w*Error:)", line):
            shown = True
        elif re.search(r"\b(INFO|WARNING|DEBUG)\b|Warning:", line):
            shown = False
        if shown:
            print(line, end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
