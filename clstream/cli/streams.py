"""`clstream show` and `record`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from clstream.cli.command_parser import CommandParser
from clstream.cli.errors import Failure, UsageError, as_failure, printable
from clstream.cli.tables import wide_console

if TYPE_CHECKING:
    from clstream.stream import Stream


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

    from clstream.figures import composition, composition_figure, composition_lines

    rest = ["--stream", *rest] if rest and not rest[0].startswith("-") else rest
    stream = _stream_of("show", rest, "--by and --out")
    try:
        shown = composition(stream, own.by)
    except ValueError as error:
        raise UsageError(str(error)) from error
    console = wide_console()
    console.print(printable(str(stream)), markup=False)
    whole = len(shown.sessions) == len(stream)
    counted = "positives" if shown.by == "class" and "multilabel" in stream.targets else "samples"
    console.print(
        f"\n{counted} of each {shown.by}, session by session{'' if whole else f', {len(shown.sessions)} of {len(stream)}'}"
    )
    for line in composition_lines(shown.counts, shown.names, shown.by, max(10, min(120, console.width - 24))):
        console.print("  " + line, markup=False)
    if own.out is not None:
        try:
            composition_figure(shown.counts, shown.sessions, shown.names, shown.by, stream.name).savefig(own.out, dpi=110)
        except (OSError, ValueError) as error:
            raise Failure(f"{own.out} can't be written: {error}") from error
        print(f"\ndrawn in {own.out}")
    return 0


def _stream_of(command: str, rest: list[str], others: str, extended: str | None = None) -> Stream:
    """Return the stream that the options of a command name, which takes no more of those of `clstream run`.

    Of a run that continues another one it is that of both; with a recording that is extended, what that has comes first.
    """
    accepted = ("--stream", "--config", "--data_root", "--data-root", "--tune", "--trust")
    for option in (argument.partition("=")[0] for argument in rest if argument.startswith("-")):
        if option not in accepted and not option.startswith("--stream."):
            raise UsageError(f"clstream {command} has no option {option}: it takes {', '.join(accepted[:3])}, --tune, {others}")
    if not any(argument.partition("=")[0] in ("--stream", "--config") for argument in rest):
        raise UsageError(f"clstream {command} needs the stream: --stream NAME, or a --config that names it")
    from clstream.cli.build import build_stream
    from clstream.cli.continuing import run_before
    from clstream.cli.experiment import print_notes
    from clstream.cli.parser import parse_run

    with as_failure(ValueError, TypeError, OSError, ImportError):
        parser, options = parse_run(rest)
        print_notes(parser)
        stream = build_stream(parser, options)
        before = run_before(options, stream)
        stream = stream if before is None else before.stream
        return stream if extended is None else _following(extended, stream, options.data_root)


def _following(file: str, stream: Stream, root: str | None) -> Stream:
    """Return a stream after the one of a recording, unless it begins with that, or the recorded data is not ours to load."""
    from clstream.cli.lookup import PLACES
    from clstream.stream import History

    try:
        past: Stream = importlib.import_module(PLACES["stream"]).recorded(file, root)
    except ValueError:  # its samples are the user's own: the stream must have them
        return stream
    history = History.of(past)
    if history.begins(stream, len(past)):
        return stream
    history.check_follows(stream, len(past))
    return past.followed_by(stream)


def record_command(arguments: list[str]) -> int:
    """`clstream record`: write what a stream is to a file; nothing is run."""
    parser = CommandParser(
        "record",
        usage="clstream record --stream NAME [--stream.OPTION VALUE ...] --out FILE [--extend]",
        description="Write what a stream is, without its samples; `--stream recorded:FILE` replays it over the same data.",
        epilog="--stream NAME and its options, --config FILE, --data_root FOLDER and --tune are as in clstream run.",
    )
    parser.add_argument("--out", required=True, help="the file to write, as digits.clstream")
    parser.add_argument("--force", action="store_true", help="overwrite a file that holds something else")
    parser.add_argument(
        "--extend", action="store_true",
        help="the file has the sessions before: the stream begins with them, or comes after them",
    )  # fmt: skip
    own, rest = parser.parse_known_args(arguments)
    from clstream.recording import record

    stream = _stream_of("record", rest, "--out, --force and --extend", own.out if own.extend else None)
    try:
        file = record(stream, own.out, own.force, own.extend)
    except (ValueError, TypeError, OSError) as error:
        raise Failure(str(error)) from error
    print(stream)
    print(f"\nrecorded in {file}: {file.stat().st_size:,} bytes, fingerprint {stream.fingerprint}")
    return 0
