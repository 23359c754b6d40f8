"""The training controls of a run, and the parts of a strategy that carry them out."""

from __future__ import annotations

from inspect import signature

from clstream.params import HasParams, check_choice, check_integer, check_positive, check_share
from clstream.training.schedule import SCHEDULES

OVER = ("session", "run")

RENEWALS = ("session", "task")

WEIGHTS = ("balanced",)


class Training(HasParams):
    """How the steps of a run are taken, for any strategy: `run(strategy, stream, train=Training(clip=1.0))`.

    Args:
        schedule: of the learning rate, step by step: "cosine" or "linear" to 0, or "constant". None: as the optimizer has it.
        schedule_over: whether it spans each "session" by itself, or the whole "run".
        warmup: batches in which the learning rate rises from 0, at the begin of each session, or of the run.
        clip: the greatest norm of the gradients of all weights together. None: any.
        accumulate: batches whose mean gradient makes one step.
        patience: epochs without a better answer to held-out samples of the session after which the session ends, with the best
            weights. None: all epochs.
        held_out: the share of a session's samples that is not learned then, of each class; of other targets, of all.
        class_weights: "balanced": each class of a session has as much of the loss as another. None: each sample has.
        renew_optimizer: when optimizers begin anew: with each "session", or each "task". None: never.

    Raises ValueError for what these can't be.

    """

    def __init__(
        self,
        schedule: str | None = None,
        schedule_over: str = "session",
        warmup: int = 0,
        clip: float | None = None,
        accumulate: int = 1,
        patience: int | None = None,
        held_out: float = 0.1,
        class_weights: str | None = None,
        renew_optimizer: str | None = None,
    ) -> None:
        check_choice(SCHEDULES, none=True, schedule=schedule)
        check_choice(OVER, schedule_over=schedule_over)
        check_integer(0, warmup=warmup)
        check_positive(none=True, clip=clip)
        check_integer(1, accumulate=accumulate)
        check_integer(1, none=True, patience=patience)
        check_share(held_out=held_out)
        check_positive(held_out=held_out)
        check_choice(WEIGHTS, none=True, class_weights=class_weights)
        check_choice(RENEWALS, none=True, renew_optimizer=renew_optimizer)
        self.schedule, self.schedule_over, self.warmup = schedule, schedule_over, warmup
        self.clip, self.accumulate = clip, accumulate
        self.patience, self.held_out = patience, held_out
        self.class_weights, self.renew_optimizer = class_weights, renew_optimizer
        if schedule_over != "session" and not self.has_schedule:
            raise ValueError("schedule_over='run' is of a schedule, and there is none: give schedule, as schedule='cosine'")
        if held_out != 0.1 and patience is None:
            raise ValueError("held_out is of early stopping, and there is none: give patience, as patience=3")

    @property
    def has_schedule(self) -> bool:
        """Whether learning rates change."""
        return self.schedule is not None or self.warmup > 0

    @property
    def controls(self) -> tuple[str, ...]:
        """The controls that were asked for, as `Strategy.takes_controls` has them."""
        asked = {
            "schedule": self.has_schedule,
            "clip": self.clip is not None,
            "accumulate": self.accumulate > 1,
            "patience": self.patience is not None,
            "class_weights": self.class_weights is not None,
            "renew_optimizer": self.renew_optimizer is not None,
        }
        return tuple(name for name, whether in asked.items() if whether)

    @property
    def options(self) -> dict[str, str | int | float | bool]:
        """What is not as by default, by name: it changes what a run learns."""
        parameters = signature(Training).parameters
        return {f"train.{name}": value for name, value in self.params.items() if value != parameters[name].default}
