"""`clstream pretrain`, `show` and `record`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clstream.cli.command_parser import CommandParser
from clstream.cli.errors import Failure, UsageError, as_failure, nearest, printable
from clstream.cli.tables import wide_console

if TYPE_CHECKING:
    from clstream.stream import Stream


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
    accepted = ("--stream", "--model", "--optimizer", "--seed", "--device", "--threads", "--data_root", "--data-root")
    for option in (argument.partition("=")[0] for argument in rest if argument.startswith("--")):
        if option.partition(".")[0] not in accepted:
            raise UsageError(
                f"clstream pretrain has no option {option}{nearest(option, ['--out', '--classes', '--epochs', *accepted])}"
            )
    try:
        classes = None if own.classes is None else [int(label) for label in own.classes.split(",")]
    except ValueError:
        raise UsageError(f"--classes takes whole numbers with commas, as 0,1,2, not {own.classes!r}") from None
    import torch

    from clstream.cli.build import build_strategy, build_stream
    from clstream.cli.experiment import print_notes
    from clstream.cli.parser import parse_run
    from clstream.engine import check_fits, run
    from clstream.pretraining import join_tasks, save_weights
    from clstream.progress import ProgressBar

    out = Path(own.out)
    if not out.parent.is_dir() or (out.exists() and not (own.force and out.is_file())):
        raise Failure(f"{out} is there already: --force replaces it" if out.exists() else f"there is no folder {out.parent}")
    given = [re.sub("^--optimizer", "--strategy.optimizer", argument) for argument in rest]
    run_options, options = parse_run(["--strategy", "Finetune", *given])
    print_notes(run_options)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    with as_failure(ValueError, TypeError, OSError, ImportError):
        whole = build_stream(run_options, options)
        stream = join_tasks(whole, classes, own.epochs)
        strategy = build_strategy(run_options, options, whole, options.seed)
        check_fits(strategy, stream, options.device)
    with as_failure(FloatingPointError):
        result = run(strategy, stream, ProgressBar(f"training on {stream.name}"), seed=options.seed, device=options.device)
    about: dict[str, Any] = {"labels": list(stream.tasks[0].classes), "data": whole.fingerprint}
    about |= {result.main_name: result.average}
    about |= {name: result.params[name] for name in ("stream", "stream.epochs", "stream.batch_size", "strategy.optimizer", "seed")}
    with as_failure(OSError):
        save_weights(strategy.model, out, about)
    print(f"{type(strategy.model).__name__} on {stream.name}: {result.main_name} {result.average:.3f}, {result.seconds:.0f} s")
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


def _stream_of(command: str, rest: list[str], others: str) -> Stream:
    """Return the stream that the options of a command name, which takes no more of those of `clstream run`."""
    accepted = ("--stream", "--config", "--data_root", "--data-root", "--tune", "--trust")
    for option in (argument.partition("=")[0] for argument in rest if argument.startswith("-")):
        if option not in accepted and not option.startswith("--stream."):
            raise UsageError(f"clstream {command} has no option {option}: it takes {', '.join(accepted[:3])}, --tune, {others}")
    if not any(argument.partition("=")[0] in ("--stream", "--config") for argument in rest):
        raise UsageError(f"clstream {command} needs the stream: --stream NAME, or a --config that names it")
    from clstream.cli.build import build_stream
    from clstream.cli.experiment import print_notes
    from clstream.cli.parser import parse_run

    with as_failure(ValueError, TypeError, OSError, ImportError):
        parser, options = parse_run(rest)
        print_notes(parser)
        return build_stream(parser, options)


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
