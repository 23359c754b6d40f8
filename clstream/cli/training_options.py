"""The options `--train.OPTION` of `clstream run`: the training controls."""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import Namespace

from clstream.cli.errors import UsageError, nearest
from clstream.cli.option_parser import Parser
from clstream.cli.settings import TRAIN, Setting
from clstream.training import Training
from clstream.training.schedule import SCHEDULES
from clstream.training.training import OVER, RENEWALS, WEIGHTS

OPTIONS: dict[str, tuple[Any, str]] = {
    "schedule": (Literal[SCHEDULES], "of the learning rate, step by step: cosine or linear to 0, or constant"),
    "schedule_over": (Literal[OVER], "whether it spans each session by itself, as by default, or the whole run"),
    "warmup": (int, "batches in which the learning rate rises from 0"),
    "clip": (float, "the greatest norm of the gradients of all weights together"),
    "accumulate": (int, "batches whose mean gradient makes one step"),
    "patience": (int, "epochs without a better answer to held-out samples after which a session ends, with the best weights"),
    "held_out": (float, "the share of a session's samples that is held out for that, 0.1 by default"),
    "class_weights": (Literal[WEIGHTS], "balanced: each class of a session has as much of the loss as another"),
    "renew_optimizer": (Literal[RENEWALS], "optimizers forget their momenta with each session, or each task"),
}
"""The type and the help of each; none has a default here, so that a config says what was asked for and no more."""


def add_training_options(parser: Parser) -> None:
    """Add them to the parser of `clstream run`."""
    for name, (kind, text) in OPTIONS.items():
        parser.add_argument(f"--{TRAIN}.{name}", type=kind, help=text)


def check_training_option(setting: Setting) -> None:
    """Refuse an option that isn't there, or none at all. Raises UsageError."""
    name = setting.key[1] if len(setting.key) > 1 else ""
    if name not in OPTIONS or len(setting.key) > 2:
        near = nearest(name, OPTIONS) or f": there are {', '.join(OPTIONS)}"
        what = f"there is no training control {'.'.join(setting.key[1:])!r}" if name else f"--{TRAIN} takes options after a dot"
        raise UsageError(f"{setting.where}{what}{near}")


def training_of(options: Namespace) -> Training | None:
    """Return the training controls that were asked for; None if there are none. Raises UsageError for what they can't be."""
    given = {name: value for name in OPTIONS if (value := options[TRAIN][name]) is not None}
    if not given:
        return None
    try:
        return Training(**given)
    except ValueError as error:
        raise UsageError(f"--{TRAIN}.{error}") from error


def check_no_training(options: Namespace, command: str) -> None:
    """Refuse training controls in a command that has none. Raises UsageError."""
    train = training_of(options)
    if train is not None:
        raise UsageError(f"clstream {command} has no training controls: leave {next(iter(train.options), TRAIN)} out")
