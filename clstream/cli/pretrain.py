"""`clstream pretrain`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clstream.cli.command_parser import CommandParser
from clstream.cli.errors import Failure, UsageError, as_failure, nearest, printable

if TYPE_CHECKING:
    from argparse import Namespace

OBJECTIVES = {"supervised": "Finetune", "simclr": "SimCLR", "episodes": "EpisodicTraining"}
"""The strategies that pre-train, by what `--objective` calls them."""

PASSED_ON = ("--stream", "--model", "--weights", "--adapter", "--optimizer", "--seed", "--device", "--threads", "--data_root",
             "--data-root", "--trust")  # fmt: skip
"""The options of `clstream run` that it takes."""


def pretrain_command(arguments: list[str]) -> int:
    """`clstream pretrain`: train a model on a stream's classes together, and write its weights to a file."""
    parser = pretrain_parser()
    own, rest = parser.parse_known_args(arguments)
    given = options_of_run(own, rest)
    classes = None if own.classes is None else _labels(own.classes)
    import torch

    from clstream.checkpoint import Checkpointer, Stopped, newest
    from clstream.cli.build import build_strategy, build_stream
    from clstream.cli.experiment import print_notes
    from clstream.cli.parser import parse_run
    from clstream.cli.training_options import check_no_training
    from clstream.engine import OtherRunError
    from clstream.files import FolderError, check_plain_files, locked
    from clstream.pretraining import ValidationLines, check_pretraining, join_tasks, pretrain, save_weights
    from clstream.progress import ProgressBar
    from clstream.serialization import CaptureError

    out, folder = Path(own.out), Path(f"{own.out}.checkpoints")
    if not out.parent.is_dir() or (out.exists() and not (own.force and out.is_file())):
        raise Failure(f"{out} is there already: --force replaces it" if out.exists() else f"there is no folder {out.parent}")
    if own.checkpoint_every < 0 or (own.resume and not own.checkpoint_every):
        raise UsageError("--checkpoint_every takes seconds, or 0 for no checkpoints; without any there is nothing to --resume")
    if folder.exists() and not own.resume and not own.force:
        raise Failure(f"{folder} has the checkpoints of a training that was stopped: --resume goes on with it, --force starts anew")
    try:
        run_options, options = parse_run(given)
    except UsageError as error:
        raise UsageError(_as_typed(str(error))) from error
    check_no_training(options, "pretrain")
    print_notes(run_options)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    with as_failure(ValueError, TypeError, OSError, ImportError):
        whole = build_stream(run_options, options)
        stream = join_tasks(whole, classes, own.epochs)
        strategy = build_strategy(run_options, options, whole, options.seed)
        check_pretraining(strategy, stream, own.schedule, own.warmup, options.device)
        state = newest(folder) if own.resume and folder.exists() else None
    title = f"{type(strategy.model).__name__} on {stream.name}"
    with as_failure(FloatingPointError, FolderError, CaptureError, OtherRunError):
        if folder.exists() and state is None:
            check_plain_files(folder)
            with locked(folder):
                shutil.rmtree(folder)
        observers: list[object] = [bar := ProgressBar(title), ValidationLines(bar.say)]
        if own.checkpoint_every:
            observers.append(Checkpointer(folder, every_seconds=own.checkpoint_every))
        try:
            card = pretrain(
                strategy, stream, *observers, schedule=own.schedule, warmup=own.warmup, seed=options.seed, device=options.device,
                resume=state,
            )  # fmt: skip
        except Stopped as stop:
            print(f"\nclstream: {stop}\nclstream: to go on, give the same command and --resume", flush=True)
            return 128 + stop.signal
        except FloatingPointError:  # to go on would end the same way
            shutil.rmtree(folder, ignore_errors=True)
            raise
    card |= {"objective": own.objective, "stream": whole.name, "data": whole.fingerprint}
    with as_failure(OSError):
        save_weights(strategy.model, out, card)
    shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(card_lines(title, card)))
    print(f"weights in {out}: clstream run --weights {out} starts from them")
    return 0


