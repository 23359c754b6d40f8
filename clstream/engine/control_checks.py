"""Whether training controls fit a strategy and a stream, checked before anything is learned."""

from __future__ import annotations

import torch

from clstream.engine.controls import session_steps
from clstream.engine.trial import learn_briefly
from clstream.strategy import Strategy
from clstream.stream import PoolSchedule, Stream
from clstream.training import Training, check_taken


def check_controls(
    train: Training | None,
    strategy: Strategy,
    stream: Stream,
    device: str | torch.device,
    max_sessions: int | None = None,
) -> None:
    """Refuse training controls that a strategy doesn't take, or that don't fit a stream, in one sentence.

    Args:
        train: the controls; None: there are none.
        strategy, stream, device, max_sessions: of the run; the stream holds samples back already, if it is to.

    Raises:
        TypeError: for what are no training controls.
        ValueError: for what doesn't fit.

    """
    if train is None:
        return
    if not isinstance(train, Training):
        raise TypeError(f"train takes training controls, as clstream.training.Training(clip=1.0), not a {type(train).__name__}")
    check_taken(strategy, train.controls)
    unknown = stream.arrives or isinstance(stream.schedule, PoolSchedule)
    if stream.arrives and train.patience is not None:
        raise ValueError(f"the sessions of {stream.name} arrive while it is learned, and hold nothing back: leave patience out")
    if unknown and train.schedule_over == "run":
        raise ValueError(
            f"how large the sessions of {stream.name} are shows while it is played, so schedule_over='run' can't be: take 'session'"
        )
    if train.has_schedule and not unknown:
        sizes = session_steps(stream, max_sessions)
        shortest = min(sizes) if train.schedule_over == "session" else sum(sizes)
        if train.warmup >= shortest:
            what = f"session {sizes.index(shortest)}" if train.schedule_over == "session" else "the run"
            raise ValueError(f"warmup must be less than the batches that there are, {shortest:,} in {what}, not {train.warmup:,}")
    if train.patience is not None:
        _check_patience(train, stream, max_sessions)
    if train.renew_optimizer == "task" and not stream.boundaries:
        raise ValueError(f"{stream.name} hides its boundaries, so renew_optimizer='task' can't be: take 'session'")
    if train.class_weights is not None:
        if stream.targets != ("label",):
            raise ValueError(
                f"class_weights are of labels, and {stream.name} has {' and '.join(stream.targets)} targets: leave it out"
            )
        refusal = learn_briefly(strategy, stream, 0, device, 2 * stream.batch_size, Training(class_weights=train.class_weights))
        if isinstance(refusal, TypeError) and "class weights" in str(refusal):
            raise ValueError(str(refusal)) from None


def _check_patience(train: Training, stream: Stream, max_sessions: int | None) -> None:
    """Refuse early stopping where no session could end early, and where a session has nothing to hold back."""
    if stream.epochs == 1:
        raise ValueError(f"patience is of epochs, and {stream.name} has one: give it more epochs, or leave patience out")
    sessions = 1 if isinstance(stream.schedule, PoolSchedule) else min(len(stream), max_sessions or len(stream))
    for index in range(sessions):
        if not len(stream.held_back(index)):
            raise ValueError(
                f"session {index} of {stream.name} has too few samples of each class to hold back a share of {train.held_out:g}, "
                "which patience needs: give a larger held_out, or leave patience out"
            )
