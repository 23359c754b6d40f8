"""`clstream profile`."""

from __future__ import annotations

import os
from pathlib import Path

from clstream.cli.command_parser import CommandParser
from clstream.cli.errors import UsageError, as_failure, nearest, printable

PASSED_ON = (
    "--config", "--stream", "--strategy", "--model", "--adapter", "--weights", "--features", "--train", "--seed", "--device",
    "--precision",
    "--deterministic", "--compile", "--threads", "--evaluate_every", "--evaluate_at", "--evaluate_on", "--probes", "--measures",
    "--max_sessions", "--data_root", "--track", "--tracking_uri", "--experiment", "--trust",
)  # fmt: skip
"""The options of `clstream run` that it takes."""


def profile_command(arguments: list[str]) -> int:
    """`clstream profile`: run a strategy on a stream, and say where the time goes."""
    parser = profile_parser()
    own, rest = parser.parse_known_args(arguments)
    given = options_of_run(rest)
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler says on stderr that it starts
    import torch

    from clstream.bus import ObserverError
    from clstream.cli.build import build_strategy, build_stream, measures_of, numerics_of
    from clstream.cli.experiment import print_notes
    from clstream.cli.parser import parse_run
    from clstream.cli.training_options import training_of
    from clstream.engine import check_fits, run
    from clstream.engine.numerics import NotDeterministicError, Numerics
    from clstream.files import FolderError, check_writable
    from clstream.profiling import Profile

    run_parser, options = parse_run(given)
    print_notes(run_parser)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    with as_failure(ValueError, TypeError, OSError, ImportError):
        try:
            observer = Profile(own.skip, own.steps)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
        stream = build_stream(run_parser, options)
        strategy = build_strategy(run_parser, options, stream, options.seed)
        how = {"evaluate_at": options.evaluate_at, "evaluate_on": options.evaluate_on, "measures": measures_of(options)}
        how |= {"train": training_of(options)}
        check_fits(strategy, stream, options.device, options.evaluate_every, options.max_sessions, **how)
        Numerics(**numerics_of(options)).check(options.device)
        check_writable(Path(own.out), "the folder for the profile")
        observers: list[object] = [observer]
        if options.track:
            from clstream.tracking import MlflowTracker

            observers.append(MlflowTracker(options.experiment, options.tracking_uri))
    with as_failure(FolderError, ObserverError, FloatingPointError, NotDeterministicError, OSError):
        run(
            strategy, stream, *observers, seed=options.seed, device=options.device, evaluate_every=options.evaluate_every,
            max_sessions=options.max_sessions, **how, **numerics_of(options),
        )  # fmt: skip
        print(printable(str(observer)))
        folder = observer.save(own.out)
    print(f"{folder} has profile.png, profile.json, and trace.json for chrome://tracing or https://ui.perfetto.dev")
    return 0


def profile_parser() -> CommandParser:
    """Return the parser of the command's own options."""
    parser = CommandParser(
        "profile",
        usage="clstream profile --stream NAME --strategy NAME [options] [--out FOLDER]",
        description="Run a strategy on a stream, and say where the time goes: by part, and by operation of torch.",
        epilog="The options that build and run it are as in clstream run; without --track true nothing is written to MLflow, and "
        "there are no checkpoints. --max_sessions 1 is often enough.",
    )
    parser.add_argument("--out", default="profile", help="folder of the profile, by default profile; earlier files are replaced")
    parser.add_argument("--skip", type=int, default=10, help="steps before those whose operations are recorded, by default 10")
    parser.add_argument("--steps", type=int, default=20, help="steps whose operations are recorded, by default 20")
    return parser


def options_of_run(rest: list[str]) -> list[str]:
    """Return the arguments for `clstream run`. Raises UsageError for options that there aren't."""
    names = [word.partition("=")[0].replace("-", "_").replace("__", "--", 1) for word in rest if word.startswith("--")]
    for name in names:
        if name.partition(".")[0].removesuffix("+") not in PASSED_ON:
            raise UsageError(f"clstream profile has no option {name}{nearest(name, ['--out', '--skip', '--steps', *PASSED_ON])}")
    return [*rest, *([] if "--track" in names else ["--track", "false"])]
