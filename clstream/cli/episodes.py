"""`clstream episodes`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from clstream.cli.command_parser import CommandParser
from clstream.cli.errors import UsageError, as_failure, nearest

PASSED_ON = ("--stream", "--strategy", "--model", "--adapter", "--weights", "--features", "--seed", "--device", "--threads",
             "--data_root", "--data-root", "--trust", "--track", "--tracking_uri", "--tracking-uri", "--experiment")  # fmt: skip
"""The options of `clstream run` that it takes."""

DEFAULTS = {"--strategy": "ProtoNet", "--model": "Conv4"}


def episodes_command(arguments: list[str]) -> int:
    """`clstream episodes`: a learner through many episodes, each from the same start."""
    parser = episodes_parser()
    own, rest = parser.parse_known_args(arguments)
    given = options_of_run(rest)
    import importlib

    import torch

    from clstream.bus import ObserverError
    from clstream.cli.build import build_model, build_strategy
    from clstream.cli.experiment import print_notes
    from clstream.cli.lookup import PLACES
    from clstream.cli.parser import parse_run
    from clstream.cli.training_options import check_no_training
    from clstream.engine import OtherRunError, check_fits
    from clstream.engine.run_params import run_params
    from clstream.episodes import run_episodes
    from clstream.episodes.progress import EpisodesProgress
    from clstream.episodes.record import EpisodesRecord
    from clstream.episodes.runner import identity_of
    from clstream.episodes.together import check_together
    from clstream.episodes.tracker import tracked_episodes
    from clstream.files import FolderError, check_plain_files, locked
    from clstream.seeds import isolated

    run_parser, options = parse_run(given)
    check_no_training(options, "episodes")
    print_notes(run_parser)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    folder = Path(own.out)
    with as_failure(ValueError, TypeError, OSError, ImportError):
        chosen = dict(options.stream.init_args.as_dict())
        del chosen["index"]
        chosen["root"] = chosen["root"] or options.data_root
        try:
            family = importlib.import_module(f"{PLACES['stream']}.episodes").episodes(**chosen)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if options.features:
            with isolated(options.seed, "model"):
                backbone = build_model(run_parser, options, family[0])
            family = importlib.import_module(f"{PLACES['stream']}.episodes").episode_features(family, backbone)
        strategy = build_strategy(run_parser, options, family[0], options.seed)
        params = run_params(strategy, family[0], options.seed, options.device)
        params |= {f"episodes.{name}": value for name, value in chosen.items()} | {"episodes": repr(family)}
        if own.batch < 1:
            raise UsageError(f"--batch takes a whole number from 1 up, not {own.batch}")
        if own.batch > 1:
            check_together(strategy)
        check_fits(strategy, family[0], options.device, evaluate_at="end")
        folder.mkdir(parents=True, exist_ok=True)
    name = f"{type(strategy).__name__} on {family.name}"
    with ExitStack() as stack, as_failure(FolderError, ObserverError, OtherRunError, FloatingPointError, OSError):
        check_plain_files(folder)
        stack.enter_context(locked(folder))
        EpisodesRecord(
            folder, identity_of(strategy, family, options.seed, options.device, own.batch), own.resume
        )  # before anything is tracked
        observers: list[object] = [EpisodesProgress(len(family))]
        tracker = None
        if options.track:
            tracker = stack.enter_context(
                tracked_episodes(name, params, options.experiment, options.tracking_uri, folder, own.resume)
            )
            observers.append(tracker)
        try:
            result = run_episodes(
                lambda: build_strategy(run_parser, options, family[0], options.seed), family, *observers, seed=options.seed,
                device=options.device, folder=folder, resume=own.resume, batch=own.batch,
            )  # fmt: skip
        except KeyboardInterrupt:
            print(f"clstream: stopped; to go on, give the same command and --resume: {folder} has what is done", file=sys.stderr)
            raise
        if tracker is not None:
            tracker.finish(result)
    print(result)
    return 0


def episodes_parser() -> CommandParser:
    """Return the parser of the command's own options."""
    parser = CommandParser(
        "episodes",
        usage="clstream episodes [--stream.OPTION ...] --strategy NAME --model NAME [options] --out FOLDER",
        description="Run a learner through many few-shot episodes, each from the same start, and ask it at the end of each.",
        epilog="--stream.OPTION are the options of streams.episodes, as --stream.ways 5 --stream.sets 4 --stream.count 100; "
        "--strategy (ProtoNet), --model (Conv4), --weights FILE of clstream pretrain, --features, --seed, --device, --threads, "
        "--data_root, --track, --tracking_uri, --experiment and --trust are as in clstream run.",
    )
    parser.add_argument("--out", required=True, help="the folder with the outcome of each episode, episodes.jsonl")
    parser.add_argument(
        "--batch", type=int, default=1,
        help="episodes that are computed together, where the learner allows it: ProtoNet, and plain SGD; by default one by one",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="go on with the episodes of that folder, as if there had been no break"
    )
    return parser


def options_of_run(rest: list[str]) -> list[str]:
    """Return the arguments for `clstream run` that build an episode. Raises UsageError for options that there aren't."""
    for option in (argument.partition("=")[0] for argument in rest if argument.startswith("--")):
        if option.partition(".")[0] not in PASSED_ON or option in ("--stream", "--stream.index"):
            raise UsageError(f"clstream episodes has no option {option}{nearest(option, ['--out', '--resume', *PASSED_ON[1:]])}")
    names = {argument.partition("=")[0] for argument in rest}
    missing = [word for option, name in DEFAULTS.items() if option not in names for word in (option, name)]
    return ["--stream", "episode", *missing, *rest]