def pretrain_parser() -> CommandParser:
    """Return the parser of the command's own options."""
    parser = CommandParser(
        "pretrain",
        usage="clstream pretrain --stream NAME --model NAME [options] --out FILE",
        description="Train a model on all classes of a stream together, or on some, and write its weights: `clstream run --weights "
        "FILE` starts from them.",
        epilog="--stream NAME, --model NAME, --adapter NAME, --optimizer NAME and their options, --weights FILE, --seed, --device, "
        "--threads and --data_root FOLDER are as in clstream run; those of an objective follow after a dot, as "
        "--objective.temperature 0.2.",
    )
    parser.add_argument("--out", required=True, help="the file to write, as vit.pt")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument(
        "--objective", default="supervised",
        help="supervised (by default: the labels), simclr (two views of each image, without labels), or episodes (few-shot "
        "episodes drawn from each batch)",
    )  # fmt: skip
    parser.add_argument("--classes", help="the labels to train on, as 0,1,2 or 0-4,7; by default all")
    parser.add_argument("--epochs", type=int, help="passes over the samples; by default those of the stream")
    parser.add_argument("--schedule", default="cosine", help="of the learning rate, step by step: cosine (by default) or constant")
    parser.add_argument("--warmup", type=float, default=0.0, help="epochs in which the learning rate rises from 0; by default none")
    parser.add_argument(
        "--validation", help="the share of the training samples that is held back, and tested on the way; by default none"
    )
    parser.add_argument("--resume", action="store_true", help="go on with a training that was stopped, as if it had not been")
    parser.add_argument(
        "--checkpoint_every", "--checkpoint-every", type=float, default=30.0,
        help="seconds from one checkpoint to the next, in FILE.checkpoints; 0: none",
    )  # fmt: skip
    return parser


def options_of_run(own: Namespace, rest: list[str]) -> list[str]:
    """Return the arguments for `clstream run` that build what is trained. Raises UsageError for options that there aren't."""
    if own.objective not in OBJECTIVES:
        raise UsageError(
            f"there is no objective {own.objective!r}{nearest(own.objective, OBJECTIVES)}; there are {', '.join(OBJECTIVES)}"
        )
    mine = ["--out", "--force", "--classes", "--epochs", "--schedule", "--warmup", "--validation", "--resume", "--objective"]
    for option in (argument.partition("=")[0] for argument in rest if argument.startswith("--")):
        name, _, inner = option.partition(".")
        if name not in PASSED_ON and not (name == "--objective" and inner):
            raise UsageError(f"clstream pretrain has no option {option}{nearest(option, [*mine, *PASSED_ON])}")
    held = [] if own.validation is None else ["--stream.validation", own.validation]
    given = ["--strategy", OBJECTIVES[own.objective], *rest, *held]
    return [re.sub("^--objective", "--strategy", re.sub("^--optimizer", "--strategy.optimizer", word)) for word in given]


def _as_typed(message: str) -> str:
    """Return an error of `clstream run` with the options as they are called here."""
    message = message.replace("--stream.validation", "--validation").replace("--strategy.optimizer", "--optimizer")
    return message.replace("--strategy", "--objective")


def _labels(text: str) -> list[int]:
    """Return the labels that --classes names. Raises UsageError for what are none."""
    labels: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", word.strip())
        if match is None:
            raise UsageError(f"--classes takes whole numbers with commas, as 0,1,2 or 0-4,7, not {text!r}")
        labels += range(int(match[1]), int(match[2] or match[1]) + 1)
    return labels


def card_lines(title: str, card: Mapping[str, Any]) -> list[str]:
    """Return the card of weights, line by line."""
    import torch

    import clstream
    from clstream.pretraining import ranges

    options = ", ".join(f"{name.removeprefix('strategy.')} {value}" for name, value in card.items() if name.startswith("strategy."))
    probed = card["linear_probe"]
    lines = {
        "objective": f"{card['objective']}: {options}",
        "data": f"{card['stream']}, fingerprint {card['data']}",
        "classes": f"{len(card['labels'])}: {ranges(card['labels'])}",
        "samples": f"{card['samples']:,}, {card['epochs']} epochs in batches of {card['stream.batch_size']}",
        "accuracy": f"{card['accuracy']:.4f} of the head on the test samples",
        "linear probe": "none: the model has no `features`" if probed is None else f"{probed:.4f} on the test samples",
        "run": f"seed {card['seed']}, {card['seconds']:.0f} s, clstream {clstream.__version__}, torch {torch.__version__}",
    }
    if "adapter" in card:
        names = ", ".join(str(value) for name, value in card.items() if re.fullmatch(r"adapter\d*", name))
        lines["adapter"] = f"{names}: {card['trained_parameters']:,} parameters learned, {card['trained_share']:.2%} of all"
    return [title, *(f"  {name:13} {printable(text)}" for name, text in lines.items())]
