"""`clstream watch`: learn what is put into a folder, as it comes, until told to stop."""

from __future__ import annotations

import time

from clstream.cli.command_parser import CommandParser
from clstream.cli.errors import UsageError

FIXED = ("--stream", "--seeds", "--together", "--workers", "--resume")
"""Options of `clstream run` that it sets itself, or hasn't."""


def watch_parser() -> CommandParser:
    """Return the parser of `clstream watch`'s own argument."""
    parser = CommandParser(
        "watch",
        usage="clstream watch FOLDER [--stream.OPTION VALUE ...] [options of clstream run]",
        description="Learn the files that are put into a folder, each as a session, until stopped by Ctrl-C, SIGTERM or "
        "--max_sessions. Each batch is answered before it is learned, and a loss that rises is an alarm. The same command goes on "
        "where the last one was.",
        epilog="--stream.OPTION are those of the stream arriving: clstream run --stream.help arriving lists them. Of clstream run "
        "it takes all options but --stream, --seeds, --together, --workers and --resume.",
    )
    parser.add_argument("folder", help="where files are put: Parquet, NPZ, folders or archives of images")
    return parser


def options_of_run(folder: str, rest: list[str]) -> list[str]:
    """Return the options of `clstream run` that watch a folder. Raises UsageError for one that can't be had."""
    for option in (argument.partition("=")[0] for argument in rest):
        if option in FIXED:
            raise UsageError(f"clstream watch has no option {option}: it learns one folder with one seed, and goes on by itself")
    return [
        *rest, "--stream=arriving", f"--stream.source={folder}", "--stream.watch=true", "--prequential", "--drift", "--resume=auto",
    ]  # fmt: skip


def watch_command(arguments: list[str]) -> int:
    """`clstream watch`: learn what a folder gets, session by session, until stopped; the same command goes on."""
    own, rest = watch_parser().parse_known_args(arguments)
    whole = options_of_run(own.folder, rest)
    from clstream.cli.arrival_lines import ArrivalLines
    from clstream.cli.build import build_stream
    from clstream.cli.experiment import run_experiment
    from clstream.cli.parser import parse_run
    from clstream.cli.tables import report_runs
    from clstream.stream import NothingYetError

    parser, options = parse_run(whole)
    said = False
    while True:
        try:
            build_stream(parser, options)
            break
        except UsageError as error:
            if not isinstance(error.__cause__, NothingYetError):
                raise
            if not said:
                ArrivalLines().say(f"{error}: waiting for it")
                said = True
            time.sleep(options.stream.init_args.poll)
        except OSError as error:
            raise UsageError(str(error)) from None
    report_runs([run_experiment(whole)])
    return 0
