"""Whether seeds can run together in one process, said before any of them begins."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import Namespace
from torch import nn

from clstream.attributes import find_all
from clstream.cli.build import numerics_of
from clstream.cli.errors import UsageError
from clstream.engine.stacked_step import OWN_STEPS, why_unstackable
from clstream.strategy import Strategy
from clstream.stream import Stream
from clstream.training import Training


def check_together(options: Namespace, seeds: Sequence[int]) -> None:
    """Refuse --together where there is one seed, and with options that it hasn't. Raises UsageError."""
    if not options.together:
        return
    if len(seeds) == 1:
        raise UsageError("--together is for several seeds: give --seeds 0-9, say, or leave it out")
    numerics = numerics_of(options)
    lower = numerics["precision"] != "fp32"
    if lower or numerics["compile"]:
        raise UsageError(f"--together and --{'precision' if lower else 'compile'} don't go together: leave out one of both")


def why_apart(strategy: Strategy, stream: Stream, train: Training | None) -> str:
    """Return why the seeds of a strategy on a stream can't take their steps together; "" if nothing shows before the run."""
    if reason := why_unstackable(strategy):
        return reason
    if stream.arrives:
        return f"the sessions of {stream.name} arrive while it is learned"
    if train is not None and {"schedule", "clip", "accumulate"} & {*train.controls}:
        return OWN_STEPS
    if stream.augment is not None:
        return f"{stream.name} is augmented, by random numbers of each seed's own"
    modules = [module for _, held in find_all(strategy, nn.Module) for module in held.modules()]
    dropped = next(
        (type(module).__name__ for module in modules if isinstance(module, nn.modules.dropout._DropoutNd) and module.p), ""
    )
    return f"its model has {dropped}, by random numbers of each seed's own" if dropped else ""
