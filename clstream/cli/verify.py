"""`clstream verify`, `prove-resume` and `parity`."""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from clstream.avalanche.imports import import_avalanche
from clstream.cli.command_parser import CommandParser
from clstream.cli.errors import Failure, UsageError, as_failure
from clstream.cli.settings import parse_seeds
from clstream.cli.tables import mean_and_std, wide_console

if TYPE_CHECKING:
    from rich.console import Console

    from clstream.cli.anchors import Anchor
    from clstream.results import Result


def verify_command(arguments: list[str]) -> int:
    """`clstream verify`: rerun an anchor, and say whether it is inside what was expected."""
    parser = CommandParser("verify", description="Rerun an anchor, and say whether it is inside what is expected.")
    parser.add_argument("anchor", nargs="?", help="its name, or a YAML file; without it, the anchors are listed")
    parser.add_argument("--seeds", help="in place of the anchor's own, as 0-2 or 0,1,2")
    parser.add_argument("--data_root", "--data-root", help="folder with the data sets, in torchvision's layout")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch uses")
    parser.add_argument("--track", action="store_true", help="also write the runs to MLflow")
    options = parser.parse_args(arguments)
    from clstream.cli.anchors import anchor_names, load_anchor
    from clstream.cli.build import seeds_of
    from clstream.cli.experiment import run_experiment
    from clstream.cli.parser import parse_run

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
        return report(console, anchor, run_experiment([*given, "--seeds", seeds]).results)
    results: list[Result] = []
    for seed in seeds_of(parse_run([*given, "--seeds", seeds])[1]):  # what is drawn anew for each run is an option of that run
        drawn = [word for option in anchor.seeded for word in (f"--{option}", str(seed))]
        results += run_experiment([*given, "--seeds", str(seed), *drawn]).results
    return report(console, anchor, results)


def report(console: Console, anchor: Anchor, results: list[Result]) -> int:
    """Print what an anchor measured, by each of its metrics; return 0 if all are inside, else 1."""
    outside = 0
    for figure in anchor:
        values = [figure.value(result) for result in results]
        seeds = ", ".join(str(result.params["seed"]) for result in results)
        console.print(f"{anchor.name}: {figure.title} {mean_and_std(values, 4)} over seeds {seeds}")
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
        usage="clstream prove-resume [episodes] [--kills N] [--out FOLDER] [options of clstream run, or of clstream episodes]",
        description="Run once through, and once killed and resumed again and again; compare all weights, memories, generators and "
        "metrics bit for bit, the event logs, and what MLflow has.",
    )
    parser.add_argument("--kills", type=int, default=20, help="how often the run is killed")
    parser.add_argument("--kill_seed", "--kill-seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", help="an empty folder for both runs; by default one that is removed at the end")
    of_episodes = arguments[:1] == ["episodes"]
    own, rest = parser.parse_known_args(arguments[1:] if of_episodes else arguments)
    if own.kills < 1:
        raise UsageError(f"--kills must be at least 1, not {own.kills}")
    if of_episodes:
        return _prove_episodes(rest, own.kills, own.out, own.kill_seed)

    from clstream.cli.build import seeds_of
    from clstream.cli.kill_test import OWN_OPTIONS, kill_test
    from clstream.cli.parser import parse_run

    given = [word.partition("=")[0].removeprefix("--").replace("-", "_") for word in rest]
    if taken := next((name for name in given if name in OWN_OPTIONS), None):
        raise UsageError(f"clstream prove-resume sets --{taken} itself: leave it out")
    if len(seeds_of(parse_run(rest)[1])) > 1:
        raise UsageError("clstream prove-resume runs one seed: give --seed")
    if own.out is not None and Path(own.out).exists() and any(Path(own.out).iterdir()):
        raise Failure(f"{own.out} is not empty: name another folder")
    console = wide_console()
    with tempfile.TemporaryDirectory(prefix="clstream-") as temporary:
        proof = kill_test(
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


def _prove_episodes(rest: list[str], kills: int, out: str | None, seed: int) -> int:
    """Kill episodes again and again, and show that they end as if they had not been."""
    from clstream.cli.episodes import options_of_run
    from clstream.cli.kill_episodes import kill_episodes
    from clstream.cli.parser import parse_run

    parse_run(options_of_run(rest))
    if out is not None and Path(out).exists() and any(Path(out).iterdir()):
        raise Failure(f"{out} is not empty: name another folder")
    with tempfile.TemporaryDirectory(prefix="clstream-") as temporary:
        done, count, difference = kill_episodes(rest, kills, Path(out or temporary).absolute(), seed, print)
    print(f"{done} kills; compared: {count} episodes, all but their seconds")
    print("0 bits differ" if difference is None else f"DIFFERENT: {difference}")
    if done < kills:
        print(f"NOT PROVED: it was to be killed {kills} times; give more episodes, or fewer kills")
    return 0 if difference is None and done == kills else 1


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

    if options.data_root:
        os.environ["CLSTREAM_DATA"] = options.data_root
    parity = importlib.import_module("clstream.experiments.parity.measuring")
    try:
        methods = parity.select_methods(options.methods)
    except ValueError as error:
        raise UsageError(f"--methods: {error}") from None
    torch.set_num_threads(options.threads)
    with as_failure(ValueError, TypeError, OSError, ImportError):
        import_avalanche("benchmarks")
        stream = parity.make_stream(options.data, options.per_task or None)
        print(f"{stream}\n", flush=True)
        out = None if options.out is None else Path(options.out)
        lines: list[str] = []

        def say(line: str) -> None:
            lines.append(line)
            print(line, flush=True)

        parity.compare(methods, seeds, stream, out, say)
    return int(any(line.endswith("DIFFER |") for line in lines))
