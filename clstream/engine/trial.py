"""A trial: a copy of a strategy learns a few samples of a stream, to see whether it can."""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import replace

import torch

from clstream import events
from clstream.engine.simulation import Simulation
from clstream.seeds import isolated
from clstream.strategy import Strategy
from clstream.stream import Samples, Stream, Subset
from clstream.training import Training


def learn_briefly(
    strategy: Strategy, stream: Stream, session: int, device: str | torch.device, count: int, train: Training | None = None
) -> Exception | None:
    """Have a copy of a strategy learn the first samples of a session's task, and return what it raised.

    Args:
        strategy, stream, device: of the run that is to be.
        session: by its number.
        count: how many samples.
        train: training controls.

    """

    def cut(part: Samples | Subset) -> Samples | Subset:
        return part.take(slice(count)) if isinstance(part, Subset) else part[:count]

    with isolated(0, "single", device=device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tasks = [replace(task, train=cut(task.train), validation=None) for task in stream.tasks]
            short = replace(stream, tasks=tasks, schedule=(stream.task_of(session),), epochs=1, drop_last=False, probes=())
            simulation = Simulation(deepcopy(strategy), short, (), 0, device, None, None, train=train)
            simulation.start(None)
            first = short.session(0)
            if short.boundaries:
                simulation.bus.emit(events.TaskStarted(short.tasks[short.task_of(0)]))
            simulation.bus.emit(events.SessionStarted(first))
            simulation.placement.update()
            for epoch in first:
                simulation.bus.emit(events.EpochStarted(epoch))
                for batch in epoch:
                    simulation.bus.emit(events.BatchReady(batch))
                    simulation.bus.emit(events.BatchLearned(batch, simulation.strategy.learn(batch)))
        except Exception as error:  # noqa: BLE001  # whatever it is, the caller knows what it looks for
            return error
    return None
