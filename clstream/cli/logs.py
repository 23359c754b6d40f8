"""`clstream log`, `sync` and `list`."""

from __future__ import annotations

import argparse
import importlib
import inspect
from pathlib import Path
from typing import Any

from clstream.cli.command_parser import CommandParser, print_error
from clstream.cli.errors import Failure, UsageError, nearest, printable
from clstream.cli.tables import wide_console
from clstream.files import locked
from clstream.tracking import outbox
from clstream.tracking.journal import describe_damage


def log_command(arguments: list[str]) -> int:
    """`clstream log`: print the event logs of a run in reading form."""
    parser = CommandParser("log", description="Print what happened in a run, an event a line.")
    parser.add_argument("run", metavar="RUN", help="a run's folder or its name below runs/, an MLflow run id, or a log")
    parser.add_argument(
        "--batches", action=argparse.BooleanOptionalAction, default=False, help="show the batches too, where they were logged"
    )
    options = parser.parse_args(arguments)

    from clstream.tracking import event_log, event_log_text

    place = run_folder(options.run)
    files = [place] if place.is_file() else sorted(path for path in place.rglob(event_log.FILE) if path.is_file())
    if not files:
        raise Failure(f"there is no event log in {place}")
    console = wide_console()
    failed = False
    for file in files:
        if len(files) > 1:
            console.print(f"{file}:", style="bold", markup=False)
        damaged: list[int] = []
        try:
            for line in event_log_text.format_log(event_log.read(file, damaged), options.batches):
                console.print(printable(line), markup=False)
        except OSError as error:
            print_error(f"the event log {file} can't be read: {error.strerror or error}")
        except ValueError as error:
            print_error(error)
        else:
            if not damaged:
                continue
            print_error(f"{file}: {describe_damage(damaged)}, and left out")
        failed = True
    return int(failed)


def sync_command(arguments: list[str]) -> int:
    """`clstream sync`: send what runs wrote while their tracking server was away; return 0 if nothing is left."""
    parser = CommandParser("sync", description="Send what runs wrote while their tracking server was away. Nothing is sent twice.")
    parser.add_argument("run", metavar="RUN", nargs="?", help="its folder or name below runs/, or its MLflow run id; else all")
    parser.add_argument("--tracking_uri", "--tracking-uri", help="where the runs are now, if not where they were")
    options = parser.parse_args(arguments)

    place = Path("runs") if options.run is None else run_folder(options.run)
    files = [place] if place.is_file() else outbox.journals(place)
    if options.run is not None and not files:
        raise Failure(f"there is no journal of a tracker in {place}: nothing was tracked there")
    pending: dict[Path, int] = {}
    faults: list[str] = []
    for file in files:
        try:
            journal = outbox.peek(file)
        except OSError as error:
            faults.append(f"the journal {file} can't be read: {error.strerror}")
        except ValueError as error:
            faults.append(str(error))
        else:
            pending[file] = len(journal.pending)
            faults += [f"{file}: {describe_damage(journal.damaged)}, and what it said can't be sent"] if journal.damaged else []
    left = len(faults)
    for fault in faults:
        print_error(fault)
    if not any(pending.values()):
        if not faults:
            print(f"there is nothing to send in {place}")
        return int(left > 0)
    from clstream.tracking.mlflow_store import sync  # importing mlflow takes seconds: only where it is used

    for file in [file for file, count in pending.items() if count]:
        try:
            with locked(file.parent):
                done = sync(file, options.tracking_uri)
        except (OSError, ValueError) as error:
            left += pending[file]
            print(f"{file}: {pending[file]} writes could not be sent: {error}")
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
    runs = Path("runs")
    folder = next((path for path in (Path(name), runs / name) if path.exists()), None) or outbox.find_run(name, runs)
    if folder is None:
        raise Failure(f"there is no run {name!r}: no folder of that name here or in {runs}/, and no MLflow run with that id there")
    return folder


def list_command(arguments: list[str]) -> int:
    """`clstream list`."""
    parser = CommandParser("list", description="The strategies, streams, models, adapters and anchors there are.")
    kinds = ("streams", "strategies", "models", "adapters", "anchors")
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"only one of {', '.join(kinds)}; by default all")
    options = parser.parse_args(arguments)
    if options.kind not in (None, *kinds):
        raise UsageError(f"clstream list has no {options.kind!r}{nearest(options.kind, kinds) or ': it has ' + ', '.join(kinds)}")
    from rich.markup import escape
    from rich.table import Table

    from clstream.cli.anchors import anchor_names, load_anchor
    from clstream.cli.lookup import PLACES, known_names
    from clstream.strategy import needs

    console = wide_console()
    for (kind, place), plural in zip(PLACES.items(), kinds, strict=False):
        if options.kind not in (None, plural):
            continue
        table = Table("name", "what it is", title=f"{kind} (--{kind} NAME)", title_justify="left", box=None, pad_edge=False)
        if kind == "strategy":
            table.add_column("needs")
            table.add_column("learns")
        for name in known_names(kind):
            thing = getattr(importlib.import_module(place), name)
            own = [", ".join(needs(thing)) or "nothing", learned_targets(thing)] if kind == "strategy" else []
            table.add_row(name, escape(first_line(thing)), *own)
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


def learned_targets(strategy: Any) -> str:
    """Return the kinds of targets that a strategy class learns; of a wrapper they are those of what it wraps."""
    kinds = strategy.learns_targets
    return ", ".join(kinds) if isinstance(kinds, tuple) else "as the wrapped one"


def first_line(thing: Any) -> str:
    """Return the first sentence of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]
