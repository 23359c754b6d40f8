"""Which training controls a strategy takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from clstream.strategy import Strategy, Wrapper
from clstream.training.training import Training

DEPENDS_ON: dict[str, tuple[str, ...]] = {
    "schedule": ("learn",),
    "clip": ("learn",),
    "accumulate": ("learn",),
    "renew_optimizer": ("learn",),
    "class_weights": ("learn",),
    "patience": ("learn", "scores", "predict"),
}
"""The methods that each control depends on. A class with one of its own takes the control if it says so: `takes_controls`."""


def learner_within(strategy: Strategy) -> Strategy:
    """Return whose optimizer takes the steps: the strategy, or the innermost one that it wraps."""
    while isinstance(strategy, Wrapper):
        strategy = strategy.base
    return strategy


def taken(strategy: Strategy, but: Iterable[str] = ()) -> Training:
    """Return all the training controls that a strategy says it takes, of each a setting that does something, but for some."""
    settings: dict[str, dict[str, Any]] = {
        "schedule": {"schedule": "cosine", "warmup": 2}, "clip": {"clip": 1.0}, "accumulate": {"accumulate": 2},
        "patience": {"patience": 1, "held_out": 0.2}, "class_weights": {"class_weights": "balanced"},
        "renew_optimizer": {"renew_optimizer": "session"},
    }  # fmt: skip
    options = dict[str, Any]()
    for control in settings.keys() - {*but}:
        try:
            check_taken(strategy, [control])
        except ValueError:
            continue
        options |= settings[control]
    return Training(**options)


def check_taken(strategy: Strategy, controls: Iterable[str]) -> None:
    """Refuse a control that a strategy, or one that it wraps, doesn't take, in a sentence. Raises ValueError."""
    asked = list(controls)
    while True:
        for control in asked:
            _check(type(strategy), control)
        if not isinstance(strategy, Wrapper):
            return
        strategy = strategy.base


def _check(strategy: type[Strategy], control: str) -> None:
    for cls in strategy.__mro__:
        said = vars(cls).get("takes_controls")
        if said is not None and control in said:
            return
        if said is not None:
            takes = f"it takes {' and '.join(said)}" if said else "it takes none"
            raise ValueError(f"{strategy.__name__} doesn't take {control}: of the training controls {takes}. Leave {control} out")
        own = next((name for name in DEPENDS_ON[control] if name in vars(cls) and cls is not Wrapper), None)
        if own is not None:
            raise ValueError(
                f"{strategy.__name__} has a `{own}` of its own, and doesn't say that {control} goes with it: leave {control} out, "
                f"or say on the class what it takes, as takes_controls = ({control!r},)"
            )
