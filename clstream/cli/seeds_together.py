"""Several seeds of one config in one process, their steps stacked: `clstream run --seeds 0-9 --together`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from clstream.checkpoint import Checkpointer
from clstream.cli.build import build_strategy, measures_of, numerics_of
from clstream.cli.errors import Failure
from clstream.cli.training_options import training_of
from clstream.engine import SeedsError, run_seeds
from clstream.results import Result
from clstream.strategy import Strategy

if TYPE_CHECKING:
    from clstream.cli.seed_runs import Experiment
    from clstream.tracking import ParentRun


def run_together(experiment: Experiment, seeds: Sequence[int], parent: ParentRun | str | None) -> dict[int, Result | Exception]:
    """Run seeds in this process, from their newest checkpoints if they have some; return the result of each, or its error.

    Those that are finished are not run again. Raises what `Experiment.run_seed` does.
    """
    options, starts, checkpointers = experiment.options, {}, list[Checkpointer]()
    results: dict[int, Result | Exception] = {}
    states: dict[int, Any] = {}
    for seed in seeds:
        state, finished = experiment.state_of(seed, parent)
        if finished:
            results[seed] = experiment.run_seed(seed, parent)
        else:
            states[seed] = state
    if not states:
        return results

    def observers(seed: int) -> list[object]:
        folder = None if experiment.folder is None else experiment.folder / f"seed_{seed}"
        own = experiment.observers(seed, folder, parent, bar=seed == next(iter(states)), signals=False)
        experiment.first = False
        checkpointers.extend(observer for observer in own if isinstance(observer, Checkpointer))
        starts[seed] = experiment.start()
        return [starts[seed], *own]

    def make_strategy(seed: int) -> Strategy:
        return experiment.built.pop(seed, None) or build_strategy(experiment.parser, options, experiment.stream, seed)

    def stop(number: int) -> None:
        for checkpointer in checkpointers:
            checkpointer.stop(number)

    with signals_to(stop):
        try:
            ended = run_seeds(
                make_strategy, experiment.stream, list(states), observers=observers, resume=states, device=options.device,
                evaluate_every=options.evaluate_every, max_sessions=options.max_sessions, code=experiment.code,
                accept_changed_code=options.accept_changed_code, evaluate_at=options.evaluate_at, evaluate_on=options.evaluate_on,
                measures=measures_of(options), deterministic=numerics_of(options)["deterministic"],
                train=training_of(options),
            )  # fmt: skip
            results |= dict(zip(states, ended, strict=True))
        except SeedsError as error:
            results |= {**error.results, **error.errors}
        except (ValueError, TypeError) as error:
            if len(starts) == len(states) and all(start.heard for start in starts.values()):
                raise
            raise Failure(str(error)) from error  # the strategy refuses the stream: nothing was learned
    for seed in states:
        if experiment.folder is not None and isinstance(results[seed], Result):
            with suppress(OSError):  # without it, a resumption finds a run with nothing left to do
                experiment.finish(seed)
    return results


@contextmanager
def signals_to(stop: Callable[[int], None]) -> Iterator[None]:
    """Have the first SIGINT or SIGTERM call a function with its number; the second one does what it did before."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def hear(number: int, _frame: FrameType | None) -> None:
        restore()
        stop(number)

    for number in before:
        signal.signal(number, hear)
    try:
        yield
    finally:
        restore()
